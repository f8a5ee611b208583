"""Grids of settings: the runs of a sweep, and the table of their results.

A grid file says which notebook runs, and how its settings (fields of `Settings`) vary:

    notebook: one_phi.ipynb           # in the folder of the grid file, or one of the report's
    preset: digits
    set: {iterations: 100}            # for every run
    rows:                             # the settings of each row, by name; "panel: name" puts it into a panel
      Adam: {phi_optimizer: Adam, phi_lr: 0.01}
      SGD: {phi_optimizer: SGD, phi_lr: 0.1}
    axes: {seed: [0, 1, 2]}           # every row runs at every combination of these
    short: [Adam]                     # the rows that --short keeps (and notebook 04 in a short report)
    picture: gain                     # the number that the figure shows
"""

import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from augdistill_core import in_short, nearest
from augdistill_report.files.store import Store
from augdistill_report.files.yaml_files import read_yaml
from augdistill_report.places import NOTEBOOKS
from augdistill_report.settings import Settings
from augdistill_report.work.jobs import Task
from augdistill_report.work.pool import Pool, WorkConfig, run_jobs
from augdistill_report.work.statistics import level, markdown_table, mean_and_std, over_seeds, row_label, stop_mark

KEYS = ("notebook", "preset", "set", "rows", "axes", "short", "picture")


@dataclasses.dataclass(frozen=True)
class Grid:
    """The content of a grid file, checked."""

    path: Path
    notebook: Path
    preset: str
    fixed: dict
    rows: dict[tuple[str, str], dict]  # by panel ("" = none) and name
    axes: dict[str, list]
    short: list[tuple[str, str]]
    picture: str

    def choices(
        self, base: Settings, changes: dict | None = None, short: bool = False, only: list[str] | None = None
    ) -> list["GridPoint"]:
        """Every run of the grid: `base`, changed by the grid's `set`, then by `changes`, its row and its point.

        `only` names the rows to keep; `short` keeps the rows in the grid's list `short`. A `ValueError` names the row
        or setting that is wrong.
        """
        for name in only or []:
            if panel_and_name(name) not in self.rows:
                known = list(map(row_label, self.rows))
                raise ValueError(f"row {name!r}: is not a row of {self.path}; {nearest(name, known)}")
        for key in changes or {}:
            if key in self.axes:
                raise ValueError(f"{key}: is an axis of {self.path}; change it in that file")
        changes = self.fixed | (changes or {})
        if self.fixed.get("phis") and changes["phis"] != self.fixed["phis"]:
            changes["phis"] = f"{self.fixed['phis']}, {changes['phis']}"  # the grid's rows need its own files
        base = changed(base, changes, str(self.path))
        base.load_phis()
        kept = [panel_and_name(name) for name in only or []] or (short and self.short) or self.rows
        points = [dict(zip(self.axes, values, strict=True)) for values in itertools.product(*self.axes.values())]
        return [
            GridPoint(*row, point, changed(base, self.rows[row] | point, f"{self.path}: row {row_label(row)!r}"))
            for row in kept
            for point in points
        ]


@dataclasses.dataclass(frozen=True, eq=False)
class GridPoint:
    """One run of a grid: its panel and row, its value on each axis, and all its settings."""

    panel: str
    row: str
    point: dict
    settings: Settings

    @property
    def name(self) -> str:
        return row_label((self.panel, self.row, *(f"{key} {value}" for key, value in self.point.items())))


def panel_and_name(row: str) -> tuple[str, str]:
    """(panel, name) of a row in a grid file, "panel: name" or "name"."""
    panel, colon, name = row.partition(": ")
    return (panel, name) if colon else ("", row)


def changed(settings: Settings, changes: dict, where: str) -> Settings:
    """The settings with some keys changed; a `ValueError` says `where` a wrong one was given."""
    try:
        return Settings.from_dict(settings.to_dict() | changes)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def read_grid(path: Path | str) -> Grid:
    """Read a grid file; a `ValueError` of one line says what is wrong in it."""
    path = Path(path)
    content = read_yaml(path)

    def wrong(key, right):
        return ValueError(f"{path}: {key}={in_short(content.get(key))}: must be {right}")

    for key in content:
        if key not in KEYS:
            raise ValueError(f"{path}: unknown key {in_short(key)}: must be one of {', '.join(KEYS)}")
    fixed, rows, axes = (content.get(key, {}) for key in ("set", "rows", "axes"))
    if not isinstance(fixed, dict):
        raise wrong("set", "settings, as `key: value`")
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise wrong("rows", "settings by name, as `name: {key: value}`")
    if len(set(map(str, rows))) < len(rows):
        raise wrong("rows", "settings by different names")
    if not isinstance(axes, dict) or not all(isinstance(values, list) and values for values in axes.values()):
        raise wrong("axes", "lists of at least one value, as `key: [value, value]`")
    if not rows and not axes:
        raise ValueError(f"{path}: has neither rows nor axes; there is nothing to vary")
    pieces = [("set", fixed), *((f"row {in_short(name)}", row) for name, row in rows.items())]
    pieces += [("axes", {key: value}) for key, values in axes.items() for value in values]
    for where, values in pieces:
        for key in set(WorkConfig.names()).intersection(values):
            raise ValueError(f"{path}: {where}: {key}: a grid cannot set where jobs run; use --set {key}=...")
        try:
            Settings.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {where}: {error}") from None
    for key, values in axes.items():
        if len({str(value) for value in values}) < len(values):
            raise ValueError(f"{path}: axes: {key}={in_short(values)}: must be different values")
    for name in map(str, rows):
        if not name.isprintable() or "$" in name:  # figures and tables show it; $ would start a formula
            raise ValueError(f"{path}: row {name!r}: must be printable text on one line, without $")
    rows = {panel_and_name(str(name)): row for name, row in rows.items()} or {("", ""): {}}
    short, preset, picture = content.get("short", []), content.get("preset", "digits"), content.get("picture", "")
    if not isinstance(short, list) or not all(isinstance(name, str) for name in short):
        raise wrong("short", "a list of names of rows")
    for name in short:
        if panel_and_name(name) not in rows:
            raise ValueError(f"{path}: short: {name!r} is not a row; {nearest(name, list(map(row_label, rows)))}")
    short = [panel_and_name(name) for name in short]
    if not isinstance(preset, str):
        raise wrong("preset", "the name of a preset, or the path of a .yaml file")
    if not isinstance(picture, str):
        raise wrong("picture", "the name of a number in the notebook's results")
    name = content.get("notebook")
    places = [str(folder / str(name)) for folder in (path.parent, NOTEBOOKS)]
    notebook = next((place for place in places if os.path.isfile(place) and place.endswith(".ipynb")), None)
    if notebook is None:
        raise wrong("notebook", "a notebook in the grid's folder, or of the report (01_expert_trajectories.ipynb)")
    if fixed.get("phis"):  # paths are relative to the grid file
        fixed = fixed | {"phis": ", ".join(str(path.parent / file.strip()) for file in fixed["phis"].split(","))}
    return Grid(path, Path(notebook), preset, fixed, rows, axes, short, picture)


def run_grid(
    tasks: dict[GridPoint, Task], store: Store, pool: Pool, show: Callable, failures: dict | None = None
) -> list[dict]:
    """Run the unfinished tasks of a grid in parallel; returns the result of each, as JSON stores it.

    A result has its panel, row, point and settings, and what the task's `found` returns, or an `error`. A task that
    fails does not stop the others: its exception is put into `failures`, which a caller can count during the run.
    """
    failures = {} if failures is None else failures
    run_jobs(list(tasks.values()), store, pool, show, failures)
    # by path: tasks with equal settings run once
    errors = {store.path(task.kind, task.spec()): error for task, error in failures.items()}
    cells = []
    for point, task in tasks.items():
        error = errors.get(store.path(task.kind, task.spec()))
        reason = error and (getattr(error, "reason", "") or f"{type(error).__name__}: {error}")
        result = {"error": reason} if error else task.found(store)
        cell = {"panel": point.panel, "row": point.row, "point": point.point}
        cells.append(cell | {"settings": point.settings.public()} | result)
    return cells


def sweep_table(cells: list[dict]) -> str:
    """A Markdown table with a line per row and point: mean ± standard deviation over seeds, and why a run failed."""
    columns = list(dict.fromkeys(k for c in cells for k, v in c.get("numbers", {}).items() if level(v) is not None))
    rows = []
    for row, group in over_seeds(cells).items():
        numbers = [cell["numbers"] for cell in group if "numbers" in cell]
        values = {key: [v for n in numbers if (v := level(n.get(key))) is not None] for key in columns}
        averages = {key: mean_and_std(found, ".3g", ".2g") if found else "" for key, found in values.items()}
        why = "; ".join(dict.fromkeys(cell["error"][:160] for cell in group if "error" in cell))
        stops = Counter(n["stopped"]["kind"] for n in numbers if n.get("stopped"))
        mark = stop_mark(", ".join(f"{kind} in {count} of {len(numbers)}" for kind, count in stops.items()))
        rows.append({"": row_label(row) + mark} | averages | {"n": len(numbers), "failed": why})
    return markdown_table(rows)
