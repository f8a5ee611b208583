"""Many independent pieces of work over the cores, with progress, through one seam: a `concurrent.futures.Executor`.

Every process uses the same number of threads, and a job's draws follow from its own seeds, so the results are the same
bits however many processes there are.
"""

import concurrent.futures
import contextlib
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


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends the workers


def _run(job, store: Store, builders: dict, progress: Path) -> None:
    """One job in a worker: phis that the user registered travel along; progress is a file that the parent reads."""
    for name, build in builders.items():
        register_phi(name)(build)
    last = 0.0

    def tick(done, total, note=""):
        nonlocal last
        if time.monotonic() - last > REFRESH:
            last = time.monotonic()
            with contextlib.suppress(OSError):
                write(progress, json.dumps([done / total, note]))

    job.run(store, tick)


def _state(progress: Path) -> tuple[float, str]:
    """How far a running job is, in [0, 1], and what it says of itself."""
    try:
        return tuple(json.loads(progress.read_text()))
    except (OSError, ValueError):
        return 0.0, ""


def run_jobs(
    jobs: list, store: Store, workers: int, show: Callable[[float, float, str], None], failures: dict | None = None
) -> None:
    """Run the jobs that the store lacks, `workers` at a time; `show(done, total, note)` in jobs, parts of one included.

    An exception in a job ends the others, unless there are `failures` to put it in (by job); Ctrl-C does in any case.
    What was finished is in the store.
    """
    missing = {store.path(job.kind, job.spec()): job for job in jobs}
    missing = [job for path, job in missing.items() if not path.is_file()]
    if not missing:
        return
    missing.sort(key=lambda job: -job.cost)  # else the longest may start last, and run alone
    show(0, len(missing), "")
    if workers == 1 or len(missing) == 1:
        for number, job in enumerate(missing):
            with _kept(job, failures):
                job.run(store, lambda done, total, note="", n=number: show(n + done / total, len(missing), note))
            show(number + 1, len(missing), "")
        return
    own = {n: b for n, b in PHIS.items() if origin(b)[0] not in OURS}
    threads = torch.get_num_threads()
    # the workers stay for the next call: starting one costs seconds
    executor = get_reusable_executor(workers, timeout=120, initializer=_start_worker, initargs=(threads,))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # loky replaces a worker that has grown by 300 MB and says so; ours may, and nothing is lost
        warnings.filterwarnings("ignore", message="A worker was restarted")
        try:
            files = [Path(folder) / str(number) for number in range(len(missing))]
            futures = [executor.submit(_run, job, store, own, file) for job, file in zip(missing, files, strict=True)]
            job_of = dict(zip(futures, missing, strict=True))
            waiting = set(futures)
            while waiting:
                done, waiting = concurrent.futures.wait(
                    waiting, timeout=REFRESH, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for future in done:
                    with _kept(job_of[future], failures):
                        future.result()  # raises what the job raised
                states = [(1.0, "") if f.done() else _state(file) for f, file in zip(futures, files, strict=True)]
                notes = dict.fromkeys(note for _, note in states if note)
                show(sum(part for part, _ in states), len(missing), "; ".join(notes))
        except BaseException:
            executor.shutdown(wait=True, kill_workers=True)
            raise


@contextlib.contextmanager
def _kept(job, failures: dict | None):
    """Put an exception of `job` into `failures`, if there are any to put it in; a dead worker ends everything."""
    try:
        yield
    except Exception as error:
        if failures is None or isinstance(error, concurrent.futures.BrokenExecutor):
            raise
        failures[job] = error


class Line:
    """One line that says where a long command is: live in a terminal, now and then in a log."""

    def __init__(self):
        self.live, self.last = sys.stderr.isatty(), -LOG_EVERY

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
