"""The jobs of a report: each declares all that its result depends on, runs in any process, and is stored.

A job is a frozen dataclass of plain values. `spec()` is what its result depends on, `work()` makes the result. A job
loads the results that it needs (a distillation its experts, an evaluation its phi) from the same store, and makes those
that are missing.
"""

import dataclasses
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from augdistill_report.data.datasets import Dataset
from augdistill_report.files.store import Store, restore
from augdistill_report.work.provenance import SOURCES
from augdistill_report.work.setup import Setup, given_experts

Tick = Callable[..., None]  # tick(done, total, note=""): the progress, and a warning if there is one


class Task:
    """A task whose result is stored under its specification. `kind` names its files."""

    kind = "task"
    form: dict | None = None  # the form of the result's JSON values: see `check_form`
    ahead = True  # it is made before the jobs that need it, in a process of its own, and counts its own time
    whole = False  # True: it makes what it needs by itself, but for experts, since their errors are its result
    cost = 0.0  # relative work among tasks of its kind: the longest should start first

    def spec(self) -> dict:
        """All that the result depends on, as plain JSON values."""
        raise NotImplementedError

    def work(self, store: Store, tick: Tick) -> tuple[dict, dict]:
        """Make the result: (tensors, JSON values). If it continued from a checkpoint, also the earlier CPU seconds."""
        raise NotImplementedError

    def run(self, store: Store, tick: Tick = lambda done, total, note="": None) -> None:
        """Make the result and store it, unless it is stored; if another process is making it, wait for that."""
        if not store.has(self.kind, self.spec()):
            with store.making(self.kind, self.spec()):
                if not store.has(self.kind, self.spec()):
                    began = time.process_time()  # CPU time: other processes on the machine do not count
                    tensors, meta, *before = self.work(store, tick)
                    seconds = sum(before) + time.process_time() - began
                    store.save(self.kind, self.spec(), tensors, meta, seconds)
        self.tidy(store)

    def found(self, store: Store) -> dict:
        """What a grid keeps of this task as its cell: `numbers`, and other facts."""
        raise NotImplementedError

    def needs(self) -> list["Task"]:
        """The tasks whose results it uses. It makes those that are missing."""
        return []

    def cancel(self) -> None:
        """End what it started outside its own process: its result is no longer wanted."""

    def tidy(self, store: Store) -> None:
        """Clean up after the result is stored. Called on every run, since a process may be killed before it."""

    def stored(self, store: Store, tick: Tick = lambda done, total, note="": None) -> tuple[dict, dict]:
        """The result, made if it is missing: (tensors, JSON values)."""
        self.run(store, tick)
        return store.load(self.kind, self.spec(), self.form)

    def restored(self, module: nn.Module, tensors: dict[str, Tensor], prefix: str, store: Store) -> nn.Module:
        """`module` with the state that the result's `tensors` hold under "prefix/"; a `ValueError` names a misfit."""
        start = f"{prefix}/"
        try:
            return restore(module, {k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)})
        except ValueError as error:
            path = store.path(self.kind, self.spec())
            raise ValueError(f"{path} is damaged ({prefix}: {error}): delete it, and run again") from None


@dataclasses.dataclass(frozen=True)
class Job(Task):
    """A task with a setup: data, student, experts, machine."""

    setup: Setup

    def modules(self) -> list[str]:
        """The modules whose source the result depends on, with all that they import."""
        return [type(self).__module__]

    def spec(self) -> dict:
        """Data and experts' files count by their content, not by their names and places."""
        setup = dataclasses.asdict(self.setup) | {"dataset": self.data.fingerprint, "data": None}
        setup["expert_files"] = [file.content for file in given_experts(self.setup)]
        setup["experts_at_once"] = None  # which experts train together changes at most the last bits
        return dataclasses.asdict(self) | {"setup": setup, "source": SOURCES.digest(*self.modules())}

    @property
    def data(self) -> Dataset:
        return self.setup.load()

    def student(self):
        return self.setup.student(self.data).to(self.setup.device)


@dataclasses.dataclass(frozen=True)
class Subset:
    """Which training images: `per_class` of each class, or a stratified `fraction`, in the nested order of `seed`.

    The first images of each class, the fraction `skip` of it, are left out. So a phi trained on those has never seen
    this subset. With a `window` in [0, 1] the images are of one difficulty, from 0 (the easiest of each class) to 1
    (the hardest): see `Dataset.subset`.
    """

    seed: int
    per_class: int | None = None
    fraction: float | None = None
    skip: float = 0.0
    window: float | None = None

    def index(self, data: Dataset, ease: torch.Tensor | None = None) -> torch.Tensor:
        """Positions `[n]` in the training split; a `ValueError` if there are not so many images.

        `ease` `[train]` ranks the images for a window, higher = easier: `work.difficulty` measures it.
        """
        return data.subset(**dataclasses.asdict(self), ease=ease)

    def about(self, data: Dataset) -> float:
        """The number of images, roughly. It is not limited by the number that the data set has."""
        return self.per_class * len(data.classes) if self.per_class else self.fraction * len(data.train)
