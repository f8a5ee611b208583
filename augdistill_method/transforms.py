"""Differentiable transformations of images `[B, C, H, W]`, with one parameter per image, `[B]`.

Why these are not kornia's. `warp`: kornia's `warp_affine` inverts the matrix, returns the identity only up to rounding,
and returns a finite image for a matrix with NaN. `color` and `turn_hue`: kornia's contrast, saturation and hue clamp to
[0, 1], but standardised images exceed that range. `flip`: a single call of torch, as in kornia.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def warp(images: Tensor, matrix: Tensor, *, padding: str, align_corners: bool) -> Tensor:
    """Affine warp: the output at (x, y) is the bilinear value of the image at `matrix` `[B, 2, 3]` times (x, y, 1).

    The origin is the image's centre, y points down, and 1 is half a side, measured to the centre of the border pixels
    (with `align_corners`) or to their outer edge. The identity matrix returns the same bits. Where a matrix is not
    finite, the image is NaN.
    """
    height, width = (side - align_corners for side in images.shape[-2:])
    of_sides = matrix.new_ones(2, 3)  # filled on its device, which is not waited for; ones for a square
    of_sides[0, 1], of_sides[1, 0] = height / width, width / height
    finite = matrix.isfinite().all((1, 2)).view(-1, 1, 1, 1)
    grid = F.affine_grid(matrix * of_sides, list(images.shape), align_corners=align_corners)
    grid = torch.where(finite, grid, 0).clamp(-1e4, 1e4)  # without the clamp torch reads outside the image and crashes
    moved = F.grid_sample(images, grid, padding_mode=padding, align_corners=align_corners)
    still = (matrix == torch.eye(2, 3, device=matrix.device)).all((1, 2)).view(-1, 1, 1, 1)
    return torch.where(still, images, torch.where(finite, moved, torch.nan))


def affine(images: Tensor, angle: Tensor, log_scale: Tensor, shear: Tensor, right: Tensor, down: Tensor) -> Tensor:
    """Images shifted by fractions of their side, then sheared along x, rotated by `angle` (radians) and scaled by
    `exp(log_scale)`. All parameters `[B]`. Pixels from outside repeat the border (the background, for digits)."""
    cos, sin, size = torch.cos(angle), torch.sin(angle), torch.exp(log_scale)
    # from output to input, in coordinates that run from -1 to 1
    rows = [cos / size, (cos * shear + sin) / size, -2 * right, -sin / size, (cos - sin * shear) / size, -2 * down]
    return warp(images, torch.stack(rows, 1).view(-1, 2, 3), padding="border", align_corners=False)


def color(images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """x + brightness, then saturation, then contrast. All parameters `[B]`; 0 changes nothing.

    Saturation and contrast s give x + s (x - mean), with each pixel's mean over channels and the image's mean. -1 gives
    the mean.
    """
    brightness, saturation, contrast = (p.view(-1, 1, 1, 1) for p in (brightness, saturation, contrast))
    images = images + brightness
    images = images + saturation * (images - images.mean(1, keepdim=True))
    return images + contrast * (images - images.mean((1, 2, 3), keepdim=True))


def turn_hue(images: Tensor, angle: Tensor) -> Tensor:
    """RGB colours rotated about the grey axis by `angle` `[B]` (radians), with Rodrigues' formula; a rotation by
    2 pi / 3 permutes the channels."""
    grey = images.mean(1, keepdim=True)
    across = (images.roll(1, 1) - images.roll(-1, 1)) / 3**0.5  # grey axis x colour
    cos, sin = (f(angle).view(-1, 1, 1, 1) for f in (torch.cos, torch.sin))
    return grey + cos * (images - grey) + sin * across


def flip(images: Tensor, flipped: Tensor) -> Tensor:
    """The images where `flipped` (bool `[B]`) is true are mirrored left to right."""
    return torch.where(flipped.view(-1, 1, 1, 1), images.flip(3), images)
