"""What the explorer shows, without widgets: the phis to choose from, and the images that each makes.

A `Choice` is one phi at several moments of its training: stored, untrained, or in training now. A `View` holds the
sliders' values. `Explorer.look` gives the images, `Explorer.scoring` trains students on them.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from augdistill_core import (
    PHIS,
    Applied,
    Config,
    DistillConfig,
    Distilled,
    Phi,
    Wrapper,
    augmented,
    knob,
    make_phi,
    rms,
    seeded,
)
from augdistill_report.files.phi_files import load_phi, open_phi, unregistered
from augdistill_report.files.store import Store, open_stored
from augdistill_report.places import PRESETS
from augdistill_report.run import Run
from augdistill_report.settings import resolve
from augdistill_report.show.image_grids import difference_image, image_grid
from augdistill_report.work.distillation import Distillation
from augdistill_report.work.jobs import Subset
from augdistill_report.work.probes import phi_images
from augdistill_report.work.provenance import own_source
from augdistill_report.work.scoring import Evaluation
from augdistill_report.work.setup import Setup
from augdistill_report.work.statistics import stop_mark

MAX_IMAGES = 20  # images in a picture

MEAN_OF = 4  # draws that estimate phi's mean: as many as a slider has time for


@dataclasses.dataclass(frozen=True)
class View(Config):
    """The values of the sliders: which images are shown, and how phi is applied to them."""

    strength: float = knob(1.0, "lambda: x + lambda (phi(x) - x)", low=0, high=1.5)
    noise: float = knob(
        1.0, "0 = the mean of several draws, 1 = one draw of phi, 2 = twice as far from the mean", low=0, high=2
    )
    seed: int = knob(0, "seed of phi's noise", low=0)
    label: int = knob(-1, "the class; -1 = all", low=-1)
    count: int = knob(10, "number of images", low=1, high=MAX_IMAGES)
    image: int = knob(1, "the image whose several draws are shown, counted from 1", low=1, high=MAX_IMAGES)
    draws: int = knob(6, "number of these draws", low=1, high=MAX_IMAGES)


class Noised(Wrapper):
    """A phi with its noise scaled: mean + noise (phi(x) - mean).

    The mean is over `MEAN_OF` draws. It is kept until the images are another tensor.
    """

    def __init__(self, phi: Phi, noise: float = 1.0):
        super().__init__(phi)
        self.phi, self.noise, self.of, self.mean = phi, noise, None, None

    def forward(self, images, *, generator, **given):
        draw = self.phi(images, generator=generator, **given)
        if self.noise == 1 or not self.stochastic:
            return draw
        return torch.lerp(self.average(images, **given), draw, self.noise)

    def average(self, images: Tensor, **given) -> Tensor:
        """The mean of several draws for images `[B, C, H, W]`, of their shape."""
        if self.of is not images:
            draws = [self.phi(images, generator=seeded(k, "mean"), **given) for k in range(MEAN_OF)]
            self.of, self.mean = images, torch.stack(draws).mean(0)
        return self.mean


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """A phi to choose: `read` gives it by moment of its training, the last moment last."""

    name: str
    subset: Subset  # the training images that it was trained on
    read: Callable[[], dict[str, Phi]]
    alpha: Callable[[], float]  # the student's step size that it learned
    job: Callable[[], tuple[Distillation, Store]] | None = None  # its distillation, and the store with the result
    trained: bool = True


@dataclasses.dataclass(frozen=True)
class Look:
    """Images in [0, 1] to show: rows by name, and several draws of one image.

    `change` is the relative change of x, ||phi(x) - x|| / ||x||.
    """

    rows: dict[str, Tensor]
    columns: list[str]
    draws: dict[str, Tensor]
    change: float

    def sheet(self, cell: int = 64) -> Image.Image:
        return image_grid(self.rows, self.columns, cell)

    def drawn(self, cell: int = 64) -> Image.Image:
        return image_grid(self.draws, [f"draw {k + 1}" for k in range(len(next(iter(self.draws.values()))))], cell)


# --- the phis to choose from ------------------------------------------------------------------------------------------


def presets() -> list[str]:
    """The names of all presets, also of those whose data is not on this machine: `Explorer` says how to get it."""
    return [path.stem for path in sorted(PRESETS.glob("*.yaml"))]


def run_beside(run: Run, preset: str) -> Run:
    """The run of another preset, in a folder beside this run's, with the user's own phis."""
    settings = resolve(preset, {"phis": run.settings.phis, "data": run.settings.data})
    return Run(run.notebook, settings, run.folder.parent / preset)


def job_of(spec: dict, run: Run) -> Distillation | None:
    """The job whose result has this specification; None if its data or its code is not that of `run`."""
    try:
        setup, ours = spec["setup"], run.settings.select(Setup)
        here = {"dataset": run.data.fingerprint, "zca": ours.zca, "device": ours.device}
        if any(setup[key] != value for key, value in here.items()):
            return None
        # a specification holds None for what results do not depend on, and digests for data and experts' files
        setup = {key: getattr(ours, key) if value is None else value for key, value in setup.items()}
        setup |= {"dataset": ours.dataset, "expert_files": ours.expert_files if setup["expert_files"] else ""}
        setup = Setup.from_dict(setup)
        subset, config = Subset(**spec["subset"]), DistillConfig.from_dict(spec["config"])
        job = Distillation(setup, spec["phi"], subset, config, own_source(spec["phi"]))
        return job if job.spec() == spec else None
    except (ValueError, LookupError, TypeError, AttributeError):  # for example, a setting that no longer exists
        return None


def choice_title(job: Distillation) -> str:
    """A short title of a distillation."""
    c, s = job.config, job.subset
    images = f"{s.per_class} a class" if s.per_class else f"{100 * s.fraction:g} % subset"
    images = f"episodes of {c.episode} a class" if c.episode else images
    return f"{job.phi}, {c.phi_optimizer} {c.phi_lr:g}, {images}, {c.iterations} iterations"


def choice_titles(jobs: list[Distillation]) -> list[str]:
    """A title for each job; equal titles are followed by the settings that differ."""
    names, flat = [choice_title(job) for job in jobs], []
    for job in jobs:
        flat.append({k: v for c in (job.setup, job.subset, job.config) for k, v in dataclasses.asdict(c).items()})
    for name in [name for name, count in Counter(names).items() if count > 1]:
        same = [k for k, other in enumerate(names) if other == name]
        differing = [key for key in flat[same[0]] if len({flat[k][key] for k in same}) > 1]
        for k in same:
            names[k] = ", ".join([name, *(f"{key} {flat[k][key]}" for key in differing)])
    return names


def from_job(job: Distillation, store: Store, name: str) -> Choice:
    def read():
        return job.stored_moments(store)

    return Choice(name, job.subset, read, lambda: job.stored(store)[1]["alpha"], lambda: (job, store))


def mark_of(about: dict) -> str:
    """What follows the name of a stored or saved phi whose run stopped early; "" if it did not."""
    stopped = about.get("stopped")
    return stop_mark(stopped.get("kind", "")) if isinstance(stopped, dict) else ""


def from_file(path: Path, run: Run) -> Choice:
    """A saved phi of the run's data; a `ValueError` if the file is damaged."""
    augment = load_phi(path)
    moments = {"last": augment.applied.phi.to(run.settings.device)}

    def alpha():
        raise ValueError(
            f"{path.name}: does not hold the alpha that it learned, which eval_lr=0 needs; choose the stored phi"
        )

    return Choice(
        f"file {path.stem}{mark_of(augment.about)}", Subset(**augment.about["subset"]), lambda: moments, alpha
    )


def fits(about: dict, run: Run) -> bool:
    """Whether a saved phi with this header was trained on the run's data."""
    found = about["data"]["fingerprint"], tuple(about["shape"]), about["setup"]["zca"]
    return found == (run.data.fingerprint, run.data.shape, run.settings.zca)


def find_trained(run: Run) -> tuple[list[Choice], list[str]]:
    """The phis in this run's folder and in those beside it that fit its data, and lines on what was left out.

    A line names each file that cannot be read. Others count the results of other data or code, and those of phis that
    are not registered here.
    """
    jobs, marks, choices, left_out, others, unknown = {}, {}, [], [], Counter(), Counter()
    for path in sorted(run.folder.parent.glob("*/artefacts/distilled-*.safetensors")):
        try:
            about = open_stored(path, Distillation.kind).about
            spec = about["spec"]
            if isinstance(spec.get("phi"), str) and (strange := unregistered(spec["phi"])):
                unknown.update(strange[:1])
            elif job := job_of(spec, run):
                jobs.setdefault(job, Store(path.parent))
                marks.setdefault(job, mark_of(about["meta"]))
            else:
                others["results"] += 1
        except (ValueError, OSError) as error:
            left_out.append(str(error))
    # first the result of the run's own settings, then by the number of images, the fewest first
    jobs = sorted(jobs.items(), key=lambda j: (j[0] != default(run), j[0].subset.about(run.data), choice_title(j[0])))
    names = choice_titles([job for job, _ in jobs])
    choices += [from_job(job, store, name + marks[job]) for (job, store), name in zip(jobs, names, strict=True)]
    for path in sorted(run.folder.parent.glob("*/phis/*.safetensors")):
        try:
            about = open_phi(path).about
            if not fits(about, run):
                others["saved phis"] += 1
            elif strange := unregistered(about["phi"]):
                unknown.update(strange[:1])
            else:
                choices.append(from_file(path, run))
        except (ValueError, OSError) as error:
            left_out.append(str(error))
    if unknown:
        left_out.append(f"{unknown.total()} of phis that are not registered here ({', '.join(sorted(unknown))})")
    left_out += [f"{count} {what} of other data, or of another version of the code" for what, count in others.items()]
    return choices, left_out


def default(run: Run) -> Distillation:
    """The distillation that notebook 03 trains with the run's own settings."""
    return run.distillation(run.settings.phi, run.base)


def fresh(run: Run, phi: str) -> Choice:
    """An untrained phi."""
    job = run.distillation(phi, run.base)

    def read():
        return {"0": job.fresh_phi()}

    return Choice(f"untrained {phi}", run.base, read, lambda: job.config.alpha, trained=False)


# --- looking ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Present:
    """A phi that takes the place of a distillation in an `Evaluation`."""

    setup: Setup
    phi: Phi
    alpha: float

    def stored_phi(self, store: Store) -> Distilled:
        return Distilled(self.phi, self.alpha, [])


class Explorer:
    """A run's data set, the phis to choose from, and the chosen one (`choose`)."""

    def __init__(self, run: Run):
        self.run, self.data = run, run.data
        labels = self.data.train.labels
        fewest = int(torch.bincount(labels, minlength=len(self.data.classes)).min())
        self.order = self.data.subset(run.settings.seed, per_class=min(MAX_IMAGES, fewest)).view(
            len(self.data.classes), -1
        )
        self.problems: list[str] = []
        self.refresh()
        for choice in self.choices.values():  # the first that can be read; an untrained one always can be
            try:
                self.choose(choice)
                break
            except (ValueError, OSError) as error:
                self.problems.append(str(error))

    def refresh(self) -> None:
        """Look for phis again."""
        found, self.problems = find_trained(self.run)
        names = dict.fromkeys([self.run.settings.phi, *PHIS])
        self.choices = {c.name: c for c in [*found, *(fresh(self.run, name) for name in names)]}
        self.pixels = self.distilled_pixels()

    @property
    def nothing_trained(self) -> bool:
        return not any(choice.trained for choice in self.choices.values())

    def distilled_pixels(self) -> Tensor | None:
        """The images that notebook 02 distilled from the run's base set, `[n, C, H, W]`; None if there are none."""
        job = self.run.distillation("pixels", self.run.base, self.run.settings.pixel_config)
        try:
            return job.stored_phi(self.run.store).phi.pixels.detach() if self.stored(job) else None
        except (ValueError, OSError) as error:
            self.problems.append(str(error))
            return None

    def stored(self, job: Distillation) -> bool:
        return self.run.store.has(job.kind, job.spec())

    def choose(self, choice: Choice) -> None:
        """Show this phi from now on; a `ValueError` if it cannot be read (then the old one stays)."""
        moments = {moment: Noised(phi.requires_grad_(False)) for moment, phi in choice.read().items()}
        self.choice, self.moments = choice, moments
        self.own = choice.subset.index(self.data)
        self.seen = (None, None)

    def index(self, view: View) -> Tensor:
        """Positions `[count]` in the training split of the images that a view shows, the run's base set first.

        A phi that is bound to its base images takes only those. A `ValueError` if there is no such class.
        """
        lines = list(self.order)
        if next(iter(self.moments.values())).bound:
            labels = self.data.train.labels[self.own]
            lines = [self.own[labels == c] for c in range(len(self.data.classes))]
        if view.label >= len(lines):
            raise ValueError(f"label={view.label}: must be a class of {self.data.name}, at most {len(lines) - 1}")
        lines = lines if view.label < 0 else [lines[view.label]]
        rounds = itertools.chain(*itertools.zip_longest(*(line.tolist() for line in lines)))
        return torch.tensor([place for place in rounds if place is not None][: view.count])

    def images(self, view: View) -> tuple[Tensor, Tensor, dict]:
        """(positions in the training split, images `[count + draws, C, H, W]`, their labels and index for phi).

        The last `draws` images are copies of the view's `image`. Equal requests get the same tensors.
        """
        key = (view.label, view.count, view.image, view.draws)
        if self.seen[0] != key:
            index = self.index(view)
            again = index[min(view.image, len(index)) - 1].expand(view.draws)
            shown = torch.cat([index, again])
            split = self.data.train.take(shown)
            place = (
                positions_in(shown, self.own) if next(iter(self.moments.values())).bound else torch.arange(len(shown))
            )
            self.seen = (key, (index, split.images, {"labels": split.labels, "index": place}))
        return self.seen[1]

    @torch.no_grad()
    def prepare(self, view: View, moment: str = "") -> None:
        """Compute the mean of phi's draws now, so that the noise slider need not wait for it."""
        _, fed, given = self.images(view)
        phi = self.moments[moment or list(self.moments)[-1]]
        if phi.stochastic:
            phi.average(fed, **given)

    @torch.no_grad()
    def look(self, view: View, moment: str = "") -> Look:
        """The view's images through phi at this moment of its training ("": the last). A `ValueError` if not finite."""
        index, fed, given = self.images(view)
        x, labels = fed[: len(index)], given["labels"][: len(index)]
        phi = self.moments[moment or list(self.moments)[-1]]
        phi.noise = view.noise
        out = augmented(Applied(phi, view.strength), fed, **given, generator=seeded(view.seed, "explorer"))
        out, drawn = out[: len(index)], out[len(index) :]
        if not out.isfinite().all():
            raise ValueError(f"{self.choice.name}: phi(x) is not finite here: choose an earlier iteration")
        before, after = self.data.pixels(x), self.data.pixels(out)
        rows = {"x": before, "phi(x)": after, "difference": difference_image(after - before)}
        if self.pixels is not None:
            of_base = self.run.base.index(self.data)
            here = torch.isin(index, of_base)
            made = torch.ones_like(before)  # white where no image was distilled
            made[here] = self.data.pixels(self.pixels[positions_in(index[here], of_base)])
            rows |= {"pixels (MTT)": made} if here.any() else {}
        own = torch.isin(index, self.own).tolist() if self.choice.trained else [False] * len(index)
        columns = [self.data.classes[c] + " ●" * mine for c, mine in zip(labels.tolist(), own, strict=True)]
        one = f"image {min(view.image, len(index))}"
        return Look(rows, columns, {one: self.data.pixels(drawn)}, rms(out - x) / (rms(x) or 1.0))

    def scoring(
        self, view: View, moment: str = ""
    ) -> Callable[[Callable[[float, float], None]], dict[str, list[float]]]:
        """The evaluation of what is shown, as a function: `work(tick)` gives the students' accuracies, a list a row.

        Fresh students are trained on phi's own images: without augmentation and through the identity (the controls),
        and through phi as it is shown. Accuracies are on the validation split, since the user chooses a phi by them.
        """
        settings, choice = self.run.settings, self.choice
        phi = Noised(self.moments[moment or list(self.moments)[-1]].phi, view.noise)
        alpha = settings.alpha if settings.eval_lr else choice.alpha()  # used only if eval_lr is 0
        identity = make_phi("identity", self.data.train.take(self.own[:1]).images, len(self.data.classes), 0)
        setup, store = settings.select(Setup), self.run.store
        rows = {"no augmentation": None, "identity": Present(setup, identity, alpha), "phi": Present(setup, phi, alpha)}

        def work(tick):
            found = {}
            for row, (name, present) in enumerate(rows.items()):
                changes = {"phi_strength": view.strength} if name == "phi" else {}
                config = settings.eval_config(present is not None, **changes)
                job = Evaluation(setup, choice.subset, config, present)
                _, found[name] = job.trained(store, lambda done, total, r=row: tick(r + done / total, len(rows)))
            return found

        return work


def frames(run: Run, moments_of: dict[str, dict[str, Phi]]) -> list[Image.Image]:
    """A film of the run's base images through phis in training: a picture for each moment of the longest training.

    A training that ended before the others (it diverged, for example) keeps its last picture.
    """
    base, seed = run.train(run.base).take(slice(0, MAX_IMAGES)), run.settings.seed
    pictures, rows = [], {"x": run.data.pixels(base.images)}
    for moment in max(moments_of.values(), key=len):
        rows |= {
            name: run.data.pixels(phi_images(phis.get(moment) or list(phis.values())[-1], base, seed))
            for name, phis in moments_of.items()
        }
        pictures.append(image_grid(rows, run.titles(base), 56, title=f"iteration {moment}"))
    return pictures


def positions_in(index: Tensor, own: Tensor) -> Tensor:
    """The position of each of `index` `[n]` in `own`, `[n]`."""
    return torch.tensor([int((own == place).nonzero()[0]) for place in index], dtype=torch.int64)
