"""Scoring a method: fresh students, trained on what it makes of a subset, judged on images that nobody trained on."""

import dataclasses
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from augdistill_core import (
    DistillConfig,
    Trajectories,
    augmented,
    draw_base,
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
from augdistill_report.instaaug import InstaAug
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


MOST = 20  # times eval_steps that a student with patience takes at most


class Patience:
    """Ends a training that stops improving: the step size falls to a tenth, and then it is over; the best is kept."""

    def __init__(self, patience: int):
        self.patience, self.factor, self.best, self.state, self.failed, self.looks = patience, 1.0, -1.0, {}, 0, 0

    def is_over(self, model: nn.Module, accuracy: float) -> bool:
        """Whether training is over, now that the model has reached this accuracy."""
        self.looks += 1
        if accuracy > self.best:
            self.best, self.failed = accuracy, 0
            self.state = {name: t.clone() for name, t in model.state_dict().items()}
        else:
            self.failed += 1
        if self.failed == self.patience and self.factor == 1:
            self.factor, self.failed = 0.1, 0
        return self.failed == self.patience or self.looks == MOST


def train_student(
    student: nn.Module,
    phi,
    images: Tensor,
    labels: Tensor,
    config: EvalConfig,
    *seed,
    augment=None,
    teacher=None,
    validation: Split | None = None,
) -> nn.Module:
    """One fresh student, trained on augment(phi(images)), both drawn afresh in every step; in its evaluation mode.

    `phi` None trains on the images themselves. The step size falls to a tenth halfway, or as `config.eval_patience`
    says, by accuracy on the `validation` split. One `seed` (path) gives the same initialisation, batches and
    augmentations for every phi, so that methods are compared in pairs. With a `teacher` the labels are what it says of
    each image that is fed (Qin et al. 2024). An augmentation that learns (`InstaAug`) learns along. A phi or an
    augmentation that changes the shape or returns what is not finite is a `ValueError` that names it.
    """
    generator, noise, shaking = seeded(*seed), seeded(*seed, "noise"), seeded(*seed, "augment")
    start = initial_parameters(student, generator).to(images)
    learns = isinstance(augment, InstaAug)

    def through(method, x: Tensor, i: Tensor, own: torch.Generator) -> Tensor:
        x = augmented(method, x, labels[i], i, own)
        if not x.isfinite().all():
            raise ValueError(f"{name_of(method)} returns values that are not finite")
        return x

    def batches():
        for i in minibatches(len(images), config.eval_batch, generator):
            with torch.no_grad():
                fed = through(phi, images[i], i, noise)
            with torch.set_grad_enabled(learns):
                fed = through(augment, fed, i, shaking)
            yield fed, teacher(fed.detach()) if teacher else labels[i]
            if learns:
                augment.learn()

    count, patience = config.steps(len(images)), Patience(config.eval_patience)

    def rate(step: int) -> float:
        if config.eval_patience:
            return config.eval_lr * patience.factor
        return config.eval_lr * (0.1 if step >= count // 2 else 1.0)

    steps = sgd(student, start, batches(), rate, config.eval_momentum, config.eval_decay)
    if not config.eval_patience:
        *_, (model, _) = itertools.islice(steps, count)
        return model.eval()
    for step, (model, _) in enumerate(steps, 1):
        if step % count == 0:
            over = patience.is_over(model, accuracy_of(model.eval(), validation))
            model.train()
            if over:
                break
    model.load_state_dict(patience.state)
    return model.eval()


def name_of(method) -> str:
    """What a phi or an augmentation is called in a message."""
    return type(getattr(method, "phi", method)).__name__


def accuracy_of(model: nn.Module, split: Split) -> float:
    """The `accuracy` of a model with its own parameters."""
    return accuracy(model, flatten(model.parameters()).detach(), split)


def evaluate(
    student: nn.Module,
    phi,
    train: Split,
    validation: Split,
    config: EvalConfig,
    seed: int,
    *,
    augment=None,
    learner=None,
    teacher=None,
    on_student=None,
) -> tuple[list[nn.Module], list[float]]:
    """`config.eval_students` students trained on phi(train), and the accuracy of each on the validation split.

    `augment` is applied after phi; `config.eval_augment` is the caller's to look up, since it may depend on the data,
    and so is the `teacher` for `config.eval_labels`. In its place `learner(images, seed)` builds an augmentation that
    learns, one for each student.
    """
    images, labels, models = train.images, train.labels, []
    for k in range(config.eval_students):
        own = learner(images, k) if learner else augment
        arguments = (student, phi, images, labels, config, seed, "student", k)
        models.append(train_student(*arguments, augment=own, teacher=teacher, validation=validation))
        if on_student is not None:
            on_student(k + 1)
    return models, [accuracy_of(model, validation) for model in models]


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
    alpha), `variance` (the part of `loss` that is noise, of phi and of the batches, as two independent draws tell:
    E||end - E end||^2 in units of the distance), `change` (how far phi(x) is from x) and `spread` (how far two draws
    are apart), both in sizes of x.
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
            fed, _ = draw_batches(one, None, train.images, train.labels, base, batches, config, "graph", own)
            ends.append(unroll(experts.student, start, fed, [train.labels[b] for b in batches], alpha))
        plain = [float(matching_loss(end, target, start)) for end in ends]
        both = float(matching_loss(torch.stack(ends[:2]), target, start))
        loss, size = (plain[0] + plain[1]) / 2, rms(x) or 1.0
        values = (loss, plain[2], loss - both, rms(draws[0] - x) / size, rms(draws[0] - draws[1]) / size)
        for name, value in zip(names, values, strict=True):
            found[name].append(value)
    return found
