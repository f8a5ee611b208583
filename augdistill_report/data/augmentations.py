"""Hand-designed augmentations, called like a phi: `augment(images, labels=, index=, generator=)`.

`AUGMENTATIONS` lists those that experts, the unroll (MTT, Algorithm 1, line 12) and evaluation may use; any of kornia's
("kornia:NAME(key=value)") works too. All sample from the generator only, and take images of any type on any device. All
but those on bytes (`OnPixels`) are differentiable in the images, so the unroll can use them (`DIFFERENTIABLE`).
"""

import dataclasses
import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from augdistill_core import Config, Phi, affine, color, flip, knob, make_phi, seeded, to_device, warp
from augdistill_report.data.datasets import Dataset


@dataclasses.dataclass(frozen=True)
class RandomAffine:
    """Each image is rotated, scaled and shifted by its own normal sample, and flipped with probability `flip`.

    Standard deviations: `rotation` in radians, `scale` of the logarithm, `shift` as a fraction of the image's side.
    Pixels from outside the image repeat its border (the background, for digits).
    """

    rotation: float = 0.15
    scale: float = 0.10
    shift: float = 0.087
    flip: float = 0.0

    def __call__(self, images: Tensor, *, generator: torch.Generator, **_) -> Tensor:
        drawn = torch.randn(len(images), 4, generator=generator, device=generator.device)
        angle, size, right, down = to_device(drawn, images.device).to(images).unbind(1)
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
            images = flip(images, to_device(flipped, images.device))
        return images


# --- the operations of DSA: images [B, C, H, W], then parameters [B], one per image -----------------------------------
# They are not kornia's: its geometry inverts a matrix, for which a program waits for its GPU, and its scaling and
# rotation give the identity back only up to rounding. Its erased boxes have the bits of `cutout` but take half as much
# time again, and as many lines.


def crop(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """The image's window shifted `down` and `right` (whole pixels); zero outside the image."""
    height, width = images.shape[-2:]
    wide = images.to(torch.promote_types(images.dtype, torch.float32))  # so that every position is exact
    matrix = torch.eye(2, 3, dtype=wide.dtype, device=images.device).repeat(len(images), 1, 1)
    matrix[:, 0, 2], matrix[:, 1, 2] = 2 * right / max(width - 1, 1), 2 * down / max(height - 1, 1)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=True)
    return F.grid_sample(wide, grid, "nearest", "zeros", align_corners=True).to(images.dtype)  # no pixel is mixed


def cutout(images: Tensor, top: Tensor, left: Tensor, box: tuple[int, int]) -> Tensor:
    """Zeros in the `box` (height, width) with first row `top` and first column `left`; it may exceed the image."""
    rows = (count(images.shape[2], images) - top[:, None])[:, None, :, None]
    columns = (count(images.shape[3], images) - left[:, None])[:, None, None, :]
    inside = (rows >= 0) & (rows < box[0]) & (columns >= 0) & (columns < box[1])
    return images.masked_fill(inside, 0)


def scale(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Images seen through a window `x` times as wide and `y` times as high: above 1 they shrink, with zeros around."""
    zero = torch.zeros_like(x)
    matrix = torch.stack([x, zero, zero, zero, y, zero], 1).view(-1, 2, 3)
    return warp(images, matrix, padding="zeros", align_corners=True)


def rotate(images: Tensor, angle: Tensor) -> Tensor:
    """Images rotated anticlockwise by `angle` (radians) about their centre; zeros come in at the corners."""
    cos, sin, zero = torch.cos(angle), torch.sin(angle), torch.zeros_like(angle)
    matrix = torch.stack([cos, -sin, zero, sin, cos, zero], 1).view(-1, 2, 3)
    return warp(images, matrix, padding="zeros", align_corners=True)


def count(n: int, like: Tensor) -> Tensor:
    """0 .. n - 1, on the device of `like`."""
    return torch.arange(n, device=like.device)


OPERATIONS: dict[str, Callable[..., Tensor]] = {f.__name__: f for f in (color, crop, cutout, flip, scale, rotate)}


@dataclasses.dataclass(frozen=True)
class DSA(Config):
    """Differentiable siamese augmentation (Zhao & Bilen, ICML 2021), with the constants of MTT's official code.

    Each batch gets one operation, sampled uniformly from `strategy`, with parameters sampled per image (MTT's
    `aug_mode` "S"). It acts on standardised images, like MTT's: nothing is clamped, and pixels from outside are zero,
    the mean colour. A strength of 0 (of 1 for `scale`) is exactly the identity.
    """

    strategy: tuple = knob(tuple(OPERATIONS), "names of operations; one of them is sampled for each batch")
    brightness: float = knob(1.0, "width of the range of the added value, around 0", low=0)
    saturation: float = knob(2.0, "width of the range of the factor, around 1", low=0)
    contrast: float = knob(0.5, "half the width of the range of the factor, around 1", low=0)
    crop: float = knob(0.125, "largest shift in each direction, as a fraction of the side", low=0, high=1)
    cutout: float = knob(0.5, "side of the box, as a fraction of the image's side", low=0, high=1)
    flip: float = knob(0.5, "probability", low=0, high=1)
    scale: float = knob(1.2, "largest factor r; each axis has its own factor in [1/r, r]", low=1)
    rotate: float = knob(15.0, "largest angle in each direction, in degrees", low=0, high=180)

    def __post_init__(self):
        super().__post_init__()
        if not self.strategy or not set(self.strategy) <= set(OPERATIONS):
            raise ValueError(f"strategy={self.strategy}: must be one or more of {', '.join(OPERATIONS)}")

    def __call__(self, images: Tensor, *, generator: torch.Generator, **_) -> Tensor:
        name = self.strategy[int(torch.randint(len(self.strategy), (), generator=generator, device=generator.device))]
        return OPERATIONS[name](images, *self.draw(name, images, generator))

    def draw(self, name: str, images: Tensor, generator: torch.Generator) -> tuple:
        """The sampled parameters of operation `name`, in the order of its arguments, for each of `images`."""
        options = dict(size=(len(images),), generator=generator, device=generator.device)

        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * to_device(torch.rand(**options), images.device).to(images)

        def integer(low: int, high: int) -> Tensor:  # both included
            return to_device(torch.randint(low, high + 1, **options), images.device)

        sides = images.shape[-2:]
        if name == "color":
            return tuple(uniform(-s, s) for s in (self.brightness / 2, self.saturation / 2, self.contrast))
        if name == "crop":
            return tuple(integer(-shift, shift) for shift in (int(self.crop * side + 0.5) for side in sides))
        if name == "cutout":
            box = tuple(int(self.cutout * side + 0.5) for side in sides)
            # its centre is anywhere in the image (for an even box: on any line between pixels, or on the border)
            top, left = (integer(0, side - b % 2) - b // 2 for side, b in zip(sides, box, strict=True))
            return top, left, box
        if name == "flip":
            return (uniform(0, 1) < self.flip,)
        if name == "scale":
            return uniform(1 / self.scale, self.scale), uniform(1 / self.scale, self.scale)
        return (uniform(-math.radians(self.rotate), math.radians(self.rotate)),)


@dataclasses.dataclass(frozen=True)
class OnPixels:
    """Common practice: crop and flip, then (except for "crop_flip") a policy of `policies_by_kornia`.

    Each image has its own samples. The policies are made for pixels as bytes, so standardising (or whitening) is
    inverted before and repeated after (`data.pixels`, `data.standardise`). Values outside [0, 1], which a phi may
    produce, are therefore clamped, and the output has 256 values per channel. The crop pads with black, 1/8 of the side
    (4 pixels on CIFAR). AutoAugment uses its policy for CIFAR-10. `magnitude` in [0, 30] is that of RandAugment's two
    operations. For one channel "color" (saturation) changes nothing, as in Pillow.
    """

    policy: str
    data: Dataset | None = dataclasses.field(default=None, repr=False, compare=False)
    flip: float = 0.5
    magnitude: int = 9

    def __call__(self, images: Tensor, *, generator: torch.Generator, **_) -> Tensor:
        pixels = (self.data.pixels(images.float()) * 255).round() / 255
        pad, options = max(images.shape[-1] // 8, 1), dict(generator=generator, device=generator.device)
        down, right = to_device(torch.randint(-pad, pad + 1, (2, len(images)), **options), images.device)
        flipped = to_device(torch.rand(len(images), **options), images.device) < self.flip
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

KORNIA = "kornia:"  # followed by a name of `kornia.augmentation`, with arguments in brackets


class Choices(tuple):
    """The choices of a setting: these names, or "kornia:NAME(key=value, ...)", which is checked as a whole."""

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


RANDOM_POLICY = "random_policy"  # the name of a policy with random ranges: for evaluation only

RANDOM_RANGES = 0.01, 0.3  # each range of it: uniform in its logarithm


def random_policy(data: Dataset, candidate: int) -> Phi:
    """A policy with random ranges, the control of a learned one: the same transformations; `candidate` is its seed."""
    policy = without_flips(make_phi("policy", data.train.images[:1], len(data.classes), 0), data.name)
    low, high = RANDOM_RANGES
    where = torch.rand(len(policy.kinds), generator=seeded("random policy", candidate)).tolist()
    policy.hold({kind: low * (high / low) ** u for kind, u in zip(policy.kinds, where, strict=True)})
    return policy.requires_grad_(False)


NEVER_FLIPPED = ("digits", "mnist")  # data sets where a mirror image has another class, or none


def augmentation(name: str, data: Dataset, magnitude: int = 9, candidate: int = 0) -> Callable | None:
    """`AUGMENTATIONS[name]`, kornia's, or a `random_policy`, adapted to a data set.

    `magnitude` in [0, 30] is RandAugment's, `candidate` the policy's.
    """
    if name == RANDOM_POLICY:
        return random_policy(data, candidate)
    if name.startswith(KORNIA):
        from augdistill_report.data.kornia_by_name import ByKornia  # kornia is slow to import

        return ByKornia(name, data)
    augment = augmentation_for(name, data.name)
    if isinstance(augment, OnPixels):
        augment = dataclasses.replace(augment, data=data, magnitude=magnitude)
    return augment


def augmentation_for(name: str, dataset: str) -> Callable | None:
    """`AUGMENTATIONS[name]`, without its flip for data sets where a flip changes the class."""
    augment = AUGMENTATIONS[name]
    if augment is None or dataset not in NEVER_FLIPPED:
        return augment
    if isinstance(augment, DSA):
        return dataclasses.replace(augment, strategy=tuple(s for s in augment.strategy if s != "flip"))
    return dataclasses.replace(augment, flip=0.0)


def without_flips(phi: Phi, dataset: str) -> Phi:
    """`phi`, whose policies lose the flip for data sets where a flip changes the class."""
    for policy in phi.modules():
        if hasattr(policy, "leave_out") and dataset in NEVER_FLIPPED:
            policy.leave_out("flip")
    return phi
