"""Training in the background, some iterations at a time: while it goes on, phi and its records can be looked at.

What comes out is what the same settings give without a pause, to the bit, and can be stored under them.
"""

import atexit
import copy
import dataclasses
import threading
import time
from collections.abc import Callable

import torch

from augdistill_core import DistillConfig, Phi, diverged
from augdistill_report.run import Run
from augdistill_report.work.distillation import Distillation
from augdistill_report.work.experts import missing_experts
from augdistill_report.work.pool import run_jobs

LOOK_EVERY = 1.0  # seconds between two looks at what is under way


class Stopped(Exception):
    """Work in the background was told to stop."""


class Background:
    """One piece of work at a time, beside the thread that a person waits for."""

    def __init__(self):
        self.thread, self.told = None, threading.Event()
        self.last = time.monotonic()
        atexit.register(self.stop)  # else a thread inside torch would meet an interpreter that is gone

    @property
    def busy(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def start(self, work: Callable[[], None], done: Callable[[Exception | None], None]) -> None:
        """Do `work`, which looks at `check` now and then; then `done(what it raised)`. Both run in the thread."""
        if self.busy:
            raise ValueError("something is under way here: stop it first, or wait")
        self.told.clear()

        def both():
            error = None
            try:
                work()
            except Stopped:
                pass
            except Exception as raised:
                error = raised
            done(error)

        self.thread = threading.Thread(target=both, daemon=True, name="explorer")
        self.thread.start()

    def check(self) -> None:
        """Raise `Stopped` if so told."""
        if self.told.is_set():
            raise Stopped

    def due(self) -> bool:
        """Whether it is time for another look."""
        now = time.monotonic()
        if now - self.last < LOOK_EVERY:
            return False
        self.last = now
        return True

    def stop(self, wait: float = 10.0) -> None:
        """Tell the work to stop, and wait until it has, at most so many seconds."""
        self.told.set()
        if self.busy and self.thread is not threading.current_thread():
            self.thread.join(wait)


class Training:
    """A phi that is trained on the run's base images, as far as it was asked to so far.

    `more` does the work, in whatever thread; `history`, `phi` and `way` may be asked for in another meanwhile.
    """

    def __init__(self, run: Run, phi: str, config: DistillConfig):
        self.run, self.job = run, run.distillation(phi, run.base, config)
        self.job.fresh_phi()  # refuses an unknown phi, or one that cannot be made, before anything starts
        self.found = {"run": None, "moments": {}}  # as in a checkpoint
        self.ended: tuple | None = None  # by divergence: the job, and its result

    @property
    def title(self) -> str:
        config = self.job.config
        return f"{self.job.phi}, {config.phi_optimizer} {config.phi_lr:g}"

    @property
    def history(self) -> list[dict]:
        if self.ended:
            return self.ended[2]["history"]
        return self.found["run"]["history"] if self.found["run"] else []

    @property
    def stopped(self) -> str:
        """Why it can go no further; "" if it can."""
        return self.ended[2]["stopped"]["reason"] if self.ended else ""

    @property
    def alpha(self) -> float:
        """The student's step size, as it is now."""
        if self.ended:
            return self.ended[2]["alpha"]
        step_size = self.found["run"] and self.found["run"]["step_size"]["value"]
        if step_size is None:
            return self.job.config.alpha
        return float(step_size.exp() if self.job.config.alpha_mode in ("log", "held") else step_size)

    def moments(self) -> dict[str, Phi]:
        """phi by moment: before iterations 0, 1, 2, 4, 8 ..., and "now"."""
        tensors = self.ended[1] if self.ended else dict(self.found["moments"])
        states: dict[str, dict] = {}
        for key, tensor in tensors.items():
            moment, _, name = key.partition("/")
            states.setdefault(moment, {})[name] = tensor
        now = states.pop("last", None) or (self.found["run"] and self.found["run"]["phi"])
        phis = {moment: self.job.fresh_phi() for moment in [*states, "now"]}
        for moment, state in (states | ({"now": now} if now else {})).items():
            phis[moment].load_state_dict(state)
        return phis

    def more(self, iterations: int, check: Callable[[], None], look: Callable[[str, float], None]) -> None:
        """Train on for so many iterations, experts first if there are none; `look(what, part)` tells how far it is.

        `check` may raise: what was done until then stays. A run that diverged goes no further.
        """
        if self.stopped:
            raise ValueError(f"{self.title} {self.stopped}: start anew with other settings")
        torch.set_num_threads(self.run.settings.threads)

        def show(done, total, note=""):
            check()
            look("experts", done / total)

        run_jobs(missing_experts(self.job.setup), self.run.store, self.run.settings.pool, show)
        begun = len(self.history)
        job = self.until(begun + iterations)
        live = Live(self, check, lambda done: look("iterations", (done - begun) / iterations))
        tensors, meta = job.from_checkpoint(self.run.store, lambda done, total, note="": None, self.found, live)
        if diverged(meta["stopped"]):
            self.ended = (job, tensors, meta)
        else:
            live.keep()

    def until(self, iterations: int) -> Distillation:
        """The job of training so long."""
        return dataclasses.replace(self.job, config=dataclasses.replace(self.job.config, iterations=iterations))

    def store(self) -> Distillation:
        """Put what was reached into the run's store; returns the job whose result it is."""
        if not self.history:
            raise ValueError(f"{self.title}: has not been trained yet")
        job, *result = self.ended or (self.until(len(self.history)),)
        if not self.run.store.has(job.kind, job.spec()):
            nothing = lambda done, total, note="": None  # noqa: E731
            result = result or job.from_checkpoint(self.run.store, nothing, self.found, None)
            with self.run.store.making(job.kind, job.spec()):
                self.run.store.save(job.kind, job.spec(), *result)
        return job


class Live:
    """In the place of a checkpoint: what a distillation offers after each step is looked at, not written."""

    def __init__(self, training: Training, check: Callable[[], None], look: Callable[[int], None]):
        self.training, self.check, self.look = training, check, look
        self.state, self.due = None, 0.0

    def offer(self, state: Callable[[], dict]) -> None:
        self.state = state
        try:
            self.check()
        except BaseException:
            self.keep()
            raise
        if time.monotonic() >= self.due:
            self.keep()
            self.look(len(self.training.history))
            self.due = time.monotonic() + LOOK_EVERY

    def write(self) -> None:
        self.keep()

    def keep(self) -> None:
        if self.state is not None:
            found = self.state()
            self.training.found = found | {"moments": copy.copy(found["moments"])}


def found_by(job: Distillation, run: Run) -> str:
    """How notebook 03 is told to show the phi of a job, if it is one that its run would make."""
    ours = run.distillation(job.phi, run.base, job.config)
    if ours != job or not run.store.has(job.kind, job.spec()):
        return ""
    changes = {k: v for k, v in {"phi": job.phi, **job.config.to_dict()}.items() if v != getattr(run.settings, k)}
    return "Notebook 03 shows it with " + (" ".join(f"-p {k} {v}" for k, v in changes.items()) or "the preset as it is")
