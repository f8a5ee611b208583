"""Any augmentation of kornia by name: `kornia:RandomPlasmaShadow`, `kornia:RandomAffine(degrees=15, shear=5)`.

The text is read, never run: a name of `kornia.augmentation`, and literals for its arguments. What is no augmentation of
single images is refused by name, after a look at what it makes of a few random images.
"""

import ast
import dataclasses
import functools
import inspect

import kornia.augmentation
import torch
from kornia.augmentation import (
    AugmentationBase2D,
    GeometricAugmentationBase2D,
    IntensityAugmentationBase2D,
    RigidAffineAugmentationBase2D,
)
from torch import Tensor, nn

from augdistill_core import nearest, seeded
from augdistill_report.data.datasets import Dataset

BASES = (AugmentationBase2D, RigidAffineAugmentationBase2D, GeometricAugmentationBase2D, IntensityAugmentationBase2D)

REFUSED = {
    "RandomTransplantation": "it needs a mask",
    "RandomDissolving": "it keeps state: a diffusion model, which it downloads",
    "RandomMixUpV2": "it returns two things: images, and labels that are mixed along",
    "RandomCutMixV2": "it returns two things: images, and labels that are mixed along",
    "RandomMosaic": "it returns two things: images, and boxes that are moved along",
    "PatchMix": "it mixes images of different classes, and leaves the labels as they were",
    "RandomJigsaw": "it has no draw an image: one order of the pieces serves the batch",
}


def known() -> list[str]:
    """The names that can be given: kornia's augmentations of single images."""
    found = {name: getattr(kornia.augmentation, name) for name in kornia.augmentation.__all__}
    single = {n for n, c in found.items() if isinstance(c, type) and issubclass(c, AugmentationBase2D)}
    return sorted(n for n in single if found[n] not in BASES and n not in REFUSED)


def refuse(text: str, why: str):
    raise ValueError(f"{text!r}: {why}") from None


def read(text: str) -> tuple[str, dict]:
    """The name and the arguments in "kornia:NAME" or "kornia:NAME(key=literal, ...)"."""
    form = "must be kornia:NAME or kornia:NAME(key=value, ...), each value a number, a string or a tuple of such"
    try:
        node = ast.parse(text.partition(":")[2].strip(), mode="eval").body
        call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        if call.args or not isinstance(call.func, ast.Name) or any(k.arg is None for k in call.keywords):
            raise ValueError
        return call.func.id, {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        refuse(text, form)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def build(text: str, **changes) -> nn.Module:
    """The augmentation that a text names, or a `ValueError` that names what is wrong with it, and what is near."""
    name, arguments = read(text)
    if name in REFUSED:
        refuse(text, f"kornia's {name} cannot be used here: {REFUSED[name]}")
    if name not in known():
        if name in kornia.augmentation.__all__:
            refuse(text, f"kornia's {name} is no augmentation of single images")
        refuse(text, f"kornia has no augmentation {name}: {nearest(name, known())}")
    make = getattr(kornia.augmentation, name)
    takes = inspect.signature(make).parameters
    for key in arguments:
        if key not in takes:
            refuse(text, f"{name} has no argument {key}: {nearest(key, list(takes))}")
    if missing := [k for k, p in takes.items() if p.default is p.empty and k not in arguments]:
        refuse(text, f"{name} needs {', '.join(missing)}")
    try:
        return make(**arguments | {k: v for k, v in changes.items() if k in takes})
    except Exception as error:  # each augmentation checks its arguments in its own way
        refuse(text, f"{name} refuses its arguments: {first_line(error)}")


def drawn(module: nn.Module, images: Tensor, generator: torch.Generator) -> Tensor:
    """`module` applied, its draws, which come from the global generators, seeded by one draw from `generator`."""
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    devices = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        return module(images)


def check_kornia(text: str, shape: tuple[int, int, int] | None = None, differentiable: bool = False) -> None:
    """A `ValueError` unless a text names an augmentation that takes images of `shape` (C, H, W), gives such back, is
    the same for the same draws, and, where that is asked for, has a gradient in the images.

    Without a shape, which depends on the data: three channels, and the sides that its argument `size` asks for.
    """
    name, arguments = read(text)
    module = build(text, p=1.0)
    if shape is None:
        size = arguments.get("size", 32)
        shape = (3, *(size if isinstance(size, tuple) else (size, size)))
    images = torch.rand(4, *shape, generator=seeded(0, "look")).requires_grad_(differentiable)
    try:
        one, other = (drawn(module, images, seeded(0, "draw")) for _ in range(2))
    except Exception as error:  # as above
        refuse(text, f"{name} cannot take images of {' x '.join(map(str, shape))}: {first_line(error)}")
    if not isinstance(one, Tensor):
        refuse(text, f"{name} returns two things: must return images")
    if one.shape != images.shape:
        refuse(text, f"{name} changes the shape, from {tuple(images.shape)} to {tuple(one.shape)}: must keep it")
    if not torch.equal(one, other):
        refuse(text, f"{name} keeps state: it gives two results for the same draws")
    if not one.isfinite().all():
        refuse(text, f"{name} returns values that are not finite")
    if differentiable:
        weights = torch.randn(one.shape, generator=seeded(0, "weights"))
        gradient = torch.autograd.grad((one * weights).sum(), images)[0] if one.requires_grad else torch.zeros(1)
        if not gradient.isfinite().all() or not gradient.any():
            refuse(text, f"{name} is not differentiable in the images, which an augmentation of the unroll must be")


@dataclasses.dataclass(frozen=True)
class ByKornia:
    """kornia's augmentation of that name, on the pixels in [0, 1] that its colour operations take.

    What was done to the pixels is undone first and done again behind them. Colour operations clamp: what a phi drove
    out of [0, 1] comes back to its border there, without a gradient. Geometry takes it as it is. What comes in from
    outside is black, unless the arguments say otherwise.
    """

    text: str
    data: Dataset = dataclasses.field(repr=False, compare=False)

    def __post_init__(self):
        check_kornia(self.text, self.data.shape)

    @functools.cached_property
    def module(self) -> nn.Module:
        return build(self.text).to(self.data.mean.device)

    def __call__(self, images: Tensor, *, generator: torch.Generator, **_) -> Tensor:
        colour = isinstance(self.module, IntensityAugmentationBase2D)
        out = drawn(self.module, self.data.pixels(images, clamp=colour), generator)
        return self.data.standardise(out).to(images.dtype)
