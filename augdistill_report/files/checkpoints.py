"""How far a long piece of work has come, on disk: one that is killed goes on from there instead of starting anew.

A state is nested dictionaries and lists of tensors and plain values. Like everything in the store it is a sealed file
that is whole or not there, says what it belongs to, and holds no code.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import Tensor

from augdistill_report.files.store import Store

CHECKPOINT = "checkpoint"

SECONDS = 30.0  # between two checkpoints: what a kill costs at most,

SHARE = 0.02  # unless writing them would take more than this part of the time

TENSOR = "tensor "  # with its number: what stands for a tensor in the JSON


class Checkpoint:
    """The state of the work with this specification, beside its future result.

    `seconds` is the CPU time that went into the state that was read, in all the processes that worked on it.
    """

    def __init__(self, store: Store, spec: dict):
        self.store, self.spec = store, spec
        self.state, self.due = None, time.monotonic() + SECONDS
        self.seconds, self.began = 0.0, time.process_time()

    def held(self) -> AbstractContextManager:
        """While work goes on from here: other processes that would, wait."""
        return self.store.making(CHECKPOINT, self.spec)

    @property
    def there(self) -> bool:
        return self.store.has(CHECKPOINT, self.spec)

    def read(self, build: Callable[[dict], object] = lambda state: state):
        """What `build` makes of the state that was written last, or None if there is none.

        A `ValueError` names a file that is damaged or foreign, or of which `build` can make nothing.
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
        """Write what `state` gives, if the last one that was written is old enough."""
        self.state = state
        if time.monotonic() >= self.due:
            self.write()

    def write(self) -> None:
        """Write what was offered last, if anything was."""
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
    """The tensors of a state by number, and the state with a name in the place of each."""
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
    """The state that was `packed`; tuples come back as lists."""

    def found(value):
        if isinstance(value, dict):
            return tensors[str(value[TENSOR])] if TENSOR in value else {key: found(v) for key, v in value.items()}
        return [found(v) for v in value] if isinstance(value, list) else value

    return found(plain)
