"""What `distill` measures in each iteration: the student's movement, norms and gradients."""

import torch
from torch import Tensor


def distance_moved(start: Tensor, end: Tensor, target: Tensor) -> float | None:
    """||end - start|| / ||target - start||, each `[P]`; None if the target is the start (no target)."""
    distance = (target - start).norm()
    return float((end - start).detach().norm() / distance) if distance else None


def rms(images: Tensor) -> float:
    """The root mean square of all values."""
    return float(images.detach().square().mean().sqrt())


def gradients(loss: Tensor, learned: list[Tensor]) -> list[Tensor | None]:
    """The gradient of the loss in each tensor of `learned`; None where the loss does not depend on it."""
    if not learned or not loss.requires_grad:
        return [None] * len(learned)
    return list(torch.autograd.grad(loss, learned, allow_unused=True))
