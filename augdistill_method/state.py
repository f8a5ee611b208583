"""The state of a `distill` run: a run resumed from it ends with the same bits as one without interruption.

Its history has a record of each iteration, which says if phi cannot learn from it (`STATES`).
"""

import copy
import itertools
import math
import time
import warnings

import torch
from torch import Tensor, nn

from augdistill_method.config import Config
from augdistill_method.measures import at_once, gradients, largest_scale
from augdistill_method.optimizers import load_optimizer_state, make_optimizer, optimizer_state
from augdistill_method.random import seeded

STATES = {  # of an iteration from which phi cannot learn, whatever the loss is
    "exploded": "phi(x) is over 10 times as large as x, which instance norm hides in the loss; use a smaller phi_lr",
    "alpha below zero": "the student ascends its loss; use alpha_mode log or fixed",
    "alpha at zero": "the student hardly moves (less than 2 % of the distance to the target), so the loss is 1 for any "
    "phi; use a larger alpha, alpha_mode fixed, or a smaller alpha_lr",
}


class StepSize(nn.Module):
    """alpha, the student's step size: learned as log(alpha) (so it stays positive), learned directly, or fixed."""

    of_logarithm = ("log", "held")

    def __init__(self, alpha: float, mode: str, like: Tensor):
        super().__init__()
        self.mode = mode
        value = torch.tensor(alpha, dtype=like.dtype, device=like.device)
        self.value = nn.Parameter(value.log() if mode in self.of_logarithm else value, requires_grad=mode != "fixed")

    def forward(self) -> Tensor:
        return self.value.exp() if self.mode in self.of_logarithm else self.value


class DistillState:
    """phi, `step_size` (whose output is alpha), their optimisers from a `DistillConfig`, the generators, the history.

    `state_dict` returns a copy as tensors and plain values; `load_state_dict` resumes from it.
    """

    def __init__(self, phi: nn.Module, step_size: nn.Module, config: Config, seed: int, memory: str):
        self.phi, self.step_size = phi, step_size
        modules = (
            (phi, config.phi_optimizer, config.phi_lr, config.phi_momentum),
            (self.step_size, config.alpha_optimizer, config.alpha_lr, config.alpha_momentum),
        )
        self.of_phi, self.of_alpha = ([p for p in module.parameters() if p.requires_grad] for module, *_ in modules)
        learned = zip((self.of_phi, self.of_alpha), modules, strict=True)
        self.optimizers = [make_optimizer(kind, own, lr, momentum) for own, (_, kind, lr, momentum) in learned if own]
        # two streams: for one seed, every phi gets the same segments and batches, however much noise it samples
        self.generator, self.noise = seeded(seed, "distill"), seeded(seed, "distill", "noise")
        self.good = self.copy_kept()  # of the last iteration with a finite loss and alpha > 0
        self.history: list[dict] = []
        self.memory = memory  # of the unroll; kept, because each mode rounds differently
        self.budget, self.begun = 60 * config.minutes or math.inf, time.monotonic()

    @property
    def learned(self) -> list[Tensor]:
        return self.of_phi + self.of_alpha

    @property
    def kept(self) -> list[Tensor]:
        """What a run that diverges gets back: what it learns, and phi's buffers."""
        return [*self.learned, *self.phi.buffers()]

    def copy_kept(self) -> list[Tensor]:
        return [value.detach().clone() for value in self.kept]

    @property
    def seconds(self) -> float:
        """Seconds of work so far, with those before a resume, at most the budget."""
        return min(time.monotonic() - self.begun, self.budget)

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of the loss. A `ValueError` if phi gets none."""
        grads = gradients(loss, self.learned)
        if self.of_phi and all(g is None for g in grads[: len(self.of_phi)]):
            raise ValueError(f"no gradient reaches phi ({type(self.phi).__name__}): is its output detached?")
        for p, g in zip(self.learned, grads, strict=True):
            p.grad = torch.zeros_like(p) if g is None else g

    def step(self, hold_alpha: bool) -> None:
        """Line 15: one step of phi's and of alpha's optimiser, after the record of an iteration with a finite loss."""
        if self.history[-1]["alpha"] > 0:
            self.good = self.copy_kept()
        for p in self.of_alpha if hold_alpha else []:
            p.grad = None  # its optimiser skips a parameter without gradient
        for optimizer in self.optimizers:
            optimizer.step()

    @torch.no_grad()
    def step_back(self) -> None:
        """Restore phi and alpha of the last iteration with a finite loss and alpha > 0."""
        for p, value in zip(self.kept, self.good, strict=True):
            p.copy_(value)

    def state_dict(self) -> dict:
        """A copy: nested dictionaries and lists of tensors, numbers and strings."""
        state = {
            "phi": dict(self.phi.state_dict()),
            "step_size": dict(self.step_size.state_dict()),
            "optimizers": list(map(optimizer_state, self.optimizers)),
            "good": self.good,
            "generators": [self.generator.get_state(), self.noise.get_state()],
            "history": self.history,
            "memory": self.memory,
            "seconds": self.seconds,
        }
        return copy.deepcopy(state)

    def load_state_dict(self, state: dict) -> None:
        """Resume from a state; a `ValueError` unless it fits this phi and these optimisers."""
        state = copy.deepcopy(state)
        try:
            self.phi.load_state_dict(state["phi"])
            self.step_size.load_state_dict(state["step_size"])
            for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
                load_optimizer_state(optimizer, own)
            self.good = [v.to(p) for v, p in zip(state["good"], self.kept, strict=True)]
            for generator, value in zip((self.generator, self.noise), state["generators"], strict=True):
                generator.set_state(value)
            self.history, self.memory = state["history"], state["memory"]
            self.begun = time.monotonic() - state["seconds"]
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"resume: not a state of this phi and these optimizers ({error})") from None


def dead_state(scale: float, alpha: float, moved: float | None) -> str:
    """The entry of `STATES` that describes an iteration, "" if phi can learn from it.

    `scale` is the norm ratio of phi(x) and x. `moved` is ||theta_N - theta_0|| / ||target - theta_0||: if it is below
    .02, the loss is between .98^2 and 1.02^2.
    """
    if scale > 10:
        return "exploded"
    if alpha < 0:
        return "alpha below zero"
    return "alpha at zero" if moved is not None and moved < 0.02 else ""


def record_of(run: DistillState, loss: Tensor, alpha: Tensor, start_epoch: int, sizes, moved) -> tuple[dict, bool]:
    """Append an iteration's record to the history, once its gradient is known; warn at the first of each state.

    `sizes` are those of `draw_batches`, `moved` a number or None. Returns the record, and whether every gradient is
    finite. On a device the only wait of an iteration is here: for all of its numbers at once.
    """
    squares = [p.grad.square().sum() for p in run.of_phi]
    checks = [p.grad.isfinite().all() for p in run.learned]
    known = [loss, alpha] if moved is None else [loss, alpha, moved]
    numbers, parts = iter(at_once(*known, *squares, *checks, *sizes)), (known, squares, checks)
    known, squares, checks = (list(itertools.islice(numbers, len(part))) for part in parts)
    record = dict(iteration=len(run.history), loss=known[0], alpha=known[1], start_epoch=start_epoch)
    record |= {"phi": watched} if (watched := getattr(run.phi, "report", dict)()) else {}
    record["grad_norm"] = sum(squares) ** 0.5
    moved, scale = None if moved is None else known[2], largest_scale(list(numbers))
    state = dead_state(scale, record["alpha"], moved)
    if state and state not in {r["state"] for r in run.history}:
        warnings.warn(f"iteration {record['iteration']}: {state}: {STATES[state]}", stacklevel=3)
    run.history.append(record | dict(scale=scale, moved=moved, state=state))
    return run.history[-1], all(checks)
