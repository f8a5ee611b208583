"""Any augmentation of kornia by name: `kornia:RandomPlasmaShadow`, `kornia:RandomAffine(degrees=15, shear=5)`.

The text is parsed, never executed: a name of `kornia.augmentation`, and literals for its arguments. A name that is not
an augmentation of single images is rejected with a reason, after a test on a few random images.
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
    "RandomMixUpV2": "it returns images and mixed labels",
    "RandomCutMixV2": "it returns images and mixed labels",
    "RandomMosaic": "it returns images and boxes",
    "PatchMix": "it mixes images of different classes, and does not change the labels",
    "RandomJigsaw": "it does not sample per image: the whole batch gets one order of the pieces",
}


def known() -> list[str]:
    """The names that can be used: kornia's augmentations of single images."""
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
    """The augmentation that a text names; a `ValueError` says what is wrong, with the nearest names."""
    name, arguments = read(text)
    if name in REFUSED:
        refuse(text, f"kornia's {name} cannot be used here: {REFUSED[name]}")
    if name not in known():
        if name in kornia.augmentation.__all__:
            refuse(text, f"kornia's {name} is not an augmentation of single images")
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
        refuse(text, f"{name} rejects its arguments: {first_line(error)}")


def drawn(module: nn.Module, images: Tensor, generator: torch.Generator) -> Tensor:
    """`module` applied to images; torch's global generators, which it uses, are seeded from `generator`."""
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    devices = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        return module(images)


def check_kornia(text: str, shape: tuple[int, int, int] | None = None, differentiable: bool = False) -> None:
    """A `ValueError` unless a text names an augmentation that takes images of `shape` (C, H, W) and keeps their shape,
    gives the same result for the same seed, and (if `differentiable`) has a gradient in the images.

    Without a shape (no data yet), three channels are assumed, and the sides in its argument `size` (or 32).
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
        refuse(text, f"{name} returns something else than a tensor: must return images")
    if one.shape != images.shape:
        refuse(text, f"{name} changes the shape, from {tuple(images.shape)} to {tuple(one.shape)}: must keep it")
    if not torch.equal(one, other):
        refuse(text, f"{name} keeps state: it gives two results for the same seed")
    if not one.isfinite().all():
        refuse(text, f"{name} returns values that are not finite")
    if differentiable:
        weights = torch.randn(one.shape, generator=seeded(0, "weights"))
        gradient = torch.autograd.grad((one * weights).sum(), images)[0] if one.requires_grad else torch.zeros(1)
        if not gradient.isfinite().all() or not gradient.any():
            refuse(text, f"{name} is not differentiable in the images; an augmentation in the unroll must be")


@dataclasses.dataclass(frozen=True)
class ByKornia:
    """kornia's augmentation of that name, on pixels in [0, 1], which its colour operations need.

    Standardising (or whitening) is inverted before and repeated after. For colour operations, values outside [0, 1],
    which a phi may produce, are clamped and get no gradient; geometric operations keep them. Pixels from outside the
    image are black, unless the arguments say otherwise.
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
