"""Policies: phis with given transformations, which learn the range of each.

A policy rotates, scales, shears, shifts, flips and recolours each image by its own samples. It learns their ranges: one
set for all images, one per class, or one per image (predicted by a small network, as in InstaAug; Miao et al. 2022).
All samples are reparameterised, so that a range gets its gradient through the augmented images.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from augdistill_method.phi import Phi, register_phi
from augdistill_method.random import randn
from augdistill_method.transforms import affine, color, turn_hue

RAMP = 0.1  # the fraction of flip samples that are a blend of both images


def drawn_flip(images: Tensor, logit: Tensor, noise: Tensor) -> Tensor:
    """`flip` with probability p = sigmoid(`logit`), from uniform `noise` u in (0, 1), both `[B]`; 10 % are a blend.

    The weight of the mirror image, s = (p - u) / w + 1/2 clipped to [0, 1], has mean p. It is between 0 and 1 in a
    fraction w of the samples (like a hard concrete variable; Louizos et al. 2018). For any f of the blend
    x + s (flip(x) - x), the mean derivative in p is the integral along the whole line, f(flip(x)) - f(x): that of a
    binary flip. A straight-through gradient uses derivatives at the ends of the line only. Those describe a faint
    mirror image on top (a double exposure), so they unlearn flips that help.
    """
    p = logit.sigmoid()
    width = (2 * torch.minimum(p, 1 - p).detach()).clamp(torch.finfo(p.dtype).tiny, RAMP)  # all of it in (0, 1)
    share = ((p - noise) / width + 0.5).clamp(0, 1).view(-1, 1, 1, 1)
    return torch.where(share < 1, images + share * (images.flip(3) - images), images.flip(3))


# --- the phi ----------------------------------------------------------------------------------------------------------

# radians; of the logarithm; radians; fractions of the side
GEOMETRY = ("rotation", "scale", "shear", "shift_x", "shift_y")

COLOUR_KINDS = ("brightness", "contrast")  # in standard deviations of the data; of the factor's logarithm

OF_RGB = ("saturation", "hue")  # of the factor's logarithm; radians

START = 0.03  # the initial value of every range, and of the flip probability

PACE = 10.0  # change of a range's logarithm per unit of its parameter: so one step size suits a U-Net and a policy


def per_image(channels: int, outputs: int) -> tuple[nn.Sequential, nn.Linear]:
    """A small network from images `[B, channels, H, W]` to features, and a zero last layer to `[B, outputs]`."""
    layers = nn.Conv2d(channels, 8, 3, 2, 1), nn.SiLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.SiLU()
    last = nn.Linear(16, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), last


class Policy(Phi):
    """Random transformations with learned ranges: standard deviations, and a probability for the flip.

    `by` is "all" (one set of ranges), "class" or "image". `ranges` returns them; `kinds` lists their names.
    """

    stochastic = True

    def __init__(self, images: Tensor, classes: int, *, by: str = "all", start: float = START):
        super().__init__()
        channels = images.shape[1]
        self.by, self.conditional = by, by == "class"
        self.kinds = [*GEOMETRY, *COLOUR_KINDS, *(OF_RGB if channels == 3 else ()), "flip"]
        first = torch.full((len(self.kinds),), start).log()
        first[-1] = torch.logit(torch.tensor(start))
        self.register_buffer("first", first)
        if by == "image":
            self.look, self.last = per_image(channels, len(self.kinds))
        else:
            self.change = nn.Parameter(torch.zeros(classes if by == "class" else 1, len(self.kinds)))

    def leave_out(self, kind: str) -> None:
        """Remove a kind, for data where it changes the class of an image (the flip of a digit)."""
        keep = [i for i, k in enumerate(self.kinds) if k != kind]
        self.kinds, self.first = [self.kinds[i] for i in keep], self.first[keep]
        if self.by == "image":
            self.last.weight, self.last.bias = (
                nn.Parameter(p.detach()[keep].clone()) for p in (self.last.weight, self.last.bias)
            )
        else:
            self.change = nn.Parameter(self.change.detach()[:, keep].clone())

    @torch.no_grad()
    def hold(self, ranges: dict[str, float]) -> None:
        """Set these ranges for all images, and nearly zero for other kinds; a `ValueError` names an unknown kind."""
        if unknown := [kind for kind in ranges if kind not in self.kinds]:
            raise ValueError(f"range {unknown[0]!r}: must be among {', '.join(self.kinds)}")
        values = torch.tensor([max(ranges.get(kind, 0.0), 1e-6) for kind in self.kinds])
        self.first = torch.where(torch.tensor([kind == "flip" for kind in self.kinds]), values.logit(), values.log())
        for p in (self.last.weight, self.last.bias) if self.by == "image" else (self.change,):
            p.zero_()

    def levels(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The logarithm of each kind's range (for the flip: the logit) for each image, `[B]`."""
        if self.by == "image":
            change = self.last(self.look(images))
        else:
            change = self.change[labels] if self.by == "class" else self.change.expand(len(images), -1)
        return dict(zip(self.kinds, (self.first + PACE * change).unbind(1), strict=True))

    def ranges(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Each kind's range for each image, `[B]`."""
        return {k: v.sigmoid() if k == "flip" else v.exp() for k, v in self.levels(images, labels).items()}

    def report(self) -> dict[str, float]:
        """Each kind's range (by class: the geometric mean over classes); empty if the ranges depend on the image."""
        if self.by == "image":
            return {}
        of = (self.first + PACE * self.change.detach()).mean(0)
        return {k: float(v.sigmoid() if k == "flip" else v.exp()) for k, v in zip(self.kinds, of, strict=True)}

    def forward(self, images, *, labels, generator, **_):
        noise = randn(images, generator, (len(images), len(self.kinds)))
        levels = self.levels(images, labels)
        draw = {k: levels[k].exp() * noise[:, i] for i, k in enumerate(self.kinds) if k != "flip"}
        nothing = images.new_zeros(len(images))

        def factor(kind: str) -> Tensor:  # the factor minus 1: 0 changes nothing
            return draw[kind].exp() - 1 if kind in draw else nothing

        def drawn(kinds: Sequence[str]) -> list[Tensor]:
            return [draw.get(kind, nothing) for kind in kinds]

        images = affine(images, *drawn(GEOMETRY))
        if "flip" in levels:
            images = drawn_flip(images, levels["flip"], torch.special.ndtr(noise[:, self.kinds.index("flip")]))
        images = color(images, draw.get("brightness", nothing), factor("saturation"), factor("contrast"))
        return turn_hue(images, draw["hue"]) if "hue" in draw else images


register_phi("policy")(Policy)

register_phi("policy_class")(lambda images, classes: Policy(images, classes, by="class"))

register_phi("policy_image")(lambda images, classes: Policy(images, classes, by="image"))
