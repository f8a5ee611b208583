"""Differentiable transformations of images `[B, C, H, W]`, each with parameters `[B]` for every image.

Why these are not kornia's. `warp`: its `warp_affine` inverts the matrix, gives the identity back only to rounding, and
makes a finite picture of a matrix that is not a number. `color` and `turn_hue`: kornia's contrast, saturation and hue
clamp to [0, 1], which standardised images leave. `flip`: a single call of torch, as in kornia.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# --- differentiable transformations: images [B, C, H, W], then for each image its own parameters [B] ------------------


def warp(images: Tensor, matrix: Tensor, *, padding: str, align_corners: bool) -> Tensor:
    """Each image's output at (x, y) is what stands, bilinearly, where its `matrix` `[B, 2, 3]` sends (x, y, 1).

    The origin is the middle, y points down, and half a side is 1, measured to the middle of the border pixels (with
    `align_corners`) or to their outer edge. The identity gives back the very same bits; where a matrix is not finite,
    the image is not a number.
    """
    height, width = (side - align_corners for side in images.shape[-2:])
    of_sides = matrix.new_tensor([[1, height / width, 1], [width / height, 1, 1]])  # ones for a square
    finite = matrix.isfinite().all((1, 2)).view(-1, 1, 1, 1)
    grid = F.affine_grid(matrix * of_sides, list(images.shape), align_corners=align_corners)
    grid = torch.where(finite, grid, 0).clamp(-1e4, 1e4)  # torch reads outside the image elsewhere, and crashes
    moved = F.grid_sample(images, grid, padding_mode=padding, align_corners=align_corners)
    still = (matrix == torch.eye(2, 3, device=matrix.device)).all((1, 2)).view(-1, 1, 1, 1)
    return torch.where(still, images, torch.where(finite, moved, torch.nan))


def affine(images: Tensor, angle: Tensor, log_scale: Tensor, shear: Tensor, right: Tensor, down: Tensor) -> Tensor:
    """Images shifted by parts of their side, then sheared along x, turned by `angle` (radians) and made
    `exp(log_scale)` times as large. Pixels from outside repeat the border (the background, for digits)."""
    cos, sin, size = torch.cos(angle), torch.sin(angle), torch.exp(log_scale)
    # from output to input, in coordinates that run from -1 to 1
    rows = [cos / size, (cos * shear + sin) / size, -2 * right, -sin / size, (cos - sin * shear) / size, -2 * down]
    return warp(images, torch.stack(rows, 1).view(-1, 2, 3), padding="border", align_corners=False)


def color(images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """x + brightness; then away from each pixel's mean over channels; then away from the image's mean.

    "Away" by s is x + s (x - mean): 0 changes nothing, -1 leaves the mean alone.
    """
    brightness, saturation, contrast = (p.view(-1, 1, 1, 1) for p in (brightness, saturation, contrast))
    images = images + brightness
    images = images + saturation * (images - images.mean(1, keepdim=True))
    return images + contrast * (images - images.mean((1, 2, 3), keepdim=True))


def turn_hue(images: Tensor, angle: Tensor) -> Tensor:
    """Three channels turned about the grey axis by `angle` (radians): Rodrigues' formula, a third of a turn permutes
    them."""
    grey = images.mean(1, keepdim=True)
    across = (images.roll(1, 1) - images.roll(-1, 1)) / 3**0.5  # grey axis x colour
    cos, sin = (f(angle).view(-1, 1, 1, 1) for f in (torch.cos, torch.sin))
    return grey + cos * (images - grey) + sin * across


def flip(images: Tensor, flipped: Tensor) -> Tensor:
    """Left and right exchanged in the images that `flipped` (truth values) marks."""
    return torch.where(flipped.view(-1, 1, 1, 1), images.flip(3), images)
