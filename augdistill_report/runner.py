"""`augdistill report`: every notebook in order by papermill, then one page to read.

Whatever can be refused is refused before anything runs. A notebook's executed copy and results replace the old ones
only when it has finished; one that fails is kept as NN_name.failed.ipynb. Finished work is found again by the next run.
"""

import contextlib
import functools
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

from augdistill_phis import builders
from augdistill_report.artefacts import as_json, write
from augdistill_report.execute import execute
from augdistill_report.html import build_report
from augdistill_report.pool import Line
from augdistill_report.run import configuration, run_folder, start_folder
from augdistill_report.settings import NOTEBOOKS, Settings, preflight, resolve
from augdistill_report.subsets import methods


def notebooks(only: str = "") -> list[Path]:
    """The report's notebooks in reading order; `only` keeps those whose numbers it lists ("02,03")."""
    every = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    if not only:
        return every
    numbers = [part.strip().zfill(2) for part in only.split(",")]
    known = {path.name[:2]: path for path in every}
    for number in numbers:
        if number not in known:
            raise ValueError(f"only={only!r}: there is no notebook {number}; must be among {', '.join(known)}")
    return [known[number] for number in sorted(set(numbers))]


class Status:
    """Which notebook, which cell, how far and how long, as a `Line`.

    Time left is counted in notebooks, each weighted with the seconds that it took the last time (equally, if never).
    """

    def __init__(self, names: list[str], seconds: dict[str, float], progress: Path):
        self.names, self.progress, self.line = names, progress, Line()
        typical = sum(seconds.values()) / len(seconds) if seconds else 1.0
        self.weight = {name: seconds.get(name, typical) for name in names}
        self.start, self.done, self.current, self.cell, self.cells = time.monotonic(), 0.0, "", 0, 1

    def at(self, name: str, cell: int, cells: int) -> None:
        self.current, self.cell, self.cells = name, cell, cells
        with contextlib.suppress(OSError):
            self.progress.unlink()
        self.show()

    def finished(self, name: str) -> None:
        self.done += self.weight[name]

    def show(self) -> None:
        work = {}
        with contextlib.suppress(OSError, ValueError):
            work = json.loads(self.progress.read_text())
        inside = (self.cell + work.get("fraction", 0.0)) / self.cells
        part = (self.done + self.weight.get(self.current, 0) * inside) / sum(self.weight.values())
        spent = time.monotonic() - self.start
        left = f", about {spent * (1 - part) / part:.0f} s left" if part > 0.02 else ""
        number = self.names.index(self.current) + 1 if self.current in self.names else 0
        text = f"[{number}/{len(self.names)}] {self.current}, cell {self.cell + 1} of {self.cells}{left}"
        self.line.show(text + (f" | {work['text']}" if work else ""))


@contextlib.contextmanager
def ticking(status: Status):
    """Look at the status twice a second while a cell runs."""
    stop = threading.Event()

    def loop():
        while not stop.wait(0.5):
            status.show()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        status.line.clear()


def report(preset: str, out: str = "", only: str = "", changes: dict | None = None, fresh: bool = False) -> Path:
    """Run the notebooks of a preset with some settings changed; returns the page that they make.

    Raises `ValueError` for anything wrong with the arguments, before anything runs; `NotebookFailed` for a notebook.
    """
    settings: Settings = resolve(preset, changes)
    chosen = notebooks(only)
    preflight(settings)
    if any(
        getattr(build, "bound", False) for build in builders(settings.phi)
    ):  # notebook 05 shows what phi makes of images that it was not given
        raise ValueError(f"phi={settings.phi!r}: is the baseline, bound to its base images; use another")
    methods(settings, 1.0)  # refuses a row that notebook 05 does not have
    folder = run_folder(preset, out)
    start_folder(folder, preset, settings)
    if fresh:
        shutil.rmtree(folder / "artefacts", ignore_errors=True)
    # papermill writes literals: keys that differ from the preset are enough, the notebook resolves them again
    parameters = {"preset": preset, "out": str(folder)} | {k: getattr(settings, k) for k in changes or {}}
    timings = folder / "timings.json"
    seconds = json.loads(timings.read_text()) if timings.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        progress = Path(temporary) / "progress.json"
        os.environ["AUGDISTILL_PROGRESS"] = str(progress)
        status = Status([path.stem for path in chosen], seconds, progress)
        for path in chosen:
            start = time.monotonic()
            status.at(path.stem, 0, 1)
            with ticking(status):
                execute(path, folder / "notebooks" / path.name, parameters, functools.partial(status.at, path.stem))
            status.finished(path.stem)
            seconds[path.stem] = round(time.monotonic() - start, 1)
            write(timings, as_json(seconds))
            print(f"{path.stem}: {seconds[path.stem]:.0f} s", file=sys.stderr)
    return build_report(folder, configuration(settings))
