"""Stored results are whole or not there, and a damaged or foreign file is named, never half read."""

import dataclasses
import pickle

import pytest
import torch

from augdistill_report.files.store import Store, digest, write
from augdistill_report.work.experts import Expert, Together, expert_jobs, missing_experts
from augdistill_report.work.setup import Setup

SPEC = {"a": 1, "b": [0.1, None, "x"]}
TENSORS = {"theta": torch.arange(1000.0).view(10, 100), "n": torch.tensor(3)}


@pytest.fixture
def store(tmp_path) -> Store:
    store = Store(tmp_path)
    store.save("thing", SPEC, TENSORS, {"loss": [1.0, float("nan")], "why": "ü"})
    return store


def test_what_is_stored_comes_back(store):
    tensors, meta = store.load("thing", SPEC)
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert meta["why"] == "ü" and meta["loss"][0] == 1.0 and meta["loss"][1] != meta["loss"][1]


def test_an_equal_specification_finds_it_and_no_other(store):
    assert store.has("thing", dict(reversed(SPEC.items())))
    for other in ({**SPEC, "a": 2}, {**SPEC, "c": 0}, {"a": 1}):
        assert not store.has("thing", other)
    assert not store.has("other", SPEC)
    assert digest({"a": 1}) != digest({"a": 1.5})


def damage(path, how):
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "header":
        path.write_bytes(content[:8] + b"#" + content[9:])
    elif how == "pickle":
        path.write_bytes(pickle.dumps({"theta": 1}))
    elif how == "another's":
        Store(path.parent).save("thing", {"a": 2}, TENSORS, {})
        Store(path.parent).path("thing", {"a": 2}).replace(path)


@pytest.mark.parametrize("how", ["truncated", "empty", "header", "pickle", "another's"])
def test_a_damaged_or_foreign_file_is_named(store, how):
    path = store.path("thing", SPEC)
    damage(path, how)
    with pytest.raises(ValueError, match=path.name):
        store.load("thing", SPEC)


def test_a_write_that_dies_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write(path, "old")
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_experts_made_together_are_stored_as_if_each_had_been_made_alone(tmp_path):
    setup = Setup(size=8, width=4, depth=1, experts=3, epochs=2, expert_augment="dsa")
    together, alone = Store(tmp_path / "together"), Store(tmp_path / "alone")
    expert_jobs(setup)[1].run(together)  # one is there already
    before = together.path("expert", Expert(setup, 1).spec()).stat().st_mtime_ns
    every = Together(setup, (0, 1, 2))
    every.run(together)
    assert every.stored(together)[1] == {"made": [0, 2]}
    assert together.path("expert", Expert(setup, 1).spec()).stat().st_mtime_ns == before
    for job in expert_jobs(setup):
        assert together.has(job.kind, job.spec())
        (tensors, meta), (other, other_meta) = job.stored(together), job.stored(alone)
        torch.testing.assert_close(tensors, other, rtol=1e-3, atol=1e-4)  # float32
        assert meta["loss"] == pytest.approx(other_meta["loss"], rel=1e-4) and len(meta["validation"]) == 3
    assert missing_experts(setup) == expert_jobs(setup)
    on_gpu = dataclasses.replace(setup, device="cuda")
    assert missing_experts(on_gpu) == [Together(on_gpu, (0, 1, 2))]
    parts = dataclasses.replace(on_gpu, experts_at_once=2)
    assert [job.which for job in missing_experts(parts)] == [(0, 1), (2,)]
    assert Expert(dataclasses.replace(setup, experts_at_once=2), 0).spec() == Expert(setup, 0).spec()
