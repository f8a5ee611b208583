"""The phis that the explorer offers: stored, saved, untrained and hand-designed ones, and those in training now.

A `Choice` is one phi at several moments of its training. `find_trained` looks for stored and saved phis.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from augdistill_core import DistillConfig, Phi
from augdistill_report.data.augmentations import AUGMENTATIONS, augmentation
from augdistill_report.files.phi_files import load_phi, open_phi, unregistered
from augdistill_report.files.store import Store, open_stored
from augdistill_report.places import PRESETS
from augdistill_report.run import Run
from augdistill_report.settings import resolve
from augdistill_report.work.distillation import Distillation
from augdistill_report.work.jobs import Subset
from augdistill_report.work.own_code import own_source
from augdistill_report.work.setup import Setup
from augdistill_report.work.statistics import stop_mark


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """A phi to choose: `read` gives it by moment of its training, the last moment last."""

    name: str
    like: Distillation  # its subset and settings (of a saved phi: those of the run, with its subset and experts)
    read: Callable[[], dict[str, Phi]]
    alpha: Callable[[], float]  # the student's step size that it learned
    job: Callable[[], tuple[Distillation, Store]] | None = None  # its distillation, and the store with the result
    trained: bool = True
    strength: float | None = None  # of a saved phi: what it was saved for (the page shows any strength)


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

    return Choice(name, job, read, lambda: job.stored(store)[1]["alpha"], lambda: (job, store))


def mark_of(about: dict) -> str:
    """What follows the name of a stored or saved phi whose run stopped early; "" if it did not."""
    stopped = about.get("stopped")
    return stop_mark(stopped.get("kind", "")) if isinstance(stopped, dict) else ""


def from_file(path: Path, run: Run) -> Choice:
    """A saved phi of the run's data, from this run's folder or one beside it; a `ValueError` if the file is damaged.

    The name of one from another run's folder begins with that folder ("file digits-full/mine").
    """
    augment = load_phi(path)
    about, moments = augment.about, {"last": augment.applied.phi.to(run.settings.device)}
    setup = run.settings.select(Setup, expert_augment=about["setup"].get("expert_augment", "none"))
    like = dataclasses.replace(run.distillation(about["phi"], Subset(**about["subset"])), setup=setup)

    def alpha():
        raise ValueError(
            f"{path.name}: does not hold the alpha that it learned, which eval_lr=0 needs; choose the stored phi"
        )

    # files of several runs may be called alike
    folder = path.parent.parent.name
    name = path.stem if folder == run.folder.name else f"{folder}/{path.stem}"
    return Choice(f"file {name}{mark_of(about)}", like, lambda: moments, alpha, strength=about["strength"])


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

    return Choice(f"untrained {phi}", job, read, lambda: job.config.alpha, trained=False)


class HandDesigned(Phi):
    """A hand-designed augmentation in the place of a phi; it may be random, and learns nothing."""

    stochastic = True

    def __init__(self, augment: Callable):
        super().__init__()
        self.augment = augment

    def forward(self, images, **given):
        return self.augment(images, **given)


HAND_DESIGNED = [name for name in AUGMENTATIONS if name != "none"]


def by_hand(run: Run, name: str) -> Choice:
    """A hand-designed augmentation: a name in `HAND_DESIGNED`, or kornia:NAME(key=value).

    A `ValueError` if kornia has no such augmentation, or if it cannot take the run's images.
    """
    job = run.distillation("identity", run.base)
    known = HandDesigned(augmentation(name, run.data)) if name not in HAND_DESIGNED else None

    def read():  # late: kornia is slow to import
        return {"0": known or HandDesigned(augmentation(name, run.data))}

    return Choice(f"hand-designed {name}", job, read, lambda: job.config.alpha, trained=False)
