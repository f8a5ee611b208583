"""Small measurements that `distill` records of an iteration."""

import torch
from torch import Tensor


def distance_moved(start: Tensor, end: Tensor, target: Tensor) -> float | None:
    """How far a student went, in distances to its target; None where there is no target but the start."""
    distance = (target - start).norm()
    return float((end - start).detach().norm() / distance) if distance else None


def rms(images: Tensor) -> float:
    """The root of the mean square."""
    return float(images.detach().square().mean().sqrt())


def gradients(loss: Tensor, learned: list[Tensor]) -> list[Tensor | None]:
    """d loss / d each tensor of `learned`; None where the loss does not depend on it."""
    if not learned or not loss.requires_grad:
        return [None] * len(learned)
    return list(torch.autograd.grad(loss, learned, allow_unused=True))
