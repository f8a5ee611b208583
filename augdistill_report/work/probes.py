"""Measurements of a phi and a student, without any training."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from augdistill_core import (
    DistillConfig,
    Trajectories,
    augmented,
    batch_labels,
    draw_base,
    draw_batches,
    draw_segment,
    draw_steps,
    make_phi,
    matching_loss,
    rms,
    seeded,
    unroll,
)
from augdistill_report.data.augmentations import augmentation
from augdistill_report.data.datasets import Split
from augdistill_report.work.distillation import Distillation
from augdistill_report.work.experts import load_trajectories, own_experts
from augdistill_report.work.jobs import Job


@dataclasses.dataclass(frozen=True)
class Probe(Job):
    """The matching loss of a distilled phi on its own random segments, and that of the identity at the same alpha.

    phi is taken at one `moment` of its training (`stored_moments`), with the alpha learned by then unless `alpha` is
    given. `ranges`, if there are any, replace the learned ranges of a policy (`Policy.hold`).
    """

    distilled: Distillation
    moment: str = "last"
    alpha: float | None = None
    segments: int = 8
    ranges: tuple[tuple[str, float], ...] = ()

    kind = "probe"

    def spec(self):
        return super().spec() | {"distilled": self.distilled.spec()}

    def needs(self):
        return [self.distilled, *own_experts(self.setup)]

    def work(self, store, tick):
        distilled = self.distilled
        base, alpha = self.data.train.take(distilled.index(store)), self.alpha
        if alpha is None:
            meta = distilled.stored(store)[1]
            alpha = meta["alpha"] if self.moment == "last" else meta["history"][int(self.moment)]["alpha"]
        phi = distilled.stored_moments(store)[self.moment]
        if self.ranges:
            phi.hold(dict(self.ranges))
        arguments = (phi, alpha, base, load_trajectories(self.setup, store), distilled.config)
        augment = augmentation(distilled.setup.augment, self.data)
        return {}, probe(*arguments, self.segments, self.setup.seed, augment)


@torch.no_grad()
def student_path(student: nn.Module, start: Tensor, phi, train: Split, alpha: float, steps: int, seed: int) -> Tensor:
    """The path `[steps + 1, P]` of a student from `start` by SGD steps of size `alpha` on all of phi(train).

    No momentum; phi is redrawn each step.
    """
    x, index, noise, path = train.images, torch.arange(len(train)), seeded(seed, "path"), [start]
    for _ in range(steps):
        images = augmented(phi, x, train.labels, index, noise)
        path.append(unroll(student, path[-1], [images], batch_labels(phi, train.labels, [index]), alpha))
    return torch.stack(path)


@torch.no_grad()
def phi_images(phi, split: Split, seed: int) -> Tensor:
    """One draw of phi(x) `[n, C, H, W]` for all images of a split, which is phi's base set; without a gradient."""
    return augmented(phi, split.images, split.labels, torch.arange(len(split)), seeded(seed, "picture"))


@torch.no_grad()
def probe(
    phi,
    alpha: float,
    train: Split,
    experts: Trajectories,
    config: DistillConfig,
    segments: int,
    seed: int,
    augment: Callable | None = None,
) -> dict[str, list[float]]:
    """The matching loss and related measures on `segments` random trajectory segments, without training.

    `augment` is the augmentation in the unroll, after phi, with which phi is trained; the identity has it too.
    Lists of one value a segment: `loss` (the matching loss), `identity` (the loss without phi at the same alpha),
    `variance` (the share of `loss` that is noise of phi and of the batches, E||end - E end||^2 divided by the squared
    distance from start to target, estimated from two independent draws), `change` (the relative change of x,
    ||phi(x) - x|| / ||x||) and `spread` (the same norm ratio for the difference of two draws).
    """
    config = dataclasses.replace(config, objective="trajectory")
    generator, identity = seeded(seed, "probe"), make_phi("identity", train.images, 1, 0)
    names = ("loss", "identity", "variance", "change", "spread")
    found = {name: [] for name in names}
    for segment in range(segments):
        _, start, target = draw_segment(experts, config, generator)
        base = draw_base(train.labels, config.episode, generator)
        first, second = (draw_steps(base, config, generator) for _ in range(2))
        x, ends, draws = train.images[base], [], []
        for one, batches in ((phi, first), (phi, second), (identity, first)):
            own = seeded(seed, "probe", segment, len(ends))
            draws.append(augmented(one, x, train.labels[base], base, own))
            fed, _ = draw_batches(one, augment, train.images, train.labels, base, batches, config, "graph", own)
            ends.append(unroll(experts.student, start, fed, batch_labels(one, train.labels, batches), alpha))
        losses = [float(matching_loss(end, target, start)) for end in ends]
        both = float(matching_loss(torch.stack(ends[:2]), target, start))
        loss, size = (losses[0] + losses[1]) / 2, rms(x) or 1.0
        values = (loss, losses[2], loss - both, rms(draws[0] - x) / size, rms(draws[0] - draws[1]) / size)
        for name, value in zip(names, values, strict=True):
            found[name].append(value)
    return found
