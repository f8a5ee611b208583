"""The pieces of work that a report consists of: each says all it depends on, runs in any process, and is stored.

A job is a frozen dataclass of plain values. `spec()` is what its result depends on, `work()` makes the result. Jobs
find what they build on (a distillation its experts, an evaluation its phi) in the same store, and make what is missing.
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

Tick = Callable[..., None]  # tick(done, total, note=""): how far, and a word on what is wrong, if anything is


class Task:
    """A piece of work whose result is stored under what it depends on. `kind` names its files."""

    kind = "task"
    form: dict | None = None  # of the plain values of its result: see `check_form`
    cost = 0.0  # about how much work it is beside others of its kind: what takes longest had better start first

    def spec(self) -> dict:
        """All that the result depends on, as plain JSON values."""
        raise NotImplementedError

    def work(self, store: Store, tick: Tick) -> tuple[dict, dict]:
        """Make the result: (tensors, plain JSON values), and, where it went on from a checkpoint, the CPU seconds of
        the processes before this one."""
        raise NotImplementedError

    def run(self, store: Store, tick: Tick = lambda done, total, note="": None) -> None:
        """Make the result and store it, unless it is there; if another process is making it, wait for that."""
        if not store.has(self.kind, self.spec()):
            with store.making(self.kind, self.spec()):
                if not store.has(self.kind, self.spec()):
                    began = time.process_time()  # what others do on the machine does not count
                    tensors, meta, *before = self.work(store, tick)
                    seconds = sum(before) + time.process_time() - began
                    store.save(self.kind, self.spec(), tensors, meta, seconds)
        self.tidy(store)

    def found(self, store: Store) -> dict:
        """What a grid shows of it, where it is a cell of one: `numbers`, and what else is worth keeping."""
        raise NotImplementedError

    def needs(self) -> list["Task"]:
        """The pieces that it builds on, and would make itself if they were missing."""
        return []

    def cancel(self) -> None:
        """End what it has started outside of its process: nobody wants its result any more."""

    def tidy(self, store: Store) -> None:
        """What is left to do when the result is there, even if a process was killed just then."""

    def stored(self, store: Store, tick: Tick = lambda done, total, note="": None) -> tuple[dict, dict]:
        """The result, made if it is missing: (tensors, plain JSON values)."""
        self.run(store, tick)
        return store.load(self.kind, self.spec(), self.form)

    def restored(self, module: nn.Module, tensors: dict[str, Tensor], part: str, store: Store) -> nn.Module:
        """`module` with the state that the result's `tensors` hold below "part/"; a `ValueError` names a misfit."""
        start = f"{part}/"
        try:
            return restore(module, {k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)})
        except ValueError as error:
            path = store.path(self.kind, self.spec())
            raise ValueError(f"{path} is damaged ({part}: {error}): delete it, and run again") from None


@dataclasses.dataclass(frozen=True)
class Job(Task):
    """A piece of work in a setup: data, student, experts, machine."""

    setup: Setup

    def modules(self) -> list[str]:
        """The modules whose source the result depends on, with all that they import."""
        return [type(self).__module__]

    def spec(self) -> dict:
        """Data and experts' files count by their content, whatever they are called and wherever they lie."""
        setup = dataclasses.asdict(self.setup) | {"dataset": self.data.fingerprint, "data": None}
        setup["expert_files"] = [file.content for file in given_experts(self.setup)]
        setup["experts_at_once"] = None  # who trains beside whom changes at most the last bits
        return dataclasses.asdict(self) | {"setup": setup, "source": SOURCES.digest(*self.modules())}

    @property
    def data(self) -> Dataset:
        return self.setup.load()

    def student(self):
        return self.setup.student(self.data).to(self.setup.device)


@dataclasses.dataclass(frozen=True)
class Subset:
    """Which training images: so many a class, or a stratified fraction, of the nested order of `seed`.

    The first `skip` of each class (a fraction) are passed over: images that a phi trained on the rest has never seen.
    """

    seed: int
    per_class: int | None = None
    fraction: float | None = None
    skip: float = 0.0

    def index(self, data: Dataset) -> torch.Tensor:
        return data.subset(self.seed, per_class=self.per_class, fraction=self.fraction, skip=self.skip)

    def about(self, data: Dataset) -> float:
        """How many images, roughly, and even if there are not so many."""
        return self.per_class * len(data.classes) if self.per_class else self.fraction * len(data.train)
