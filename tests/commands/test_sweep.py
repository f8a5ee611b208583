"""A sweep runs every cell of its grid once, gives the reason for a failure, continues, and refuses a wrong grid."""

import re
import shutil

import nbformat
import pytest
from helpers import CUT, TINY, found, grid_file, notebook_of

from augdistill_report import open_run
from augdistill_report.commands import publish as gallery
from augdistill_report.commands.cli import main
from augdistill_report.commands.sweep import sweep
from augdistill_report.files.sealed_json import read_json, write_json
from augdistill_report.studies.grid import read_grid
from augdistill_report.studies.why import study
from augdistill_report.work.statistics import over_seeds


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep of two phis that work, one that is refused and one whose kernel dies, with two seeds each."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "grid").mkdir()
    (folder / "grid" / "own.py").write_text(CUT)
    rows = {"U-Net": {"phi": "unet"}, "cut": {"phi": "cut"}, "dies": {"phi": "deadly"}, "none": {"phi": "identity"}}
    path = grid_file(folder / "grid", set=TINY | {"phis": "own.py"}, rows=rows, axes={"seed": [0, 1]}, picture="gain")
    assert main(["sweep", str(path), "--out", str(folder / "run"), "--set", "workers=2"]) == 0
    return path, folder / "run", folder / "run" / "sweeps" / "mine"


def test_a_failed_cell_is_a_row_with_the_reason(swept):
    _, _, sweep = swept
    cells = over_seeds(found(sweep))
    assert list(cells) == [("", row) for row in ("U-Net", "cut", "dies", "none")] and all(
        len(group) == 2 for group in cells.values()
    )
    for name in ("U-Net", "none"):
        assert all("numbers" in cell and "error" not in cell for cell in cells["", name])
    assert all("no gradient reaches phi (Cut)" in cell["error"] for cell in cells["", "cut"])
    assert all("kernel died" in cell["error"] for cell in cells["", "dies"])
    text = (sweep / "table.md").read_text()
    assert re.search(r"\| cut \|.*no gradient reaches phi", text) and re.search(r"\| U-Net \|.*± .*\| 2 \|  \|", text)
    assert (sweep / "mine.png").read_bytes().startswith(b"\x89PNG")
    assert (sweep / "cells" / "U-Net__seed_0" / "notebooks" / "one_phi.ipynb").exists()
    assert (sweep / "cells" / "cut__seed_1" / "notebooks" / "one_phi.failed.ipynb").exists()


def test_results_hold_no_paths_of_this_machine(swept):
    _, run, sweep = swept
    text = (sweep / "mine.json").read_text() + "".join(p.read_text() for p in sweep.glob("cells/*/results/*.json"))
    assert str(run.parent) not in text and '"phis": "own.py"' in text


def test_a_notebook_finds_in_the_same_cells_what_the_sweep_found(swept, tmp_path):
    """Notebook 04 runs its cells without papermill, in other processes with another store: the same numbers."""
    path, _, sweep = swept
    run = open_run("study", {"preset": "smoke", "out": str(tmp_path), "why_iterations": 0, "why_eval_steps": 0})
    cells, cases = study(run, read_grid(path), short=False)
    expected = {(c["row"], c["point"]["seed"]): c for c in found(sweep) if c["row"] in ("U-Net", "none", "cut")}
    assert set(cases) == {("", row) for row in ("U-Net", "cut", "dies", "none")}
    for cell in cells:
        other = expected.get((cell["row"], cell["point"]["seed"]))
        if other:
            assert cell.get("numbers") == other.get("numbers") and ("error" in cell) == ("error" in other)
    assert {c["row"] for c in cells if "error" in c} == {"cut", "dies"}
    assert len(run.jobs) == 2 and all(run.store.seconds(job.kind, job.spec()) > 0 for job in run.jobs.values())


def test_a_second_sweep_runs_what_is_missing_and_nothing_else(swept, capsys):
    path, run, sweep = swept
    before = {p: p.stat().st_mtime_ns for p in sweep.rglob("*.ipynb") if "failed" not in p.name}
    assert main(["sweep", str(path), "--out", str(run), "--set", "workers=2"]) == 0
    assert "8 cells, 4 failed" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in before} == before
    gone = sweep / "cells" / "none__seed_0"
    shutil.rmtree(gone)
    for artefact in (run / "artefacts").glob("cell-*"):
        artefact.unlink()
    whole = (sweep / "mine.json").read_bytes()
    numbers = {(cell["row"], cell["point"]["seed"]): cell.get("numbers") for cell in found(sweep)}
    # one after the other, on what the cells had made
    assert main(["sweep", str(path), "--out", str(run), "--row", "U-Net", "--row", "none"]) == 0
    command = "sweep notebooks/sweeps/mine.yaml --preset smoke --row U-Net --row none`"
    assert gallery.origin_row(sweep / "mine.json")["command"].endswith(command)
    again = {(cell["row"], cell["point"]["seed"]): cell["numbers"] for cell in found(sweep)}
    assert len(again) == 4 and again.items() <= numbers.items() and gone.exists()
    (sweep / "mine.json").write_bytes(whole)


def test_the_identity_s_row_is_its_own_control(swept):
    cells = over_seeds(found(swept[2]))
    for cell in cells["", "none"]:
        numbers = cell["numbers"]
        assert numbers["test accuracy"] == numbers["real images"] and numbers["gain"]["mean"] == 0
        assert numbers["matching loss"] == pytest.approx(numbers["identity at the same alpha"])
        assert numbers["change of x"] == numbers["spread of draws"] == 0
    seeds = [[cell["numbers"]["test accuracy"] for cell in group] for group in (cells["", "none"], cells["", "U-Net"])]
    assert seeds[0][0] != seeds[0][1]  # a seed is another experiment


def test_a_sweep_is_published_alone_unless_its_code_is_uncommitted(swept, tmp_path):
    _, run, _ = swept
    other = tmp_path / "smoke"
    shutil.copytree(run / "sweeps", other / "sweeps")
    path = other / "sweeps" / "mine" / "mine.json"
    for uncommitted in (True, False):
        result = read_json(path, "sweep")
        result["environment"] |= {"uncommitted": uncommitted, "commit": "0" * 40}
        write_json(path, "sweep", result)
        if uncommitted:
            with pytest.raises(ValueError, match=r"mine\.json was made with uncommitted code"):
                gallery.publish("smoke", str(other), "sweeps", gallery=tmp_path / "gallery")
    target = gallery.publish("smoke", str(other), "sweeps", gallery=tmp_path / "gallery")
    assert sorted(p.name for p in target.iterdir()) == ["mine.json", "mine.png"]
    with pytest.raises(ValueError, match="holds no sweeps"):
        gallery.publish("smoke", str(tmp_path / "nowhere"), "sweeps", gallery=tmp_path / "gallery")


def test_any_notebook_can_be_swept(tmp_path):
    path = grid_file(
        tmp_path / "grid", notebook="01_expert_trajectories.ipynb", axes={"expert_lr": [0.01, 0.1]}, set={}
    )
    assert main(["sweep", str(path), "--out", str(tmp_path / "run")]) == 0
    cells = found(tmp_path / "run" / "sweeps" / "mine")
    assert [cell["point"] for cell in cells] == [{"expert_lr": 0.01}, {"expert_lr": 0.1}]
    assert [cell["settings"]["expert_lr"] for cell in cells] == [0.01, 0.1]
    assert cells[0]["numbers"] != cells[1]["numbers"]


def test_a_changed_notebook_gets_no_results_of_the_one_before(tmp_path):
    path = grid_file(tmp_path / "grid", notebook="made.ipynb", axes={"seed": [0]}, set={})
    start = 'from augdistill_report import open_run\nrun = open_run("{}", globals())\nrun.number("n", {})'

    def cell(*cells: str) -> dict:
        notebook_of(tmp_path / "grid" / "made.ipynb", 'preset = ""', *cells)
        (made,) = sweep(path, out=str(tmp_path / "run"))[1]
        return made

    assert cell(start.format("one", 1), "run.finish()")["numbers"] == {"n": 1}
    assert cell(start.format("two", 2), "run.finish()")["numbers"] == {"n": 2}
    assert "made.ipynb left 0 files in results/: must be one" in cell(start.format("two", 3))["error"]


def test_what_a_sweep_changed_is_in_its_file_its_command_and_the_table_of_studies(tmp_path):
    path = grid_file(tmp_path / "grid", notebook="01_expert_trajectories.ipynb", axes={"expert_lr": [0.01]}, set={})
    assert main(["sweep", str(path), "--out", str(tmp_path / "run"), "--set", "width=4", "--set", "workers=1"]) == 0
    written = tmp_path / "run" / "sweeps" / "mine" / "mine.json"
    result = read_json(written, "sweep")
    assert result["changes"] == {"width": 4} and result["only"] == []
    assert gallery.origin_row(written)["command"].endswith("mine.yaml --preset smoke --set width=4`")
    assert set(gallery.study_table({"smoke/mine": result})[0]) == {"gain over the real images", "smoke, width 4"}


def test_rows_whose_names_would_share_a_folder_are_refused(tmp_path):
    rows = {"Adam, .1": {"phi_lr": 0.1}, "Adam; .1": {"phi_lr": 0.2}}
    path = grid_file(tmp_path / "grid", rows=rows)
    with pytest.raises(ValueError, match=r"'Adam, \.1' and 'Adam; \.1' have one folder, .*Adam__\.1; rename one"):
        sweep(path, out=str(tmp_path / "run"))


def test_a_sweep_of_which_every_cell_fails_says_so(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("raise RuntimeError('ill | here')")])
    notebook.metadata["language_info"] = {"name": "python"}
    path = grid_file(tmp_path / "grid", notebook="ill.ipynb", axes={"seed": [0]})
    nbformat.write(notebook, tmp_path / "grid" / "ill.ipynb")
    assert main(["sweep", str(path), "--out", str(tmp_path / "run")]) == 1
    assert r"RuntimeError: ill \| here" in (tmp_path / "run" / "sweeps" / "mine" / "table.md").read_text()
