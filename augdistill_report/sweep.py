"""`augdistill sweep GRID.yaml`: a notebook for every choice of a grid, over the cores; then a table, a JSON, a picture.

A cell that fails is a row of the table that says why. A sweep that is stopped goes on where it was.
"""

import dataclasses
import hashlib
import json
import shutil
import time
from pathlib import Path

from augdistill_report.artefacts import Store, as_json, write
from augdistill_report.execute import NotebookFailed, execute
from augdistill_report.grid import Choice, Grid, as_found, changed, read_grid, table
from augdistill_report.jobs import Task
from augdistill_report.plots import heat_map
from augdistill_report.pool import Line, run_jobs
from augdistill_report.run import configuration, environment, file_name, picture, run_folder, start_folder
from augdistill_report.settings import Settings, preflight, preset_path, read_preset, resolve


@dataclasses.dataclass(frozen=True, eq=False)
class Cell(Task):
    """The grid's notebook at one choice, by papermill; its result is what the notebook wrote to results/."""

    choice: Choice
    notebook: Path
    parameters: dict
    folder: Path

    kind = "cell"

    @property
    def cost(self):
        s = self.choice.settings
        return s.iterations * s.draws * s.syn_steps

    def spec(self):
        """The notebook and everything that it may import; what is costly in it is found again under its own digest."""
        code = hashlib.sha256(self.notebook.read_bytes()).hexdigest()
        return {"code": code, "configuration": configuration(self.choice.settings)}

    def work(self, store, tick):
        start = time.monotonic()
        start_folder(self.folder, self.parameters["preset"], self.choice.settings)
        execute(self.notebook, self.folder / "notebooks" / self.notebook.name, self.parameters, tick)
        results = sorted((self.folder / "results").glob("*.json"))
        if len(results) != 1:
            raise NotebookFailed(f"{self.notebook.name} left {len(results)} files in results/: must be one")
        result = json.loads(results[0].read_text())
        return {}, result | {"seconds": round(time.monotonic() - start, 1)}


def sweep(
    path: Path | str,
    preset: str = "",
    out: str = "",
    changes: dict | None = None,
    short: bool = False,
    only: list[str] | None = None,
    fresh: bool = False,
) -> tuple[Path, list[dict]]:
    """Run the cells that are missing; returns the folder with table.md, NAME.json and NAME.png, and the cells.

    A sweep lives in its preset's run folder, and shares finished work with the report there. Raises `ValueError` for
    anything wrong with the grid or the arguments, before anything runs.
    """
    grid = read_grid(path)
    preset = preset or grid.preset
    count = {key: value for key, value in (changes or {}).items() if key == "images_per_class"}
    base = resolve(preset, count)
    choices = grid.choices(base, changes, short, only)
    if read_preset(preset)[1] and any(c.settings.images_per_class != base.images_per_class for c in choices):
        raise ValueError(f"{grid.path}: varies images_per_class, for each of which {preset!r} has other settings")
    for choice in choices:
        try:
            preflight(choice.settings)
        except ValueError as error:
            raise ValueError(f"{grid.path}: {choice.name}: {error}") from None
    run = run_folder(preset, out)
    if not (run / "config.json").exists():
        start_folder(run, preset, base)
    store, folder = Store(run / "artefacts"), run / "sweeps" / grid.path.stem
    folder.mkdir(parents=True, exist_ok=True)
    cells = [cell_of(choice, grid, preset, base, folder, store) for choice in choices]
    if fresh:
        for cell in cells:
            store.path(cell.kind, cell.spec()).unlink(missing_ok=True)
            shutil.rmtree(cell.folder, ignore_errors=True)
    failures: dict = {}
    line, start = Line(), time.monotonic()

    def show(done, total, note):
        spent = time.monotonic() - start
        left = f", about {spent * (total - done) / done:.0f} s left" if done > 0.02 else ""
        line.show(f"{done:.1f} of {total} cells{left}, {len(failures)} failed")

    run_jobs(cells, store, changed(base, changes or {}, "--set").processes, show, failures)
    line.clear()
    # by path: a cell of equal settings is made once
    errors = {store.path(cell.kind, cell.spec()): error for cell, error in failures.items()}
    found = [as_found(c.choice, outcome(c, store, errors.get(store.path(c.kind, c.spec())))) for c in cells]
    write(folder / "table.md", table(found))
    write(folder / f"{grid.path.stem}.png", picture(heat_map(found, grid.picture)))
    facts = {"grid": grid.path.name, "notebook": grid.notebook.name, "preset": preset_path(preset).stem, "short": short}
    facts["environment"] = environment(base.device)
    write(folder / f"{grid.path.stem}.json", as_json(facts | {"cells": found}))
    return folder, found


def cell_of(choice: Choice, grid: Grid, preset: str, base: Settings, folder: Path, store: Store) -> Cell:
    """papermill writes literals: the keys that differ from the preset are enough, the notebook resolves them again."""
    own = folder / "cells" / file_name(choice.name)
    differ = {k: v for k, v in choice.settings.to_dict().items() if v != getattr(base, k)}
    differ["images_per_class"] = choice.settings.images_per_class  # by which a preset may choose its settings
    shared = {"preset": preset, "out": str(own), "store": str(store.folder), "workers": 1}
    return Cell(choice, grid.notebook, differ | shared, own)


def outcome(cell: Cell, store: Store, error: Exception | None) -> dict:
    """What came of a cell: its numbers, or why there are none."""
    if error is not None:
        return {"error": getattr(error, "reason", "") or f"{type(error).__name__}: {error}"}
    result = store.load(cell.kind, cell.spec())[1]
    return {key: result[key] for key in ("numbers", "seconds", "configuration")}
