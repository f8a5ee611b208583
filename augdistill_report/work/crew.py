"""Who runs jobs: the interface that processes on this machine and workers of a cluster share."""

import concurrent.futures
import contextlib
import time
from collections.abc import Callable

from augdistill_core import PHIS, is_ours, register_phi
from augdistill_report.files.store import Store
from augdistill_report.work.progress import REFRESH


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
    return {name: build for name, build in PHIS.items() if not is_ours(build)}


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
