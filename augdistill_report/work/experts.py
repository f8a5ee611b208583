"""The jobs that train experts."""

import dataclasses
from collections.abc import Callable

import torch

from augdistill_core import Trajectories, snapshots_every, train_expert, train_together
from augdistill_report.data.augmentations import augmentation
from augdistill_report.files.expert_files import FLOATS, ExpertFile, TrainingFiles, sealed
from augdistill_report.files.store import Store
from augdistill_report.work.jobs import Job, Tick
from augdistill_report.work.provenance import versions
from augdistill_report.work.setup import Setup, given_experts, public_name
from augdistill_report.work.students import accuracy


@dataclasses.dataclass(frozen=True)
class Expert(Job):
    """One expert's way, and its accuracy on the validation split at every snapshot."""

    expert: int

    kind = "expert"

    def spec(self):
        spec = super().spec()
        # it does not depend on how many others there are, nor on what is done with them
        return spec | {"setup": spec["setup"] | {"experts": None, "augment": None, "expert_files": None}}

    def work(self, store, tick):
        return self.with_accuracy(*train_resumable(self, train_expert, self.expert, store, tick))

    def with_accuracy(self, theta: torch.Tensor, losses: list[float]) -> tuple[dict, dict]:
        theta = theta.to(FLOATS[self.setup.expert_float])
        return with_accuracy(self.setup, self.spec(), theta, {"expert": self.expert, "loss": losses})

    def file(self, store: Store) -> ExpertFile:
        """Its file in the store, made if it is missing, to be read by the snapshot."""
        self.run(store)
        file = ExpertFile(store.path(self.kind, self.spec()), self.setup.device)
        if file.spec != self.spec():
            raise ValueError(f"{file.path} is not ours (it was made from another specification): delete it")
        return file

    def tidy(self, store):
        training_files(self, [self.expert], store).clear()
        ExpertFile(store.path(self.kind, self.spec())).write_json()


@dataclasses.dataclass(frozen=True)
class Together(Job):
    """Some of a set-up's experts, those that the store lacks trained at once; each is stored as if made alone."""

    which: tuple[int, ...]

    kind = "experts"

    def needs(self):
        return [Expert(self.setup, k) for k in self.which]

    def work(self, store, tick):
        missing = [job for job in self.needs() if not store.has(job.kind, job.spec())]
        if missing:
            ways, losses = train_resumable(self, train_together, [job.expert for job in missing], store, tick)
            for job, *found in zip(missing, ways, torch.stack(losses, 1).tolist(), strict=True):
                store.save(job.kind, job.spec(), *job.with_accuracy(*found))
        return {}, {"made": [job.expert for job in missing]}

    def tidy(self, store):
        training_files(self, [], store).clear()


def with_accuracy(setup: Setup, spec: dict, theta: torch.Tensor, about: dict) -> tuple[dict, dict]:
    """What is kept of an expert's way `[snapshots, P]`: with its accuracy on the validation split at every snapshot."""
    data = setup.load()
    student, validation = setup.student(data).to(setup.device), data.validation.made()
    about = about | {
        "dataset": public_name(data.name),
        "classes": list(data.classes),
        "versions": versions(setup.device),
        "validation": [accuracy(student, t.to(setup.device).float(), validation) for t in theta],
    }
    return {"theta": theta}, sealed(theta, spec, about)


def training_files(job: Expert | Together, which: list[int], store: Store) -> TrainingFiles:
    """Where a job keeps its training until it is done: beside its result."""
    return TrainingFiles(store.path(job.kind, job.spec()).with_suffix(".training"), job.spec(), which)


def train_resumable(
    job: Expert | Together, how: Callable, which: int | list[int], store: Store, tick: Tick
) -> tuple[torch.Tensor, list]:
    """The experts `which` by `how` (one of the core's two ways), and their losses by snapshot.

    Killed at any moment, the next one goes on from the last whole epoch.
    """
    setup, data, losses = job.setup, job.data, []
    images, snapshots = data.train.images, snapshots_every(len(data.train), setup)[1]
    kept = training_files(job, which if isinstance(which, list) else [which], store)

    def on_snapshot(snapshot, loss):
        losses.append(loss)
        tick(snapshot, snapshots)

    # all of it as floats meanwhile (CIFAR-10: 550 MB), since the core takes tensors of floats
    arguments = (job.student(), images, data.train.labels, setup, setup.seed, which)
    augment = augmentation(setup.expert_augment, data)
    options = dict(augment=augment, on_snapshot=on_snapshot, on_epoch=kept.save, resume=kept.load(setup.device))
    return how(*arguments, **options), losses


def expert_jobs(setup: Setup) -> list[Expert]:
    return [Expert(setup, k) for k in range(setup.experts)]


def own_experts(setup: Setup) -> list[Expert]:
    """Those that are trained here: none if they are given."""
    return [] if setup.expert_files else expert_jobs(setup)


def missing_experts(setup: Setup) -> list[Job]:
    """The jobs that make a set-up's own experts: so many at once on a GPU, one a process on a CPU."""
    own = own_experts(setup)
    if setup.device != "cuda" or not own:
        return own
    at_once = setup.experts_at_once or len(own)
    return [Together(setup, tuple(range(len(own))[i : i + at_once])) for i in range(0, len(own), at_once)]


def load_trajectories(setup: Setup, store: Store) -> Trajectories:
    """The experts' ways, each read from its file by the snapshot."""
    files = given_experts(setup) or [job.file(store) for job in expert_jobs(setup)]
    return Trajectories(setup.student(setup.load()).to(setup.device), files)
