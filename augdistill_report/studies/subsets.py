"""The test accuracy of students trained on subsets by each method: what notebook 05 learns, selects and scores.

All methods (`subset_methods`) have one protocol: the same student, the same number of steps (or, as a second budget,
until validation accuracy stops improving), the same nested and stratified subsets, and selection on the validation
split. Intervals are over `settings.subset_repeats` repetitions, each with its own subsets and phis; experts and the
students' seeds are the same in all of them.
"""

import dataclasses

import torch
import torch.nn.functional as F

from augdistill_core import DistillConfig, augmented, labels_under, seeded, snapshots_every
from augdistill_report.data.augmentations import augmentation
from augdistill_report.data.instaaug import InstaAug
from augdistill_report.files.store import Store
from augdistill_report.settings import Settings
from augdistill_report.show.image_grids import readable_choice
from augdistill_report.studies.drift import Drift, shares
from augdistill_report.studies.subjects import experts_bytes, stored_bytes
from augdistill_report.studies.subset_methods import (
    CONTROL,
    FULL,
    Method,
    methods,
)
from augdistill_report.studies.unseen import Repetition
from augdistill_report.work.difficulty import subset_index
from augdistill_report.work.distillation import Distillation
from augdistill_report.work.experts import load_trajectories
from augdistill_report.work.jobs import Subset
from augdistill_report.work.scoring import EvalConfig, Evaluation, train_student
from augdistill_report.work.setup import Setup

Key = tuple[str, float, int]  # of an evaluation and its score: method id, fraction, number of the repetition


@dataclasses.dataclass(frozen=True)
class Trial(Repetition):
    """One repetition in the setup of `settings`, with its own subsets, by `number`."""

    number: int = 0

    def setup(self, augment: str) -> Setup:
        """As in `Repetition`, but with the given `expert_files` if they have that augmentation."""
        return self.settings.select(Setup) if augment == self.settings.expert_augment else super().setup(augment)

    def subset(self, fraction: float, window: float | None = None) -> Subset:
        return Subset(self.settings.seed + self.number, fraction=fraction, window=window)

    def distilled(self, method: Method, fraction: float, option: dict) -> Distillation | None:
        """The job of training a method's phi on a subset, with one of its options; None for a method without a phi."""
        if not method.phi:
            return None
        changes = method.recipe(self) | {k: v for k, v in option.items() if k in DistillConfig.names()}
        job = self.distillation(method.phi, self.subset(fraction, option.get("window")), method.experts, **changes)
        return dataclasses.replace(job, setup=dataclasses.replace(job.setup, augment=method.under or job.setup.augment))

    def learned(self, fraction: float, chosen: dict[tuple[str, float], dict]) -> dict[str, Distillation]:
        """The phis trained on a subset with the chosen options, by method id; one of two methods is under the first."""
        found: dict[str, Distillation] = {}
        for id, method in methods(self.settings, fraction).items():
            job = self.distilled(method, fraction, chosen[id, fraction])
            if job and job not in found.values():
                found[id] = job
        return found

    def scored(self, method: Method, fraction: float, option: dict, **changes) -> Evaluation:
        """The evaluation of a method on a subset, with one of its options."""
        changes = {k: v for k, v in option.items() if k in EvalConfig.names()} | changes
        return self.evaluation(
            self.subset(fraction, option.get("window")), self.distilled(method, fraction, option), **changes
        )


def trials(settings: Settings) -> list[Trial]:
    return [Trial(settings, number) for number in range(settings.subset_repeats)]


def choose(run, fractions: list[float]) -> dict[tuple[str, float], dict]:
    """Each method's option at each fraction, and that of all the data: the best on validation, in the first trial.

    A method that `follows` another keeps what is chosen for that one, if both are in the table.
    """
    settings, first = run.settings, trials(run.settings)[0]
    rows = {(id, f): method for f in fractions for id, method in methods(settings, f).items()} | {(FULL.id, 1.0): FULL}
    found: dict[tuple[str, float], dict] = {}

    def kept(method: Method, f: float) -> dict:
        other = method.follows, f
        keys = {k for alternatives in rows[other].choices for o in alternatives for k in o} if other in rows else ()
        return {k: found[other][k] for k in keys}

    while left := {key: method for key, method in rows.items() if key not in found}:
        ready = {(id, f): method for (id, f), method in left.items() if (method.follows, f) not in left}
        options = {
            (id, f): [o for o in method.options(settings) if all(o.get(k, v) == v for k, v in kept(method, f).items())]
            for (id, f), method in ready.items()
        }
        alone = {key: several[0] for key, several in options.items() if len(several) == 1}
        found |= alone
        if alone:  # rows that follow these may be ready too, and are better trained beside the others
            continue
        jobs = {
            ((id, f), number): first.scored(rows[id, f], f, option)
            for (id, f), several in options.items()
            for number, option in enumerate(several)
        }
        found |= {key: options[key][number] for key, number in run.choose(jobs).items()}
    return {key: found[key] for key in rows}


def evaluations(run, chosen: dict[tuple[str, float], dict], **changes) -> dict[Key, Evaluation]:
    """The evaluations of every method at every fraction in every trial, with the chosen options.

    All the data are the same in every trial: the first evaluates them, with as many students as all trials have.
    """
    settings, jobs = run.settings, {}
    everyone = dict(eval_students=settings.eval_students * settings.subset_repeats)
    for (id, f), option in chosen.items():
        method, own = (FULL, changes | everyone) if id == FULL.id else (methods(settings, f)[id], changes)
        for trial in trials(settings)[: 1 if method is FULL else None]:
            jobs[id, f, trial.number] = trial.scored(method, f, option, **own)
    return jobs


EQUAL, UNTIL, DC_BENCH = "equal updates", "until it stops", "DC-Bench"  # budgets


def budgets(settings: Settings) -> dict[str, dict]:
    """The training budgets besides equal updates that the settings ask for: changes of `EvalConfig`, by name.

    "until it stops": until validation accuracy stops improving, checked 4 times as often. "DC-Bench": its protocol (Cui
    et al. 2022), a number of epochs on the subset with its own step size; the augmentation is that of the row.
    """
    patient = dict(eval_patience=settings.subset_patience, eval_steps=max(settings.subset_eval_steps // 4, 2))
    dc_bench = dict(eval_epochs=settings.subset_epochs, eval_batch=256, eval_lr=0.01)
    dc_bench |= dict(eval_momentum=0.9, eval_decay=5e-4)
    asked = {UNTIL: settings.subset_patience, DC_BENCH: settings.subset_epochs}
    return {name: how for name, how in {UNTIL: patient, DC_BENCH: dc_bench}.items() if asked[name]}


def seconds(run, jobs: dict[Key, Evaluation]) -> dict[tuple[str, float], tuple[float, float]]:
    """CPU seconds to learn each method at each fraction, and of one student epoch; means over trials."""
    found: dict[tuple[str, float], list] = {}
    for (id, f, _), job in jobs.items():
        images, c = len(subset_index(job.subset, job.setup, run.store)), job.config
        learning = run.seconds(job.distilled) if job.distilled else 0.0
        epoch = run.seconds(job) / c.eval_students / c.steps(images) * -(-images // c.eval_batch)
        found.setdefault((id, f), []).append((learning, epoch))
    return {key: tuple(sum(column) / len(column) for column in zip(*rows, strict=True)) for key, rows in found.items()}


def bytes_stored(run, jobs: dict[Key, Evaluation]) -> dict[tuple[str, float], int]:
    """Bytes that each method needs at each fraction while students train: images, labels, phi, experts that label.

    Of the first trial.
    """
    found = {}
    for (id, f, k), job in jobs.items():
        if k == 0:
            phi = job.distilled.stored_phi(run.store).phi if job.distilled else None
            hard = run.data.train.labels[subset_index(job.subset, job.setup, run.store)]
            found[id, f] = sum(stored_bytes(phi, hard, run.data).values()) + experts_bytes(job.setup, job.config)
    return found


def other_students(run, fraction: float, chosen: dict) -> dict[tuple[str, str, int], Evaluation]:
    """The jobs of `carried` methods with other student architectures, by student, method and trial."""
    settings = run.settings
    return {
        (student, id, t.number): t.scored(method, fraction, chosen[id, fraction], eval_student=student)
        for student in ("convnet", *settings.student_list)
        for id, method in methods(settings, fraction).items()
        if method.carried
        for t in trials(settings)
    }


@torch.no_grad()
def pictures(run, fraction: float, chosen: dict) -> tuple[dict[str, torch.Tensor], list[str], str]:
    """The same images augmented by each method: pixels in [0, 1] by label, class names, and what is left out.

    One image of a class (`readable_choice`); without controls, which do not change images.
    """
    settings, data, first = run.settings, run.data, trials(run.settings)[0]
    train = data.train.take(first.subset(fraction).index(data))
    index, note = readable_choice(train.labels, each=1)
    x, labels = train.images[index], train.labels[index]
    rows = {"x": data.pixels(x)}
    for id, method in methods(settings, fraction).items():
        if method.group != CONTROL:
            option, own, phi = chosen[id, fraction], seeded(settings.seed, "picture"), None
            scored = first.scored(method, fraction, option)
            images = data.train.take(subset_index(scored.subset, scored.setup, run.store)).images[index]
            if scored.distilled:
                phi = scored.distilled.stored_phi(run.store).phi
                images = augmented(phi, images, labels, index, own)
            if method.augment == "instaaug":
                augment = trained_instaaug(scored, run.store)
            else:  # on every image, whatever its probability
                augment = augmentation(method.augment, data, scored.config.eval_magnitude, scored.config.eval_candidate)
            rows[method.label] = data.pixels(augmented(augment, images, labels, index, own))
            if (soft := labels_under(phi, labels, index)).ndim == 2:
                rows[f"{method.label}: labels"] = label_bars(soft, images)
    return rows, run.titles(train.take(index)), note


def label_bars(labels: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Soft labels `[n, K]` as pictures `[n, 1, H, W]` of dark bars, one a class from left to right, as large as `like`.

    A bar is as high as the probability. If the pictures are narrower than K pixels, neighbours share a pixel.
    """
    height, width = like.shape[-2:]
    levels = (torch.arange(height, 0, -1) - 0.5) / height
    bars = 0.9 - 0.8 * (labels[:, None, None] > levels[:, None]).float()
    return F.interpolate(bars, (height, width), mode="nearest-exact" if width >= labels.shape[1] else "area")


@torch.enable_grad()
def trained_instaaug(job: Evaluation, store: Store) -> InstaAug:
    """The InstaAug trained with the first student of an evaluation."""
    train = job.data.train.take(subset_index(job.subset, job.setup, store))
    augment, seed = InstaAug(train.images, 0, reward=job.config.eval_reward), (job.setup.seed, "student", 0)
    train_student(job.student(), None, train.images, train.labels, job.config, *seed, augment=augment)
    return augment


def drifts(run, fraction: float, chosen: dict) -> dict[int, dict[str, tuple[float, float | None]]]:
    """The remaining distance to the target (`shares`), by the step of the expert trajectory where students start.

    For the methods in the `drift` table, on trajectories of the experts that policies learn from, at three snapshots:
    the first, a middle one, and the last that has a successor.
    """
    settings, first = run.settings, trials(run.settings)[0]
    rows = {id: method for id, method in methods(settings, fraction).items() if method.drift}
    jobs = tuple((id, first.scored(method, fraction, chosen[id, fraction])) for id, method in rows.items())
    setup = first.setup(settings.taught_augment)
    every, last = snapshots_every(len(run.data.train), setup)[0], load_trajectories(setup, run.store).snapshots - 2
    found = run.probe({start: Drift(setup, start, jobs) for start in (0, last // 2, last)})
    return {start * every: shares(f) for start, f in found.items()}
