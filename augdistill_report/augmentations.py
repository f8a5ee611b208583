"""Augmentations without anything to learn, called like a phi: `augment(images, labels=, index=, generator=)`.

`AUGMENTATIONS` names those that experts, the unroll (MTT, Algorithm 1, line 12) and evaluation may use. All are
differentiable in the images, draw from the generator alone, and take images of any type on any device.
"""

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from augdistill_config import Config, knob


def warp(images: Tensor, matrix: Tensor, *, padding: str, align_corners: bool) -> Tensor:
    """Each image's output at (x, y) is what stands, bilinearly, where its `matrix` `[B, 2, 3]` sends (x, y, 1).

    The origin is the middle, y points down, and half a side is 1, measured to the middle of the border pixels (with
    `align_corners`) or to their outer edge. The identity gives back the very same bits.
    """
    height, width = (side - align_corners for side in images.shape[-2:])
    of_sides = matrix.new_tensor([[1, height / width, 1], [width / height, 1, 1]])  # ones for a square
    grid = F.affine_grid(matrix * of_sides, list(images.shape), align_corners=align_corners)
    moved = F.grid_sample(images, grid, padding_mode=padding, align_corners=align_corners)
    still = (matrix == torch.eye(2, 3, device=matrix.device)).all((1, 2))
    return torch.where(still.view(-1, 1, 1, 1), images, moved)


@dataclasses.dataclass(frozen=True)
class RandomAffine:
    """Each image turned, scaled and shifted by its own normal draw.

    `rotation` in radians, `scale` of the logarithm, `shift` as a fraction of the image's side: standard deviations.
    Pixels from outside the image repeat its border (the background, for digits).
    """

    rotation: float = 0.15
    scale: float = 0.10
    shift: float = 0.087

    def __call__(self, images: Tensor, *, generator: torch.Generator, **_) -> Tensor:
        draw = torch.randn(len(images), 4, generator=generator, device=generator.device).to(images)
        angle, scale = self.rotation * draw[:, 0], torch.exp(self.scale * draw[:, 1])
        cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
        shift = -2 * self.shift * draw[:, 2:]  # grid coordinates run from -1 to 1, and point from output to input
        matrix = torch.stack([cos, sin, shift[:, 0], -sin, cos, shift[:, 1]], 1).view(-1, 2, 3)
        return warp(images, matrix, padding="border", align_corners=False)


# --- the operations of DSA: images [B, C, H, W], then for each image its own parameters [B] ---------------------------


def color(images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """x + brightness; then away from each pixel's mean over channels; then away from the image's mean.

    "Away" by s is x + s (x - mean): 0 changes nothing, -1 leaves the mean alone.
    """
    brightness, saturation, contrast = (p.view(-1, 1, 1, 1) for p in (brightness, saturation, contrast))
    images = images + brightness
    images = images + saturation * (images - images.mean(1, keepdim=True))
    return images + contrast * (images - images.mean((1, 2, 3), keepdim=True))


def crop(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """The window that lies `down` and `right` (whole pixels) of the image's own; zero where it leaves the image."""
    _, channels, height, width = images.shape
    rows = (count(height, images) + down[:, None])[:, None, :, None]
    columns = (count(width, images) + right[:, None])[:, None, None, :]
    image, channel = count(len(images), images)[:, None, None, None], count(channels, images)[:, None, None]
    window = images[image, channel, rows.clamp(0, height - 1), columns.clamp(0, width - 1)]
    outside = (rows < 0) | (rows >= height) | (columns < 0) | (columns >= width)
    return window.masked_fill(outside, 0)


def cutout(images: Tensor, top: Tensor, left: Tensor, box: tuple[int, int]) -> Tensor:
    """Zeros in the `box` (height, width) whose first row is `top` and first column `left`; it may leave the image."""
    rows = (count(images.shape[2], images) - top[:, None])[:, None, :, None]
    columns = (count(images.shape[3], images) - left[:, None])[:, None, None, :]
    inside = (rows >= 0) & (rows < box[0]) & (columns >= 0) & (columns < box[1])
    return images.masked_fill(inside, 0)


def flip(images: Tensor, flipped: Tensor) -> Tensor:
    """Left and right exchanged in the images that `flipped` (truth values) marks."""
    return torch.where(flipped.view(-1, 1, 1, 1), images.flip(3), images)


def scale(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Images seen `x` times as wide and `y` times as high a window: above 1 they shrink, and zeros surround them."""
    zero = torch.zeros_like(x)
    matrix = torch.stack([x, zero, zero, zero, y, zero], 1).view(-1, 2, 3)
    return warp(images, matrix, padding="zeros", align_corners=True)


def rotate(images: Tensor, angle: Tensor) -> Tensor:
    """Images turned anticlockwise by `angle` (radians) about their middle; zeros come in at the corners."""
    cos, sin, zero = torch.cos(angle), torch.sin(angle), torch.zeros_like(angle)
    matrix = torch.stack([cos, -sin, zero, sin, cos, zero], 1).view(-1, 2, 3)
    return warp(images, matrix, padding="zeros", align_corners=True)


def count(n: int, like: Tensor) -> Tensor:
    """0 .. n - 1, where `like` lives."""
    return torch.arange(n, device=like.device)


OPERATIONS: dict[str, Callable[..., Tensor]] = {f.__name__: f for f in (color, crop, cutout, flip, scale, rotate)}


@dataclasses.dataclass(frozen=True)
class DSA(Config):
    """Differentiable siamese augmentation (Zhao & Bilen, ICML 2021), with the constants of MTT's official code.

    One operation a batch, drawn uniformly from `strategy`, its parameters drawn for each image (MTT's `aug_mode` "S").
    It acts on standardised images as theirs does: nothing is clamped, and what comes in from outside is zero, the mean
    colour. A strength of zero (of one for `scale`) is exactly the identity.
    """

    strategy: tuple = knob(tuple(OPERATIONS), "names of operations, one of which is drawn for each batch")
    brightness: float = knob(1.0, "width of the range of what is added, around 0", low=0)
    saturation: float = knob(2.0, "width of the range of its factor, around 1", low=0)
    contrast: float = knob(0.5, "half the width of the range of its factor, around 1", low=0)
    crop: float = knob(0.125, "largest shift either way, as a part of the side", low=0, high=1)
    cutout: float = knob(0.5, "side of the box, as a part of the image's", low=0, high=1)
    flip: float = knob(0.5, "probability", low=0, high=1)
    scale: float = knob(1.2, "largest factor r; each axis has its own in [1/r, r]", low=1)
    rotate: float = knob(15.0, "largest angle either way, in degrees", low=0, high=180)

    def __post_init__(self):
        super().__post_init__()
        if not self.strategy or not set(self.strategy) <= set(OPERATIONS):
            raise ValueError(f"strategy={self.strategy}: must be one or more of {', '.join(OPERATIONS)}")

    def __call__(self, images: Tensor, *, generator: torch.Generator, **_) -> Tensor:
        name = self.strategy[int(torch.randint(len(self.strategy), (), generator=generator, device=generator.device))]
        return OPERATIONS[name](images, *self.draw(name, images, generator))

    def draw(self, name: str, images: Tensor, generator: torch.Generator) -> tuple:
        """Parameters of the operation `name`, in its own order, for each of `images`."""
        options = dict(size=(len(images),), generator=generator, device=generator.device)

        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(**options).to(images)

        def integer(low: int, high: int) -> Tensor:  # both included
            return torch.randint(low, high + 1, **options).to(images.device)

        sides = images.shape[-2:]
        if name == "color":
            return tuple(uniform(-s, s) for s in (self.brightness / 2, self.saturation / 2, self.contrast))
        if name == "crop":
            return tuple(integer(-shift, shift) for shift in (int(self.crop * side + 0.5) for side in sides))
        if name == "cutout":
            box = tuple(int(self.cutout * side + 0.5) for side in sides)
            # its middle lies anywhere in the image (of an even box: on any line between pixels, or on the border)
            top, left = (integer(0, side - b % 2) - b // 2 for side, b in zip(sides, box, strict=True))
            return top, left, box
        if name == "flip":
            return (uniform(0, 1) < self.flip,)
        if name == "scale":
            return uniform(1 / self.scale, self.scale), uniform(1 / self.scale, self.scale)
        return (uniform(-math.radians(self.rotate), math.radians(self.rotate)),)


AUGMENTATIONS = {"none": None, "affine": RandomAffine(rotation=math.radians(8.6)), "dsa": DSA()}

NEVER_FLIPPED = ("digits", "mnist")  # data sets where a mirror image is of no class or of another


def augmentation(name: str, dataset: str) -> Callable | None:
    """`AUGMENTATIONS[name]` as it fits a data set: DSA without its flip where a flip changes what an image shows."""
    augment = AUGMENTATIONS[name]
    if isinstance(augment, DSA) and dataset in NEVER_FLIPPED:
        return dataclasses.replace(augment, strategy=tuple(s for s in augment.strategy if s != "flip"))
    return augment
