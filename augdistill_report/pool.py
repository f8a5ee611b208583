"""Many independent pieces of work over the cores, with progress, through one seam: a `concurrent.futures.Executor`.

Every process uses the same number of threads, and a job's draws follow from its own seeds, so the results are the same
bits however many processes there are.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from loky import get_reusable_executor

from augdistill_phis import OURS, PHIS, origin, register_phi
from augdistill_report.artefacts import Store, write

REFRESH = 0.5  # seconds between two looks at the progress
LOG_EVERY = 15  # seconds between two lines of progress in a log


@dataclasses.dataclass(frozen=True)
class Pool:
    """Who shares the work: so many processes on this machine, or (its scheduler's address or file) a Dask cluster."""

    processes: int = 1
    cluster: str = ""

    def crew(self, store: Store) -> "Crew":
        if self.cluster:
            from augdistill_report.cluster import Cluster  # late: it needs an extra, and the jobs' own module

            return Cluster(self.cluster, store)
        return Processes(self.processes, store)


class Crew(contextlib.AbstractContextManager):
    """An executor, and what differs from one to the next. An exception that leaves the context stops all that runs."""

    about = ""  # what a person may want to know of it while it works

    def submit(self, job) -> concurrent.futures.Future:
        raise NotImplementedError

    def state(self, future: concurrent.futures.Future) -> tuple[float, str]:
        """How far a job is that is not done, in [0, 1], and what it says of itself."""
        raise NotImplementedError

    def take(self, future: concurrent.futures.Future) -> None:
        """Have what a job that is done has made in the store; raises what it raised."""
        future.result()


def own_phis() -> dict:
    """The phis that a user registered, by name: they travel along with the jobs."""
    return {name: build for name, build in PHIS.items() if origin(build)[0] not in OURS}


class Processes(Crew):
    """Processes on this machine, by loky. How far a job is stands in a file that its worker writes."""

    def __init__(self, processes: int, store: Store):
        self.processes, self.store, self.files = processes, store, {}

    def __enter__(self):
        # the workers stay for the next call: starting one costs seconds
        start = dict(initializer=_start_worker, initargs=(torch.get_num_threads(),))
        self.executor = get_reusable_executor(self.processes, timeout=120, **start)
        self.open = contextlib.ExitStack()
        self.folder = Path(self.open.enter_context(tempfile.TemporaryDirectory()))
        # loky replaces a worker that has grown by 300 MB and says so; ours may, and nothing is lost
        self.open.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="A worker was restarted")
        return self

    def __exit__(self, kind, error, trace):
        if kind is not None:
            self.executor.shutdown(wait=True, kill_workers=True)
        self.open.close()

    def submit(self, job):
        file = self.folder / str(len(self.files))
        future = self.executor.submit(_run, job, self.store, own_phis(), file)
        self.files[future] = file
        return future

    def state(self, future):
        try:
            return tuple(json.loads(self.files[future].read_text()))
        except (OSError, ValueError):
            return 0.0, ""


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends the workers


def _run(job, store: Store, phis: dict, progress: Path) -> None:
    """One job in a process of this machine."""

    def tell(part, note):
        with contextlib.suppress(OSError):
            write(progress, json.dumps([part, note]))

    run_with(job, store, phis, tell)


def run_with(job, store: Store, phis: dict, tell: Callable[[float, str], None]) -> None:
    """One job in a worker, with the phis that its user registered; it may `tell(part, note)` twice a second."""
    for name, build in phis.items():
        register_phi(name)(build)
    last = 0.0

    def tick(done, total, note=""):
        nonlocal last
        if time.monotonic() - last > REFRESH:
            last = time.monotonic()
            tell(done / total, note)

    job.run(store, tick)


def run_jobs(
    jobs: list, store: Store, pool: Pool, show: Callable[[float, float, str], None], failures: dict | None = None
) -> None:
    """Run the jobs that the store lacks, shared by a pool; `show(done, total, note)` in jobs, parts of one included.

    Each counts by its share of all their `cost`, so that what is left tells how long it will take. An exception in a
    job ends the others, unless there are `failures` to put it in (by job); Ctrl-C does in any case. What was finished
    is in the store.
    """
    missing = {store.path(job.kind, job.spec()): job for job in jobs}
    missing = [job for path, job in missing.items() if not path.is_file()]
    if not missing:
        return
    count, whole = len(missing), sum(job.cost for job in missing)
    weight = {job: count * job.cost / whole if whole else 1.0 for job in missing}  # count, together
    finished = 0.0
    show(0, count, "")
    if not pool.cluster and (pool.processes == 1 or count == 1):
        for number, job in enumerate(missing, 1):
            with _kept(job, failures):
                at = finished, weight[job]
                job.run(store, lambda done, total, note="", at=at: show(at[0] + at[1] * done / total, count, note))
            finished += weight[job]
            show(finished if number < count else count, count, "")
        return
    missing.sort(key=lambda job: -job.cost)  # else the longest may start last, and run alone
    with pool.crew(store) as crew:
        job_of = {crew.submit(job): job for job in missing}
        waiting = set(job_of)
        while waiting:
            done, waiting = concurrent.futures.wait(
                waiting, timeout=REFRESH, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
                job = job_of.pop(future)  # forgotten, as its result may be large
                with _kept(job, failures):
                    crew.take(future)
                finished += weight[job]
            states = {future: crew.state(future) for future in waiting}
            notes = dict.fromkeys(note for note in (crew.about, *(note for _, note in states.values())) if note)
            parts = sum(part * weight[job_of[future]] for future, (part, _) in states.items())
            show(finished + parts if waiting else count, count, "; ".join(notes))


@contextlib.contextmanager
def _kept(job, failures: dict | None):
    """Put an exception of `job` into `failures`, if there are any to put it in; a dead worker ends everything."""
    try:
        yield
    except Exception as error:
        if failures is None or isinstance(error, concurrent.futures.BrokenExecutor):
            raise
        failures[job] = error


class Line(contextlib.AbstractContextManager):
    """One line that says where a long command is: live in a terminal, now and then in a log. Gone with its context."""

    def __init__(self):
        self.live, self.last, self.start = sys.stderr.isatty(), -LOG_EVERY, time.monotonic()

    def __exit__(self, *_):
        self.clear()

    def count(self, what: str, done: float, total: float, note: str = "") -> None:
        """So much of something is done, which tells how long the rest will take."""
        part = done / total
        left = f", about {(time.monotonic() - self.start) * (1 - part) / part:.0f} s left" if part > 0.02 else ""
        self.show(f"{done:.1f} of {total} {what}{left}" + (f" | {note}" if note else ""))

    def show(self, text: str) -> None:
        if self.live:
            print(f"\r\033[K{text[: shutil.get_terminal_size().columns - 1]}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self.last > LOG_EVERY:
            self.last = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


class Progress:
    """A bar that stays readable wherever it lands: live in a notebook, one line at the end of a saved one, or a `Line`.

    The runner, which cannot see into a running cell, reads the same state from the file that it names in the
    environment variable AUGDISTILL_PROGRESS.
    """

    def __init__(self, what: str):
        self.what, self.start, self.last, self.handle = what, time.monotonic(), 0.0, None
        self.line = Line()

    def __call__(self, done: float, total: float, note: str = "") -> None:
        from IPython import get_ipython
        from IPython.display import display

        if self.handle is None and get_ipython() is not None:  # nothing is shown for work that was done before
            self.handle = display({"text/plain": self.what}, raw=True, display_id=True)
        now = time.monotonic()
        if now - self.last < REFRESH and done < total:
            return
        self.last = now
        spent = now - self.start
        left = f", {spent * (total - done) / done:.0f} s left" if done else ""
        text = f"{self.what}: {done:.1f} of {total:g}{left}" if done < total else f"{self.what}: {total:g} done"
        text += f" | {note}" if note else ""
        bar = f'<progress max="{total}" value="{done}"></progress> {text}' if done < total else text
        if self.handle:
            self.handle.update({"text/plain": text, "text/html": bar}, raw=True)
        else:
            self.line.show(text) if done < total else self.line.clear()
        if path := os.environ.get("AUGDISTILL_PROGRESS"):
            with contextlib.suppress(OSError):
                write(Path(path), json.dumps(dict(text=text, fraction=done / total)))
