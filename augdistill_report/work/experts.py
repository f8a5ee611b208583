"""The jobs that train experts."""

import dataclasses
import time
from collections.abc import Callable

import torch
from torch import nn

from augdistill_core import TrainingState, Trajectories, snapshots_every, train_expert, train_together
from augdistill_report.data.augmentations import augmentation
from augdistill_report.files.checkpoints import Checkpoint
from augdistill_report.files.expert_files import FLOATS, ExpertFile, snapshot_tensors
from augdistill_report.files.store import Store, a_count, check_form
from augdistill_report.work.jobs import Job, Tick
from augdistill_report.work.provenance import versions
from augdistill_report.work.setup import Setup, given_experts, public_name
from augdistill_report.work.students import accuracy


@dataclasses.dataclass(frozen=True)
class Expert(Job):
    """Trains one expert: its trajectory, and its accuracy on the validation split at every snapshot."""

    expert: int

    kind = "expert"

    def spec(self):
        spec = super().spec()
        # it depends neither on the number of experts nor on what uses them
        return spec | {"setup": spec["setup"] | {"experts": None, "augment": None, "expert_files": None}}

    def work(self, store, tick):
        checkpoint = checkpoint_of(self, store)
        theta, losses = train_resumable(self, train_expert, self.expert, checkpoint, tick)
        return *self.with_accuracy(theta, losses), checkpoint.seconds

    def with_accuracy(self, theta: torch.Tensor, losses: list[float]) -> tuple[dict, dict]:
        theta = theta.to(FLOATS[self.setup.expert_float])
        return with_accuracy(self.setup, theta, {"expert": self.expert, "loss": losses})

    def file(self, store: Store) -> ExpertFile:
        """The expert's file in the store, made if it is missing. Snapshots are read from it one by one.

        A `ValueError` if the file holds another result.
        """
        self.run(store)
        file = ExpertFile(store.path(self.kind, self.spec()), self.setup.device)
        if file.spec != self.spec():
            raise ValueError(f"{file.path} is not ours (it was made from another specification): delete it")
        return file

    def tidy(self, store):
        checkpoint_of(self, store).remove()
        ExpertFile(store.path(self.kind, self.spec())).write_json()


@dataclasses.dataclass(frozen=True)
class Together(Job):
    """Trains several of a setup's experts together on one GPU: those that the store lacks. Each is stored alone."""

    which: tuple[int, ...]

    kind = "experts"

    def needs(self):
        return [Expert(self.setup, k) for k in self.which]

    def work(self, store, tick):
        missing = [job for job in self.needs() if not store.has(job.kind, job.spec())]
        if missing:
            began, checkpoint = time.process_time(), checkpoint_of(self, store)
            experts = [job.expert for job in missing]
            trajectories, losses = train_resumable(self, train_together, experts, checkpoint, tick)
            each = (checkpoint.seconds + time.process_time() - began) / len(missing)
            for job, *found in zip(missing, trajectories, torch.stack(losses, 1).tolist(), strict=True):
                store.save(job.kind, job.spec(), *job.with_accuracy(*found), each)
        return {}, {"made": [job.expert for job in missing]}

    def tidy(self, store):
        checkpoint_of(self, store).remove()


def with_accuracy(setup: Setup, theta: torch.Tensor, about: dict) -> tuple[dict, dict]:
    """(tensors, meta) to store for a trajectory `[snapshots, P]`, with its validation accuracy at every snapshot."""
    tensors, data = snapshot_tensors(theta.cpu(), about["expert"]), setup.load()
    student, validation = setup.student(data).to(setup.device), data.validation.made()
    return tensors, about | {
        "dataset": public_name(data.name),
        "classes": list(data.classes),
        "versions": versions(setup.device),
        "validation": [accuracy(student, t.to(setup.device).float(), validation) for t in theta],
    }


def checkpoint_of(job: Expert | Together, store: Store) -> Checkpoint:
    """Where a training keeps its state until its result is stored."""
    return Checkpoint(store, job.spec())


def train_resumable(
    job: Expert | Together, how: Callable, which: int | list[int], checkpoint: Checkpoint, tick: Tick
) -> tuple[torch.Tensor, list]:
    """The trajectories of the experts `which`, trained by `how` (`train_expert` or `train_together`), and their losses.

    Losses are by snapshot. If the process is killed, the next call continues from the checkpoint, which is written at
    the end of an epoch.
    """
    setup, data, losses = job.setup, job.data, []
    images, snapshots = data.train.images, snapshots_every(len(data.train), setup)[1]
    student, experts = job.student(), which if isinstance(which, list) else [which]

    def on_snapshot(snapshot, loss):
        losses.append(loss)
        tick(snapshot, snapshots)

    def on_epoch(at):
        checkpoint.offer(lambda: {"experts": experts, "training": at.state_dict()})

    def resumed(state):
        check_form(state, {"experts": [a_count], "training": dict}, "state")
        rows = [state["experts"].index(k) for k in experts]  # those that still lack a result
        at = TrainingState.from_state_dict(state["training"], rows, parameters_of(student), images)
        if len(at.losses) > snapshots:
            raise ValueError(f"{len(at.losses)} snapshots; a training of these settings takes {snapshots}")
        return at

    # all images as floats during training (CIFAR-10: 550 MB), since the core takes float tensors
    arguments = (student, images, data.train.labels, setup, setup.seed, which)
    augment = augmentation(setup.expert_augment, data)
    resume = checkpoint.read(resumed)
    return how(*arguments, augment=augment, on_snapshot=on_snapshot, on_epoch=on_epoch, resume=resume), losses


def expert_jobs(setup: Setup) -> list[Expert]:
    return [Expert(setup, k) for k in range(setup.experts)]


def own_experts(setup: Setup) -> list[Expert]:
    """The experts that this run trains itself: none if `expert_files` gives them."""
    return [] if setup.expert_files else expert_jobs(setup)


def missing_experts(setup: Setup) -> list[Job]:
    """The jobs that train a setup's own experts: `experts_at_once` a job on a GPU, one a job on a CPU."""
    own = own_experts(setup)
    if setup.device != "cuda" or not own:
        return own
    at_once = setup.experts_at_once or len(own)
    return [Together(setup, tuple(range(len(own))[i : i + at_once])) for i in range(0, len(own), at_once)]


def parameters_of(student: nn.Module) -> int:
    """The number of a student's parameters, P."""
    return sum(p.numel() for p in student.parameters())


def load_trajectories(setup: Setup, store: Store) -> Trajectories:
    """The expert trajectories. Snapshots are read from the files one by one, when they are used.

    A `ValueError` names a file whose parameters are not the student's.
    """
    files = given_experts(setup) or [job.file(store) for job in expert_jobs(setup)]
    student = setup.student(setup.load()).to(setup.device)
    parameters = parameters_of(student)
    for file in files:
        if file.parameters != parameters:
            raise ValueError(
                f"{file.path}: has snapshots of {file.parameters} parameters, the student has {parameters}"
            )
    return Trajectories(student, files)
