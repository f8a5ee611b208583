"""Optimisers of torch.optim by name."""

import torch
from torch import Tensor


def make_optimizer(kind: str, parameters: list[Tensor], lr: float, momentum: float) -> torch.optim.Optimizer:
    """The optimiser of `torch.optim` of that name; a `ValueError` if there is none, or it knows no momentum."""
    build = getattr(torch.optim, kind, None)
    unfit = kind in ("Optimizer", "LBFGS", "SparseAdam")  # no optimiser; wants a closure; wants sparse gradients
    if unfit or not (isinstance(build, type) and issubclass(build, torch.optim.Optimizer)):
        raise ValueError(f"optimizer {kind!r}: must be one in torch.optim that takes plain steps, such as SGD or Adam")
    try:
        return build(parameters, lr=lr, **({"momentum": momentum} if momentum else {}))
    except TypeError:
        raise ValueError(f"momentum={momentum}: {kind} takes none; use 0, or another optimizer such as SGD") from None
    except ValueError as error:  # Muon, for one, takes matrices only
        raise ValueError(f"optimizer {kind!r}: {error}") from None


def optimizer_state(optimizer: torch.optim.Optimizer) -> list[dict]:
    """What an optimiser with one group of parameters holds for each of them, in their order: tensors and numbers."""
    return [optimizer.state.get(p, {}) for p in optimizer.param_groups[0]["params"]]


def load_optimizer_state(optimizer: torch.optim.Optimizer, states: list[dict]) -> None:
    """Go on from what `optimizer_state` gave; parameters that had none yet start anew."""
    own = {k: values for k, values in enumerate(states) if values}
    optimizer.load_state_dict({"state": own, "param_groups": optimizer.state_dict()["param_groups"]})
