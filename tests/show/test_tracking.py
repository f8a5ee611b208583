"""Curves and pictures in a tracker are those of the files. A tracker that is not installed is skipped, and named."""

import importlib.util
import json
import sqlite3
import struct

import numpy as np
import pytest

from augdistill_report.commands.cli import main
from augdistill_report.run import Run, configuration
from augdistill_report.settings import resolve
from augdistill_report.show import plots
from augdistill_report.show.tracking import TRACKERS, numbers

INSTALLED = [name for name in TRACKERS if importlib.util.find_spec(name)]


@pytest.fixture
def notebook(tmp_path):
    """What a notebook does with its run; the same again for the same folder and settings."""

    def make(track: str, **changes) -> Run:
        run = Run("03", resolve("smoke", {"track": track, **changes}), tmp_path / "run")
        rows = {"identity": run.distillation("identity", run.base)}
        rows |= {("a policy", 1): run.distillation("policy", run.base, phi_lr=0.1)}
        results = run.distill(rows)
        run.figure(plots.curves({str(name): r.history for name, r in results.items()}), "curves")
        run.finish()
        return run

    return make


def curves(run: Run) -> dict[str, list[dict]]:
    """By row, what the files say."""
    files = (run.folder / "curves" / "03").iterdir()
    return {file.stem: [numbers(json.loads(line)) for line in file.read_text().splitlines()] for file in files}


def tracker(name: str) -> None:
    pytest.importorskip(name, reason=f"{name} is not installed: an optional extra")


def test_the_numbers_of_a_record():
    record = {"iteration": 3, "loss": 0.5, "start_epoch": 2, "moved": None, "state": "exploded", "phi": {"flip": 0.1}}
    assert numbers(record) == {"loss": 0.5, "start_epoch": 2.0, "phi/flip": 0.1}


def test_without_a_tracker_nothing_is_sent(notebook):
    run = notebook("none")
    assert not (run.folder / "tracked").exists() and len(curves(run)) == 2


def test_results_do_not_depend_on_the_tracker():
    assert configuration(resolve("smoke", {"track": "wandb"})) == configuration(resolve("smoke"))


@pytest.mark.parametrize("name", sorted(set(TRACKERS) - set(INSTALLED)))
def test_a_missing_package_is_named_before_anything_runs(name, tmp_path, capsys):
    assert main(["report", "--preset", "smoke", "--track", name, "--out", str(tmp_path / "out")]) == 2
    assert f"track='{name}': the package is not installed; pip install {name}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_unknown_tracker_is_refused_by_name(tmp_path, capsys):
    assert main(["report", "--preset", "smoke", "--track", "mlflow", "--out", str(tmp_path / "out")]) == 2
    assert "track='mlflow': must be one of none, tensorboard, trackio, wandb" in capsys.readouterr().err


def test_tensorboard_has_the_curves_and_pictures_of_the_files(notebook):
    tracker("tensorboard")
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def events(folder) -> EventAccumulator:
        found = EventAccumulator(str(folder), {"scalars": 0, "images": 0})
        return found.Reload()

    run = notebook("tensorboard")
    place = run.folder / "tracked" / "tensorboard" / "03"
    for again in (False, True):
        for row, records in curves(run).items():
            found = events(place / row)
            assert set(found.Tags()["scalars"]) == {key for record in records for key in record}
            for key in found.Tags()["scalars"]:
                values = [(e.step, e.value) for e in found.Scalars(key)]
                expected = [(step, np.float32(r[key])) for step, r in enumerate(records)]
                np.testing.assert_array_equal(values, expected)
        assert "phi/rotation" in events(place / "a_policy__1").Tags()["scalars"]
        (image,) = events(place / "pictures").Images("curves")
        with Image.open(run.folder / "figures" / "curves.png") as picture:
            assert (image.width, image.height) == picture.size
        files = {p: p.stat().st_mtime_ns for p in place.rglob("events*")}
        assert len(files) == 3
        if not again:  # the same again is not sent again; other settings take its place
            notebook("tensorboard")
            assert {p: p.stat().st_mtime_ns for p in place.rglob("events*")} == files
            notebook("tensorboard", iterations=6)


def test_trackio_has_the_curves_and_pictures_of_the_files(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    tracker("trackio")
    run = notebook("trackio")
    notebook("trackio")  # sends nothing more
    (file,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(file) as base:
        rows = base.execute("select run_name, step, metrics from metrics order by id").fetchall()
    found: dict = {}
    for name, step, metrics in rows:
        found.setdefault(name, []).append((step, json.loads(metrics)))
    for row, records in curves(run).items():
        assert found.pop(f"03/{row}") == list(enumerate(records))
    ((_, pictures),) = found.pop("03/pictures")
    assert set(pictures) == {"curves"} and not found
    assert [p.suffix for p in (tmp_path / "trackio" / "media").rglob("*.*")] == [".png"]


def log_records(content: bytes):
    """The records of a file in LevelDB's log format, in which wandb keeps a run, behind a header of seven bytes."""
    place, parts = 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # what is left of a block is not used
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_wandb_has_the_curves_and_pictures_of_the_files(notebook, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker("wandb")
    from wandb.proto import wandb_internal_pb2

    run = notebook("wandb")
    notebook("wandb")
    found: dict = {}
    for file in (run.folder / "tracked" / "wandb").glob("offline-run-*/run-*.wandb"):
        name = ""
        for data in log_records(file.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            name = record.run.display_name or name
            items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            if items:
                assert name not in found or record.history.step.num == len(found[name])
                found.setdefault(name, []).append({k: v for k, v in items.items() if not k.startswith("_")})
    assert set(found) == {"03/pictures", *(f"03/{row}" for row in curves(run))}
    for row, records in curves(run).items():
        assert found[f"03/{row}"] == records
    assert found["03/pictures"][0]["curves/_type"] == "image-file"
