"""Time of a sweep of eight cells on two Dask workers compared with two local processes; checks that numbers agree.

    python benchmarks/cluster.py [--repeat 2] [--out figures/benchmarks]

Scheduler and workers are processes on loopback, started before the measurement. Each worker has its own folder, so
every file is sent. The two variants alternate, each without stored results. On a busy machine compare the CPU seconds,
which are those of the command and of all its workers.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml

from augdistill_report.files.store import as_json, write
from augdistill_report.places import NOTEBOOKS, ROOT
from augdistill_report.work.provenance import environment

GRID = {
    "notebook": str(NOTEBOOKS / "sweeps" / "one_phi.ipynb"),
    "preset": "smoke",
    "set": {"iterations": 20, "eval_steps": 30},
    "rows": {"U-Net": {"phi": "unet"}, "distnet2": {"phi": "distnet2"}},
    "axes": {"seed": [0, 1, 2, 3]},
}
COMMAND = [
    sys.executable,
    "-c",
    "import sys; from augdistill_report.commands.cli import main; sys.exit(main())",
    "sweep",
]
PYTHONPATH = {"PYTHONPATH": str(ROOT)}  # this clone's code, also on the workers


@contextlib.contextmanager
def machines(folder: Path, workers: int):
    """Start a scheduler and its workers; gives the scheduler's file and all these processes."""
    file, started = folder / "scheduler.json", []

    def start(what: str, *options: str, cwd: Path = folder) -> None:
        command = [sys.executable, "-m", f"distributed.cli.dask_{what}", "--host", "127.0.0.1", *options]
        env = os.environ | PYTHONPATH | {"DASK_AUGDISTILL__SHARED_FOLDER": "False"}
        started.append(psutil.Popen(command, cwd=cwd, env=env, stderr=subprocess.DEVNULL))

    try:
        start("scheduler", "--port", "0", "--dashboard-address", "127.0.0.1:0", "--scheduler-file", str(file))
        while not file.is_file():
            time.sleep(0.1)
        for number in range(workers):
            own = folder / f"worker{number}"
            own.mkdir()
            where = ("--scheduler-file", str(file), "--local-directory", str(own))
            start("worker", "--no-nanny", "--no-dashboard", "--nthreads", "1", *where, cwd=own)
        yield file, started
    finally:
        for process in started:
            process.kill()
            process.wait()


def spent(processes: list[psutil.Process]) -> float:
    """CPU seconds of these processes, and of their ended children."""
    return sum(sum(process.cpu_times()[:4]) for process in processes)


def timed(options: list[str], workers: list[psutil.Process]) -> dict:
    """Wall-clock and CPU seconds of a sweep."""
    mine, begin = psutil.Process(), time.monotonic()
    before = spent([mine, *workers])
    env = os.environ | PYTHONPATH
    subprocess.run([*COMMAND, *options], check=True, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return {"seconds": time.monotonic() - begin, "processor": spent([mine, *workers]) - before}


def numbers(run: Path) -> list[dict]:
    return [cell["numbers"] for cell in json.loads((run / "sweeps" / "grid" / "grid.json").read_text())["cells"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", default=2, type=int)
    parser.add_argument("--out", default="", help="a folder for cluster.json")
    options = parser.parse_args()
    rows: dict[str, list[dict]] = {"processes": [], "dask": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "grid.yaml").write_text(yaml.safe_dump(GRID))
        with machines(folder, 2) as (file, workers):
            variants = {"processes": ["--set", "workers=2"], "dask": ["--cluster", str(file)]}
            for turn in range(options.repeat):
                for name, how in variants.items():
                    run = folder / f"{name}{turn}"
                    arguments = [str(folder / "grid.yaml"), "--out", str(run), *how]
                    rows[name].append(timed(arguments, workers if name == "dask" else []))
                    print(name, *(f"{value:.1f} s {key}" for key, value in rows[name][-1].items()), flush=True)
                    assert numbers(run) == numbers(folder / "processes0"), f"{run}: other numbers"
    best = {name: {key: min(row[key] for row in found) for key in found[0]} for name, found in rows.items()}
    ratio = {key: best["dask"][key] / best["processes"][key] for key in best["dask"]}
    print("dask / processes:", *(f"{value:.2f} {key}" for key, value in ratio.items()))
    if options.out:
        content = {"environment": environment("cpu"), "cells": 8, "workers": 2, "rows": rows, "ratio": ratio}
        write(Path(options.out) / "cluster.json", as_json(content))


if __name__ == "__main__":
    main()
