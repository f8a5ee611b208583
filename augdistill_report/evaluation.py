"""Scoring a method: fresh students, trained on what it makes of a subset, tested on images that nobody trained on."""

import dataclasses
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from augdistill_core import (
    DistillConfig,
    Trajectories,
    augmented,
    draw_batches,
    draw_segment,
    draw_steps,
    flatten,
    initial_parameters,
    logits_of,
    make_phi,
    matching_loss,
    minibatches,
    rms,
    seeded,
    sgd,
    unflatten,
    unroll,
)
from augdistill_report.data import Split
from augdistill_report.settings import EvalConfig


@torch.no_grad()
def accuracy(student: nn.Module, theta: Tensor, split: Split) -> float:
    """The fraction of `split` that `student` with parameters `theta` `[P]` classifies right."""
    pieces = unflatten(student, theta)
    right = 0
    for part in split.batches(512):
        logits = logits_of(student, pieces, part.images)
        right += int((logits.argmax(1) == part.labels).sum())
    return right / len(split)


def teacher_of(experts: Trajectories) -> Callable[[Tensor], Tensor]:
    """What the experts, as they ended, say of images `[B, C, H, W]`: their mean probabilities `[B, classes]`."""
    student, ends = experts.student, [unflatten(experts.student, way[experts.snapshots - 1]) for way in experts.ways]
    return lambda images: torch.stack([logits_of(student, end, images).softmax(1) for end in ends]).mean(0)


def train_student(
    student: nn.Module, phi, images: Tensor, labels: Tensor, config: EvalConfig, *seed, augment=None, teacher=None
) -> Tensor:
    """One fresh student's final parameters `[P]`: trained on augment(phi(images)), both drawn afresh in every step.

    `phi` None trains on the images themselves. The step size falls to a tenth halfway. One `seed` (path) gives the same
    initialisation, batches and augmentations for every phi, so that methods are compared in pairs. With a `teacher`
    the labels are what it says of each image that is fed (Qin et al. 2024).
    """
    generator, noise, shaking = seeded(*seed), seeded(*seed, "noise"), seeded(*seed, "augment")
    start = initial_parameters(student, generator).to(images)

    @torch.no_grad()
    def batches():
        for i in minibatches(len(images), config.eval_batch, generator):
            fed = augmented(phi, images[i], labels[i], i, noise)
            fed = augmented(augment, fed, labels[i], i, shaking)
            yield fed, teacher(fed) if teacher else labels[i]

    count = config.steps(len(images))

    def rate(step: int) -> float:
        return config.eval_lr * (0.1 if step >= count // 2 else 1.0)

    steps = sgd(student, start, batches(), rate, config.eval_momentum, config.eval_decay)
    *_, (model, _) = itertools.islice(steps, count)
    return flatten(model.parameters()).detach()


def evaluate(
    student: nn.Module,
    phi,
    train: Split,
    scored: dict[str, Split],
    config: EvalConfig,
    seed: int,
    *,
    augment=None,
    teacher=None,
    on_student=None,
) -> dict[str, list[float]]:
    """For each split of `scored`, the accuracy of each of `config.eval_students` students trained on phi(train).

    `augment` is applied after phi; `config.eval_augment` is the caller's to look up, since it may depend on the data,
    and so is the `teacher` for `config.eval_labels`.
    """
    values = {name: [] for name in scored}
    for k in range(config.eval_students):
        arguments = (student, phi, train.images, train.labels, config, seed, "student", k)
        theta = train_student(*arguments, augment=augment, teacher=teacher)
        for name, split in scored.items():
            values[name].append(accuracy(student, theta, split))
        if on_student is not None:
            on_student(k + 1)
    return values


@torch.no_grad()
def student_path(student: nn.Module, start: Tensor, phi, train: Split, alpha: float, steps: int, seed: int) -> Tensor:
    """`[steps + 1, P]`: where a student goes from `start` in plain SGD steps of size `alpha` on all of phi(train)."""
    x, index, noise, way = train.images, torch.arange(len(train)), seeded(seed, "path"), [start]
    for _ in range(steps):
        images = augmented(phi, x, train.labels, index, noise)
        way.append(unroll(student, way[-1], [images], [train.labels], alpha))
    return torch.stack(way)


@torch.no_grad()
def phi_images(phi, split: Split, seed: int) -> Tensor:
    """One draw of phi(x) for all images of a split that is phi's base set, `[n, C, H, W]`, without a gradient."""
    return augmented(phi, split.images, split.labels, torch.arange(len(split)), seeded(seed, "picture"))


@torch.no_grad()
def probe(
    phi, alpha: float, train: Split, experts: Trajectories, config: DistillConfig, segments: int, seed: int
) -> dict[str, list[float]]:
    """What a student makes of phi(train) on `segments` random segments of the experts' ways, without learning anything.

    A list a measure, a value a segment: `loss` (the matching loss), `identity` (the same without phi at the same
    alpha), `variance` (the part of `loss` that is noise, as two independent draws of phi tell: E||end - E end||^2 in
    units of the distance), `change` (how far phi(x) is from x) and `spread` (how far two draws are apart), both in
    sizes of x.
    """
    config = dataclasses.replace(config, objective="trajectory")
    generator, identity = seeded(seed, "probe"), make_phi("identity", train.images, 1, 0)
    names = ("loss", "identity", "variance", "change", "spread")
    found = {name: [] for name in names}
    for segment in range(segments):
        _, start, target = draw_segment(experts, config, generator)
        base, batches = draw_steps(train.labels, config, generator)
        x, labels, ends, draws = train.images[base], [train.labels[b] for b in batches], [], []
        for one in (phi, phi, identity):
            own = seeded(seed, "probe", segment, len(ends))
            draws.append(augmented(one, x, train.labels[base], base, own))
            fed, _ = draw_batches(one, None, train.images, train.labels, base, batches, config, "graph", own)
            ends.append(unroll(experts.student, start, fed, labels, alpha))
        plain = [float(matching_loss(end, target, start)) for end in ends]
        both = float(matching_loss(torch.stack(ends[:2]), target, start))
        loss, size = (plain[0] + plain[1]) / 2, rms(x) or 1.0
        values = (loss, plain[2], loss - both, rms(draws[0] - x) / size, rms(draws[0] - draws[1]) / size)
        for name, value in zip(names, values, strict=True):
            found[name].append(value)
    return found
