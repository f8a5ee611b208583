"""The interface of what runs jobs: processes on this machine, or the workers of a cluster."""

import concurrent.futures
import contextlib
import time
from collections.abc import Callable

from augdistill_core import PHIS, is_ours, register_phi
from augdistill_report.files.store import Store
from augdistill_report.work.progress import REFRESH


class Crew(contextlib.AbstractContextManager):
    """Runs jobs while its context is open. An exception inside the context stops all jobs."""

    about = ""  # shown beside the progress

    def submit(self, job) -> concurrent.futures.Future:
        raise NotImplementedError

    def state(self, future: concurrent.futures.Future) -> tuple[float, str]:
        """The progress of an unfinished job, in [0, 1], and a note (a line of text, or "")."""
        raise NotImplementedError

    def take(self, future: concurrent.futures.Future) -> None:
        """Put the result of a finished job into the store, if it is not there. Raises the job's own exception."""
        future.result()


def own_phis() -> dict:
    """The user's own registered phis, by name: they are sent to the workers with each job."""
    return {name: build for name, build in PHIS.items() if not is_ours(build)}


def run_with(job, store: Store, phis: dict, tell: Callable[[float, str], None]) -> None:
    """Run one job in a worker, with the user's own phis.

    Calls `tell(fraction done, note)` at most twice a second.
    """
    for name, build in phis.items():
        register_phi(name)(build)
    last = 0.0

    def tick(done, total, note=""):
        nonlocal last
        if time.monotonic() - last > REFRESH:
            last = time.monotonic()
            tell(done / total, note)

    job.run(store, tick)
