"""The learned ranges of a phi in degrees, per cent and pixels, turned by hand; and the matching loss along one range.

A phi with ranges is a policy, one of kornia's phis, or a chain with such links. `dials` lists its ranges; `with_ranges`
gives a copy of it with other ranges and without some links.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from augdistill_core import Phi, Trajectories, Wrapper
from augdistill_report.data.augmentations import augmentation
from augdistill_report.data.datasets import Dataset
from augdistill_report.explorer.choices import Choice
from augdistill_report.run import Run
from augdistill_report.studies.unseen import SEGMENTS, truth
from augdistill_report.work.probes import probe

SMALLEST = 1e-6  # the smallest range, as in `Policy.hold`: its logarithm must be finite

DEGREE = 180 / math.pi

# by kind: the unit, the factor from the phi's own value (None: the side in pixels), and the most that a dial offers
OF_POLICY = {
    "rotation": ("°", DEGREE, 90.0),
    "scale": ("%", 100.0, 100.0),
    "shear": ("%", 100.0, 100.0),
    "shift_x": ("px", None, 0.5),
    "shift_y": ("px", None, 0.5),
    "brightness": ("% sd", 100.0, 200.0),
    "contrast": ("%", 100.0, 200.0),
    "saturation": ("%", 100.0, 200.0),
    "hue": ("°", DEGREE, 180.0),
    "flip": ("%", 100.0, 100.0),
}

OF_KORNIA = {  # a kind that is not here is a fraction, shown in per cent
    "degrees": ("°", 1.0),
    "translate_x": ("px", None),
    "translate_y": ("px", None),
    "shear_x": ("°", 1.0),
    "shear_y": ("°", 1.0),
    "sigma": ("px", 1.0),
    "hue": ("°", DEGREE),
}


@dataclasses.dataclass(frozen=True)
class Dial:
    """One range of a phi, in its `unit`: what was learned, the experts' (None: not known), and the `most` it may be.

    `link` is its place in a chain, `kind` its name there. The phi's own value is that in units divided by `factor`.
    """

    name: str
    link: int
    kind: str
    unit: str
    factor: float
    most: float
    learned: float
    taught: float | None = None


class Links(Wrapper):
    """Some links of a chain, one after the other; without any, the identity."""

    def __init__(self, phis: Iterable[Phi]):
        phis = list(phis)
        super().__init__(*phis)
        self.phis = torch.nn.ModuleList(phis)

    def forward(self, images, **given):
        for phi in self.phis:
            images = phi(images, **given)
        return images


def links_of(phi: Phi) -> list[Phi]:
    """The links of a chain; a list with the phi itself, if it is none."""
    return list(getattr(phi, "phis", [phi]))


def has_ranges(phi: Phi) -> bool:
    return hasattr(phi, "kinds") and hasattr(phi, "first")


def limits(phi: Phi) -> list[float | None]:
    """By kind: the limit that a range cannot pass; None if it has none (then it is learned as a logarithm)."""
    if hasattr(phi, "levels"):
        return [1.0 if kind == "flip" else None for kind in phi.kinds]
    return phi.limit.tolist()


def level_of(value: float, limit: float | None) -> float:
    """What a phi adds up to make a range: its logarithm, or the logit of its share of the limit."""
    value = max(value, SMALLEST)
    if limit is None:
        return math.log(value)
    share = min(value / limit, 1 - SMALLEST)
    return math.log(share / (1 - share))


@torch.no_grad()
def learned_ranges(phi: Phi, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Each kind's range; if it depends on class or image, the geometric mean over `images` (for the flip, of odds)."""
    if not hasattr(phi, "levels"):
        return phi.report()
    means = {kind: float(levels.mean()) for kind, levels in phi.levels(images, labels).items()}
    return {k: 1 / (1 + math.exp(-v)) if k == "flip" else math.exp(v) for k, v in means.items()}


def taught_ranges(choice: Choice, run: Run) -> dict[str, float]:
    """The ranges of the augmentation that the phi's experts were trained with, by kinds of a policy."""
    return truth(dataclasses.replace(run.settings, taught_augment=choice.like.setup.expert_augment))


def dials(choice: Choice, phi: Phi, run: Run, images: Tensor, labels: Tensor) -> list[Dial]:
    """The ranges of `phi`, the choice at one moment. `images` `[B, C, H, W]` are those that it is shown on."""
    links, found = links_of(phi), []
    untaught, taught = choice.like.setup.expert_augment == "none", taught_ranges(choice, run)
    side = images.shape[-1]
    for number, link in enumerate(links):
        if not has_ranges(link):
            continue
        for (kind, value), limit in zip(learned_ranges(link, images, labels).items(), limits(link), strict=True):
            unit, factor, *most = OF_POLICY[kind] if hasattr(link, "levels") else OF_KORNIA.get(kind, ("%", 100.0))
            factor = float(side) if factor is None else factor
            top = factor * limit if limit else most[0] * (side if unit == "px" else 1)
            its = 0.0 if untaught else taught.get(kind, 0.0) if taught and hasattr(link, "levels") else None
            name = kind.replace("_", " ") if len(links) == 1 else f"{number + 1} {kind.replace('_', ' ')}"
            own = factor * value
            found.append(
                Dial(name, number, kind, unit, factor, max(top, own), own, None if its is None else factor * its)
            )
    return found


def checked_turns(values: dict[str, float], rows: list[Dial]) -> dict[str, float]:
    """The turned ranges among `values`, in units, by name; a `ValueError` names one that is unknown or out of range."""
    by_name = {row.name: row for row in rows}
    for name, value in values.items():
        if name not in by_name:
            raise ValueError(f"range {name!r}: this phi has {', '.join(by_name) or 'no ranges'}")
        most = by_name[name].most
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= most:
            raise ValueError(f"{name}={value}: must be in [0, {most:.3g}] {by_name[name].unit}")
    return dict(values)


def with_ranges(phi: Phi, rows: list[Dial], values: dict[str, float], off: Iterable[int] = ()) -> Phi:
    """A copy of `phi` with the ranges `values` (in units, by name) and without the links `off`.

    A range that depends on class or image is multiplied: its mean over the shown images becomes the value.
    """
    if not values and not off:
        return phi
    out = copy.deepcopy(phi)
    links = links_of(out)
    for row in rows:
        if row.name in values:
            link, place = links[row.link], links[row.link].kinds.index(row.kind)
            limit, first = limits(link)[place], link.first.clone()
            change = (level_of(v / row.factor, limit) for v in (values[row.name], row.learned))
            now, before = change
            first[place] += now - before
            link.first = first
    return Links(link for k, link in enumerate(links) if k not in set(off)) if off else out


def loss_along(
    row: Dial,
    phi_at: Callable[[float], Phi],
    choice: Choice,
    data: Dataset,
    experts: Trajectories,
    tick: Callable[[int, int], None],
) -> dict[float, tuple[float, float]]:
    """By value of one range, in units: the excess of the matching loss over that at the learned value, and its error.

    `phi_at(value)` is the phi with that range. The loss is that of two independent draws, so that randomness itself is
    not punished; the differences are taken on the same `SEGMENTS` trajectory segments, and the error is their standard
    error. `tick(done, total)` may raise, to stop.
    """
    like, marks = choice.like, {row.learned, row.taught or 0.0}
    values = sorted(v for v in marks | {f * row.learned for f in (0.0, 0.5, 1.5, 2.0, 3.0)} if v <= row.most)
    base, alpha, losses = data.train.take(like.subset.index(data)), choice.alpha(), {}
    augment = augmentation(like.setup.augment, data)
    for done, value in enumerate(values):
        tick(done, len(values))
        found = probe(phi_at(value), alpha, base, experts, like.config, SEGMENTS, like.setup.seed, augment)
        losses[value] = np.subtract(found["loss"], found["variance"])
    over = {value: those - losses[row.learned] for value, those in losses.items()}
    return {v: (float(those.mean()), float(those.std(ddof=1) / len(those) ** 0.5)) for v, those in over.items()}
