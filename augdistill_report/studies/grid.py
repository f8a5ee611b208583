"""Grids of settings: which choices a sweep goes through, and what was found, as a table.

A grid file says which notebook, and how its settings (those of `Settings`) vary:

    notebook: one_phi.ipynb           # beside the grid file, or one of the report's
    preset: digits
    set: {iterations: 100}            # in every cell
    rows:                             # choices by name: what each changes; "group: name" puts it into a panel
      Adam: {phi_optimizer: Adam, phi_lr: 0.01}
      SGD: {phi_optimizer: SGD, phi_lr: 0.1}
    axes: {seed: [0, 1, 2]}           # every row at every combination of these
    short: [Adam]                     # the rows that --short keeps (and notebook 04 in a short report)
    picture: gain                     # the number that the picture shows
"""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml

from augdistill_report.files.store import Store
from augdistill_report.places import NOTEBOOKS
from augdistill_report.settings import Settings
from augdistill_report.work.jobs import Task
from augdistill_report.work.pool import Pool, WorkConfig, run_jobs
from augdistill_report.work.statistics import level, over_seeds, summary

KEYS = ("notebook", "preset", "set", "rows", "axes", "short", "picture")


@dataclasses.dataclass(frozen=True)
class Grid:
    """What a grid file says, checked."""

    path: Path
    notebook: Path
    preset: str
    fixed: dict
    rows: dict[str, dict]
    axes: dict[str, list]
    short: list[str]
    picture: str

    def choices(
        self, base: Settings, changes: dict | None = None, short: bool = False, only: list[str] | None = None
    ) -> list["GridPoint"]:
        """Every cell: `base`, then the grid's `set`, then `changes`, then its row, then its point on the axes.

        `only` names the rows to keep; `short` keeps those that the grid names for that.
        """
        for name in only or []:
            if name not in self.rows:
                raise ValueError(f"row {name!r}: is none of {self.path}; must be among {', '.join(self.rows)}")
        for key in changes or {}:
            if key in self.axes:
                raise ValueError(f"{key}: is an axis of {self.path}; change it there")
        changes = self.fixed | (changes or {})
        if self.fixed.get("phis") and changes["phis"] != self.fixed["phis"]:
            changes["phis"] = f"{self.fixed['phis']}, {changes['phis']}"  # the grid's rows need their own
        base = changed(base, changes, str(self.path))
        base.load_phis()
        rows = {name: self.rows[name] for name in only or (short and self.short) or self.rows}
        points = [dict(zip(self.axes, values, strict=True)) for values in itertools.product(*self.axes.values())]
        return [
            GridPoint(name, point, changed(base, row | point, f"{self.path}: row {name!r}"))
            for name, row in rows.items()
            for point in points
        ]


@dataclasses.dataclass(frozen=True, eq=False)
class GridPoint:
    """A cell of a grid: its row, its place on the axes, and all its settings."""

    row: str
    point: dict
    settings: Settings

    @property
    def name(self) -> str:
        return ", ".join([self.row, *(f"{key} {value}" for key, value in self.point.items())])


def changed(settings: Settings, changes: dict, where: str) -> Settings:
    """The settings with some keys changed; a `ValueError` that says `where` the wrong one stands."""
    try:
        return Settings.from_dict(settings.to_dict() | changes)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def read_grid(path: Path | str) -> Grid:
    """A grid file, or a `ValueError` that names what is wrong in it."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; must be a grid (notebooks/sweeps/why_phi_failed.yaml is one)")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is not YAML ({error})") from None

    def wrong(key, right):
        return ValueError(f"{path}: {key}={content.get(key)!r}: must be {right}")

    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold `key: value` lines, with keys among {', '.join(KEYS)}")
    for key in content:
        if key not in KEYS:
            raise ValueError(f"{path}: unknown key {key!r}: must be one of {', '.join(KEYS)}")
    fixed, rows, axes = (content.get(key, {}) for key in ("set", "rows", "axes"))
    if not isinstance(fixed, dict):
        raise wrong("set", "settings, as `key: value`")
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise wrong("rows", "settings by name, as `name: {key: value}`")
    if not isinstance(axes, dict) or not all(isinstance(values, list) and values for values in axes.values()):
        raise wrong("axes", "lists of at least one value, as `key: [value, value]`")
    if not rows and not axes:
        raise ValueError(f"{path}: has neither rows nor axes; there is nothing to vary")
    for key in [*fixed, *axes, *itertools.chain(*rows.values())]:
        if key not in Settings.names() or key in WorkConfig.names():
            raise ValueError(f"{path}: unknown setting {key!r}: must be one of {', '.join(Settings.names())}")
    for key, values in axes.items():
        if len({str(value) for value in values}) < len(values):
            raise ValueError(f"{path}: axes: {key}={values}: must be different values")
    rows = {str(name): row for name, row in rows.items()} or {"": {}}
    short = content.get("short", [])
    for name in short if isinstance(short, list) else [short]:
        if name not in rows:
            raise ValueError(f"{path}: short: {name!r} is no row; must be among {', '.join(rows)}")
    name = content.get("notebook")
    places = [folder / str(name) for folder in (path.parent, NOTEBOOKS)]
    notebook = next((place for place in places if place.is_file() and place.suffix == ".ipynb"), None)
    if notebook is None:
        raise wrong("notebook", "a notebook beside the grid, or one of the report's (01_expert_trajectories.ipynb)")
    if fixed.get("phis"):  # relative to the grid
        fixed = fixed | {"phis": ", ".join(str(path.parent / part.strip()) for part in fixed["phis"].split(","))}
    return Grid(
        path, notebook, str(content.get("preset", "digits")), fixed, rows, axes, short, str(content.get("picture", ""))
    )


def run_grid(
    tasks: dict[GridPoint, Task], store: Store, pool: Pool, show: Callable, failures: dict | None = None
) -> list[dict]:
    """Make what the cells of a grid lack, a task each, over the cores; what came of each cell, as JSON holds it.

    That is its row and point, its settings, and what the task's `found` gives, or an `error`. A task that fails ends no
    others: its exception is put into `failures`, where they can be counted meanwhile.
    """
    failures = {} if failures is None else failures
    run_jobs(list(tasks.values()), store, pool, show, failures)
    # by path: tasks of equal settings are made once
    errors = {store.path(task.kind, task.spec()): error for task, error in failures.items()}
    cells = []
    for choice, task in tasks.items():
        error = errors.get(store.path(task.kind, task.spec()))
        reason = error and (getattr(error, "reason", "") or f"{type(error).__name__}: {error}")
        came = {"error": reason} if error else task.found(store)
        cells.append({"row": choice.row, "point": choice.point, "settings": choice.settings.public()} | came)
    return cells


def sweep_table(cells: list[dict]) -> str:
    """A Markdown table: a line for every row and point, mean ± deviation over seeds; why, where a cell failed."""
    columns = list(dict.fromkeys(k for c in cells for k, v in c.get("numbers", {}).items() if level(v) is not None))
    lines = ["| | " + " | ".join([*columns, "n", "failed"]) + " |", "|---" * (len(columns) + 3) + "|"]
    for name, group in over_seeds(cells).items():
        numbers = [cell["numbers"] for cell in group if "numbers" in cell]
        values = [[level(n[key]) for n in numbers if level(n.get(key)) is not None] for key in columns]
        why = "; ".join(dict.fromkeys(one_line(cell["error"]) for cell in group if "error" in cell))
        lines.append(f"| {name} | " + " | ".join([*map(averaged, values), str(len(numbers)), why]) + " |")
    return "\n".join(lines) + "\n"


def averaged(values: list[float]) -> str:
    """Mean ± deviation of one number over seeds; alone, if there is one."""
    if not values:
        return ""
    return f"{values[0]:.3g}" if len(values) == 1 else f"{np.mean(values):.3g} ± {summary(values)['std']:.2g}"


def one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")[:160]
