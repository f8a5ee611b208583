"""Checkpoints of long jobs: a job that was killed resumes from its last checkpoint.

A state is nested dictionaries and lists of tensors and plain values. Like every file in the store, a checkpoint is a
sealed file: it is complete or absent, says which job it belongs to, and contains no code.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import Tensor

from augdistill_report.files.store import OutOfTime, Store

CHECKPOINT = "checkpoint"

SECONDS = 30.0  # between two checkpoints: the most that is lost when a job is killed,

SHARE = 0.02  # unless writing would take more than this fraction of the time

TENSOR = "tensor "  # the key of a tensor's number, which replaces the tensor in the JSON


class Checkpoint:
    """The checkpoint of the job with this specification, in the same store as its result.

    `seconds` is the CPU time spent until the state that was read, summed over all processes that worked on it.
    """

    def __init__(self, store: Store, spec: dict):
        self.store, self.spec = store, spec
        self.state, self.offered = None, time.monotonic()
        self.due = self.offered + SECONDS
        self.seconds, self.began = 0.0, time.process_time()

    def held(self) -> AbstractContextManager:
        """A lock to hold while this job runs: other processes that want to run it wait."""
        return self.store.making(CHECKPOINT, self.spec)

    @property
    def there(self) -> bool:
        return self.store.has(CHECKPOINT, self.spec)

    def read(self, build: Callable[[dict], object] = lambda state: state):
        """`build` applied to the last written state, or None if there is none.

        A `ValueError` names a file that is damaged, belongs to something else, or is rejected by `build`.
        """
        if not self.there:
            return None
        file = self.store.open(CHECKPOINT, self.spec)
        tensors = file.read()
        with file.checking():
            found = build(unpacked(tensors, file.about["meta"]))
        self.seconds = file.about["seconds"]
        return found

    def offer(self, state: Callable[[], dict]) -> None:
        """Write the state that `state` returns, if the last checkpoint is old enough.

        If the next offer would come after the store's deadline, write it and raise `OutOfTime`.
        """
        self.state, before, self.offered = state, self.offered, time.monotonic()
        late = 2 * self.offered - before >= self.store.deadline
        if late or self.offered >= self.due:
            self.write()
        if late:
            raise OutOfTime

    def write(self) -> None:
        """Write the state that was offered last, if there is one."""
        if self.state is None:
            return
        begun = time.monotonic()
        spent = self.seconds + time.process_time() - self.began
        self.store.save(CHECKPOINT, self.spec, *packed(self.state()), spent)
        now = time.monotonic()
        self.due = now + max(SECONDS, (now - begun) / SHARE)

    def remove(self) -> None:
        self.store.path(CHECKPOINT, self.spec).unlink(missing_ok=True)


def packed(state: dict) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a state by number, and the state with each tensor replaced by {TENSOR: number}."""
    tensors: dict[str, Tensor] = {}

    def named(value):
        if isinstance(value, Tensor):
            tensors[str(len(tensors))] = value
            return {TENSOR: len(tensors) - 1}
        if isinstance(value, dict):
            return {key: named(v) for key, v in value.items()}
        return [named(v) for v in value] if isinstance(value, list | tuple) else value

    return tensors, named(state)


def unpacked(tensors: dict[str, Tensor], plain: dict) -> dict:
    """The inverse of `packed`; tuples become lists."""

    def found(value):
        if isinstance(value, dict):
            return tensors[str(value[TENSOR])] if TENSOR in value else {key: found(v) for key, v in value.items()}
        return [found(v) for v in value] if isinstance(value, list) else value

    return found(plain)
