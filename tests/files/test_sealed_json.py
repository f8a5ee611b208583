"""JSON that our code reads back is what was written, or is refused by its file's name before any work is done."""

import hashlib
import json
import random
import re
import shutil

import pytest
from helpers import TINY, grid_file

from augdistill_report.commands import publish as gallery
from augdistill_report.commands.cli import main
from augdistill_report.commands.report import notebook_seconds
from augdistill_report.files.sealed_json import JSON_KINDS, read_json, write_json
from augdistill_report.run import Run, open_run
from augdistill_report.settings import resolve

ENVIRONMENT = {"commit": "0" * 40, "uncommitted": False, "torch": "2.9"}
SCORE = {"mean": 0.915, "std": 0.0125, "n": 2, "values": [0.91, 0.92]}
CONTENT = {
    "run": {"preset": "smoke", "settings": resolve("smoke").to_dict()},
    "results": {
        "notebook": "02_baseline_mtt",
        "preset": "smoke",
        "changes": {"iterations": 10},
        "seconds": 12.5,
        "headline": "Pixels teach — ten images, 91.5 %",
        "figure": "curves",
        "settings": {"iterations": 10, "alpha": 0.02},
        "fingerprint": "a1b2c3",
        "configuration": "d4e5f6",
        "environment": ENVIRONMENT,
        "numbers": {"pixels (MTT)": SCORE, "real images": {**SCORE, "mean": 0.7}, "loss": [0.5, None, 1e-300]},
        "figures": ["curves", "accuracy"],
        "films": [],
    },
    "sweep": {
        "grid": "mine.yaml",
        "notebook": "one_phi.ipynb",
        "preset": "smoke",
        "short": False,
        "environment": ENVIRONMENT,
        "cells": [
            {"row": "a", "point": {"seed": 0}, "settings": {"phi": "unet"}, "numbers": {"gain": SCORE}},
            {"row": "b", "point": {"seed": 0}, "settings": {"phi": "mlp"}, "error": "RuntimeError: ill"},
        ],
    },
    "campaign": {
        "campaign": "mine",
        "preset": "smoke",
        "changes": {"precision": "tf32"},
        "tiny": False,
        "settings": {"iterations": 10},
        "environment": ENVIRONMENT,
        "rows": [
            {"row": "DSA", "images": "10 %", "seed": 0, "state": "done", "test": SCORE, "settings": {}},
            {"row": "DSA", "images": "1 %", "seed": 0, "state": "not started", "settings": {"eval_steps": 4}},
        ],
    },
    "timings": {"seconds": {"01_a": 12.3, "02_b": 4}},
    "tracked": {"sent": {"03/pictures": "0123456789ab", "03/unet": "ba9876543210"}},
    "card": {
        "data": "digits",
        "classes": ["a", "b"],
        "normalisation": {"name": "own", "mean": [0.25], "std": [0.5]},
        "lr": 0.0125,
        "content": "0123456789ab",
        "environment": ENVIRONMENT,
    },
    "score": {
        "name": "pixels (MTT)",
        "data": "digits",
        "size": 8,
        "protocol": {"name": "ours", "steps": 300},
        "command": "augdistill score pixels --on digits",
        "rows": {"the set": {"accuracy": SCORE, "images": 10, "bytes": {"images": 2560, "labels": 10}}},
        "environment": ENVIRONMENT,
    },
    "row": {
        "row": "unet",
        "store": "runs/digits/artefacts",
        "setup": {"seed": 0},
        "phi": "unet",
        "subset": {"seed": 0, "per_class": 1},
        "config": {"iterations": 3},
    },
    "apply": {"phi": "unet", "trained on": "digits (ab)", "state": "0a1b", "strength": 1.0, "to": "digits", "of": "cd"},
}


@pytest.fixture(params=JSON_KINDS)
def sealed(request, tmp_path):
    """A kind, a file of it, and its content."""
    path = tmp_path / f"{request.param}.json"
    write_json(path, request.param, CONTENT[request.param])
    return request.param, path, CONTENT[request.param]


def same(a, b) -> bool:
    """Equal, the order of keys and the types of numbers included."""
    return json.dumps(a) == json.dumps(b)


def refused(path, kind) -> bool:
    """Whether a file is refused, by its name and with what to do; if it is not, it holds what was written."""
    try:
        content = read_json(path, kind)
    except ValueError as error:
        assert str(error).startswith(f"{path}: is damaged or not ours (") and JSON_KINDS[kind].again in str(error)
        assert "\n" not in str(error)
        return True
    assert same(content, CONTENT[kind]), "taken with other content"
    return False


def test_what_is_written_comes_back_in_its_order_and_a_person_can_read_it(sealed):
    kind, path, content = sealed
    assert same(read_json(path, kind), content)
    plain = json.loads(path.read_text())
    assert plain.pop("kind") == kind and len(plain.pop("sha256")) == 64 and same(plain, content)
    before = path.read_bytes()
    write_json(path, kind, read_json(path, kind))
    assert path.read_bytes() == before
    path.write_text(json.dumps(json.loads(before), indent=4))  # another layout is the same content
    assert not refused(path, kind)


def test_what_is_not_finite_becomes_null(tmp_path):
    content = CONTENT["results"] | {"numbers": {"loss": [float("nan"), float("inf"), 1.0], 3: (1, 2)}}
    write_json(tmp_path / "r.json", "results", content)
    assert read_json(tmp_path / "r.json", "results")["numbers"] == {"loss": [None, None, 1.0], "3": [1, 2]}


def edits(text: str, rng: random.Random):
    """Other texts: bytes changed, cut, doubled or put in, numbers and words changed, lines swapped and dropped."""
    content = text.encode()
    for _ in range(150):
        place, value = rng.randrange(len(content)), rng.randrange(256)
        yield content[:place] + bytes([content[place] ^ (1 << value % 8)]) + content[place + 1 :]
        yield content[:place] + bytes([value]) + content[place:]
    for _ in range(30):
        yield content[: rng.randrange(len(content))]
        start, end = sorted(rng.sample(range(len(content)), 2))
        yield content[:start] + content[end:]
        yield content[:end] + content[start:]
    for match in re.finditer(r"(?<=[\s\[])-?\d[\d.e+-]*", text):
        for number in ("0", "-1", "1e999", "NaN", "true", '"1"', "null", "9" * 5000, f"{match[0]}1", "[]", "{}"):
            yield f"{text[: match.start()]}{number}{text[match.end() :]}".encode()
    for match in re.finditer(r'"[^"]*"', text):
        for word in ('"another"', f'"{match[0][1:-1]} "', "[]", '"\\ud800"'):
            yield f"{text[: match.start()]}{word}{text[match.end() :]}".encode()
    lines = text.splitlines()
    for _ in range(60):
        a, b = rng.sample(range(len(lines)), 2)
        swapped = list(lines)
        swapped[a], swapped[b] = swapped[b], swapped[a]
        yield "\n".join(swapped).encode()
        yield "\n".join(lines[:a] + lines[a + 1 :]).encode()
        yield "\n".join([*lines[:a], lines[a], *lines[a:]]).encode()  # a key twice
    for encoding in ("utf-16", "utf-8-sig", "utf-32", "utf-16-le"):
        yield text.encode(encoding)
    for other in ("", "null", "[]", "{}", "1", '"text"', "[" * 100_000, '{"a":' * 100_000, "\0", "NaN"):
        yield other.encode()
    for value in ("[" * 100_000 + "]" * 100_000, '{"a":' * 50_000 + "1" + "}" * 50_000):
        yield f'{{"deep": {value}, {text.lstrip()[1:]}'.encode()
    yield text.replace("{", '{"kind": "run",', 1).encode()
    yield re.sub(r'"sha256": "\w+"', '"sha256": null', text).encode()
    yield re.sub(r'"sha256": "\w+"', f'"sha256": "{"0" * 64}"', text).encode()


def test_any_damage_is_refused_by_name_or_changes_nothing(sealed):
    kind, path, _ = sealed
    text, rng = path.read_text(), random.Random(0)
    found = []
    for damaged in edits(text, rng):
        path.write_bytes(damaged)
        found.append(refused(path, kind))
    assert len(found) > 500 and sum(found) > 0.9 * len(found)  # the rest is layout


def test_a_file_of_another_kind_and_what_is_no_file_are_refused(sealed, tmp_path):
    kind, path, _ = sealed
    for other in set(JSON_KINDS) - {kind}:
        write_json(path, other, CONTENT[other])
        assert refused(path, kind)
    path.unlink()
    path.mkdir()
    assert refused(path, kind)
    assert refused(tmp_path / "nowhere.json", kind)


def leaves(value, at=()):
    """The places of all values in a shape."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*at, key)
        yield from leaves(inner, (*at, key))


def test_a_missing_key_or_a_wrong_type_is_refused_by_its_place(tmp_path):
    for kind, content in CONTENT.items():
        for place in leaves(JSON_KINDS[kind].shape):
            wrong = inner = json.loads(json.dumps(content))
            *above, last = place
            for key in above:
                inner = inner[key]
            if last is str:  # any key
                last = next(iter(inner))
            elif isinstance(inner, dict):
                value = inner.pop(last)
                with pytest.raises(ValueError, match=rf"x.json: cannot be written .* has no '{last}'"):
                    write_json(tmp_path / "x.json", kind, wrong)
                inner[last] = value
            if isinstance(inner, list):
                inner[:] = [None]
            else:
                inner[last] = None
            with pytest.raises(ValueError, match=rf"x.json: cannot be written .*{last}'?\] must be of type .*NoneType"):
                write_json(tmp_path / "x.json", kind, wrong)
    for wrong in ({"kind": "x"}, {"sha256": "x"}, {"more": object()}, {"more": {1: 2, "1": 3}}):
        with pytest.raises(ValueError, match=r"x.json: cannot be written"):
            write_json(tmp_path / "x.json", "timings", CONTENT["timings"] | wrong)
    assert not list(tmp_path.iterdir())


# --- what reads them --------------------------------------------------------------------------------------------------


def hurt(path) -> None:
    """Change one digit of a file's content."""
    text = path.read_text()
    place = next(m.start() for m in re.finditer(r"\d", text) if m.start() > text.index(",\n"))
    path.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])


@pytest.fixture
def run(tmp_path):
    """The folder of a run as `open_run` starts it, with results, timings and a sweep."""
    folder = tmp_path / "smoke"
    open_run("01", {"preset": "smoke", "out": str(folder)})
    write_json(folder / "timings.json", "timings", CONTENT["timings"])
    write_json(folder / "results" / "02_baseline_mtt.json", "results", CONTENT["results"])
    write_json(folder / "sweeps" / "mine" / "mine.json", "sweep", CONTENT["sweep"])
    write_json(folder / "tracked" / "none.json", "tracked", CONTENT["tracked"])
    return folder


@pytest.mark.parametrize(
    "name",
    ["config.json", "timings.json", "results/02_baseline_mtt.json", "results/03_other.json", "tracked/none.json"],
)
def test_a_report_refuses_a_damaged_file_before_anything_runs(run, name, capsys):
    if name == "results/03_other.json":  # whole, but of another notebook
        shutil.copy(run / "results" / "02_baseline_mtt.json", run / name)
    else:
        hurt(run / name)
    assert main(["report", "--preset", "smoke", "--out", str(run), "--only", "01"]) == 2
    assert f"augdistill: {run / name}: " in capsys.readouterr().err
    assert not (run / "notebooks").exists() and not (run / "artefacts").exists()


def test_a_damaged_config_can_be_deleted_where_there_is_finished_work(run):
    hurt(run / "config.json")
    with pytest.raises(ValueError, match=r"config.json: is damaged .*delete it and run the same command again"):
        open_run("01", {"preset": "smoke", "out": str(run)})
    (run / "config.json").unlink()
    with pytest.raises(ValueError, match="holds files but no run"):
        open_run("01", {"preset": "smoke", "out": str(run)})
    (run / "artefacts").mkdir()
    open_run("01", {"preset": "smoke", "out": str(run)})
    assert notebook_seconds(run) == CONTENT["timings"]["seconds"]


def test_results_that_are_about_to_be_replaced_may_be_damaged(run, monkeypatch):
    hurt(run / "results" / "02_baseline_mtt.json")
    ran = []
    monkeypatch.setattr("augdistill_report.commands.report.run_jobs", lambda tasks, *_: ran.extend(tasks))
    with pytest.raises(KeyError):  # nothing was run, so there is no time to tell
        main(["report", "--preset", "smoke", "--out", str(run), "--only", "02"])
    assert [task.notebook.stem for task in ran] == ["02_baseline_mtt"]


def test_publishing_reads_everything_before_it_writes_anything(run, tmp_path):
    (run / "sweeps" / "mine" / "mine.png").write_bytes(b"a picture")
    target = gallery.publish("smoke", str(run), "sweeps", gallery=tmp_path / "gallery")
    assert sorted(p.name for p in target.iterdir()) == ["mine.json", "mine.png"]
    assert same(read_json(target / "mine.json", "sweep"), CONTENT["sweep"])
    made = CONTENT["campaign"] | {"environment": ENVIRONMENT | {"python": "3", "torch": "2", "device": "cuda"}}
    write_json(run / "campaigns" / "gpu.json", "campaign", made)
    (run / "campaigns" / "gpu.png").write_bytes(b"a picture")
    target = gallery.publish("smoke", str(run), "campaigns", gallery=tmp_path / "campaigns")
    assert sorted(p.name for p in target.iterdir()) == ["gpu.json", "gpu.png"]
    command = gallery.origin_row(target / "gpu.json")["command"]
    assert command == "`augdistill campaign mine --set precision=tf32`"
    write_json(run / "campaigns" / "gpu.json", "campaign", made | {"tiny": True})
    with pytest.raises(ValueError, match="holds no campaigns"):  # a trial is no result
        gallery.publish("smoke", str(run), "campaigns", gallery=tmp_path / "trial")
    write_json(run / "sweeps" / "other" / "other.json", "sweep", CONTENT["sweep"] | {"grid": "other.yaml"})
    for break_it, message in (
        (lambda path: None, "other.png: is missing"),
        (hurt, "other.json: is damaged"),
        (lambda path: shutil.copy(run / "sweeps" / "mine" / "mine.json", path), "other.json: .*the grid mine.yaml"),
    ):
        break_it(run / "sweeps" / "other" / "other.json")
        with pytest.raises(ValueError, match=message):
            gallery.publish("smoke", str(run), "sweeps", gallery=tmp_path / "new")
        assert not (tmp_path / "new").exists()
    hurt(run / "results" / "02_baseline_mtt.json")
    with pytest.raises(ValueError, match=r"02_baseline_mtt.json: is damaged"):
        gallery.publish("smoke", str(run), "01", gallery=tmp_path / "new")


def test_a_sweep_refuses_a_damaged_cell_before_the_others_run(tmp_path, capsys, monkeypatch):
    from augdistill_report.commands import sweep

    path = grid_file(tmp_path / "grid", set=TINY, axes={"seed": [0, 1]})
    monkeypatch.setattr(sweep, "run_grid", lambda *_: pytest.fail("a cell ran"))
    run, made = tmp_path / "run", []
    cell_of = sweep.cell_of

    def with_a_damaged_file(*arguments):
        cell = cell_of(*arguments)
        made.append(sweep.Store(run / "artefacts").path(cell.kind, cell.spec()))
        made[0].parent.mkdir(exist_ok=True)
        made[0].write_bytes(b"damaged")
        return cell

    monkeypatch.setattr(sweep, "cell_of", with_a_damaged_file)
    assert main(["sweep", str(path), "--out", str(run)]) == 2
    assert f"{made[0]} is damaged" in capsys.readouterr().err and len(made) == 2


def test_a_notebook_names_its_headline_and_its_figure(tmp_path):
    from PIL import Image

    run = Run("mine", resolve("smoke"), tmp_path)
    run.figure(Image.new("RGB", (4, 4)), "curves")
    with pytest.raises(ValueError, match=r"finish\(figure='curve'\): must be a figure .*made \(curves\)"):
        run.finish(figure="curve")
    assert not (tmp_path / "results").exists()
    run.finish(headline="Pixels teach most.", figure="curves")
    said = read_json(tmp_path / "results" / "mine.json", "results")
    assert said["headline"] == "Pixels teach most." and said["figure"] == "curves"
    content = (tmp_path / "figures" / "curves.png").read_bytes()
    assert said["digests"] == {"curves.png": hashlib.sha256(content).hexdigest()}
    run.finish()
    said = read_json(tmp_path / "results" / "mine.json", "results")
    assert said["headline"] == said["figure"] == ""


def test_published_results_are_sealed():
    from augdistill_report.places import ROOT

    for path in sorted((ROOT / "figures").glob("*/*.json")):
        if path.parent.name != "benchmarks":  # nothing reads those
            kind = json.loads(path.read_text())["kind"]
            assert kind in ("results", "sweep", "score", "campaign") and read_json(path, kind)
