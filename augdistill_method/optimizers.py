"""The optimisers of `torch.optim` by name, and their state as plain tensors."""

import torch
from torch import Tensor


def make_optimizer(kind: str, parameters: list[Tensor], lr: float, momentum: float) -> torch.optim.Optimizer:
    """The optimiser of `torch.optim` with that name; a `ValueError` if it is unknown or takes no momentum."""
    build = getattr(torch.optim, kind, None)
    unfit = kind in ("Optimizer", "LBFGS", "SparseAdam")  # no optimiser; wants a closure; wants sparse gradients
    if unfit or not (isinstance(build, type) and issubclass(build, torch.optim.Optimizer)):
        raise ValueError(f"optimizer {kind!r}: must be one of torch.optim that needs no closure, such as SGD or Adam")
    try:
        return build(parameters, lr=lr, **({"momentum": momentum} if momentum else {}))
    except TypeError:
        raise ValueError(f"momentum={momentum}: {kind} has no momentum; use 0, or an optimizer such as SGD") from None
    except ValueError as error:  # Muon, for one, takes matrices only
        raise ValueError(f"optimizer {kind!r}: {error}") from None


def optimizer_state(optimizer: torch.optim.Optimizer) -> list[dict]:
    """The state of an optimiser with one parameter group: tensors and numbers for each parameter, in order."""
    return [optimizer.state.get(p, {}) for p in optimizer.param_groups[0]["params"]]


def load_optimizer_state(optimizer: torch.optim.Optimizer, states: list[dict]) -> None:
    """Restore the state from `optimizer_state`; parameters without state start from zero."""
    own = {k: values for k, values in enumerate(states) if values}
    optimizer.load_state_dict({"state": own, "param_groups": optimizer.state_dict()["param_groups"]})
