"""`augdistill sweep GRID.yaml`: runs a notebook for every point of a grid, then writes a table, JSON and a picture.

The table gives the reason for a cell that failed. A sweep that was stopped continues where it was.
"""

import contextlib
import dataclasses
import hashlib
import shutil
import tempfile
import time
from pathlib import Path

from augdistill_report.commands.execute import KernelManager, NotebookFailed, execute
from augdistill_report.commands.preflight import preflight
from augdistill_report.files.sealed_json import read_json, write_json
from augdistill_report.files.store import TOKEN, Store, write
from augdistill_report.run import (
    UNIMPORTANT,
    configuration,
    file_name,
    folder_config,
    picture,
    run_folder,
    start_folder,
)
from augdistill_report.settings import Settings, preset_path, preset_text, read_preset, resolve
from augdistill_report.show.plots import heat_map
from augdistill_report.studies.grid import Grid, GridPoint, changed, read_grid, run_grid, sweep_table
from augdistill_report.work.experts import own_experts
from augdistill_report.work.jobs import Task
from augdistill_report.work.progress import Line
from augdistill_report.work.provenance import code_state, environment
from augdistill_report.work.setup import Setup


@dataclasses.dataclass(frozen=True, eq=False)
class Cell(Task):
    """The grid's notebook at one point, run by papermill; its result is what the notebook wrote to results/."""

    choice: GridPoint
    notebook: Path
    parameters: dict
    place: str  # its folder, inside the run's folder
    texts: dict[Path, str]  # of the files that it needs besides the package
    configuration: str

    kind = "cell"

    @property
    def setup(self) -> Setup:
        return self.choice.settings.select(Setup)

    def folder(self, store: Store) -> Path:
        return store.folder.parent / self.place

    @property
    def cost(self):
        s = self.choice.settings
        return s.iterations * s.draws * s.syn_steps

    def spec(self):
        """The notebook and all that it may import. Its jobs have their own digests, so a changed cell reuses them."""
        code = hashlib.sha256(self.texts[self.notebook].encode()).hexdigest()
        return {"code": code, "configuration": self.configuration}

    def needs(self):
        return own_experts(self.setup)

    def cancel(self):
        KernelManager.end_all()  # nothing else can stop a notebook in the middle of a cell

    def found(self, store):
        result = self.stored(store)[1]
        return {key: result[key] for key in ("numbers", "seconds", "configuration")}

    def work(self, store, tick):
        start, folder = time.monotonic(), self.folder(store)
        parameters = self.parameters | {"out": str(folder), "store": str(store.folder)}
        start_folder(folder, parameters["preset"], self.choice.settings)
        # else what another notebook left here, when the cell ran before, would pass for a result of this one
        shutil.rmtree(folder / "results", ignore_errors=True)
        with tempfile.TemporaryDirectory() as temporary:
            here = {path: at_hand(path, text, Path(temporary)) for path, text in self.texts.items()}
            parameters["preset"] = str(here.get(Path(parameters["preset"]), parameters["preset"]))
            if phis := self.choice.settings.phi_files:
                parameters["phis"] = ", ".join(str(here[path]) for path in phis)
            execute(here[self.notebook], folder / "notebooks" / self.notebook.name, parameters, tick)
        results = sorted((folder / "results").glob("*.json"))
        if len(results) != 1:
            raise NotebookFailed(f"{self.notebook.name} left {len(results)} files in results/: must be one")
        result = read_json(results[0], "results")
        return {}, result | {"seconds": round(time.monotonic() - start, 1)}


def at_hand(path: Path, text: str, folder: Path) -> Path:
    """The file itself if it is on this machine with this content, else a copy in `folder`."""
    with contextlib.suppress(ValueError):
        if path.is_file() and text_of(path) == text:
            return path
    copy = Path(tempfile.mkdtemp(dir=folder)) / path.name
    write(copy, text)
    return copy


def text_of(path: Path) -> str:
    """The text of a file that a cell needs: of a preset all settings, with those that it inherits by `like`."""
    return preset_text(str(path)) if path.suffix in (".yaml", ".yml") else path.read_text(encoding="utf-8")


def sweep(
    path: Path | str,
    preset: str = "",
    out: str = "",
    changes: dict | None = None,
    short: bool = False,
    only: list[str] | None = None,
    fresh: bool = False,
) -> tuple[Path, list[dict]]:
    """Run the missing cells; returns the folder with table.md, NAME.json and NAME.png, and all cells.

    A sweep is kept in its preset's run folder, and shares finished results with the report there. Before anything runs,
    a `ValueError` says what is wrong with the grid or the arguments.
    """
    code_state()  # of now, not of the end
    grid = read_grid(path)
    preset = preset or grid.preset
    count = {key: value for key, value in (changes or {}).items() if key == "images_per_class"}
    base = resolve(preset, count)
    choices = grid.choices(base, changes, short, only)
    if read_preset(preset)[1] and any(c.settings.images_per_class != base.images_per_class for c in choices):
        raise ValueError(f"{grid.path}: varies images_per_class, but {preset!r} has other settings for each value")
    for choice in choices:
        try:
            preflight(choice.settings)
        except ValueError as error:
            raise ValueError(f"{grid.path}: {choice.name}: {error}") from None
    run = run_folder(preset, out)
    if not folder_config(run):
        start_folder(run, preset, base)
    store, folder = Store(run / "artefacts"), run / "sweeps" / grid.path.stem
    folder.mkdir(parents=True, exist_ok=True)
    given, cells = changed(base, changes or {}, "--set"), {c: cell_of(c, grid, preset, base) for c in choices}
    places: dict[str, GridPoint] = {}
    for choice, cell in cells.items():
        if (other := places.setdefault(cell.place, choice)) is not choice:
            raise ValueError(
                f"{grid.path}: {other.name!r} and {choice.name!r} have one folder, {cell.place}; rename one"
            )
    if fresh:
        for cell in cells.values():
            store.path(cell.kind, cell.spec()).unlink(missing_ok=True)
            shutil.rmtree(cell.folder(store), ignore_errors=True)
        (store.folder / TOKEN).unlink(missing_ok=True)  # cluster workers then ignore their copies of the old results
    for cell in cells.values():
        if store.has(cell.kind, cell.spec()):  # refuse a damaged one now, not after all others have run
            store.load(cell.kind, cell.spec())
    failures: dict = {}
    with Line() as line:

        def show(done, total, note):
            line.count(f"cells ({len(failures)} failed)", done, total, note)

        found = run_grid(cells, store, given.pool, show, failures)
    write(folder / "table.md", sweep_table(found))
    write(folder / f"{grid.path.stem}.png", picture(heat_map(found, grid.picture)))
    facts = {"grid": grid.path.name, "notebook": grid.notebook.name, "preset": preset_path(preset).stem, "short": short}
    facts["changes"] = {key: value for key, value in given.public().items() if key in {*(changes or {})} - UNIMPORTANT}
    facts["only"] = only or []
    facts["environment"] = environment(base.device)
    write_json(folder / f"{grid.path.stem}.json", "sweep", facts | {"cells": found})
    return folder, found


def cell_of(choice: GridPoint, grid: Grid, preset: str, base: Settings) -> Cell:
    """The job of a grid point. It passes what differs from the preset as literals; the notebook resolves it again."""
    place = f"sweeps/{grid.path.stem}/cells/{file_name(choice.name)}"
    differ = {k: v for k, v in choice.settings.to_dict().items() if v != getattr(base, k)}
    differ["images_per_class"] = choice.settings.images_per_class  # a preset may choose its settings by it
    shared = {"preset": preset, "workers": 1, "cluster": ""}
    texts = {path: text_of(path) for path in (grid.notebook, preset_path(preset), *choice.settings.phi_files)}
    return Cell(choice, grid.notebook, differ | shared, place, texts, configuration(choice.settings))
