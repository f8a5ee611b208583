"""A grid defines the cells; a wrong grid is refused by name before anything runs."""

import json
import re

import pytest
from helpers import CUT, SWEEPS, TINY, grid_file

from augdistill_report.commands.cli import main
from augdistill_report.settings import resolve
from augdistill_report.studies.grid import read_grid, sweep_table


def test_short_keeps_the_rows_that_the_grid_names_and_set_changes_all(tmp_path):
    rows = {"a": {"phi": "unet"}, "b": {"phi": "identity"}, "c": {"iterations": 7}}
    grid = read_grid(grid_file(tmp_path, rows=rows, axes={"seed": [3, 4], "width": [4, 8]}, short=["c", "a"]))
    choices = grid.choices(resolve("smoke"), {"syn_steps": "2"}, short=True)
    assert [c.row for c in choices] == ["c"] * 4 + ["a"] * 4
    assert [(c.settings.seed, c.settings.width) for c in choices[:4]] == [(3, 4), (3, 8), (4, 4), (4, 8)]
    assert {c.settings.syn_steps for c in choices} == {2}
    assert [c.settings.iterations for c in choices] == [7] * 4 + [3] * 4  # a row's own is what the row is about
    assert {c.row for c in grid.choices(resolve("smoke"), only=["b"])} == {"b"}
    with pytest.raises(ValueError, match=r"row 'd': is not a row of .*the nearest are a, b, c"):
        grid.choices(resolve("smoke"), only=["b", "d"])
    assert len({c.name for c in choices}) == 8 and len(grid.choices(resolve("smoke"))) == 12


def test_a_table_groups_seeds_and_shows_means():
    def cell(row, seed, **outcome):
        return {"panel": "", "row": row, "point": {"seed": seed, "width": 8}} | outcome

    numbers = [{"score": {"mean": m, "std": 0.0, "n": 2, "values": [m, m]}, "note": "x"} for m in (0.2, 0.4)]
    text = sweep_table([cell("a", k, numbers=n) for k, n in enumerate(numbers)] + [cell("b", 0, error="no\nway")])
    assert "| a, width 8 | 0.3 ± 0.14 | 2 |  |" in text and "| b, width 8 |  | 0 | no way |" in text
    assert "note" not in text
    stopped = [cell("a", k, numbers={"score": 0.2, "stopped": stop}) for k, stop in enumerate([{"kind": "alpha"}, {}])]
    assert "| a, width 8 (stopped: alpha in 1 of 2) | 0.2 ± 0 | 2 |  |" in sweep_table(stopped)


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
    "unknown setting in a row": (dict(rows={"a": {"phy": 1}}), "unknown key 'phy': the nearest are"),
    "unknown setting as an axis": (dict(axes={"sead": [1]}), "unknown key 'sead': the nearest are"),
    "unknown setting in set": (dict(rows=ROW, set={"sett": 1}), "unknown key 'sett': the nearest are"),
    "workers": (dict(rows=ROW, set={"workers": 1}), "set: workers: a grid cannot set"),
    "side by side": (dict(rows=ROW, set={"notebooks_at_once": 2}), "set: notebooks_at_once: a grid cannot set"),
    "empty axis": (dict(axes={"seed": []}), "axes=.*at least one value"),
    "axis of one value": (dict(axes={"seed": 3}), "axes=.*at least one value"),
    "twice the same": (dict(axes={"seed": [1, 1]}), "must be different"),
    "row that is a list": (dict(rows={"a": [1]}), "rows=.*must be settings by name"),
    "row of two lines": (dict(rows={"a\nb": {"phi": "unet"}}), r"row 'a\\nb': must be printable text on one line"),
    "row with a formula": (dict(rows={"$x^$": {"phi": "unet"}}), r"row '\$x\^\$': must be .* without \$"),
    "wrong value": (dict(rows={"a": {"phi_lr": "fast"}}), "row 'a': phi_lr='fast'"),
    "wrong phi": (dict(rows={"a": {"phi": "nonesuch"}}), "a: unknown phi 'nonesuch'"),
    "short that is no row": (dict(rows=ROW, short=["b"]), "short: 'b' is not a row"),
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
