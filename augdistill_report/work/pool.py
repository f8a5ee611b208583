"""Runs independent jobs in worker processes, with progress: by loky on this machine, by Dask on others.

Every process uses the same number of threads, and a job's random numbers depend only on its own seeds. So the results
are bit-identical for any number of processes.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path

import torch
from loky import get_reusable_executor

from augdistill_core import Config, knob
from augdistill_report.files.store import Store, write
from augdistill_report.work.crew import Crew, own_phis, run_with
from augdistill_report.work.experts import Expert, missing_experts
from augdistill_report.work.jobs import Task
from augdistill_report.work.progress import REFRESH, Progress
from augdistill_report.work.worker import start_worker


@dataclasses.dataclass(frozen=True)
class Pool:
    """Where jobs run: in `processes` on this machine, or on a Dask cluster (its scheduler's address, or file)."""

    processes: int = 1
    cluster: str = ""
    insecure: bool = False  # accept a cluster on other machines without TLS

    def crew(self, store: Store) -> "Crew":
        if self.cluster:
            from augdistill_report.work.cluster import Cluster  # late: it needs an optional package

            return Cluster(self.cluster, self.insecure, store)
        return Processes(self.processes, store)


@dataclasses.dataclass(frozen=True)
class WorkConfig(Config):
    """Where jobs run."""

    workers: int = knob(0, "worker processes; 0 = one per core (one, on a GPU)", low=0)
    notebooks_at_once: int = knob(
        0, "notebooks of a report run at once; 0 = two (one worker: one), or all on a cluster", low=0
    )
    cluster: str = knob("", "run jobs on this Dask cluster: its scheduler's address, or its scheduler.json")
    cluster_insecure: bool = knob(False, "accept a cluster on other machines without TLS, if you trust that network")

    @property
    def processes(self) -> int:
        """Worker processes in all."""
        return self.workers or (1 if self.device == "cuda" else os.cpu_count() or 1)

    @property
    def pool(self) -> Pool:
        """Where the jobs of one notebook run: in its share of the processes."""
        return Pool(max(self.processes // max(self.notebooks_at_once, 1), 1), self.cluster, self.cluster_insecure)


class Processes(Crew):
    """Worker processes on this machine, by loky. Each writes the progress of its job to a file."""

    def __init__(self, processes: int, store: Store):
        self.processes, self.store, self.files = processes, store, {}

    def __enter__(self):
        # the workers wait for the next call, since starting one takes seconds
        start = dict(initializer=start_worker, initargs=(torch.get_num_threads(), os.getpid()))
        with _without_ctrl_c():
            self.executor = get_reusable_executor(self.processes, timeout=120, **start)
        self.open = contextlib.ExitStack()
        self.folder = Path(self.open.enter_context(tempfile.TemporaryDirectory()))
        # loky restarts a worker whose memory has grown by 300 MB, with a warning; that is harmless here
        self.open.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="A worker was restarted")
        return self

    def __exit__(self, kind, error, trace):
        if kind is not None:
            self.executor.shutdown(wait=True, kill_workers=True)
        self.open.close()

    def submit(self, job):
        file = self.folder / str(len(self.files))
        with _without_ctrl_c():
            future = self.executor.submit(_run, job, self.store, own_phis(), file)
        self.files[future] = file
        return future

    def state(self, future):
        try:
            return tuple(json.loads(self.files[future].read_text()))
        except (OSError, ValueError):
            return 0.0, ""


@contextlib.contextmanager
def _without_ctrl_c():
    """Block Ctrl-C in this thread, and in the processes that it starts meanwhile: they inherit the block.

    A terminal sends Ctrl-C to all of them, and a worker that is still importing would end with a traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # if it started while Ctrl-C is blocked, it would unblock it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run(job, store: Store, phis: dict, progress: Path) -> None:
    """Run one job in a worker process of this machine."""

    def tell(fraction, note):
        with contextlib.suppress(OSError):
            write(progress, json.dumps([fraction, note]))

    run_with(job, store, phis, tell)


def run_jobs(
    jobs: list, store: Store, pool: Pool, show: Callable[[float, float, str], None], failures: dict | None = None
) -> None:
    """Run the jobs whose results the store lacks. `show(done, total, note)` gets the progress, in jobs (fractional).

    A job counts by its share of the total `cost`, so the progress shows how long the rest will take. An exception in a
    job stops all jobs, or is put into `failures` (by job) if that is given. Ctrl-C stops all jobs. Finished results
    stay in the store.
    """
    missing = {store.path(job.kind, job.spec()): job for job in jobs}
    missing = [job for path, job in missing.items() if not path.is_file()]
    if not missing:
        return
    count, whole = len(missing), sum(job.cost for job in missing)
    weight = {job: count * job.cost / whole if whole else 1.0 for job in missing}  # in jobs: the weights sum to `count`
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
    missing.sort(key=lambda job: -job.cost)  # longest first: started last, it would run alone at the end
    with pool.crew(store) as crew:
        job_of = {crew.submit(job): job for job in missing}
        waiting = set(job_of)
        while waiting:
            done, waiting = concurrent.futures.wait(
                waiting, timeout=REFRESH, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
                job = job_of.pop(future)  # not kept: its result may be large
                with _kept(job, failures):
                    crew.take(future)
                finished += weight[job]
            states = {future: crew.state(future) for future in waiting}
            notes = dict.fromkeys(note for note in (crew.about, *(note for _, note in states.values())) if note)
            partly = sum(fraction * weight[job_of[future]] for future, (fraction, _) in states.items())
            show(finished + partly if waiting else count, count, "; ".join(notes))


def make_jobs(store: Store, pool: Pool, jobs: list, what: str) -> None:
    """Run the jobs whose results the store lacks, with a progress bar called `what`, after those that they need.

    Else several workers would wait for one that makes what they all need, and its time would count as theirs.
    """

    def is_stored(job: Task) -> bool:
        return store.has(job.kind, job.spec())

    needed = dict.fromkeys(n for job in jobs for n in needs_of(job, is_stored) if not is_stored(n))
    setups = dict.fromkeys(need.setup for need in needed if need.kind == Expert.kind)
    run_jobs([expert for setup in setups for expert in missing_experts(setup)], store, pool, Progress("experts"))
    others = [need for need in needed if need.kind != Expert.kind]
    for kind in dict.fromkeys(need.kind for need in others):
        run_jobs([need for need in others if need.kind == kind], store, pool, Progress(kind))
    run_jobs(jobs, store, pool, Progress(what))


def needs_of(job: Task, is_done: Callable[[Task], bool] = lambda job: False) -> Iterator[Task]:
    """What is made ahead of a job: all that it needs, directly or not, the first to be made first.

    A job that is done needs nothing.
    """
    for need in () if is_done(job) else job.needs():
        for task in (*needs_of(need, is_done), need):
            if task.ahead and (task.kind == Expert.kind or not job.whole):
                yield task


@contextlib.contextmanager
def _kept(job, failures: dict | None):
    """Put an exception of `job` into `failures`, if that is given. A dead worker stops all jobs."""
    try:
        yield
    except Exception as error:
        if failures is None or isinstance(error, concurrent.futures.BrokenExecutor):
            raise
        failures[job] = error
