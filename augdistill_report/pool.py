"""Many independent pieces of work over the cores, with progress, through one seam: a `concurrent.futures.Executor`.

Every process uses the same number of threads, and a job's draws follow from its own seeds, so the results are the same
bits however many processes there are.
"""

import concurrent.futures
import contextlib
import json
import os
import signal
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from loky import get_reusable_executor

from augdistill_phis import PHIS, register_phi
from augdistill_report.artefacts import Store, write

REFRESH = 0.5  # seconds between two looks at the progress


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends the workers


def _run(job, store: Store, builders: dict, progress: Path) -> None:
    """One job in a worker: phis that the user registered travel along; progress is a file that the parent reads."""
    for name, build in builders.items():
        register_phi(name)(build)
    last = 0.0

    def tick(done, total):
        nonlocal last
        if time.monotonic() - last > REFRESH:
            last = time.monotonic()
            write(progress, json.dumps([done, total]))

    job.run(store, tick)


def _fraction(progress: Path) -> float:
    try:
        done, total = json.loads(progress.read_text())
        return done / total
    except (OSError, ValueError):
        return 0.0


def run_jobs(jobs: list, store: Store, workers: int, show: Callable[[float, float], None]) -> None:
    """Run the jobs that the store lacks, `workers` at a time; `show(done, total)` in jobs, parts of a job included.

    An exception in a job, or Ctrl-C, ends the others; what was finished is in the store.
    """
    missing = {store.path(job.kind, job.spec()): job for job in jobs}
    missing = [job for path, job in missing.items() if not path.is_file()]
    if not missing:
        return
    show(0, len(missing))
    if workers == 1 or len(missing) == 1:
        for number, job in enumerate(missing):
            job.run(store, lambda done, total, n=number: show(n + done / total, len(missing)))
            show(number + 1, len(missing))
        return
    own = {n: b for n, b in PHIS.items() if getattr(b, "__module__", "") != "augdistill_phis"}
    threads = torch.get_num_threads()
    # the workers stay for the next call: starting one costs seconds
    executor = get_reusable_executor(workers, timeout=120, initializer=_start_worker, initargs=(threads,))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # loky replaces a worker that has grown by 300 MB and says so; ours may, and nothing is lost
        warnings.filterwarnings("ignore", message="A worker was restarted")
        try:
            files = [Path(folder) / str(number) for number in range(len(missing))]
            futures = [executor.submit(_run, job, store, own, file) for job, file in zip(missing, files, strict=True)]
            waiting = set(futures)
            while waiting:
                done, waiting = concurrent.futures.wait(
                    waiting, timeout=REFRESH, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for future in done:
                    future.result()  # raises what the job raised
                parts = [1.0 if f.done() else _fraction(file) for f, file in zip(futures, files, strict=True)]
                show(sum(parts), len(missing))
        except BaseException:
            executor.shutdown(wait=True, kill_workers=True)
            raise


class Progress:
    """A bar that stays readable wherever it lands: live in a notebook, one line at the end in a saved one.

    The runner, which cannot see into a running cell, reads the same state from the file that it names in the
    environment variable AUGDISTILL_PROGRESS.
    """

    def __init__(self, what: str):
        self.what, self.start, self.last, self.handle = what, time.monotonic(), 0.0, None

    def __call__(self, done: float, total: float) -> None:
        from IPython.display import display

        if self.handle is None:  # nothing is shown for work that was done before
            self.handle = display({"text/plain": self.what}, raw=True, display_id=True)
        now = time.monotonic()
        if now - self.last < REFRESH and done < total:
            return
        self.last = now
        spent = now - self.start
        left = f", {spent * (total - done) / done:.0f} s left" if done else ""
        text = f"{self.what}: {done:.1f} of {total:g}{left}" if done < total else f"{self.what}: {total:g} done"
        bar = f'<progress max="{total}" value="{done}"></progress> {text}' if done < total else text
        if self.handle:
            self.handle.update({"text/plain": text, "text/html": bar}, raw=True)
        if path := os.environ.get("AUGDISTILL_PROGRESS"):
            with contextlib.suppress(OSError):
                write(Path(path), json.dumps(dict(text=text, fraction=done / total)))
