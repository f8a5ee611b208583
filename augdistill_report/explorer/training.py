"""Training in a background thread, some iterations at a time. Meanwhile phi and its history can be read.

The result is bit-identical to one run of the same settings without a pause, and can be stored as that run's result.
"""

import atexit
import copy
import dataclasses
import threading
import time
from collections.abc import Callable

import torch

from augdistill_core import Config, DistillConfig, Phi, diverged, knob
from augdistill_report.run import Run
from augdistill_report.work.distillation import Distillation
from augdistill_report.work.experts import missing_experts
from augdistill_report.work.pool import run_jobs

LOOK_EVERY = 1.0  # seconds between two updates of the page


@dataclasses.dataclass(frozen=True)
class Asked(Config):
    """What one click may ask for, in checked ranges: a client can send a slider any bounds and any value."""

    iterations: int = knob(50, "k, iterations of one click", low=1, high=500)
    syn_steps: int = knob(15, "N, student steps in one unroll", low=1, high=100)
    expert_epochs: int = knob(2, "M, expert snapshots from the start to the target", low=1, high=10)
    phi_lr: float = knob(0.01, "step size of phi's optimiser", low=1e-5, high=1e3)
    alpha: float = knob(0.01, "the student's initial step size", low=1e-4, high=1)


class Stopped(Exception):
    """The background work was told to stop."""


class Background:
    """Runs one task at a time in its own thread, so that the page stays responsive."""

    def __init__(self):
        self.thread, self.told = None, threading.Event()
        self.last = time.monotonic()
        atexit.register(self.stop)  # else a thread inside torch could outlive the interpreter

    @property
    def busy(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def start(self, work: Callable[[], None], done: Callable[[Exception | None], None]) -> None:
        """Run `work`, which calls `check` now and then, and then `done(its exception, or None)`, both in the thread."""
        if self.busy:
            raise ValueError("a training or an evaluation is running: stop it first, or wait")
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
        """Raise `Stopped` if the work was told to stop."""
        if self.told.is_set():
            raise Stopped

    def due(self) -> bool:
        """Whether it is time for another update of the page."""
        now = time.monotonic()
        if now - self.last < LOOK_EVERY:
            return False
        self.last = now
        return True

    def stop(self, wait: float = 10.0) -> None:
        """Tell the work to stop, and wait for its end, at most `wait` seconds."""
        self.told.set()
        if self.busy and self.thread is not threading.current_thread():
            self.thread.join(wait)


class Training:
    """A phi in training on the run's base images, for as many iterations as were asked for so far.

    `more` trains, in any thread; meanwhile another thread may read `history`, `alpha` and `moments`.
    """

    def __init__(self, run: Run, phi: str, config: DistillConfig):
        self.run, self.job = run, run.distillation(phi, run.base, config)
        self.job.fresh_phi()  # refuses an unknown phi, or one that cannot be built, before anything starts
        self.found = {"run": None, "moments": {}}  # as in a checkpoint
        self.ended: tuple | None = None  # if it diverged: the job, its tensors and its meta

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
        """Why it cannot continue; "" if it can."""
        return self.ended[2]["stopped"]["reason"] if self.ended else ""

    @property
    def alpha(self) -> float:
        """The student's current step size."""
        if self.ended:
            return self.ended[2]["alpha"]
        step_size = self.found["run"] and self.found["run"]["step_size"]["value"]
        if step_size is None:
            return self.job.config.alpha
        return float(step_size.exp() if self.job.config.alpha_mode in ("log", "held") else step_size)

    def moments(self) -> dict[str, Phi]:
        """phi by moment of its training: before iterations "0", "1", "2", "4", "8" ..., and "now"."""
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
        """Train for `iterations` more, after missing experts; `look(what, fraction done)` gets the progress.

        `check` may raise an exception: the iterations until then are kept. A `ValueError` if the run has diverged.
        """
        if self.stopped:
            raise ValueError(f"{self.title} {self.stopped}: start again with other settings")
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
        """The job of training for this many iterations in all."""
        return dataclasses.replace(self.job, config=dataclasses.replace(self.job.config, iterations=iterations))

    def store(self) -> Distillation:
        """Save the current phi in the run's store; returns the job whose result it is. A `ValueError` if untrained."""
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
    """Takes the place of a checkpoint: keeps the training state of each step in memory, and updates the page."""

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
    """The parameters with which notebook 03 shows a job's phi; "" if no parameters of its run make this job."""
    ours = run.distillation(job.phi, run.base, job.config)
    if ours != job or not run.store.has(job.kind, job.spec()):
        return ""
    changes = {k: v for k, v in {"phi": job.phi, **job.config.to_dict()}.items() if v != getattr(run.settings, k)}
    return "Notebook 03 shows it with " + (
        " ".join(f"-p {k} {v}" for k, v in changes.items()) or "the preset unchanged"
    )
