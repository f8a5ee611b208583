"""A mistyped setting is refused and runs no other experiment: by papermill, --set, a preset and a grid."""

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
from helpers import grid_file

from augdistill_report.commands.cli import main
from augdistill_report.places import NOTEBOOKS
from augdistill_report.run import open_run
from augdistill_report.settings import PARAMETERS, RENAMED, Settings, given_settings

EVERY = sorted([*NOTEBOOKS.glob("*.ipynb"), *(NOTEBOOKS / "sweeps").glob("*.ipynb")])
CELL = "preset: str = 'digits'  # a name\nout: str = ''\nseed: int = None"


@pytest.fixture(scope="module")
def opening(tmp_path_factory) -> Path:
    """Notebook 02 up to the cell that opens its run."""
    notebook = nbformat.read(NOTEBOOKS / "02_baseline_mtt.ipynb", as_version=4)
    last = next(i for i, cell in enumerate(notebook.cells) if "open_run(" in cell.source and cell.cell_type == "code")
    notebook.cells = notebook.cells[: last + 1]
    path = tmp_path_factory.mktemp("notebook") / "02_baseline_mtt.ipynb"
    nbformat.write(notebook, path)
    return path


def plain_papermill(notebook: Path, folder: Path, **parameters) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "papermill", str(notebook), str(folder / "out.ipynb"), "--no-progress-bar"]
    for key, value in ({"preset": "smoke", "out": str(folder / "run")} | parameters).items():
        command += ["-p", key, str(value)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize(
    "key, says",
    [
        ("iteratons", "unknown key 'iteratons': the nearest are iterations, "),
        ("late_start_epoch", "setting 'late_start_epoch' is called 'policy_max_start_epoch' now: rename it"),
    ],
)
def test_plain_papermill_refuses_what_is_no_setting(opening, tmp_path, key, says):
    ended = plain_papermill(opening, tmp_path, **{key: 3})
    assert ended.returncode != 0 and says in ended.stderr
    assert not (tmp_path / "run").exists()


def test_plain_papermill_takes_a_setting_that_the_notebook_does_not_list(opening, tmp_path):
    ended = plain_papermill(opening, tmp_path, width=4, phi_lr="1e-2")
    assert ended.returncode == 0, ended.stderr
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert (settings["width"], settings["phi_lr"]) == (4, 0.01)


@pytest.mark.parametrize("path", EVERY, ids=lambda path: path.stem)
def test_papermill_can_read_every_line_of_a_parameters_cell(path, caplog):
    listed = papermill.inspect_notebook(str(path))
    assert "Unable to parse" not in caplog.text
    cell = next(c for c in nbformat.read(path, as_version=4).cells if "parameters" in c.metadata.get("tags", ()))
    assert len(listed) == sum(not line.startswith("#") for line in cell.source.splitlines())
    assert set(listed) <= {*Settings.names(), *PARAMETERS} and {"preset", "out"} <= set(listed)
    assert all(parameter["help"] for parameter in listed.values())


def after(*cells: str, **variables) -> dict:
    """The result of `given_settings` in a notebook that has run these cells; the last one opens the run."""
    return given_settings({"_ih": ["", *cells, "run = open_run('x', globals())"], "preset": "smoke", **variables})


def test_the_parameters_are_those_of_the_cell_and_of_papermill():
    assert after(CELL, seed=None, iterations=3) == {"iterations": 3}
    # in a notebook that is at work, other variables mean nothing
    assert after(CELL, "rows = {}\nscores = 3", rows={}, scores=3, seed=4) == {"seed": 4}
    for cells in (
        [CELL, "# Parameters\niteratons = 3\n"],
        [CELL + "\niteratons: int = 3"],
        [CELL, "# Parameters\nseed = 1\npreset = 'smoke'\niteratons = 3", "1 + 1"],
    ):
        with pytest.raises(ValueError, match=r"unknown key 'iteratons': the nearest are iterations, .*parameter"):
            after(*cells)
    # mended and run again, what ran before it counts no longer
    assert after(CELL, "# Parameters\niteratons = 3", CELL, "a = = 1", seed=2) == {"seed": 2}


def test_a_script_s_parameters_are_its_plain_values(tmp_path):
    with pytest.raises(ValueError, match="unknown key 'iteratons': the nearest are iterations"):
        open_run("mine", {"preset": "smoke", "out": str(tmp_path / "run"), "iteratons": 3})
    assert not (tmp_path / "run").exists()
    around = {"__name__": "__main__", "json": json, "main": main, "_private": 3}
    run = open_run("mine", around | {"preset": "smoke", "out": str(tmp_path / "run"), "iterations": 3})
    assert run.settings.iterations == 3


@pytest.mark.parametrize("command", ["report", "experts train", "preset", "preset by count", "grid set", "grid row"])
@pytest.mark.parametrize("key", ["nonsense", "iteratons", *RENAMED])
def test_the_command_presets_and_grids_refuse_it_too(command, key, tmp_path, capsys):
    """In one line, with the nearest names or the new name of an old setting; exit code 2, and no files are left."""
    path = tmp_path / "mine.yaml"
    arguments = [*(command.split() if command.startswith(("report", "experts")) else ["report"])]
    arguments += ["--preset", "smoke", "--set", f"{key}=3"]
    if command == "preset":
        path.write_text(f"like: smoke\n{key}: 3\n")
        arguments = ["report", "--preset", str(path)]
    elif command == "preset by count":
        path.write_text(f"like: smoke\nwith_images_per_class: {{1: {{{key}: 3}}}}\n")
        arguments = ["report", "--preset", str(path)]
    elif command.startswith("grid"):
        changes = {"set": {key: 3}} if command == "grid set" else {"rows": {"a": {key: 3}}}
        arguments = ["sweep", str(grid_file(tmp_path / "grid", **({"axes": {"seed": [0]}} | changes)))]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    right = f"is called {RENAMED[key]!r} now" if key in RENAMED else f"unknown key {key!r}: the nearest are "
    assert right in error and error.count("\n") == 1 and len(error) < 300
    assert key != "iteratons" or "nearest are iterations," in error
    assert not (tmp_path / "run").exists()
