"""`augdistill report`: runs every notebook by papermill, one by one or several at once, then writes one page.

Wrong arguments and damaged files are refused before anything runs. A notebook's executed copy and results replace the
old ones only when it has finished; one that fails is kept as NN_name.failed.ipynb. The next run reuses finished work.
"""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

from augdistill_core import builders
from augdistill_report.commands.execute import execute
from augdistill_report.commands.preflight import check_fractions, preflight
from augdistill_report.files.sealed_json import read_json, write_json
from augdistill_report.files.store import Store
from augdistill_report.places import NOTEBOOKS
from augdistill_report.run import configuration, run_folder, start_folder
from augdistill_report.settings import Settings, resolve
from augdistill_report.show.page import build_report, read_results
from augdistill_report.show.tracking import already_sent
from augdistill_report.studies.subsets import methods
from augdistill_report.work.experts import missing_experts
from augdistill_report.work.jobs import Task, Tick
from augdistill_report.work.pool import Pool, run_jobs
from augdistill_report.work.progress import REFRESH, Line
from augdistill_report.work.setup import Setup

SUBSETS = "05_subset_evaluation"  # the notebook that uses the setting `fractions`


def notebooks(only: str = "") -> list[Path]:
    """The report's notebooks in reading order; `only` keeps those whose numbers it lists ("02,03")."""
    every = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    if not only:
        return every
    numbers = [number.strip().zfill(2) for number in only.split(",")]
    known = {path.name[:2]: path for path in every}
    for number in numbers:
        if number not in known:
            raise ValueError(f"only={only!r}: there is no notebook {number}; must be among {', '.join(known)}")
    return [known[number] for number in sorted(set(numbers))]


@dataclasses.dataclass(frozen=True, eq=False)
class NotebookTask(Task):
    """Executes one notebook of the report. It is not stored itself: the store holds the results of its jobs."""

    notebook: Path
    folder: Path  # of the run
    parameters: dict
    configuration: str  # of the run: the page shows its notebooks
    cost: float = 0.0  # seconds of its last run

    kind = "notebook"

    def spec(self):
        return {"notebook": self.notebook.name, "folder": str(self.folder)}

    def run(self, store: Store, tick: Tick = lambda done, total, note="": None) -> None:
        start, name = time.monotonic(), self.notebook.stem
        with tempfile.TemporaryDirectory() as temporary, Cells(name, Path(temporary) / "progress.json", tick) as cells:
            # the kernel inherits this variable
            os.environ["AUGDISTILL_PROGRESS"] = str(cells.progress)
            execute(self.notebook, self.folder / "notebooks" / self.notebook.name, self.parameters, cells.at)
        timings = self.folder / "timings.json"
        with store.lock(timings):  # other notebooks may be running
            seconds = notebook_seconds(self.folder) | {name: round(time.monotonic() - start, 1)}
            write_json(timings, "timings", {"seconds": seconds})
            build_report(self.folder, self.configuration)  # a reader need not wait for the last notebook


class Cells:
    """Reports a running notebook's progress: its cell, and what the kernel writes to the file `progress`."""

    def __init__(self, name: str, progress: Path, tick: Tick):
        self.name, self.progress, self.tick, self.cell, self.cells = name, progress, tick, 0, 1
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.look, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()

    def at(self, cell: int, cells: int) -> None:
        self.cell, self.cells = cell, cells
        with contextlib.suppress(OSError):
            self.progress.unlink()

    def look(self) -> None:
        while not self.over.wait(REFRESH):
            work = {}
            with contextlib.suppress(OSError, ValueError):
                work = json.loads(self.progress.read_text())
            inside = f": {work['text']}" if work else ""
            note = f"{self.name}, cell {self.cell + 1} of {self.cells}{inside}"
            self.tick(self.cell + work.get("fraction", 0.0), self.cells, note)


def notebook_seconds(folder: Path) -> dict[str, float]:
    """Seconds of each notebook's last run in this folder, by name; {} if there was none."""
    timings = folder / "timings.json"
    return read_json(timings, "timings")["seconds"] if timings.exists() else {}


def check_unbound(phi: str) -> None:
    """A `ValueError` if a phi (or a part of a chain) has parameters for each base image: notebook 05 applies phi to
    other images."""
    if bound := [name for name in phi.split("+") if any(getattr(build, "bound", False) for build in builders(name))]:
        raise ValueError(
            f"phi={phi!r}: {bound[0]!r} has parameters for each of its base images, and notebook 05 applies phi to "
            "other images; choose another phi, or run other notebooks (--only 03)"
        )


def report(preset: str, out: str = "", only: str = "", changes: dict | None = None, fresh: bool = False) -> Path:
    """Run the notebooks of a preset, with `changes` of its settings; returns the path of the page.

    `fresh` deletes the finished work first. Raises `ValueError` for a wrong argument or a damaged file of the run's
    folder, before anything runs; `NotebookFailed` if a notebook raises.
    """
    settings: Settings = resolve(preset, changes)
    chosen = notebooks(only)
    preflight(settings)
    if SUBSETS in {path.stem for path in chosen}:
        check_fractions(settings)
    print(f"data: {settings.load(whiten=False).where}", file=sys.stderr)
    if SUBSETS in {path.stem for path in chosen}:
        check_unbound(settings.phi)
    methods(settings, 1.0)  # refuses a subset row that notebook 05 does not have
    folder = run_folder(preset, out)
    start_folder(folder, preset, settings)
    before = notebook_seconds(folder)  # files that are needed later are read now: a damaged one costs no hour
    read_results(folder, ignore=[path.stem for path in chosen])
    already_sent(folder, settings.track)
    if fresh:
        shutil.rmtree(folder / "artefacts", ignore_errors=True)
    store = Store(folder / "artefacts")
    # two notebooks with half of the processes each: one uses them while the other starts its kernel or draws a figure
    at_once = settings.notebooks_at_once or (len(chosen) if settings.cluster else min(2, settings.processes))
    at_once = min(at_once, len(chosen))
    # papermill takes literals only: pass what differs from the preset, and the notebook resolves it again
    parameters = {"preset": preset, "out": str(folder)} | {k: getattr(settings, k) for k in changes or {}}
    parameters |= {"notebooks_at_once": at_once} if at_once > 1 else {}
    typical = sum(before.values()) / len(before) if before else 1.0
    ours = configuration(settings)
    tasks = [NotebookTask(path, folder, parameters, ours, before.get(path.stem, typical)) for path in chosen]
    if at_once > 1:  # first the experts, which several notebooks need: else those would wait for each other
        everyone = dataclasses.replace(settings, notebooks_at_once=1).pool
        with Line() as line:
            run_jobs(missing_experts(settings.select(Setup)), store, everyone, functools.partial(line.count, "experts"))
    known = {path.stem for path in chosen} <= before.keys()  # else nobody knows how much of the work a notebook is
    with Line() as line:
        run_jobs(tasks, store, Pool(at_once), functools.partial(line.count, "notebooks", even=known))
    for path in chosen:
        print(f"{path.stem}: {notebook_seconds(folder)[path.stem]:.0f} s", file=sys.stderr)
    return folder / "report.html"
