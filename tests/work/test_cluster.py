"""A Dask cluster gives bit-identical results, also after failures: real schedulers and workers on loopback.

Each worker is a process in its own folder, and sees no other folder (unless a test says so).
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import cloudpickle
import pytest
import torch
from helpers import CUT, SLEEPY, augdistill, found, grid_file, make_folder, processes_of, until

from augdistill_core import DistillConfig, Phi, register_phi
from augdistill_report.commands.cli import main
from augdistill_report.files.store import Store
from augdistill_report.places import ROOT
from augdistill_report.run import configuration
from augdistill_report.settings import resolve
from augdistill_report.studies import grid
from augdistill_report.work import cluster
from augdistill_report.work.distillation import Distillation
from augdistill_report.work.experts import expert_jobs
from augdistill_report.work.jobs import Subset, Task
from augdistill_report.work.own_code import own_source
from augdistill_report.work.pool import Pool, run_jobs
from augdistill_report.work.probes import Probe
from augdistill_report.work.scoring import EvalConfig, Evaluation, Score
from augdistill_report.work.setup import Setup

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import the tests


class Machines:
    """A scheduler and its workers, each in its own process."""

    def __init__(self, folder: Path):
        self.folder, self.address, self.processes = folder, str(folder / "scheduler.json"), {}
        folder.mkdir(parents=True)
        self.start("scheduler", "--port", "0", "--dashboard-address", "127.0.0.1:0", "--scheduler-file", self.address)
        until(Path(self.address).is_file)

    def start(self, name: str, *options: str, command: str = "scheduler", **environment: str) -> subprocess.Popen:
        (self.folder / name).mkdir()
        module = f"distributed.cli.dask_{command}"
        with open(self.folder / f"{name}.log", "w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module, "--host", "127.0.0.1", *options],
                cwd=self.folder / name,
                env=os.environ | {"PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT))} | environment,
                stdout=log,
                stderr=log,
            )
        self.processes[name] = process
        return process

    def worker(self, name: str, *options: str, threads: int = 1, **environment: str) -> subprocess.Popen:
        here = {"DASK_AUGDISTILL__SHARED_FOLDER": "False", **environment}
        how = ["--no-nanny", "--no-dashboard", "--nthreads", str(threads), "--name", name]
        where = ["--scheduler-file", self.address, "--local-directory", str(self.folder / name)]
        return self.start(name, *how, *where, *options, command="worker", **here)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()


@contextlib.contextmanager
def machines(folder: Path):
    made = Machines(folder)
    try:
        yield made
    finally:
        made.end()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A cluster of two workers; the second declares a GPU."""
    with machines(tmp_path_factory.mktemp("cluster") / "two") as made:
        made.worker("first")
        made.worker("second", "--resources", "GPU=1")
        until(lambda: all("Registered to" in made.log(name) for name in ("first", "second")))
        yield made


def run(jobs: list, store: Store, on: str = "", failures: dict | None = None, show=lambda *_: None) -> None:
    run_jobs(jobs, store, Pool(cluster=on), show, failures)


def same(jobs: list, one: Store, other: Store) -> None:
    """Both stores hold the same bits for every job."""
    for job in jobs:
        (tensors, meta), (others, meta_of_other) = (s.load(job.kind, job.spec()) for s in (one, other))
        assert meta == meta_of_other and sorted(tensors) == sorted(others)
        assert all(torch.equal(tensors[name], others[name]) for name in tensors)


class Own(Phi):
    def __init__(self, images, classes):
        super().__init__()
        self.range = torch.nn.Parameter(torch.tensor(0.1))

    def forward(self, images, *, generator, **_):
        return images + self.range * torch.randn(len(images), 1, 1, 1, generator=generator)


@dataclasses.dataclass(frozen=True)
class Piece(Task):
    """Writes its process id into a folder, waits, and returns its name."""

    name: str
    marks: Path
    seconds: float = 0.0
    wrong: str = ""

    kind = "piece"

    def spec(self):
        return {"name": self.name}

    def work(self, store, tick):
        (self.marks / f"{self.name}-{os.getpid()}").touch()
        until_then = time.monotonic() + self.seconds
        while time.monotonic() < until_then:
            time.sleep(0.1)
            tick(1, 2, f"{self.name} takes its time")
        if self.wrong:
            raise RuntimeError(self.wrong)
        (self.marks / f"{self.name}-done").touch()
        return {}, {"name": self.name, "pid": os.getpid()}


def pids(marks: Path, name: str) -> list[int]:
    return [int(path.name.rpartition("-")[2]) for path in marks.glob(f"{name}-[0-9]*")]


# --- the same bits ----------------------------------------------------------------------------------------------------

SMALL = dict(size=8, width=4, experts=8, epochs=2)


def test_experts_and_the_jobs_that_use_them_are_bit_identical(two, tmp_path, monkeypatch):
    register_phi("cluster's own")(Own)  # forgotten behind this file
    setup, ten, config = (
        Setup(**SMALL),
        Subset(0, per_class=1),
        DistillConfig(iterations=3, syn_steps=2, max_start_epoch=0),
    )
    config = dataclasses.replace(config, expert_epochs=1)
    name = "cluster's own"
    distilled = [Distillation(setup, "unet", ten, config), Distillation(setup, name, ten, config, own_source(name))]
    scoring = EvalConfig(eval_students=2, eval_steps=5, eval_labels="soft")
    scored = [Evaluation(setup, ten, scoring, job) for job in distilled] + [Probe(setup, distilled[1], segments=2)]
    last = [Score(setup, scored[0])]
    here, there, sent = Store(tmp_path / "here" / "artefacts"), Store(tmp_path / "there" / "artefacts"), []
    send = cluster.Cluster.send
    monkeypatch.setattr(
        cluster.Cluster,
        "send",
        lambda self, worker, lacks: (sent.extend((worker, n) for n in lacks), send(self, worker, lacks)),
    )
    for jobs in (expert_jobs(setup), distilled, scored, last):
        for job in jobs:
            job.run(here)
        run(jobs, there, two.address)
        same(jobs, here, there)
    assert len(list(there.folder.glob("expert-*.json"))) == 8
    # no worker made again what was in the store, nor was it sent twice
    assert len(sent) == len(set(sent)) and {"expert", "distilled"} <= {n.split("-")[0] for _, n in sent}
    assert not list(two.folder.rglob("artefacts/checkpoint-*"))
    assert [file.name for file in two.folder.rglob("expert-*.safetensors")]


def test_a_sweep_gives_the_numbers_of_this_machine(two, tmp_path, monkeypatch):
    """Its notebook, its preset and its phi are in a folder that workers do not see."""
    (tmp_path / "grid").mkdir()
    (tmp_path / "grid" / "own.py").write_text(CUT)
    shutil.copy(ROOT / "notebooks" / "presets" / "smoke.yaml", tmp_path / "grid" / "own.yaml")
    changes = {"set": {"iterations": 3, "phis": "own.py"}, "preset": str(tmp_path / "grid" / "own.yaml")}
    path = grid_file(tmp_path / "grid", rows={"U-Net": {"phi": "unet"}, "cut": {"phi": "cut"}}, **changes)
    here, there, work = tmp_path / "here", tmp_path / "there", grid.run_jobs

    def without_the_files(*arguments):
        (tmp_path / "grid").rename(tmp_path / "hidden")
        work(*arguments)
        (tmp_path / "hidden").rename(tmp_path / "grid")

    assert main(["sweep", str(path), "--out", str(here), "--row", "U-Net", "--set", "workers=1"]) == 0
    monkeypatch.setattr(grid, "run_jobs", without_the_files)
    assert main(["sweep", str(path), "--out", str(there), "--cluster", two.address]) == 0
    (ours,), (theirs, cut) = (found(folder / "sweeps" / "mine") for folder in (here, there))
    assert ours["numbers"] == theirs["numbers"] and ours["settings"] == theirs["settings"]
    assert "no gradient reaches phi" in cut["error"]
    assert (there / "sweeps" / "mine" / "cells" / "cut" / "notebooks" / "one_phi.failed.ipynb").is_file()
    inside = {p.relative_to(here) for p in here.rglob("[!.]*") if p.is_file()}
    assert inside <= {p.relative_to(there) for p in there.rglob("[!.]*") if p.is_file()}
    picture = Path("sweeps/mine/cells/U-Net/figures/images.png")
    assert (here / picture).read_bytes() == (there / picture).read_bytes()


def test_a_report_s_notebooks_run_in_parallel_here_and_their_jobs_on_workers(smoke, two, tmp_path, capsys):
    arguments = ["report", "--preset", "smoke", "--only", "02,03", "--out", str(tmp_path)]
    assert main([*arguments, "--cluster", two.address]) == 0
    assert "notebooks" in capsys.readouterr().err
    for name in ("02_baseline_mtt", "03_phi_distillation"):
        here, there = (json.loads((at / "results" / f"{name}.json").read_text()) for at in (smoke, tmp_path))
        assert here["numbers"] == there["numbers"] and here["configuration"] == there["configuration"]
    for name in ("first", "second"):  # pieces were made there, and sent back
        assert list((two.folder / name).rglob("accuracy-*.safetensors"))


def test_in_a_shared_folder_no_file_is_sent(two, tmp_path):
    """Workers that see the run's folder, and may use it, work in it."""
    store, jobs = Store(tmp_path / "artefacts"), [Piece("one", tmp_path), Piece("two", tmp_path)]

    def shared(yes):
        import dask

        dask.config.set({"augdistill.shared-folder": yes})

    with cluster.connect(two.address) as client:
        client.run(shared, True)
        run(jobs, store, two.address)
        client.run(shared, False)
    token = store.token()
    assert not list(two.folder.rglob(f"{token}/artefacts/piece-*"))
    assert all(store.load(job.kind, job.spec())[1]["name"] == job.name for job in jobs)


def test_what_a_job_raises_is_raised_here(two, tmp_path):
    ill, well, failures = Piece("ill", tmp_path, wrong="it is ill"), Piece("well", tmp_path), {}
    store = Store(tmp_path / "artefacts")
    run([ill, well], store, two.address, failures)
    assert list(failures) == [ill] and str(failures[ill]) == "it is ill" and store.has(well.kind, well.spec())
    with pytest.raises(RuntimeError, match="it is ill"):
        run([ill], store, two.address)


def test_progress_is_that_of_this_machine_and_says_where_the_dashboard_is(two, tmp_path):
    shown = []
    jobs = [Piece(name, tmp_path, 1.5) for name in ("one", "two")]
    run(jobs, Store(tmp_path / "artefacts"), two.address, show=lambda *state: shown.append(state))
    assert shown[0] == (0, 2, "") and shown[-1][:2] == (2, 2)
    assert any(0 < done < 2 and "takes its time" in note for done, _, note in shown)
    assert any("2 running on http://127.0.0.1:" in note for _, _, note in shown)


def test_a_gpu_job_goes_to_a_worker_with_a_gpu(two, tmp_path):
    """By the device of its setup; here that is only simulated, since the tests need no GPU."""

    @dataclasses.dataclass(frozen=True)
    class OnGPU(Piece):
        @property
        def setup(self):
            class Looks:
                device, dataset = "cuda", "digits"

                def load(self, whiten):
                    self.fingerprint = "f"
                    return self

            return Looks()

    jobs = [OnGPU(f"gpu {i}", tmp_path) for i in range(4)]
    run(jobs, Store(tmp_path / "artefacts"), two.address)
    assert {pid for job in jobs for pid in pids(tmp_path, job.name)} == {two.processes["second"].pid}


def test_results_do_not_depend_on_the_number_of_workers(tmp_path):
    assert configuration(resolve("smoke", {"cluster": "tcp://10.0.0.7:8786"})) == configuration(resolve("smoke"))
    assert resolve("smoke", {"cluster": "tcp://10.0.0.7:8786"}).public() == resolve("smoke").public()


# --- what can go wrong ------------------------------------------------------------------------------------------------


def test_the_job_of_a_killed_worker_runs_on_another(tmp_path):
    with machines(tmp_path / "machines") as own:
        own.worker("one")
        own.worker("other")
        store, job = Store(tmp_path / "artefacts"), Piece("victim", tmp_path, 3)

        def kill():
            (pid,) = until(lambda: pids(tmp_path, "victim"))
            os.kill(pid, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        run([job], store, own.address)
        killer.join()
        by = store.load(job.kind, job.spec())[1]["pid"]
        assert len(pids(tmp_path, "victim")) == 2 and by in pids(tmp_path, "victim")
        assert [p.name for p in store.folder.glob("piece-*")] == [store.path(job.kind, job.spec()).name]
        dead = {name for name, process in own.processes.items() if process.poll() is not None}
        assert len(dead) == 1 and own.processes[dead.pop()].pid != by


def test_a_killed_scheduler_ends_the_run_and_finished_results_stay(two, tmp_path):
    quick, slow, store = Piece("quick", tmp_path), Piece("slow", tmp_path, 60), Store(tmp_path / "artefacts")
    with machines(tmp_path / "machines") as own:
        own.worker("one")
        own.worker("another")  # or the slow one may come first, and nothing be left when both are seen

        def kill():
            until(lambda: store.has(quick.kind, quick.spec()) and pids(tmp_path, "slow"))
            own.processes["scheduler"].kill()

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(
            ConnectionError, match="its scheduler is gone; what was finished is kept, and the same command"
        ):
            run([quick, slow], store, own.address, failures={})
        killer.join()
        own.processes["one"].wait(60)  # a worker without a scheduler ends
    assert not store.has(slow.kind, slow.spec())
    slow = dataclasses.replace(slow, seconds=0)  # the same piece
    run([quick, slow], store, two.address)  # going on elsewhere repeats nothing
    assert len(pids(tmp_path, "quick")) == 1 and store.has(slow.kind, slow.spec())


def test_a_worker_with_another_version_is_named(tmp_path):
    copy = tmp_path / "other"
    copy.mkdir()
    shutil.copy(ROOT / "augdistill_core.py", copy)
    for package in ("augdistill_method", "augdistill_report"):
        shutil.copytree(ROOT / package, copy / package)
    with open(copy / "augdistill_report" / "work" / "pool.py", "a") as module:
        module.write("another = 1\n")
    store, job = Store(tmp_path / "artefacts"), Piece("one", tmp_path)
    with machines(tmp_path / "machines") as own:
        own.worker("foreign", PYTHONPATH=str(copy))
        until(lambda: "Registered to" in own.log("foreign"))
        right = r"worker tcp://127.0.0.1:\d+ has augdistill .* \(code \w+\), torch .*; must be augdistill .* install"
        with pytest.raises(ValueError, match=right):
            cluster.check_cluster(own.address)
        with pytest.raises(ValueError, match=right):  # one that comes later says so when it is given work
            run([job], store, own.address, failures={})
    assert not pids(tmp_path, "one")


def test_a_worker_without_the_data_or_with_other_data_is_named(two, tmp_path, monkeypatch):
    make_folder(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    setup = Setup(**SMALL | {"dataset": "folder:/proc/self/cwd/images", "experts": 1})  # each process has its own
    store = Store(tmp_path / "artefacts")
    with pytest.raises(ValueError, match=r"worker tcp://127.0.0.1:\d+ on .*: dataset='folder:/proc/self/cwd/images'"):
        run(expert_jobs(setup), store, two.address, failures={})
    for name in ("first", "second"):
        make_folder(two.folder / name / "images", count=12)
    with pytest.raises(ValueError, match=r"worker tcp://.*: its folder:.* has fingerprint \w+, must be \w+"):
        run(expert_jobs(setup), store, two.address, failures={})


def test_a_worker_that_runs_jobs_in_threads_is_named(tmp_path):
    with machines(tmp_path / "machines") as own:
        own.worker("wide", threads=2)
        with pytest.raises(ValueError, match=r"worker tcp://.*: runs 2 jobs at a time .*--nthreads 1"):
            run([Piece("one", tmp_path)], Store(tmp_path / "artefacts"), own.address)


# addresses for documentation, which no machine has
ELSEWHERE = ("192.0.2.1:1", "tcp://192.0.2.1:1", "tcp://[2001:db8::1]:1", "ws://192.0.2.1:1", "ucx://192.0.2.1:1")
ELSEWHERE += ('file: {"address": "tcp://192.0.2.1:1"}',)


@pytest.mark.parametrize("where", ELSEWHERE[:3])
def test_another_machine_without_tls_is_contacted_only_if_the_user_says_so(where, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cluster, "TIMEOUT", 1)
    command = ["experts", "train", "--preset", "smoke", "--out", str(tmp_path / "out"), "--cluster", where]
    assert main([*command, "--set", "cluster_insecure=true"]) == 2
    assert "no Dask scheduler answers there" in capsys.readouterr().err


def test_this_machine_s_own_addresses_need_no_tls():
    assert cluster.is_here("127.0.0.1") and cluster.is_here("::1") and cluster.is_here("localhost")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:  # sends nothing, and learns the machine's address
        try:
            route.connect(("192.0.2.1", 1))
        except OSError:
            pytest.skip("this machine has no network")
        assert cluster.is_here(route.getsockname()[0])


@pytest.mark.parametrize(
    "where, why",
    [
        ("127.0.0.1:1", "no Dask scheduler answers there"),
        ("nowhere.json", "no such file; must be written by"),
        ("tls://127.0.0.1:1", "needs TLS, but Dask's configuration here has no certificates"),
        ('file: {"address": "tls://127.0.0.1:1"}', "needs TLS"),
        ("file: {}", "holds no scheduler's address; must be written by"),
        ("file: [1]", "holds no scheduler's address"),
        ('file: {"address": 1}', "holds no scheduler's address"),
        ('file: {"addr', "cannot be read"),
        ("file: " + "[" * 100_000, "cannot be read"),
        ("folder.json", "cannot be read"),
        ("nowhere", "is no scheduler's address"),
        *((where, "is on another machine.*must be tls://.*cluster_insecure=true") for where in ELSEWHERE),
    ],
)
def test_a_missing_cluster_is_refused_before_anything_runs(where, why, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cluster, "TIMEOUT", 1)
    if where.startswith("file: "):
        (tmp_path / "dask.json").write_text(where.removeprefix("file: "))
        where = str(tmp_path / "dask.json")
    elif where == "folder.json":
        (tmp_path / where).mkdir()
        where = str(tmp_path / where)
    assert main(["experts", "train", "--preset", "smoke", "--out", str(tmp_path / "out"), "--cluster", where]) == 2
    error = capsys.readouterr().err.strip()
    assert re.search(f"^augdistill: cluster=.*{why}", error) and "\n" not in error and not (tmp_path / "out").exists()


def test_an_exception_here_cancels_the_jobs_on_workers(two, tmp_path):
    """Ctrl-C is an exception: running jobs end, waiting jobs never start."""
    store, jobs = Store(tmp_path / "artefacts"), [Piece(f"piece {i}", tmp_path, 60) for i in range(4)]

    def show(done, total, note):
        if len(list(tmp_path.glob("piece *"))) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(jobs, store, two.address, show=show)
    with cluster.connect(two.address) as client:
        until(lambda: not any(client.run(lambda dask_worker: len(dask_worker.state.executing)).values()), 20)
    assert len(list(tmp_path.glob("piece *"))) == 2 and not list(store.folder.glob("piece-*"))


def test_ctrl_c_ends_a_notebook_on_a_worker(tmp_path):
    (tmp_path / "mine.py").write_text(SLEEPY)
    path = grid_file(tmp_path / "grid", rows={"slow": {"phi": "sleepy"}}, set={"phis": str(tmp_path / "mine.py")})
    with machines(tmp_path / "machines") as own:
        own.worker("one", OF_THIS_TEST=str(tmp_path / "machines"))
        process = augdistill(tmp_path / "here", "sweep", path, "--out", tmp_path / "run", "--cluster", own.address)
        until(lambda: processes_of(tmp_path / "machines", "ipykernel"))
        process.send_signal(signal.SIGINT)
        assert "stopped" in process.communicate(timeout=60)[1] and process.returncode == 130
        until(lambda: not processes_of(tmp_path / "machines", "ipykernel"), 30)
        assert own.processes["one"].poll() is None
