"""Scores a method: trains fresh students on a subset with it, and tests them on images that nothing was trained on."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from augdistill_core import (
    Added,
    Applied,
    Config,
    Stored,
    augmented,
    initial_parameters,
    knob,
    labels_under,
    minibatches,
    seeded,
    sgd,
    sgd_together,
    teacher_of,
    to_device,
    with_parameters,
)
from augdistill_report.data.augmentations import AUGMENTATIONS, RANDOM_POLICY, Choices, augmentation
from augdistill_report.data.datasets import Split
from augdistill_report.data.instaaug import InstaAug
from augdistill_report.files.store import Store, a_fraction
from augdistill_report.work.difficulty import ranking, subset_index
from augdistill_report.work.experts import load_trajectories, own_experts
from augdistill_report.work.jobs import Job, Subset, Tick
from augdistill_report.work.setup import Setup, public_name
from augdistill_report.work.students import STUDENTS, accuracy_of

if TYPE_CHECKING:  # an argument: its own digest holds what it depends on
    from augdistill_report.work.distillation import Distillation


MAX_LOOKS = 20  # rounds of eval_steps, at most, of a student with patience


@dataclasses.dataclass(frozen=True)
class EvalConfig(Config):
    """How a method is scored: fresh students trained on its images by SGD, with the step size x0.1 halfway (MTT).

    MTT's protocol is eval_epochs 1000, eval_batch 256, eval_lr 0 and eval_augment dsa. DC-Bench's is the same with
    eval_lr .01. (Both codes train one epoch more. They drop the step size, and reset the momentum, two epochs later.)
    """

    eval_students: int = knob(5, "fresh students, each with its own seed", low=2)
    eval_steps: int = knob(300, "SGD steps of each student", low=2)
    eval_epochs: int = knob(0, "epochs of each student, instead of eval_steps; 0 = use eval_steps", low=0)
    eval_batch: int = knob(64, "images in a batch (all, if there are fewer)", low=1)
    eval_lr: float = knob(
        0.02, "SGD step size; 0 = the alpha that phi learned (without a phi: the setting alpha)", low=0
    )
    eval_momentum: float = knob(0.9, "SGD momentum", low=0, high=1)
    eval_decay: float = knob(5e-4, "weight decay", low=0)
    eval_patience: int = knob(
        0,
        "early stopping: rounds of eval_steps without a better validation accuracy until the step size falls to a "
        "tenth, and as many again until training ends, with the best student; 0 = off",
        low=0,
        high=MAX_LOOKS - 1,
    )
    eval_student: str = knob(
        "convnet", "the students' architecture: the experts' ConvNet, or another", choices=("convnet", *STUDENTS)
    )
    eval_augment: str = knob(
        "none",
        "augmentation after phi, redrawn each step, or kornia:NAME(key=value)",
        choices=Choices("eval_augment", (*AUGMENTATIONS, RANDOM_POLICY, "instaaug")),
    )
    eval_magnitude: int = knob(9, "RandAugment's magnitude, if eval_augment is randaugment", low=0, high=30)
    eval_candidate: int = knob(0, "which random ranges, if eval_augment is random_policy", low=0)
    eval_augment_probability: float = knob(
        1.0,
        "fraction of the images that it is applied to, redrawn each step; not for instaaug",
        low=0,
        high=1,
    )
    eval_reward: float = knob(1.0, "factor of InstaAug's reward for wide ranges, if eval_augment is instaaug", low=0)
    eval_copies: int = knob(
        0, "fixed copies of each image, augmented before training; 0 = augmented anew in each step", low=0, high=1000
    )
    eval_labels: str = knob(
        "hard",
        "hard = the images' own labels, or those of phi; soft = the experts' mean probabilities",
        choices=("hard", "soft"),
    )
    phi_strength: float = knob(1.0, "lambda: students train on x + lambda (phi(x) - x)", low=0)
    phi_probability: float = knob(
        1.0, "fraction of the images that phi is applied to, redrawn each step", low=0, high=1
    )

    def __post_init__(self):
        super().__post_init__()
        if self.eval_patience and self.eval_epochs:
            raise ValueError(
                f"eval_patience={self.eval_patience}: counts rounds of eval_steps, so eval_epochs must be 0, and is "
                f"{self.eval_epochs}"
            )

    def steps(self, images: int) -> int:
        """The number of a student's SGD steps on a subset of so many images."""
        return self.eval_epochs * -(-images // self.eval_batch) or self.eval_steps


CONTROLS = {
    "stored": Stored,
    "added": Added,
}  # controls that keep only one effect of phi, by their name in `Evaluation.only`


@dataclasses.dataclass(frozen=True)
class Evaluation(Job):
    """Fresh students trained on a subset, through a distilled phi or (None) without it, and their validation accuracy.

    `only` "stored" trains them only on phi(blank image) (`Stored`), "added" only on what phi adds to each image,
    without the image (`Added`). Their test accuracy is measured by a `Score` alone.
    """

    subset: Subset
    config: EvalConfig
    distilled: "Distillation | None" = None
    only: str = ""

    kind = "students"
    ahead = False  # the `Score` that needs them trains them, and does not store them: they are large
    form = {"validation": [a_fraction]}  # noqa: RUF012

    @property
    def cost(self):
        c, images = self.config, round(self.subset.about(self.data))
        return c.eval_students * c.steps(images) * min(images, c.eval_batch)

    def __post_init__(self):
        if self.only not in (("", *CONTROLS) if self.distilled else ("",)):
            controls = " or ".join(map(repr, CONTROLS))
            raise ValueError(f"only={self.only!r}: must be empty, or {controls} with a distilled phi")
        if self.config.eval_copies and self.config.eval_augment == "instaaug":
            raise ValueError(
                f"eval_copies={self.config.eval_copies}: must be 0 for instaaug, which learns all the time"
            )
        if not (self.config.eval_lr or self.distilled):
            raise ValueError("eval_lr=0.0: must be above 0 without a phi, since no step size was learned")
        if self.distilled and images_of(self.distilled.setup) != images_of(self.setup):
            ours, its = (", ".join(map(str, images_of(s))) for s in (self.setup, self.distilled.setup))
            raise ValueError(f"phi {self.distilled.phi!r} was trained on {its}: not for {ours} (dataset, size, zca)")

    def spec(self):
        return super().spec() | {"distilled": self.distilled and self.distilled.spec()}

    def needs(self):
        teachers = own_experts(self.setup) if self.config.eval_labels == "soft" else []
        return [*([self.distilled] if self.distilled else []), *teachers, *ranking(self.subset, self.setup)]

    def student(self):
        build = STUDENTS.get(self.config.eval_student)
        if build is None:
            return super().student()
        return build(self.data.shape[0], len(self.data.classes), self.setup.size).to(self.setup.device)

    def phi(self, store: Store) -> Applied | None:
        """The distilled phi as students are trained with it: with strength, probability and control (`only`)."""
        if self.distilled is None:
            return None
        phi = self.distilled.stored_phi(store).phi
        if phi.bound and self.subset != self.distilled.subset:
            its, ours = (subset.about(self.data) for subset in (self.distilled.subset, self.subset))
            raise ValueError(
                f"phi {self.distilled.phi!r} holds something for each of the {its} images that it was trained on "
                f"({self.distilled.subset}): it cannot change {ours} others ({self.subset})"
            )
        phi = CONTROLS[self.only](phi) if self.only else phi
        return Applied(phi, self.config.phi_strength, self.config.phi_probability)

    def augment(self) -> Applied | None:
        """The augmentation after phi, with its probability; None if there is none, or if it learns with students."""
        c = self.config
        if c.eval_augment == "instaaug":
            return None
        known = augmentation(c.eval_augment, self.data, c.eval_magnitude, c.eval_candidate)
        return known and Applied(known, probability=c.eval_augment_probability)

    def work(self, store, tick):
        models, found = self.trained(store, tick)
        states = {f"{k}/{name}": t for k, model in enumerate(models) for name, t in model.state_dict().items()}
        return states, {"validation": found}

    def trained(self, store: Store, tick: Tick) -> tuple[list[torch.nn.Module], list[float]]:
        """The trained students, and the validation accuracy of each, in [0, 1]."""
        data, config = self.data, self.config
        if not config.eval_lr:
            config = dataclasses.replace(config, eval_lr=learned_step_size(self.distilled, store))
        train, validation = data.train.take(subset_index(self.subset, self.setup, store)), data.validation.made()
        arguments = (self.student(), self.phi(store), train, validation, config, self.setup.seed)
        soft, total = config.eval_labels == "soft", config.eval_students
        teacher = teacher_of(load_trajectories(self.setup, store)) if soft else None
        learns = config.eval_augment == "instaaug"
        learner = functools.partial(InstaAug, reward=config.eval_reward) if learns else None
        options = dict(augment=self.augment(), learner=learner, teacher=teacher)
        return evaluate(*arguments, **options, on_student=lambda done: tick(done, total))

    def stopped(self, store: Store) -> str:
        """The kind of `Stop` that ended phi's training early; "" if it ran to its end, or there is no phi."""
        stop = self.distilled and self.distilled.stored(store)[1]["stopped"]
        return stop["kind"] if stop else ""

    def students(self, store: Store, tick: Tick) -> tuple[list[torch.nn.Module], list[float]]:
        """The same, loaded if `Run.choose` has stored them; else trained now, and not stored since they are large."""
        if not store.has(self.kind, self.spec()):
            return self.trained(store, tick)
        tensors, meta = self.stored(store)
        count = len(meta["validation"])
        models = [self.restored(self.student().eval(), tensors, str(k), store) for k in range(count)]
        return models, meta["validation"]


def learned_step_size(distilled: "Distillation", store: Store) -> float:
    """The learned alpha, the students' step size if eval_lr is 0; a `ValueError` if it is not above 0."""
    alpha = distilled.stored_phi(store).alpha
    if not alpha > 0:
        raise ValueError(f"eval_lr=0: phi {distilled.phi!r} learned alpha {alpha:g}, must be above 0; set eval_lr")
    return alpha


def images_of(setup: Setup) -> tuple:
    """What determines the images in a setup: the data set's name, the size, and whether they are whitened."""
    return public_name(setup.dataset), setup.size, setup.zca


@dataclasses.dataclass(frozen=True)
class Score(Job):
    """The test accuracy of an evaluation's students. Nothing else opens the test split."""

    evaluation: Evaluation

    kind = "accuracy"
    form = {"validation": [a_fraction], "test": [a_fraction]}  # noqa: RUF012

    @property
    def cost(self):
        return self.evaluation.cost

    def spec(self):
        return super().spec() | {"evaluation": self.evaluation.spec()}

    def needs(self):
        return [self.evaluation, *self.evaluation.needs()]

    def work(self, store, tick):
        models, validation = self.evaluation.students(store, tick)
        test = self.evaluation.data.test.opened().made()
        accuracies = {"validation": validation, "test": [accuracy_of(model, test) for model in models]}
        return {}, accuracies | {"stopped": self.evaluation.stopped(store)}


class Patience:
    """Early stopping: without improvement the step size falls to a tenth, then training ends with the best model."""

    def __init__(self, patience: int):
        self.patience, self.factor, self.best, self.state, self.failed, self.looks = patience, 1.0, -1.0, {}, 0, 0

    def is_over(self, model: nn.Module, accuracy: float) -> bool:
        """Whether training ends, given the model's current validation accuracy."""
        self.looks += 1
        if accuracy > self.best:
            self.best, self.failed = accuracy, 0
            self.state = {name: t.clone() for name, t in model.state_dict().items()}
        else:
            self.failed += 1
        if self.failed == self.patience and self.factor == 1:
            self.factor, self.failed = 0.1, 0
        return self.failed == self.patience or self.looks == MAX_LOOKS


def batches_of_student(
    student: nn.Module, phi, images: Tensor, labels: Tensor, config: EvalConfig, *seed, augment=None, teacher=None
) -> tuple[Tensor, Iterator[tuple[Tensor, Tensor]], Callable[[], None]]:
    """One student's start `[P]`, its endless batches as described in `train_student`, and a check of all so far.

    The check is the `ValueError` for images that are not finite. On a CPU it runs with each batch. On a CUDA device,
    which the program must not wait for, the caller runs it at the end.
    """
    generator, noise, shaking = seeded(*seed), seeded(*seed, "noise"), seeded(*seed, "augment")
    start = initial_parameters(student, generator).to(images)
    learns, broken = isinstance(augment, InstaAug), {}

    def check() -> None:
        for name, found in broken.items():
            if found:
                raise ValueError(f"{name} returns values that are not finite")

    def through(method, x: Tensor, i: Tensor, own: torch.Generator) -> Tensor:
        x, name = augmented(method, x, labels[i], i, own), name_of(method)
        broken[name] = ~x.isfinite().all() | broken.get(name, False)
        if not x.is_cuda:
            check()
        return x

    def drawn(i: Tensor) -> Tensor:
        with torch.no_grad():
            fed = through(phi, images[i], i, noise)
        with torch.set_grad_enabled(learns):
            return through(augment, fed, i, shaking)

    positions = to_device(torch.arange(len(images)), images.device).split(512)
    copies = [drawn(i) for _ in range(config.eval_copies) for i in positions]
    fixed = torch.cat(copies) if copies else None

    def batches():
        for picked in minibatches(max(config.eval_copies, 1) * len(images), config.eval_batch, generator):
            k = to_device(picked, images.device)
            i = k % len(images)
            fed = drawn(i) if fixed is None else fixed[k]
            yield fed, teacher(fed.detach()) if teacher else labels_under(phi, labels[i], i).detach()
            if learns:
                augment.learn()

    return start, batches(), check


def lr_of_step(config: EvalConfig, steps: int) -> Callable[[int], float]:
    """The step size of a training of so many steps, by the number of the step: a tenth from the middle on."""
    return lambda step: config.eval_lr * (0.1 if step >= steps // 2 else 1.0)


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
    """One fresh student, trained on augment(phi(images)), both redrawn each step; returned in evaluation mode.

    `images` are `[n, C, H, W]`, `labels` `[n]`. `phi` None trains on the images themselves. The step size falls to a
    tenth halfway, or by early stopping on the `validation` split (`config.eval_patience`). The same `seed` (a path)
    gives the same initialisation, batches and augmentations for every phi, so that methods are compared in pairs. With
    a `teacher` the labels are its probabilities for each augmented image (Qin et al. 2024). An augmentation that learns
    (`InstaAug`) is trained with the student. A `ValueError` names a phi or an augmentation that changes the images'
    shape or returns values that are not finite.
    """
    options = dict(augment=augment, teacher=teacher)
    start, batches, check = batches_of_student(student, phi, images, labels, config, *seed, **options)
    count, patience = config.steps(len(images)), Patience(config.eval_patience)
    rate = (lambda step: config.eval_lr * patience.factor) if config.eval_patience else lr_of_step(config, count)
    steps = sgd(student, start, batches, rate, config.eval_momentum, config.eval_decay)
    if not config.eval_patience:
        *_, (model, _) = itertools.islice(steps, count)
        check()
        return model.eval()
    for step, (model, _) in enumerate(steps, 1):
        if step % count == 0:
            check()
            over = patience.is_over(model, accuracy_of(model.eval(), validation))
            model.train()
            if over:
                break
    model.load_state_dict(patience.state)
    return model.eval()


def train_students(
    student: nn.Module,
    phi,
    images: Tensor,
    labels: Tensor,
    config: EvalConfig,
    seeds: Sequence[tuple],
    *,
    augment=None,
    teacher=None,
    on_student: Callable[[int], None] | None = None,
) -> list[nn.Module]:
    """One student for each of `seeds`, trained together (`sgd_together`): those of `train_student`, up to rounding.

    For a CUDA device, without patience and an augmentation that learns. `on_student(k)` is called when k / n of the
    training of the n students is done.
    """
    options, count = dict(augment=augment, teacher=teacher), config.steps(len(images))
    each = [batches_of_student(student, phi, images, labels, config, *seed, **options) for seed in seeds]
    starts, batches, checks = zip(*each, strict=True)
    rate, given, theta = lr_of_step(config, count), zip(*batches, strict=True), torch.stack(starts)
    steps = sgd_together(student, theta, given, rate, config.eval_momentum, config.eval_decay)
    for step, (theta, _) in enumerate(itertools.islice(steps, count), 1):  # noqa: B007, the last one is used
        done = step * len(seeds) // count
        if on_student is not None and done > (step - 1) * len(seeds) // count:
            on_student(done)
    for check in checks:
        check()
    return [with_parameters(student, one).eval() for one in theta]


def name_of(method) -> str:
    """The name of a phi or an augmentation for a message."""
    return type(getattr(method, "phi", method)).__name__


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
    """`config.eval_students` students trained on phi(train), and the validation accuracy of each, in [0, 1].

    `augment` is applied after phi. The caller builds it from `config.eval_augment`, and the `teacher` for
    `config.eval_labels`, since both may depend on the data. Instead of `augment`, `learner(images, seed)` builds an
    augmentation that learns, one for each student. `on_student(count)` is called after each student. On a CUDA device
    the students are trained together.
    """
    arguments, models = (student, phi, train.images, train.labels, config), []
    seeds = [(seed, "student", k) for k in range(config.eval_students)]
    if train.images.is_cuda and config.eval_student == "convnet" and not (learner or config.eval_patience):
        models = train_students(*arguments, seeds, augment=augment, teacher=teacher, on_student=on_student)
    else:
        for k, own_seed in enumerate(seeds):
            own = learner(train.images, seeded(*own_seed, "learner").initial_seed()) if learner else augment
            options = dict(augment=own, teacher=teacher, validation=validation)
            models.append(train_student(*arguments, *own_seed, **options))
            if on_student is not None:
                on_student(k + 1)
    return models, [accuracy_of(model, validation) for model in models]
