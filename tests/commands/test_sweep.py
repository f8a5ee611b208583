"""A sweep runs every cell of its grid once, says why one failed, goes on where it was, and refuses a wrong grid."""

import concurrent.futures
import dataclasses
import json
import re
import shutil

import nbformat
import pytest
from helpers import CUT, SWEEPS, TINY, found, grid_file

from augdistill_core import DistillConfig
from augdistill_report import open_run
from augdistill_report.commands import publish as gallery
from augdistill_report.commands.cli import main
from augdistill_report.files.store import Store
from augdistill_report.settings import resolve
from augdistill_report.studies.grid import read_grid, sweep_table
from augdistill_report.work.crew import Crew
from augdistill_report.work.distillation import Distillation
from augdistill_report.work.jobs import Subset, Task
from augdistill_report.work.pool import Pool, run_jobs
from augdistill_report.work.setup import Setup
from augdistill_report.work.statistics import over_seeds


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep of two phis that work, one that is refused and one whose kernel dies, at two seeds each."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "grid").mkdir()
    (folder / "grid" / "own.py").write_text(CUT)
    rows = {"U-Net": {"phi": "unet"}, "cut": {"phi": "cut"}, "dies": {"phi": "deadly"}, "none": {"phi": "identity"}}
    path = grid_file(folder / "grid", set=TINY | {"phis": "own.py"}, rows=rows, axes={"seed": [0, 1]}, picture="gain")
    assert main(["sweep", str(path), "--out", str(folder / "run"), "--set", "workers=2"]) == 0
    return path, folder / "run", folder / "run" / "sweeps" / "mine"


def test_a_cell_that_fails_is_a_row_that_says_why(swept):
    _, _, sweep = swept
    cells = over_seeds(found(sweep))
    assert list(cells) == ["U-Net", "cut", "dies", "none"] and all(len(group) == 2 for group in cells.values())
    for name in ("U-Net", "none"):
        assert all("numbers" in cell and "error" not in cell for cell in cells[name])
    assert all("no gradient reaches phi (Cut)" in cell["error"] for cell in cells["cut"])
    assert all("kernel died" in cell["error"] for cell in cells["dies"])
    text = (sweep / "table.md").read_text()
    assert re.search(r"\| cut \|.*no gradient reaches phi", text) and re.search(r"\| U-Net \|.*± .*\| 2 \|  \|", text)
    assert (sweep / "mine.png").read_bytes().startswith(b"\x89PNG")
    assert (sweep / "cells" / "U-Net__seed_0" / "notebooks" / "one_phi.ipynb").exists()
    assert (sweep / "cells" / "cut__seed_1" / "notebooks" / "one_phi.failed.ipynb").exists()


def test_results_do_not_say_where_files_lie(swept):
    _, run, sweep = swept
    text = (sweep / "mine.json").read_text() + "".join(p.read_text() for p in sweep.glob("cells/*/results/*.json"))
    assert str(run.parent) not in text and '"phis": "own.py"' in text


def test_a_notebook_finds_in_the_same_cells_what_the_sweep_found(swept, tmp_path):
    """`run.study` makes its cells without papermill: other processes, another store, the same numbers."""
    path, _, sweep = swept
    run = open_run("study", {"preset": "smoke", "out": str(tmp_path), "why_iterations": 0})
    cells, cases = run.study(read_grid(path), short=False)
    expected = {(c["row"], c["point"]["seed"]): c for c in found(sweep) if c["row"] in ("U-Net", "none", "cut")}
    assert set(cases) == {"U-Net", "cut", "dies", "none"}
    for cell in cells:
        other = expected.get((cell["row"], cell["point"]["seed"]))
        if other:
            assert cell.get("numbers") == other.get("numbers") and ("error" in cell) == ("error" in other)
    assert {c["row"] for c in cells if "error" in c} == {"cut", "dies"}


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
    numbers = [cell.get("numbers") for cell in found(sweep)]
    assert main(["sweep", str(path), "--out", str(run)]) == 0  # one after the other, on what the cells had made
    assert [cell.get("numbers") for cell in found(sweep)] == numbers and gone.exists()


def test_the_identity_s_row_is_its_own_control(swept):
    cells = over_seeds(found(swept[2]))
    for cell in cells["none"]:
        numbers = cell["numbers"]
        assert numbers["test accuracy"] == numbers["real images"] and numbers["gain"]["mean"] == 0
        assert numbers["matching loss"] == pytest.approx(numbers["identity at the same alpha"])
        assert numbers["change of x"] == numbers["spread of draws"] == 0
    seeds = [[cell["numbers"]["test accuracy"] for cell in group] for group in (cells["none"], cells["U-Net"])]
    assert seeds[0][0] != seeds[0][1]  # a seed is another experiment


def test_a_sweep_is_published_alone_unless_its_code_is_uncommitted(swept, tmp_path):
    _, run, _ = swept
    other = tmp_path / "smoke"
    shutil.copytree(run / "sweeps", other / "sweeps")
    path = other / "sweeps" / "mine" / "mine.json"
    for uncommitted in (True, False):
        result = json.loads(path.read_text())
        result["environment"] |= {"uncommitted": uncommitted, "commit": "0" * 40}
        path.write_text(json.dumps(result))
        if uncommitted:
            with pytest.raises(ValueError, match="mine was swept with uncommitted code"):
                gallery.publish_sweeps("smoke", str(other), tmp_path / "gallery")
    target = gallery.publish_sweeps("smoke", str(other), tmp_path / "gallery")
    assert sorted(p.name for p in target.iterdir()) == ["mine.json", "mine.png"]
    with pytest.raises(ValueError, match="holds no sweep"):
        gallery.publish_sweeps("smoke", str(tmp_path / "nowhere"), tmp_path / "gallery")


def test_any_notebook_can_be_swept(tmp_path):
    path = grid_file(
        tmp_path / "grid", notebook="01_expert_trajectories.ipynb", axes={"expert_lr": [0.01, 0.1]}, set={}
    )
    assert main(["sweep", str(path), "--out", str(tmp_path / "run")]) == 0
    cells = found(tmp_path / "run" / "sweeps" / "mine")
    assert [cell["point"] for cell in cells] == [{"expert_lr": 0.01}, {"expert_lr": 0.1}]
    assert [cell["settings"]["expert_lr"] for cell in cells] == [0.01, 0.1]
    assert cells[0]["numbers"] != cells[1]["numbers"]


def test_a_sweep_of_which_every_cell_fails_says_so(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("raise RuntimeError('ill | here')")])
    notebook.metadata["language_info"] = {"name": "python"}
    path = grid_file(tmp_path / "grid", notebook="ill.ipynb", axes={"seed": [0]})
    nbformat.write(notebook, tmp_path / "grid" / "ill.ipynb")
    assert main(["sweep", str(path), "--out", str(tmp_path / "run")]) == 1
    assert "RuntimeError: ill / here" in (tmp_path / "run" / "sweeps" / "mine" / "table.md").read_text()


def test_short_keeps_the_rows_that_the_grid_names_and_set_changes_all(tmp_path):
    rows = {"a": {"phi": "unet"}, "b": {"phi": "identity"}, "c": {"iterations": 7}}
    grid = read_grid(grid_file(tmp_path, rows=rows, axes={"seed": [3, 4], "width": [4, 8]}, short=["c", "a"]))
    choices = grid.choices(resolve("smoke"), {"syn_steps": "2"}, short=True)
    assert [c.row for c in choices] == ["c"] * 4 + ["a"] * 4
    assert [(c.settings.seed, c.settings.width) for c in choices[:4]] == [(3, 4), (3, 8), (4, 4), (4, 8)]
    assert {c.settings.syn_steps for c in choices} == {2}
    assert [c.settings.iterations for c in choices] == [7] * 4 + [3] * 4  # a row's own is what the row is about
    assert {c.row for c in grid.choices(resolve("smoke"), only=["b"])} == {"b"}
    with pytest.raises(ValueError, match=r"row 'd': is none of .*must be among a, b, c"):
        grid.choices(resolve("smoke"), only=["b", "d"])
    assert len({c.name for c in choices}) == 8 and len(grid.choices(resolve("smoke"))) == 12


def test_a_table_groups_seeds_and_shows_means():
    def cell(row, seed, **outcome):
        return {"row": row, "point": {"seed": seed, "width": 8}} | outcome

    numbers = [{"score": {"mean": m, "std": 0.0, "n": 2, "values": [m, m]}, "note": "x"} for m in (0.2, 0.4)]
    text = sweep_table([cell("a", k, numbers=n) for k, n in enumerate(numbers)] + [cell("b", 0, error="no\nway")])
    assert "| a, width 8 | 0.3 ± 0.14 | 2 |  |" in text and "| b, width 8 |  | 0 | no way |" in text
    assert "note" not in text


def test_a_grid_keeps_its_own_phis_beside_those_that_are_set(tmp_path):
    (tmp_path / "own.py").write_text(CUT.replace('"cut"', '"own"').replace('"deadly"', '"own too"'))
    mine = tmp_path / "mine.py"
    mine.write_text(CUT.replace('"cut"', '"mine"').replace('"deadly"', '"mine too"'))
    grid = read_grid(
        grid_file(tmp_path, set=TINY | {"phis": "own.py"}, rows={"a": {"phi": "own"}, "b": {"phi": "mine"}})
    )
    choices = grid.choices(resolve("smoke"), {"phis": str(mine)})
    assert [path.name for path in choices[0].settings.phi_files] == ["own.py", "mine.py"]


ROW = {"a": {"phi": "unet"}}
BAD = {
    "no rows": (dict(), "neither rows nor axes"),
    "unknown key": (dict(rows=ROW, axis={"seed": [1]}), "unknown key 'axis': must be one of notebook, preset"),
    "unknown setting in a row": (dict(rows={"a": {"phy": 1}}), "unknown setting 'phy'"),
    "unknown setting as an axis": (dict(axes={"sead": [1]}), "unknown setting 'sead'"),
    "unknown setting in set": (dict(rows=ROW, set={"sett": 1}), "unknown setting 'sett'"),
    "workers": (dict(rows=ROW, set={"workers": 1}), "unknown setting 'workers'"),
    "side by side": (dict(rows=ROW, set={"notebooks_at_once": 2}), "unknown setting 'notebooks_at_once'"),
    "empty axis": (dict(axes={"seed": []}), "axes=.*at least one value"),
    "axis of one value": (dict(axes={"seed": 3}), "axes=.*at least one value"),
    "twice the same": (dict(axes={"seed": [1, 1]}), "must be different"),
    "row that is a list": (dict(rows={"a": [1]}), "rows=.*must be settings by name"),
    "wrong value": (dict(rows={"a": {"phi_lr": "fast"}}), "row 'a': phi_lr='fast'"),
    "wrong phi": (dict(rows={"a": {"phi": "nonesuch"}}), "a: unknown phi 'nonesuch'"),
    "short that is no row": (dict(rows=ROW, short=["b"]), "short: 'b' is no row"),
    "no notebook": (dict(rows=ROW, notebook="nowhere.ipynb"), "notebook='nowhere.ipynb'"),
    "preset": (dict(rows=ROW, preset="digit"), "preset='digit'"),
    "file of phis": (dict(rows=ROW, set={"phis": "nowhere.py"}), "phis=.*nowhere.py.*no such file"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_grid_is_refused_by_name_before_anything_runs(case, tmp_path, capsys):
    content, message = BAD[case]
    path = grid_file(tmp_path / "grid", **content)
    assert main(["sweep", str(path), "--out", str(tmp_path / "run")]) == 2
    assert re.search(message, capsys.readouterr().err) and not (tmp_path / "run").exists()


def test_other_wrong_arguments(tmp_path, capsys):
    path = grid_file(tmp_path / "grid", axes={"seed": [0]})
    for arguments, message in (
        ([str(tmp_path / "nowhere.yaml")], "nowhere.yaml: no such file"),
        ([str(path), "--set", "seed=3"], "seed: is an axis"),
        ([str(path), "--set", "sed=3"], "unknown key 'sed'"),
        ([str(path), "--preset", "smok"], "preset='smok'"),
    ):
        assert main(["sweep", *arguments, "--out", str(tmp_path / "run")]) == 2
        assert message in capsys.readouterr().err
    for text in ("- a", "a: [", "\xff"):
        path.write_bytes(text.encode("latin1"))
        assert main(["sweep", str(path)]) == 2


def test_the_study_is_such_a_grid():
    """Every row of the committed study can be run on every preset that is named for it."""
    grid = read_grid(SWEEPS / "why_phi_failed.yaml")
    choices = grid.choices(resolve("digits"))
    assert len(choices) == 3 * len(grid.rows) and {c.settings.seed for c in choices} == {0, 1, 2}
    assert len({json.dumps(c.settings.to_dict()) for c in choices}) == len(choices)  # no row says what another says
    assert set(grid.short) < set(grid.rows)
    for preset in ("smoke", "fashion-small", "cifar10-small"):
        assert len(grid.choices(resolve(preset), {"iterations": 5}, short=True)) == 3 * len(grid.short)


class InTurn(Crew):
    """Jobs one after the other, in this process."""

    def __init__(self, store):
        self.store, self.executor = store, concurrent.futures.ThreadPoolExecutor(1)

    def __exit__(self, *_):
        self.executor.shutdown()

    def submit(self, job):
        return self.executor.submit(job.run, self.store)

    def state(self, future):
        return 0.5 if future.running() else 0.0, ""


def test_what_takes_longest_starts_first_and_counts_most(tmp_path, monkeypatch):
    began, shown = [], []

    @dataclasses.dataclass(frozen=True)
    class Piece(Task):
        name: str
        cost: float

        def spec(self):
            return {"name": self.name}

        def work(self, store, tick):
            began.append(self.name)
            tick(1, 2)
            return {}, {}

    pieces = [Piece("short", 1), Piece("long", 4), Piece("other short", 1), Piece("middle", 2)]
    monkeypatch.setattr(Pool, "crew", lambda pool, store: InTurn(store))
    run_jobs(pieces, Store(tmp_path / "two"), Pool(2), lambda *state: shown.append(state))
    assert began == ["long", "middle", "short", "other short"]
    assert shown[0] == (0, 4, "") and shown[-1] == (4, 4, "")
    began.clear()
    shown.clear()
    run_jobs(pieces, Store(tmp_path / "one"), Pool(1), lambda *state: shown.append(state))
    assert began == ["short", "long", "other short", "middle"]  # alone, in their own order
    assert [done for done, _, _ in shown] == [0, 0.25, 0.5, 1.5, 2.5, 2.75, 3, 3.5, 4]  # in eighths of the cost, of 4


def test_cost_follows_what_a_distillation_does():
    def cost(subset, **config):
        return Distillation(Setup(size=8), "unet", subset, DistillConfig(**config)).cost

    twenty = Subset(0, per_class=2)
    assert cost(twenty, draws=2) == cost(twenty, iterations=600) == 2 * cost(twenty)
    assert cost(twenty, batch_syn=10) == cost(Subset(0, fraction=0.5), episode=1) == cost(twenty) / 2
