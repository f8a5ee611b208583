"""Augmentations without anything to learn, called like a phi: `augment(images, labels=, index=, generator=)`.

`AUGMENTATIONS` names those that experts, the unroll (MTT, Algorithm 1, line 12) and evaluation may use, beside any of
kornia's ("kornia:NAME(key=value)"). All draw from
the generator alone, and take images of any type on any device. All but those on bytes (`OnPixels`) are differentiable
in the images, so that the unroll may use them (`DIFFERENTIABLE`).
"""

import dataclasses
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from augdistill_core import Config, Phi, affine, color, flip, knob, warp
from augdistill_report.data.datasets import Dataset


@dataclasses.dataclass(frozen=True)
class RandomAffine:
    """Each image turned, scaled and shifted by its own normal draw, and flipped with a probability.

    `rotation` in radians, `scale` of the logarithm, `shift` as a part of the image's side: standard deviations.
    Pixels from outside the image repeat its border (the background, for digits).
    """

    rotation: float = 0.15
    scale: float = 0.10
    shift: float = 0.087
    flip: float = 0.0

    def __call__(self, images: Tensor, *, generator: torch.Generator, **_) -> Tensor:
        angle, size, right, down = (
            torch.randn(len(images), 4, generator=generator, device=generator.device).to(images).unbind(1)
        )
        images = affine(
            images,
            self.rotation * angle,
            self.scale * size,
            torch.zeros_like(angle),
            self.shift * right,
            self.shift * down,
        )
        if self.flip:
            flipped = torch.rand(len(images), generator=generator, device=generator.device) < self.flip
            images = flip(images, flipped.to(images.device))
        return images


# --- the operations of DSA: images [B, C, H, W], then for each image its own parameters [B] ---------------------------
# `crop` is kornia's. The others are not: its scaling and turning give the identity back only to rounding; its erased
# boxes are those of `cutout`, to the bit, in half as much time again and as many lines.


def crop(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """The window that lies `down` and `right` (whole pixels) of the image's own; zero where it leaves the image."""
    from kornia.geometry import transform  # slow to import

    shift = -torch.stack([right, down], 1).to(images)
    return transform.translate(images, shift, "nearest", "zeros", align_corners=True)  # to the bit: no pixel is mixed


def cutout(images: Tensor, top: Tensor, left: Tensor, box: tuple[int, int]) -> Tensor:
    """Zeros in the `box` (height, width) whose first row is `top` and first column `left`; it may leave the image."""
    rows = (count(images.shape[2], images) - top[:, None])[:, None, :, None]
    columns = (count(images.shape[3], images) - left[:, None])[:, None, None, :]
    inside = (rows >= 0) & (rows < box[0]) & (columns >= 0) & (columns < box[1])
    return images.masked_fill(inside, 0)


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


@dataclasses.dataclass(frozen=True)
class OnPixels:
    """What practitioners use: crop and flip, and then (but for "crop_flip") a policy of `policies_by_kornia`.

    Each image has draws of its own, on its pixels as bytes, which is what the policies are made for: what was done to
    the pixels (`data.pixels`) is undone first and done again behind them. So whatever leaves [0, 1], as a phi before it
    may, is clamped, and the output is one of 256 values a channel. The crop pads with black, an eighth of the side
    (CIFAR's 4 pixels). AutoAugment's policy is the one for CIFAR-10, and `magnitude`, of 30, is that of RandAugment's
    two operations. Of one channel "color" (saturation) changes nothing, as in Pillow.
    """

    policy: str
    data: Dataset | None = dataclasses.field(default=None, repr=False, compare=False)
    flip: float = 0.5
    magnitude: int = 9

    def __call__(self, images: Tensor, *, generator: torch.Generator, **_) -> Tensor:
        pixels = (self.data.pixels(images.float()) * 255).round() / 255
        pad, options = max(images.shape[-1] // 8, 1), dict(generator=generator, device=generator.device)
        down, right = torch.randint(-pad, pad + 1, (2, len(images)), **options).to(images.device)
        flipped = torch.rand(len(images), **options).to(images.device) < self.flip
        pixels = flip(crop(pixels, down, right), flipped)
        if self.policy != "crop_flip":
            from augdistill_report.data.policies_by_kornia import PIXEL_POLICIES, Draws  # kornia is slow to import

            pixels = PIXEL_POLICIES[self.policy](pixels, Draws(len(images), generator), self.magnitude)
        return self.data.standardise(pixels).to(images.dtype)


LIBRARY = ("crop_flip", "autoaugment", "randaugment", "trivialaugment", "augmix")

AUGMENTATIONS = {
    "none": None,
    "affine": RandomAffine(),
    "flip_affine": RandomAffine(flip=0.5),
    "dsa": DSA(),
    **{name: OnPixels(name) for name in LIBRARY},
}

DIFFERENTIABLE = tuple(name for name in AUGMENTATIONS if name not in LIBRARY)

KORNIA = "kornia:"  # then a name of `kornia.augmentation`, and its arguments in brackets


class Choices(tuple):
    """What a setting may be: these names, or "kornia:NAME(key=value, ...)", which is looked at as a whole."""

    def __new__(cls, key: str, names: Iterable[str], differentiable: bool = False):
        choices = super().__new__(cls, names)
        choices.key, choices.differentiable = key, differentiable
        return choices

    def __contains__(self, name: object) -> bool:
        if not str(name).startswith(KORNIA):
            return super().__contains__(name)
        from augdistill_report.data.kornia_by_name import check_kornia  # kornia is slow to import

        try:
            check_kornia(name, differentiable=self.differentiable)
        except ValueError as error:
            raise ValueError(f"{self.key}={error}") from None
        return True


NEVER_FLIPPED = ("digits", "mnist")  # data sets where a mirror image is of no class or of another


def augmentation(name: str, data: Dataset, magnitude: int = 9) -> Callable | None:
    """`AUGMENTATIONS[name]`, or kornia's, as it fits a data set; RandAugment's has that `magnitude`."""
    if name.startswith(KORNIA):
        from augdistill_report.data.kornia_by_name import ByKornia  # kornia is slow to import

        return ByKornia(name, data)
    augment = augmentation_for(name, data.name)
    if isinstance(augment, OnPixels):
        augment = dataclasses.replace(augment, data=data, magnitude=magnitude)
    return augment


def augmentation_for(name: str, dataset: str) -> Callable | None:
    """`AUGMENTATIONS[name]` without its flip where a flip changes what an image shows."""
    augment = AUGMENTATIONS[name]
    if augment is None or dataset not in NEVER_FLIPPED:
        return augment
    if isinstance(augment, DSA):
        return dataclasses.replace(augment, strategy=tuple(s for s in augment.strategy if s != "flip"))
    return dataclasses.replace(augment, flip=0.0)


def without_flips(phi: Phi, dataset: str) -> Phi:
    """`phi`, its policies without the flip where a flip changes what an image shows."""
    for policy in phi.modules():
        if hasattr(policy, "leave_out") and dataset in NEVER_FLIPPED:
            policy.leave_out("flip")
    return phi
