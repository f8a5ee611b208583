"""The workers of a Dask cluster as a `Crew`: the same jobs with bit-identical results, on other machines.

A worker needs the package and the data set. Before it runs a job it checks that both are the same as here. It works in
the run's folder if it can see it (unless Dask's configuration says `augdistill.shared-folder: false`). Otherwise it has
its own folder: the stored results that a job needs are sent there once, and the files that it makes are sent back. If a
worker dies, Dask gives its job to another.
"""

import concurrent.futures
import contextlib
import functools
import importlib.metadata
import ipaddress
import json
import platform
import queue
import socket
import threading
import time
import uuid
from pathlib import Path

import cloudpickle
import dask
import torch
from distributed import Client, Security, Status, Worker, get_worker
from distributed.comm import parse_address, parse_host_port

from augdistill_report.files.store import Store, write
from augdistill_report.work.crew import Crew, own_phis, run_with
from augdistill_report.work.jobs import Task
from augdistill_report.work.progress import REFRESH
from augdistill_report.work.provenance import SOURCES

TIMEOUT = 10  # seconds to wait for a scheduler's answer

VERSION = f"augdistill {importlib.metadata.version('augdistill')} (code {SOURCES.digest()}), torch {torch.__version__}"


class UnfitWorker(concurrent.futures.BrokenExecutor, ValueError):
    """A worker would make a different result, or none. The message names it and the reason."""


class ClusterLost(concurrent.futures.BrokenExecutor, ConnectionError):
    """The scheduler has gone, and the unfinished jobs with it."""


def connect(scheduler: str, insecure: bool = False) -> Client:
    """A client of the cluster whose scheduler has this address, or wrote this file (*.json).

    Raises `ValueError` if no scheduler answers, or if it is on another machine without TLS, unless `insecure`. Without
    TLS anyone on the network between could read all traffic, and run code on both machines.
    """
    address = address_in(Path(scheduler)) if scheduler.endswith(".json") else scheduler
    protocol, host = address_parts(scheduler, address)
    if protocol == "tls" and not Security().get_connection_args("client").get("ssl_context"):
        raise ValueError(
            f"cluster={scheduler!r}: needs TLS, but Dask's configuration here has no certificates; must have "
            "distributed.comm.tls.ca-file, and client.cert and client.key there"
        )
    if protocol not in ("tls", "wss") and not insecure and not is_here(host):
        raise ValueError(
            f"cluster={scheduler!r}: {address} is on another machine, and {protocol}:// is neither encrypted nor "
            "checked; must be tls:// (TLS certificates in Dask's configuration), or say --set cluster_insecure=true "
            "if you trust everyone on that network"
        )
    try:
        return Client(address, timeout=TIMEOUT, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"cluster={scheduler!r}: no Dask scheduler answers there ({error})") from None


def address_in(file: Path) -> str:
    """The address in a scheduler's file; a `ValueError` if the file holds none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
    else:
        if isinstance(found, dict) and isinstance(found.get("address"), str):
            return found["address"]
        reason = "holds no scheduler's address"
    raise ValueError(f"cluster={str(file)!r}: {reason}; must be written by `dask scheduler --scheduler-file`")


def address_parts(scheduler: str, address: str) -> tuple[str, str]:
    """The protocol and the host of a scheduler's address; a `ValueError` if it is none."""
    try:
        protocol, place = parse_address(address)
        return protocol, parse_host_port(place)[0]
    except ValueError as error:
        right = "must be tls://HOST:PORT, or tcp://HOST:PORT on this machine"
        raise ValueError(f"cluster={scheduler!r}: {address!r} is no scheduler's address ({error}); {right}") from None


def is_here(host: str) -> bool:
    """Whether every address of a host is this machine's own: only to those can a socket be bound."""
    try:
        for family, kind, protocol, _, place in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
            if not ipaddress.ip_address(place[0].partition("%")[0]).is_loopback:
                with socket.socket(family, kind, protocol) as probe:
                    probe.bind(place)
    except OSError:
        return False
    return True


@functools.cache  # the same for every cell of a sweep
def check_cluster(scheduler: str, insecure: bool = False) -> None:
    """A `ValueError`, before anything runs, if the cluster cannot be reached or a worker has another version."""

    def version():  # sent to workers as code, since one may lack the package
        try:
            from augdistill_report.work.cluster import VERSION
        except ImportError as error:
            return f"no such package ({error})"
        return VERSION

    with connect(scheduler, insecure) as client:
        for worker, found in client.run(version).items():
            if found != VERSION:
                raise UnfitWorker(other_version(worker, found, VERSION))


def other_version(worker: str, found: str, wanted: str) -> str:
    return f"worker {worker} has {found}; must be {wanted}, as where the command runs: install that there"


# --- on this machine --------------------------------------------------------------------------------------------------


class Cluster(Crew):
    """Submits jobs to a cluster by Dask's executor. Workers report their progress and the files that they lack."""

    def __init__(self, scheduler: str, insecure: bool, store: Store):
        self.scheduler, self.insecure, self.store = scheduler, insecure, store
        self.numbers: dict[concurrent.futures.Future, int] = {}
        self.told: dict[int, tuple[float, str]] = {}
        self.asked: queue.SimpleQueue = queue.SimpleQueue()
        self.names: dict = {}  # file names of the stored results that jobs need

    def __enter__(self):
        self.client = connect(self.scheduler, self.insecure)
        self.dashboard = self.client.dashboard_link
        self.order = {"version": VERSION, "token": self.store.token(), "folder": str(self.store.folder.absolute())}
        self.order |= {"threads": torch.get_num_threads(), "topic": f"augdistill-{uuid.uuid4().hex}"}
        self.client.subscribe_topic(self.order["topic"], self.hear)
        return self

    def __exit__(self, kind, error, trace):
        for future in self.numbers:
            future.cancel()  # also on the cluster
        with contextlib.suppress(
            Exception
        ):  # the scheduler may have gone; the exception that matters is already raised
            self.client.close(timeout=TIMEOUT)

    @property
    def about(self) -> str:
        running = sum(number in self.told for number in self.numbers.values())
        return f"{running} running on {self.dashboard}"

    def submit(self, job):
        setup = getattr(job, "setup", None)
        order = self.order | {"number": len(self.numbers), "needs": self.there_of(job.needs())}
        order["fingerprint"] = setup and setup.load(whiten=False).fingerprint
        gpu = {"resources": {"GPU": 1}} if setup and setup.device == "cuda" else {}
        future = self.client.get_executor(pure=False, **gpu).submit(work, order, cloudpickle.dumps((job, own_phis())))
        self.numbers[future] = order["number"]
        return future

    def there_of(self, jobs: list) -> list[str]:
        """The file names of those of the jobs' results that are in the store."""
        for job in jobs:
            if job not in self.names:
                self.names[job] = self.store.path(job.kind, job.spec()).name
        return [self.names[job] for job in jobs if (self.store.folder / self.names[job]).is_file()]

    def hear(self, event: tuple) -> None:
        """Take one message of a worker. Called in the client's own thread."""
        _, said = event
        if "lacks" in said:
            self.asked.put(said)
        else:
            self.told[said["number"]] = (said["fraction"], said["note"])

    def state(self, future):
        if self.client.status != "running":
            raise self.lost()
        while not self.asked.empty():
            self.send(**self.asked.get())
        return self.told.get(self.numbers[future], (0.0, ""))

    def send(self, worker: str, lacks: list[str]) -> None:
        """Send a worker the files that it lacks, one at a time. A worker that has died meanwhile is ignored."""
        for name in lacks:
            content = (self.store.folder / name).read_bytes()
            with contextlib.suppress(OSError):  # the scheduler may have gone: the next call of `state` reports it
                self.client.run(receive, self.order["token"], name, content, workers=[worker], on_error="ignore")

    def take(self, future):
        self.told.pop(self.numbers.pop(future), None)
        try:
            result = future.result()
        except concurrent.futures.CancelledError:
            raise self.lost() from None
        if "unfit" in result:
            raise UnfitWorker(result["unfit"])
        for name, content in result["files"].items():
            path = self.store.folder.parent / name
            if path.parent != self.store.folder:
                write(path, content)
            elif not path.is_file():  # a job may run twice: then the same file comes twice
                with self.store.lock(path):
                    write(path, content)
        if result["error"]:
            raise result["error"]

    def lost(self) -> ClusterLost:
        return ClusterLost(
            f"cluster={self.scheduler!r}: its scheduler is gone; what was finished is kept, and the same command "
            "goes on from there, on this cluster or another"
        )


# --- on a worker ------------------------------------------------------------------------------------------------------


class Cancelled(Exception):
    """The client has cancelled the job."""


def work(order: dict, packed: bytes) -> dict:
    """Run a job on a worker. Returns `unfit`, the reason why it cannot, or the `files` to send back and the `error`."""
    worker = get_worker()
    if order["version"] != VERSION:
        return {"unfit": other_version(worker.address, VERSION, order["version"])}
    job, phis = cloudpickle.loads(packed)
    if reason := unfit(worker, job, order["fingerprint"]):
        return {"unfit": f"worker {worker.address} on {platform.node()}: {reason}"}
    store = Store(order["folder"])
    shared = dask.config.get("augdistill.shared-folder", True) and store.known_by(order["token"])
    store = store if shared else own_store(worker, order["token"])
    torch.set_num_threads(order["threads"])
    error = None
    with Watch(worker, order, job) as watch:
        if not shared:
            watch.wait_for(store, order["needs"])
        before = set() if shared else seen(store)
        try:
            run_with(job, store, phis, watch.tell)
        except Exception as raised:
            error = raised
        watch.check()
    if shared:
        return {"files": {}, "error": error}
    made = {path for path, _ in seen(store) - before} | {store.path(job.kind, job.spec())}
    root = store.folder.parent
    return {"files": {str(p.relative_to(root)): p.read_bytes() for p in made if p.is_file()}, "error": error}


def unfit(worker: Worker, job, fingerprint: str | None) -> str:
    """The reason why a worker must not run a job; \"\" if there is none."""
    if worker.state.nthreads != 1:  # jobs in threads of one process would share the libraries' global state
        return f"runs {worker.state.nthreads} jobs at a time in one process; start it with --nthreads 1"
    try:
        found = job.setup.load(whiten=False).fingerprint if fingerprint else None
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: torch's, for a missing GPU
        return str(error)
    other = f"its {fingerprint and job.setup.dataset} has fingerprint {found}, must be {fingerprint}"
    return other if found != fingerprint else ""


def own_store(worker: Worker, token: str) -> Store:
    """A worker's own copy of a store that it cannot see. Dask removes it when the worker ends."""
    return Store(Path(worker.local_directory) / "augdistill" / token / "artefacts")


def receive(token: str, name: str, content: bytes, dask_worker: Worker) -> None:
    write(own_store(dask_worker, token).folder / name, content)


def seen(store: Store) -> set[tuple[Path, int]]:
    """Every file of a run's folder that is not hidden, with its modification time in ns."""
    inside = [p for p in store.folder.parent.rglob("[!.]*") if p.is_file()]
    return {(path, path.stat().st_mtime_ns) for path in inside}


class Watch:
    """Watches a running job on a worker: reports its progress, and ends it when the client cancels it."""

    def __init__(self, worker: Worker, order: dict, job: Task):
        self.worker, self.order, self.job, self.key = worker, order, job, worker.get_current_task()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.look, daemon=True)

    def __enter__(self):
        self.tell(0.0, "")
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()

    @property
    def cancelled(self) -> bool:
        """Whether the client has cancelled the job or has gone, or the worker is closing."""
        task = self.worker.state.tasks.get(self.key)
        closing = self.worker.status in (Status.closing, Status.closed, Status.failed)
        return closing or task is None or task.state == "cancelled"

    def look(self) -> None:
        while not self.over.wait(REFRESH):
            if self.cancelled:
                self.job.cancel()
                return

    def check(self) -> None:
        if self.cancelled:
            raise Cancelled

    def tell(self, fraction: float, note: str) -> None:
        self.check()
        said = {"number": self.order["number"], "fraction": fraction, "note": note}
        self.worker.log_event(self.order["topic"], said)

    def wait_for(self, store: Store, names: list[str]) -> None:
        """Ask the client for the files that this worker lacks, and wait for them."""
        lacks = [name for name in names if not (store.folder / name).is_file()]
        if lacks:
            self.worker.log_event(self.order["topic"], {"worker": self.worker.address, "lacks": lacks})
        while not all((store.folder / name).is_file() for name in lacks):
            self.check()
            time.sleep(0.05)
