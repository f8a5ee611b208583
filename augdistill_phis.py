"""Phi models: what maps images to images, and the table `PHIS` that names them. Section 4 of `augdistill_core`.

One interface for all of them, the pixels of the baseline included, so that the baseline, the student report's networks
and ours are rows of one table. To add one: subclass `Phi`, write `forward`, decorate with `register_phi("name")`.
"""

import itertools
import types
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from augdistill_random import randn


class Phi(nn.Module):
    """An augmentation: maps images `[B, C, H, W]` to images of the same shape. Subclass, write `forward`, register.

    `forward(images, *, labels, index, generator)` may use `labels` `[B]`, `index` `[B]` (each image's position in the
    base set) and `generator` (the only source of noise); take `**_` for those that you ignore. The class attributes
    below say what a phi does; the table of phis and the tests read them.
    """

    stochastic = False  # draws noise from the generator
    conditional = False  # reads the labels
    positional = False  # holds something for each place in the image
    bound = False  # holds something for each base image, so it cannot take others
    starts_as_identity = False  # returns its input before it is trained

    def forward(self, images: Tensor, *, labels: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
        raise NotImplementedError

    def report(self) -> dict[str, float]:
        """Numbers of its own that are worth watching while it learns; `distill` keeps them in each record."""
        return {}


class Chain(Phi):
    """Phis one after the other, the first first: `make_phi("unet+policy", ...)`."""

    def __init__(self, phis: Sequence[Phi]):
        super().__init__()
        self.phis = nn.ModuleList(phis)
        for claim in ("stochastic", "conditional", "positional", "bound"):
            setattr(self, claim, any(getattr(phi, claim, False) for phi in phis))
        self.starts_as_identity = all(getattr(phi, "starts_as_identity", False) for phi in phis)

    def forward(self, images, **given):
        for phi in self.phis:
            images = phi(images, **given)
        return images

    def report(self):
        return {k: v for phi in self.phis for k, v in getattr(phi, "report", dict)().items()}


class Applied(Phi):
    """How strongly and how often a phi is used: x + strength (phi(x) - x), on each image with a `probability`."""

    def __init__(self, phi: Phi, strength: float = 1.0, probability: float = 1.0):
        super().__init__()
        self.phi, self.strength, self.probability = phi, strength, probability
        for claim in ("conditional", "positional", "bound", "starts_as_identity"):
            setattr(self, claim, getattr(phi, claim, False))
        self.stochastic = getattr(phi, "stochastic", False) or probability < 1

    def forward(self, images, *, generator, **given):
        out = self.phi(images, generator=generator, **given)
        if self.strength != 1:
            out = images + self.strength * (out - images)
        if self.probability < 1:
            taken = torch.rand(len(images), generator=generator, device=generator.device) < self.probability
            out = torch.where(taken.to(images.device).view(-1, 1, 1, 1), out, images)
        return out


_REGISTRY: dict[str, Callable[[Tensor, int], Phi]] = {}
PHIS = types.MappingProxyType(_REGISTRY)  # read-only: `register_phi` is the one way in, so no name is taken twice


OURS = ("augdistill_phis", "augdistill_policies")  # the modules of all phis but a user's


def origin(build) -> tuple[str, str]:
    """The module and the name under which a class or function was defined."""
    return getattr(build, "__module__", ""), getattr(build, "__qualname__", repr(build))


def register_phi(name: str):
    """Decorator: make `build(images, classes) -> Phi` (a class will do) available to everything as `PHIS[name]`.

    `images` `[n, C, H, W]` is the base set: read the shape from it (and, for a bound phi, the initial values).
    """

    def register(build):
        if "+" in name:
            raise ValueError(f"phi {name!r}: a + joins the names of a chain; choose another name")
        # a notebook's cell may run again, and a worker may be told again: the same definition is replaced
        if name in PHIS and origin(PHIS[name]) != origin(build):
            raise ValueError(f"phi {name!r} is registered already; choose another name")
        _REGISTRY[name] = build
        return build

    return register


def builders(name: str) -> list:
    """The entries of `PHIS` that a name stands for: one, or those of a chain ("unet+policy"), in their order."""
    parts = name.split("+")
    for part in parts:
        if part not in PHIS:
            raise ValueError(f"unknown phi {part!r}: must be one of {', '.join(PHIS)}, or several with + between")
    return [PHIS[part] for part in parts]


def make_phi(name: str, images: Tensor, classes: int, seed: int) -> Phi:
    """A fresh phi of that name (or chain of names) for base images `[n, C, H, W]`, initialised from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        phis = [build(images, classes) for build in builders(name)]
        return (phis[0] if len(phis) == 1 else Chain(phis)).to(images)


def augmented(augment, images: Tensor, labels: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
    """`augment` applied to a batch, its output's shape checked; None leaves the images as they are."""
    if augment is None:
        return images
    out = augment(images, labels=labels, index=index, generator=generator)
    if out.shape != images.shape:
        raise ValueError(f"{type(augment).__name__} turned {tuple(images.shape)} into {tuple(out.shape)}: must keep it")
    return out


@register_phi("identity")
class Identity(Phi):
    """phi(x) = x: the control that every claim about phi is held against (alpha is still learned)."""

    starts_as_identity = True

    def __init__(self, images: Tensor, classes: int):
        super().__init__()

    def forward(self, images, **_):
        return images


@register_phi("pixels")
class Pixels(Phi):
    """The baseline: one free image for every base image, initialised there (MTT's synthetic set, real init)."""

    bound = True
    positional = True
    starts_as_identity = True

    def __init__(self, images: Tensor, classes: int):
        super().__init__()
        self.pixels = nn.Parameter(images.detach().clone())

    def forward(self, images, *, index, **_):
        return self.pixels[index]


class DistNet(Phi):
    """The student report's family: valid convolutions, noise on the hidden layer, transposed convolutions back.

    Args:
        widths: channels of the hidden layers; the way back mirrors them.
        kernel: 3, or 1 (then the way back is one 1x1 convolution from the hidden layer).
        noise: "blind" is h + s1 Normal(h, 1) without a path for the gradient through the draw, "scaled" is
            s1 (h + eps), "none" is h.
        scales: the initial (s1, s2); `learned` tells which of them are parameters.
        skip: the output is s2 out + x if true, else s2 out.
        relu: whether ReLU stands between the layers.
    """

    def __init__(
        self,
        images: Tensor,
        classes: int,
        *,
        widths: Sequence[int],
        kernel: int = 3,
        noise: str = "scaled",
        scales: tuple[float, float] = (0.1, 0.1),
        learned: tuple[bool, bool] = (True, True),
        skip: bool = True,
        relu: bool = True,
    ):
        super().__init__()
        channels = [images.shape[1], *widths]
        there = list(itertools.pairwise(channels))
        back = [(b, a) for a, b in reversed(there)] if kernel == 3 else [(channels[-1], channels[0])]
        if images.shape[-1] <= (kernel - 1) * len(there):
            raise ValueError(
                f"images of {images.shape[-1]} pixels: {len(there)} valid convolutions leave nothing of them"
            )
        self.there = nn.ModuleList(nn.Conv2d(a, b, kernel) for a, b in there)
        self.back = nn.ModuleList((nn.ConvTranspose2d if kernel == 3 else nn.Conv2d)(a, b, kernel) for a, b in back)
        for name, scale, is_learned in zip(("s1", "s2"), scales, learned, strict=True):
            value = torch.tensor([scale])
            self.register_parameter(name, nn.Parameter(value)) if is_learned else self.register_buffer(name, value)
        self.noise, self.skip, self.stochastic = noise, skip, noise != "none"
        self.activation = F.relu if relu else nn.Identity()

    def forward(self, images, *, generator, **_):
        h = images
        for layer in self.there:
            h = self.activation(layer(h))
        if self.noise == "blind":
            h = h + self.s1 * (h.detach() + randn(h, generator))
        elif self.noise == "scaled":
            h = self.s1 * (h + randn(h, generator))
        for layer in self.back[:-1]:
            h = self.activation(layer(h))
        out = self.s2 * self.back[-1](h)
        return out + images if self.skip else out


# Exactly as the student report ran them, flaws included; c = image channels. Without s2, the output is not scaled.
_PLAIN = dict(kernel=1, scales=(0.1, 1.0))
_DISTNETS: dict[str, Callable[[int], dict]] = {
    "distnet": lambda c: dict(widths=[6], noise="blind", scales=(1.0, 0.001), learned=(False, False)),
    "distnet1": lambda c: dict(widths=[6], noise="blind", scales=(0.001, 0.001)),
    "distnet2": lambda c: dict(widths=[6, 12]),
    "distnet3": lambda c: dict(widths=[c], skip=False, learned=(True, False), **_PLAIN),
    "distnet4": lambda c: dict(widths=[], skip=False, noise="none", learned=(False, False), **_PLAIN),
    "distnet5": lambda c: dict(widths=[c] * 4, skip=False, noise="none", relu=False, learned=(False, False), **_PLAIN),
    "distnet6": lambda c: dict(widths=[9, 27]),
    "distnet7": lambda c: dict(widths=[c], learned=(False, False), **_PLAIN),
}
for _name, _options in _DISTNETS.items():
    register_phi(_name)(lambda images, classes, o=_options: DistNet(images, classes, **o(images.shape[1])))


@register_phi("hallucinator")
class Hallucinator(Phi):
    """HaBa's hallucinator (Liu et al. 2022): a valid 3x3 convolution, a scale and a shift for every location, and back.

    Nothing in it is nonlinear, skipped or random.
    """

    positional = True

    def __init__(self, images: Tensor, classes: int):
        super().__init__()
        channels, height, width = images.shape[1:]
        self.encoder, self.decoder = nn.Conv2d(channels, channels, 3), nn.ConvTranspose2d(channels, channels, 3)
        self.scale = nn.Parameter(torch.ones(channels, height - 2, width - 2))
        self.shift = nn.Parameter(torch.zeros(channels, height - 2, width - 2))

    def forward(self, images, **_):
        return self.decoder(self.scale * self.encoder(images) + self.shift)


class UNet(Phi):
    """A small U-Net (two halvings) as a residual: x + out, the last layer zero, so that it starts as the identity.

    With `noise` > 0 that many channels of fresh standard normal noise stand beside the image at the input.
    """

    starts_as_identity = True

    def __init__(self, images: Tensor, classes: int, *, width: int = 16, noise: int = 0):
        super().__init__()
        channels, size = images.shape[1], images.shape[-1]
        if size < 4:
            raise ValueError(f"images of {size}x{size} pixels: a U-Net of two halvings takes at least 4x4")
        self.noise, self.stochastic = noise, noise > 0

        def block(a, b):
            return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.SiLU(), nn.Conv2d(b, b, 3, padding=1), nn.SiLU())

        self.down1, self.down2 = block(channels + noise, width), block(width, 2 * width)
        self.middle = block(2 * width, 2 * width)
        self.up2, self.up1 = block(4 * width, width), block(2 * width, width)
        self.last = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def residual(self, images: Tensor, generator: torch.Generator) -> Tensor:
        x = images
        if self.noise:
            batch, _, height, width = images.shape
            x = torch.cat([x, randn(x, generator, (batch, self.noise, height, width))], 1)
        fine = self.down1(x)
        middle = self.down2(F.avg_pool2d(fine, 2))
        coarse = self.middle(F.avg_pool2d(middle, 2))
        up = self.up2(torch.cat([F.interpolate(coarse, size=middle.shape[-2:]), middle], 1))
        up = self.up1(torch.cat([F.interpolate(up, size=fine.shape[-2:]), fine], 1))
        return self.last(up)

    def forward(self, images, *, generator, **_):
        return images + self.residual(images, generator)


class ConditionalUNet(UNet):
    """A U-Net that sees classes and positions: x + gain[y] unet(x) + bias[y], gain and bias `[classes, C, H, W]`.

    Mind what it stores: bias alone is a free image for every class, so it can distil pixels without looking at x.
    """

    conditional = True
    positional = True

    def __init__(self, images: Tensor, classes: int, *, width: int = 16, noise: int = 0):
        super().__init__(images, classes, width=width, noise=noise)
        self.gain = nn.Parameter(torch.ones(classes, *images.shape[1:]))
        self.bias = nn.Parameter(torch.zeros(classes, *images.shape[1:]))

    def forward(self, images, *, labels, generator, **_):
        return images + self.gain[labels] * self.residual(images, generator) + self.bias[labels]


class MLP(Phi):
    """A perceptron of two hidden layers as a residual, the last layer zero: x + out, it starts as the identity.

    It has a weight for every place, and learns without labels to tell what an image shows, sooner than a U-Net's 3x3
    convolutions do (notebook 07). `noise` standard normal numbers an image stand beside its pixels at the input.
    Mind what it stores: every hidden unit of the last layer holds an image.
    """

    starts_as_identity = True
    positional = True

    def __init__(self, images: Tensor, classes: int, *, width: int = 256, noise: int = 0):
        super().__init__()
        pixels = images[0].numel()
        self.noise, self.stochastic = noise, noise > 0
        self.first, self.second = nn.Linear(pixels + noise, width), nn.Linear(width, width)
        self.last = nn.Linear(width, pixels)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, images, *, generator, **_):
        x = images.flatten(1)
        if self.noise:
            x = torch.cat([x, randn(x, generator, (len(x), self.noise))], 1)
        out = self.last(F.silu(self.second(F.silu(self.first(x)))))
        return images + out.view_as(images)


class Control(Phi):
    """A part of what a phi does, scored alone."""

    def __init__(self, phi: Phi):
        super().__init__()
        self.phi = phi
        for claim in ("stochastic", "conditional", "positional", "bound"):
            setattr(self, claim, getattr(phi, claim, False))


class Stored(Control):
    """The control of a class-conditioned phi: what it makes of a blank image (all pixels at their mean).

    So it holds all that phi stores for each class, and nothing that it takes from the image it is given.
    """

    def forward(self, images, **given):
        return self.phi(torch.zeros_like(images), **given)


class Added(Control):
    """The control of a phi that may tell what an image shows: phi(x) - x, what it adds, without the image itself."""

    def forward(self, images, **given):
        return self.phi(images, **given) - images


register_phi("unet")(UNet)
register_phi("unet_noise")(lambda images, classes: UNet(images, classes, noise=1))
register_phi("unet_class")(ConditionalUNet)
register_phi("unet_class_noise")(lambda images, classes: ConditionalUNet(images, classes, noise=1))
register_phi("mlp")(MLP)
register_phi("mlp_noise")(lambda images, classes: MLP(images, classes, noise=16))
