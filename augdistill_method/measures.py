"""What `distill` measures in each iteration: the student's movement, norms and gradients."""

import math

import torch
from torch import Tensor


def distance_moved(start: Tensor, end: Tensor, target: Tensor) -> Tensor:
    """||end - start|| / ||target - start||, each `[P]`; not finite if the target is the start (no target)."""
    return (end - start).detach().norm() / (target - start).norm()


def at_once(*tensors: Tensor) -> list[float]:
    """The values of all tensors, one after the other, by a single copy from their device."""
    return torch.cat([t.detach().double().flatten() for t in tensors]).tolist()


def root_mean_square(images: Tensor) -> Tensor:
    return images.detach().square().mean().sqrt()


def rms(images: Tensor) -> float:
    """The root mean square of all values."""
    return float(root_mean_square(images))


def largest_scale(sizes: list[float]) -> float:
    """The largest rms(phi(x)) / rms(x) of the batches; NaN counts as largest. `sizes`: rms(phi(x)), rms(x), ..."""
    scales = [out / (into or 1.0) for out, into in zip(sizes[::2], sizes[1::2], strict=True)]
    return max(scales, key=lambda scale: math.inf if math.isnan(scale) else scale)


def gradients(loss: Tensor, learned: list[Tensor]) -> list[Tensor | None]:
    """The gradient of the loss in each tensor of `learned`; None where the loss does not depend on it."""
    if not learned or not loss.requires_grad:
        return [None] * len(learned)
    return list(torch.autograd.grad(loss, learned, allow_unused=True))
