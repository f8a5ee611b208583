"""Policies: phi models that know the transformations, and learn how far each may go. Section 4 of `augdistill_core`.

A policy turns, scales, shears, shifts, flips and recolours every image by draws of its own, and what it learns is their
ranges: one set for all images, one a class, or one an image (a small network looks at it, as in InstaAug; Miao et al.
2022). All draws are reparameterised, so that a range gets its gradient through the images that it made.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from augdistill_method.phi import Phi, register_phi
from augdistill_method.random import randn
from augdistill_method.transforms import affine, color, turn_hue

RAMP = 0.1  # of the draws of a flip are between none and one


def drawn_flip(images: Tensor, logit: Tensor, noise: Tensor) -> Tensor:
    """`flip` with the probability p of a `logit`, by uniform `noise` u in (0, 1); one draw in ten is a blend.

    The part of the mirror image, s = (p - u) / w + 1/2 within [0, 1], has the mean p, and rises from 0 to 1 in w of the
    draws (as a hard concrete variable does; Louizos et al. 2018). Whatever f a blend x + s (flip(x) - x) is fed to, the
    mean of its derivative by p is the integral along the whole line, f(flip(x)) - f(x), as of a draw that is one or
    none. Derivatives at the ends of the line alone (a straight-through gradient) say what a trace of the mirror image
    does, which is a double exposure: they unlearn flips that help.
    """
    p = logit.sigmoid()
    width = (2 * torch.minimum(p, 1 - p).detach()).clamp(torch.finfo(p.dtype).tiny, RAMP)  # all of it in (0, 1)
    share = ((p - noise) / width + 0.5).clamp(0, 1).view(-1, 1, 1, 1)
    return torch.where(share < 1, images + share * (images.flip(3) - images), images.flip(3))


# --- the phi ----------------------------------------------------------------------------------------------------------

GEOMETRY = ("rotation", "scale", "shear", "shift_x", "shift_y")  # radians; of the logarithm; radians; parts of the side

COLOUR_KINDS = ("brightness", "contrast")  # in standard deviations of the data; of the factor's logarithm

OF_RGB = ("saturation", "hue")  # of the factor's logarithm; radians

START = 0.03  # every range, and the probability of a flip, before anything is learned

PACE = 10.0  # a step of a parameter, in steps of its range's logarithm: so one step size serves a U-Net and its policy


def per_image(channels: int, outputs: int) -> tuple[nn.Sequential, nn.Linear]:
    """A small network that looks at images `[B, channels, H, W]`, and its last layer, zero at first: `[B, outputs]`."""
    layers = nn.Conv2d(channels, 8, 3, 2, 1), nn.SiLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.SiLU()
    last = nn.Linear(16, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), last


class Policy(Phi):
    """Random transformations of which the ranges are learned: standard deviations, and a probability for the flip.

    `by` is "all" (one set of ranges), "class" or "image". `ranges` gives them; `kinds` names them.
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
        """Take a kind away, where it changes what an image shows (a digit's flip)."""
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
        """Have these ranges, for all images, and next to nothing of the kinds that are not named."""
        if unknown := [kind for kind in ranges if kind not in self.kinds]:
            raise ValueError(f"range {unknown[0]!r}: must be among {', '.join(self.kinds)}")
        values = torch.tensor([max(ranges.get(kind, 0.0), 1e-6) for kind in self.kinds])
        self.first = torch.where(torch.tensor([kind == "flip" for kind in self.kinds]), values.logit(), values.log())
        for p in (self.last.weight, self.last.bias) if self.by == "image" else (self.change,):
            p.zero_()

    def levels(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Each kind's logarithm of its range (a flip's logit) for each image, `[B]`."""
        if self.by == "image":
            change = self.last(self.look(images))
        else:
            change = self.change[labels] if self.by == "class" else self.change.expand(len(images), -1)
        return dict(zip(self.kinds, (self.first + PACE * change).unbind(1), strict=True))

    def ranges(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Each kind's range for each image, `[B]`."""
        return {k: v.sigmoid() if k == "flip" else v.exp() for k, v in self.levels(images, labels).items()}

    def report(self) -> dict[str, float]:
        """Each kind's range, the geometric mean over classes where they differ; nothing where an image decides."""
        if self.by == "image":
            return {}
        of = (self.first + PACE * self.change.detach()).mean(0)
        return {k: float(v.sigmoid() if k == "flip" else v.exp()) for k, v in zip(self.kinds, of, strict=True)}

    def forward(self, images, *, labels, generator, **_):
        noise = randn(images, generator, (len(images), len(self.kinds)))
        levels = self.levels(images, labels)
        draw = {k: levels[k].exp() * noise[:, i] for i, k in enumerate(self.kinds) if k != "flip"}
        nothing = images.new_zeros(len(images))

        def factor(kind: str) -> Tensor:  # a factor, less the one that changes nothing
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
