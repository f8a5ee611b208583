"""Experts on disk: training that SIGKILL cannot spoil, files whose every damage is named, the official code's files.

Trainings are compared bit for bit with undisturbed ones, imported experts with a model of torch's own layers, and what
is read by the snapshot with what is read whole.
"""

import copy
import dataclasses
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parameters_to_vector

from augdistill_core import (
    DistillConfig,
    TrainingState,
    Trajectories,
    logits_of,
    train_expert,
    train_together,
    unflatten,
)
from augdistill_report.commands import cli
from augdistill_report.commands.preflight import preflight
from augdistill_report.files import checkpoints
from augdistill_report.files.checkpoints import Checkpoint
from augdistill_report.files.expert_files import ExpertFile, in_folder, kept_snapshot, snapshot_tensors
from augdistill_report.files.store import Store
from augdistill_report.settings import Settings, resolve
from augdistill_report.studies.unseen import Repetition
from augdistill_report.work.distillation import Distillation
from augdistill_report.work.experts import (
    Expert,
    Together,
    checkpoint_of,
    expert_jobs,
    load_trajectories,
    missing_experts,
    train_resumable,
)
from augdistill_report.work.jobs import Subset
from augdistill_report.work.scoring import EvalConfig, Evaluation
from augdistill_report.work.setup import Setup
from augdistill_report.work.students import accuracy

SMALL = dict(size=8, width=4, depth=1, experts=2, epochs=3)
SETUP = Setup(**SMALL)


def make(folder, setup=SETUP) -> list[ExpertFile]:
    return [job.file(Store(folder)) for job in expert_jobs(setup)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with two experts, to be copied."""
    folder = tmp_path_factory.mktemp("made")
    make(folder)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "experts")


def same(one: ExpertFile, other: ExpertFile) -> bool:
    """Whether two files say the same, bit for bit, but for the seconds that it took."""
    return (one.spec, one.about, one.file.digests) == (other.spec, other.about, other.file.digests)


# ----------------------------------------------------------------------------------------------------------------------
# Training that goes on
# ----------------------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


class Every(Checkpoint):
    """A checkpoint after every epoch; after so many of them the training is stopped."""

    left = math.inf

    def offer(self, state):
        self.state = state
        self.write()
        self.left -= 1
        if self.left == 0:
            raise Killed


def interrupted(how, setup, which, folder, epochs, job=None):
    """Train by checkpoints, and stop after each of `epochs` once; then to the end. The trajectory, and its losses."""
    job = job or (Together(setup, tuple(which)) if isinstance(which, list) else Expert(setup, which))
    for begin, stop in zip([0, *epochs], [*epochs, math.inf], strict=True):
        checkpoint = Every(Store(folder), job.spec())
        checkpoint.left = stop - begin
        try:
            return train_resumable(job, how, which, checkpoint, lambda *_: None)
        except Killed:
            pass


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(expert_momentum=0.9, expert_decay=0.01),
        dict(expert_augment="dsa", expert_batch=100),
        dict(snapshot_steps=7, expert_momentum=0.5),  # an epoch ends between two snapshots,
        dict(snapshot_steps=50),  # or without one
        dict(expert_batch=2000),  # all of the data, in no random order
    ],
    ids=str,
)
@pytest.mark.parametrize(("how", "which"), [(train_expert, 3), (train_together, [3, 0])])
def test_a_training_goes_on_from_any_epoch_with_the_same_bits(tmp_path, how, which, changes):
    setup = Setup(**SMALL | dict(epochs=5) | changes)
    whole, told = interrupted(how, setup, which, tmp_path / "whole", [])
    parts, told_again = interrupted(how, setup, which, tmp_path / "parts", [1, 2, 4])
    assert torch.equal(whole, parts)
    for loss, the_same in zip(told, told_again, strict=True):
        assert torch.equal(torch.as_tensor(loss), torch.as_tensor(the_same))
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) == 1


def test_some_of_the_experts_that_were_trained_together_go_on(tmp_path):
    """As when some of them were stored before the process was killed."""
    setup = Setup(**SMALL)
    job = Together(setup, (0, 1, 2))
    whole, _ = interrupted(train_together, setup, [0, 1, 2], tmp_path / "whole", [])
    with pytest.raises(TypeError):  # stopped after its second epoch, and not taken up again
        interrupted(train_together, setup, [0, 1, 2], tmp_path, [2, None], job)
    rest, _ = interrupted(train_together, setup, [2, 0], tmp_path, [], job)
    assert torch.equal(rest, whole[[2, 0]])


def break_file(path, how):
    content = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "bit":
        content[-5] ^= 16
        path.write_bytes(content)
    elif how == "pickle":
        path.write_bytes(pickle.dumps({"theta": 1}))
    elif how == "archive":
        torch.save({"theta": torch.zeros(3)}, path)
    elif how == "foreign":
        save_file({"theta": torch.zeros(4, 3)}, path, {"kind": "other"})


@pytest.mark.parametrize("how", ["truncated", "empty", "bit", "pickle", "archive", "foreign", "another's"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, how):
    setup = Setup(**SMALL)
    interrupted(train_expert, setup, 0, tmp_path, [])
    (path,) = tmp_path.glob("checkpoint-*.safetensors")
    if how == "another's":
        interrupted(train_expert, setup, 1, tmp_path / "other", [])
        shutil.copy(next((tmp_path / "other").glob("checkpoint-*.safetensors")), path)
    else:
        break_file(path, how)
    with pytest.raises(ValueError, match=rf"{path.name} is (damaged|not ours) "):
        interrupted(train_expert, setup, 0, tmp_path, [])
    path.unlink()
    assert len(interrupted(train_expert, setup, 0, tmp_path, [])[0]) == 4


@pytest.mark.parametrize(
    "part, value",
    [
        ("theta", None),
        ("theta", torch.zeros(1, 3)),
        ("velocity", "fast"),
        ("snapshots", []),
        ("losses", [torch.zeros(1)]),
        ("rest", [torch.zeros(1, dtype=torch.int64)]),
        ("generators", [torch.zeros(3, dtype=torch.uint8)]),
        ("generators", []),
        ("seconds", {}),
    ],
)
def test_a_whole_checkpoint_with_a_state_that_is_none_is_refused_by_name(tmp_path, part, value):
    setup = Setup(**SMALL)
    interrupted(train_expert, setup, 0, tmp_path, [])
    kept = Checkpoint(Store(tmp_path), Expert(setup, 0).spec())
    state = kept.read()
    state["training"][part] = value
    kept.offer(lambda: state)
    kept.write()
    with pytest.raises(ValueError, match=r"checkpoint-.*safetensors is damaged \(.*\): delete it, and run again"):
        interrupted(train_expert, setup, 0, tmp_path, [])


def test_seconds_count_every_process_that_worked_on_a_result(tmp_path, monkeypatch):
    """Experts alone and together, and a distillation: stopped on the way, as if 1,000 seconds had been spent."""
    monkeypatch.setattr(checkpoints, "SECONDS", 0.0)
    monkeypatch.setattr(checkpoints, "SHARE", math.inf)
    setup = Setup(**SMALL)
    config = DistillConfig(iterations=4, syn_steps=1, max_start_epoch=1, expert_epochs=1)
    distillation = Distillation(setup, "distnet2", Subset(0, per_class=1), config)
    make(tmp_path / "distilled", setup)
    for job, folder in ((Expert(setup, 0), "one"), (Together(setup, (0, 1)), "two"), (distillation, "distilled")):
        store = Store(tmp_path / folder)

        def stop(done, total, note=""):
            if done == 3:
                raise Killed

        with pytest.raises(Killed):
            job.run(store, stop)
        (path,) = store.folder.glob("checkpoint-*.safetensors")
        spec = job.checkpoint(store).spec if job is distillation else job.spec()
        kept = store.open("checkpoint", spec)
        assert 0 < kept.about["seconds"] < 100
        store.save("checkpoint", spec, kept.read(), kept.about["meta"], 1000.0)
        job.run(store)
        made = job.needs() if isinstance(job, Together) else [job]
        spent = [store.seconds(one.kind, one.spec()) for one in made]
        assert 1000 < sum(spent) < 1100 and not path.exists()


SERVANT = """
import os, random, signal, sys, time
from augdistill_report.files import checkpoints
from augdistill_report.files.store import SealedFile, Store
from augdistill_report.work.experts import Expert
from augdistill_report.work.setup import Setup
import torch
torch.set_num_threads(1)
checkpoints.SECONDS, checkpoints.SHARE = 0.0, float("inf")  # one after every epoch
setup = Setup(**{setup})
Expert(setup, 1).run(Store(sys.argv[1] + "/first"))  # what is imported and loaded once
job = Expert(setup, 0)

def start(folder):
    child = os.fork()
    if child == 0:
        job.file(Store(folder))
        os._exit(0)
    return child

def wait(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

began = time.monotonic()
assert wait(start(sys.argv[1] + "/whole")) == 0
whole, kills, draw, under_way = time.monotonic() - began, 0, random.Random({seed}), set()
while True:
    child = start(sys.argv[1] + "/killed")
    if kills < 8:
        time.sleep(draw.uniform(0, whole / 3))
        os.kill(child, signal.SIGKILL)
    code = wait(child)
    found = [n for _, _, names in os.walk(sys.argv[1] + "/killed") for n in names if n.startswith("checkpoint")]
    for name in found:
        under_way.add(len(SealedFile(sys.argv[1] + "/killed/" + name, "checkpoint").shapes))
    if code == 0:
        break
    assert code == -signal.SIGKILL, code
    kills += 1
two = [start(sys.argv[1] + "/two") for _ in range(2)]
assert [wait(child) for child in two] == [0, 0]
print(kills, len(under_way))
"""


def servant(tmp_path, seed=0, **changes):
    """A process whose children train one expert: undisturbed, killed again and again, and two at once."""
    code = SERVANT.format(setup=repr(SMALL | changes), seed=seed)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


def test_an_expert_that_is_killed_again_and_again_ends_with_the_same_bits(tmp_path):
    kills, under_way = servant(tmp_path, epochs=30, expert_momentum=0.9, expert_augment="dsa")
    assert kills >= 4 and under_way >= 2  # it was hit while it trained, in different epochs
    whole, killed, two = (ExpertFile(in_folder(tmp_path / name)[0]) for name in ("whole", "killed", "two"))
    assert len(whole) == 31
    for other in (killed, two):
        assert same(other, whole)
        other.check()
        # nothing is left but the expert, what is said of it, and the locks
        assert {path.suffix for path in other.path.parent.iterdir()} == {".safetensors", ".json", ".lock"}
        assert len(list(other.path.parent.glob("*.safetensors"))) == 1


def test_a_full_disk_loses_nothing_that_was_finished(made, tmp_path, monkeypatch):
    """The disk fills up in the middle of the second expert, and again when the result is written."""
    fsync, left = os.fsync, [0]

    def full(handle):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr("os.fsync", full)
    monkeypatch.setattr(checkpoints, "SECONDS", 0.0)
    monkeypatch.setattr(checkpoints, "SHARE", math.inf)
    first, second = expert_jobs(SETUP)
    first_writes = SETUP.epochs + 2  # checkpoints, the expert, its .json
    for room in (first_writes + 2, 1, 0):
        left[0] = room
        with pytest.raises(OSError, match=r"No space left on device .*\.safetensors"):
            for job in (first, second):
                job.file(Store(tmp_path))
        assert [ExpertFile(path).about["expert"] for path in in_folder(tmp_path)] == [0]
    left[0] = 100
    assert same(second.file(Store(tmp_path)), second.file(Store(made)))


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_last_good_state(tmp_path):
    setup = Setup(**SMALL | dict(expert_lr=1e30))
    with pytest.raises(ValueError, match=r"expert 1 diverged: its loss is (nan|inf) at step \d+ .*expert_lr=1e\+30"):
        expert_jobs(setup)[1].run(Store(tmp_path))
    assert in_folder(tmp_path) == []
    # one that is led astray in its third epoch
    data, config = SETUP.load(), SETUP
    steps = -(-len(data.train) // config.expert_batch)
    calls = Counter()

    def poison(images, *, generator, **_):
        """Spoils the 45th batch, say, of the expert whose generator came last."""
        calls[generator] += 1
        last = generator is list(calls)[-1]
        return images * (float("nan") if last and calls[generator] == 2 * steps + 5 else 1)

    states = []
    arguments = (SETUP.student(data), data.train.images, data.train.labels, config, 0)
    message = f"expert 4 diverged: its loss is nan at step {2 * steps + 5} .*use a smaller expert_lr"
    with pytest.raises(ValueError, match=message):
        train_expert(*arguments, 4, augment=poison, on_epoch=lambda at: states.append(copy.deepcopy(at.state_dict())))
    good = train_expert(*arguments, 4)
    last = TrainingState.from_state_dict(states[-1], [0], good.shape[1], data.train.images)
    assert torch.equal(last.theta[0], good[2])
    calls.clear()
    with pytest.raises(ValueError, match=message):
        train_together(*arguments, [2, 4], augment=poison)


def test_what_a_killed_process_left_is_removed(folder):
    job = Expert(SETUP, 5)
    path = Store(folder).path(job.kind, job.spec())
    rubbish = path.with_name(f".{path.name}.abcd1234")
    rubbish.write_bytes(b"half")
    job.run(Store(folder))
    assert path.is_file() and not rubbish.exists()
    # killed between the last two steps: the expert is there, its checkpoint too, and nobody has described it
    path.with_suffix(".json").unlink()
    kept = checkpoint_of(job, Store(folder))
    kept.offer(dict)
    kept.write()
    assert kept.there
    job.run(Store(folder))
    assert path.with_suffix(".json").is_file() and not kept.there


# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------


def test_ways_that_are_read_by_the_snapshot_are_those_that_are_read_whole(folder):
    lazy = load_trajectories(SETUP, Store(folder))
    stored = [job.stored(Store(folder))[0] for job in expert_jobs(SETUP)]
    theta = torch.stack([torch.stack([tensors[str(t)] for t in range(4)]) for tensors in stored])
    whole = Trajectories(lazy.student, theta)
    assert torch.equal(lazy.theta, theta) and lazy.snapshots == whole.snapshots == 4
    for segment in [(0, 0, 1), (1, 2, 1), (1, 0, 3)]:
        assert all(map(torch.equal, lazy.segment(*segment), whole.segment(*segment)))
    way = lazy.trajectories[0]
    assert torch.equal(way[-1], theta[0, 3]) and len(list(way)) == 4
    with pytest.raises(IndexError):
        way[4]
    way[0].zero_()  # a copy, never the file
    assert torch.equal(way[0], theta[0, 0])


def test_a_snapshot_that_is_kept_is_read_once(folder):
    file = ExpertFile(in_folder(folder)[0])
    kept = kept_snapshot(file, 1)
    assert torch.equal(kept, file[1]) and kept_snapshot(file, 1) is kept and file[1] is not kept


def test_an_expert_kept_as_float16_comes_back_as_float32(folder):
    setup = dataclasses.replace(SETUP, expert_float="float16")
    way, whole = (load_trajectories(s, Store(folder)).trajectories[0] for s in (setup, SETUP))
    assert way[2].dtype == torch.float32 and torch.equal(way[2], whole[2].half().float())
    assert way.path.stat().st_size < 0.75 * whole.path.stat().st_size
    student, data = SETUP.student(SETUP.load()), SETUP.load()
    assert way.about["validation"] == [accuracy(student, t, data.validation) for t in way]
    with pytest.raises(ValueError, match="expert 7 has parameters that are not finite"):
        snapshot_tensors(torch.full((2, 3), 1e6).half(), 7)


MEASURE = """
import sys
from augdistill_core import Trajectories
from augdistill_report.files.expert_files import ExpertFile

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

def during(work):
    open("/proc/self/clear_refs", "w").write("5")  # VmHWM falls to what is in use now
    before = peak()
    kept = work()
    return peak() - before

small, large = (ExpertFile(path) for path in sys.argv[1:])
Trajectories(None, [small, small]).segment(0, 0, 1)  # what is loaded and set up once
experts = Trajectories(None, [large])
print(during(lambda: experts.segment(0, 20, 2)), during(lambda: experts.theta))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="measures by Linux's /proc")
def test_a_segment_of_a_long_expert_takes_little_memory(folder, tmp_path):
    """A 50-epoch CIFAR-10 expert of the recipe: 51 x 320,010 parameters, 65 MB.

    Measured is the peak of the resident set in a process of its own: it counts what is allocated and every page of a
    mapped file that is touched. Reading all of it is the control.
    """
    theta = torch.arange(320010.0).repeat(51, 1) + torch.arange(51.0)[:, None]
    about = ExpertFile(in_folder(folder)[0])
    Store(tmp_path).save("expert", about.spec, snapshot_tensors(theta, 0), about.about | {"validation": [0.5] * 51})
    code = [sys.executable, "-c", MEASURE, in_folder(folder)[0], in_folder(tmp_path)[0]]
    done = subprocess.run(code, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    segment, whole = map(int, done.stdout.split())
    both = 2 * 4 * 320010  # the two snapshots
    assert both * 0.9 < segment < both + 10e6
    assert whole > 51 * 4 * 320010


DAMAGE = ["truncated", "empty", "bit", "pickle", "archive", "foreign", "another's", "not finite", "cut header"]


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_expert_is_named_by_check_and_by_a_run(folder, how, capsys):
    path, other = (Store(folder).path(job.kind, job.spec()) for job in expert_jobs(SETUP))
    if how == "another's":
        shutil.copy(other, path)
    elif how == "not finite":  # as another program might write it, its digests right
        file = ExpertFile(path)
        tensors = file.file.read()
        tensors["2"][7] = float("nan")
        Store(folder).save("expert", file.spec, tensors, file.about)
        path.with_suffix(".json").unlink()
    elif how == "cut header":
        path.write_bytes(path.read_bytes()[:100])
    else:
        break_file(path, how)
    assert cli.main(["experts", "check", str(folder)]) == 1
    said = capsys.readouterr().out
    assert path.name in said and "2 checked, 1 damaged" in said and other.stem not in said.split("experts:")[0]
    subset = Subset(0, per_class=1)
    distillation = Distillation(SETUP, "identity", subset, DistillConfig(iterations=12, syn_steps=1, max_start_epoch=1))
    with pytest.raises(ValueError, match=path.name):
        distillation.run(Store(folder))


def test_no_flipped_bit_goes_unseen(folder):
    path = in_folder(folder)[0]
    content = path.read_bytes()
    right = ExpertFile(path)
    meant, snapshots = (right.spec, right.about), list(right)
    generator = torch.Generator().manual_seed(0)
    header = int.from_bytes(content[:8], "little") + 8
    places = [*range(8), *torch.randint(8, header, (150,), generator=generator).tolist()]
    places += torch.randint(header, len(content), (50,), generator=generator).tolist()
    unseen = 0
    for place in places:
        broken = bytearray(content)
        broken[place] ^= 1 << int(torch.randint(8, (), generator=generator))
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=path.stem):
            ExpertFile(path).check()
        try:  # a run reads no .json: what it takes must mean the same
            now = ExpertFile(path)
            assert (now.spec, now.about) == meant and all(map(torch.equal, now, snapshots))
            unseen += 1
        except ValueError as error:
            assert path.name in str(error)
    assert unseen < 25  # in what says nothing of the expert: spaces, and the checksum of the whole, which `check` reads


def test_json_says_what_an_expert_is_and_check_compares_it(folder):
    path = in_folder(folder)[0]
    said = json.loads(path.with_suffix(".json").read_text())
    student = SETUP.student(SETUP.load())
    assert said["file"] == path.name and said["dataset"] == "digits" and said["fingerprint"] == SETUP.load().fingerprint
    assert (
        said["setup"]["epochs"] == 3 and said["setup"]["seed"] == 0 and said["versions"]["torch"] == torch.__version__
    )
    assert said["parameters"] == sum(p.numel() for p in student.parameters()) and said["snapshots"] == 4
    assert len(said["loss"]) == 3 and len(said["validation"]) == 4 and said["float"] == "float32"
    assert said["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    for wrong in (json.dumps(said | {"expert": 9}), "{", "[" * 10**5, json.dumps(said | {"snapshots": 4.0}, indent=1)):
        path.with_suffix(".json").write_text(wrong)
        with pytest.raises(ValueError, match=r"json does not describe"):
            ExpertFile(path).check()


def test_train_list_and_check(tmp_path, capsys, monkeypatch):
    arguments = ["--preset", "smoke", "--out", str(tmp_path / "run")]
    sets = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    sets += ["--set", "max_start_epoch=1"]
    assert cli.main(["experts", "list", *arguments]) == 2
    assert "artefacts: must be an expert's file, or a folder that holds some" in capsys.readouterr().err
    assert cli.main(["experts", "train", *arguments, *sets]) == 0
    first = capsys.readouterr().out
    assert "digits" in first and str(tmp_path / "run" / "artefacts") in first
    before = [path.stat().st_mtime_ns for path in in_folder(tmp_path / "run" / "artefacts")]
    assert cli.main(["experts", "train", *arguments, *sets]) == 0
    assert [path.stat().st_mtime_ns for path in in_folder(tmp_path / "run" / "artefacts")] == before and len(
        before
    ) == 2
    capsys.readouterr()
    assert cli.main(["experts", "list", *arguments]) == 0
    assert capsys.readouterr().out == first
    rows = first.splitlines()
    file = ExpertFile(in_folder(tmp_path / "run" / "artefacts")[0])
    row = next(row for row in rows if file.path.name in row).split()
    assert row[3:5] == ["3", "4"] and row[5] == f"{100 * file.about['validation'][-1]:.1f}" and row[-1] == "float32"
    assert cli.main(["experts", "check", *arguments]) == 0
    assert cli.main(["experts", "check", str(file.path)]) == 0
    assert cli.main(["experts", "check", str(tmp_path / "none.safetensors")]) == 2
    assert "none.safetensors" in capsys.readouterr().err
    assert cli.main(["experts", "train", *arguments, "--set", "epochs=0"]) == 2


# ----------------------------------------------------------------------------------------------------------------------
# Experts from elsewhere
# ----------------------------------------------------------------------------------------------------------------------


def official(channels, classes, size, width, depth):
    """The published ConvNet, as its layers follow each other."""
    layers, side = [], size
    for block in range(depth):
        layers += [nn.Conv2d(channels if block == 0 else width, width, 3, padding=1)]
        layers += [nn.GroupNorm(width, width), nn.ReLU(), nn.AvgPool2d(2)]
        side //= 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * side * side, classes))


def buffer(count=2, epochs=3, width=4, depth=1, seed=0):
    """What the official code would save (experts, of snapshots, of parameters), and the models as they end."""
    data, experts, ends = SETUP.load(), [], []
    for k in range(count):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + k)
            model = official(1, 10, 8, width, depth)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        snapshots = [[p.detach().clone() for p in model.parameters()]]
        for _ in range(epochs):
            for split in data.train.batches(64):
                optimizer.zero_grad()
                F.cross_entropy(model(split.images), split.labels).backward()
                optimizer.step()
            snapshots.append([p.detach().clone() for p in model.parameters()])
        experts.append(snapshots)
        ends.append(model)
    return experts, ends


def settings_of(changes):
    return [word for key, value in (SMALL | changes).items() for word in ("--set", f"{key}={value}")]


def bring(files, out, **changes):
    return cli.main(
        ["experts", "import", *map(str, files), "--preset", "smoke", "--out", str(out), *settings_of(changes)]
    )


@pytest.fixture(scope="module")
def published():
    return buffer()


@pytest.mark.parametrize("zipped", [True, False])
def test_official_experts_are_imported(tmp_path, published, zipped, capsys):
    experts, ends = published
    path = tmp_path / "replay_buffer_0.pt"
    torch.save(experts, path, _use_new_zipfile_serialization=zipped)
    assert bring([path], tmp_path / "own") == 0
    assert "digits" in capsys.readouterr().out
    data = SETUP.load()
    files = sorted((ExpertFile(p) for p in in_folder(tmp_path / "own")), key=lambda f: f.about["expert"])
    assert [file.about["expert"] for file in files] == [0, 1]
    for file, snapshots, model in zip(files, experts, ends, strict=True):
        file.check()
        assert torch.equal(file[1], parameters_to_vector(snapshots[1]))
        x = data.test.opened().images
        student = SETUP.student(data)
        torch.testing.assert_close(logits_of(student, unflatten(student, file[-1]), x), model(x), rtol=1e-4, atol=1e-5)
        right = (model(data.validation.images).argmax(1) == data.validation.labels).float().mean().item()
        assert file.about["validation"][-1] == pytest.approx(right)
    # again: they are there; another file's go on from their numbers
    assert bring([path], tmp_path / "own") == 0
    assert len(in_folder(tmp_path / "own")) == 2
    torch.save(buffer(1, seed=5)[0], tmp_path / "replay_buffer_1.pt")
    assert bring([tmp_path / "replay_buffer_1.pt"], tmp_path / "own", expert_float="float16") == 0
    assert sorted(ExpertFile(p).about["expert"] for p in in_folder(tmp_path / "own")) == [0, 1, 2]


class Trap:
    def __reduce__(self):
        return print, ("sprung",)


def spoiled(experts, how):
    experts = copy.deepcopy(experts)
    if how == "missing":
        experts[1][2].pop()
    elif how == "order":
        experts[1][0][2], experts[1][0][4] = experts[1][0][4], experts[1][0][2]
    elif how == "one":
        experts = [[experts[0][0]]]
    elif how == "flat":
        experts = experts[0]
    elif how == "tensor":
        experts = torch.zeros(3)
    elif how == "aliases":
        experts = [[experts[0][3]] * 4]
    elif how == "nan":
        experts[0][1][0][0] = float("nan")
    elif how == "code":
        experts[0][0].append(Trap())
    return experts


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"expert 1: snapshot 2: holds 5 parameters, must be 6"),
        ("order", r"expert 1: snapshot 0: parameter 2 \(features.1.weight\) is \(10, 64\), must be \(4,\)"),
        ("one", "expert 0: must be a list of at least two snapshots"),
        ("flat", "expert 0: snapshot 0: must be a list of tensors"),
        ("tensor", "must be a list of experts"),
        ("aliases", "expert 0: ends where it starts"),
        ("nan", "expert 0: expert 0 has parameters that are not finite"),
        ("code", "holds more than tensors"),
    ],
)
def test_an_official_file_that_does_not_fit_is_refused(tmp_path, published, how, message, capsys):
    path = tmp_path / "replay_buffer_0.pt"
    torch.save(spoiled(published[0], how), path)
    assert bring([path], tmp_path / "own") == 2
    said = capsys.readouterr()
    assert "sprung" not in said.out
    assert str(path) in said.err and re.search(message, said.err), said.err


def test_an_official_file_for_another_student_names_the_parameter(tmp_path, published, capsys):
    path = tmp_path / "replay_buffer_0.pt"
    torch.save(published[0], path)
    assert bring([path], tmp_path / "own", width=6) == 2
    said = capsys.readouterr().err
    assert "parameter 0 (features.0.weight) is (4, 1, 3, 3), must be (6, 1, 3, 3)" in said and "width=6" in said
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "missing"])
def test_a_damaged_official_file_is_refused(tmp_path, published, how, capsys):
    path = tmp_path / "replay_buffer_0.pt"
    torch.save(published[0], path)
    content = path.read_bytes()
    changed = {"truncated": content[: len(content) // 2], "empty": b"", "text": b"hello there"}
    path.unlink() if how == "missing" else path.write_bytes(changed[how])
    assert bring([path], tmp_path / "own") == 2
    assert str(path) in capsys.readouterr().err


def given(folder, **changes) -> Setup:
    return Setup(**SMALL | dict(expert_files=str(folder)) | changes)


def test_a_run_takes_experts_from_a_folder(folder, tmp_path, monkeypatch):
    setup, own = given(folder), Store(tmp_path / "own")
    assert missing_experts(setup) == []
    experts = load_trajectories(setup, own)
    assert torch.equal(experts.theta, load_trajectories(SETUP, Store(folder)).theta)
    assert not own.folder.exists()  # nothing is trained, nothing copied
    config, subset = DistillConfig(iterations=2, syn_steps=1, max_start_epoch=1), Subset(0, per_class=1)

    def spec(setup):
        return Distillation(setup, "identity", subset, config).spec()

    # the content counts, not the place, nor the file's name
    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere")
    assert spec(given(elsewhere)) == spec(setup) != spec(SETUP)
    assert str(folder) not in json.dumps(spec(setup))
    for path in in_folder(elsewhere):
        path.unlink()
    make(elsewhere, dataclasses.replace(SETUP, seed=1))
    assert spec(given(elsewhere, threads=1, seed=0, expert_lr=0.02)) == spec(setup)  # opened once a process
    other = shutil.copytree(elsewhere, tmp_path / "other")
    assert spec(given(other)) != spec(setup)
    soft = Evaluation(setup, subset, EvalConfig(eval_students=2, eval_steps=2, eval_labels="soft"))
    assert len(soft.stored(own)[1]["validation"]) == 2


def test_a_folder_of_experts_that_do_not_fit_is_refused_by_name(folder, tmp_path):
    some = in_folder(folder)[0].name
    cases = {
        r"made with width 4, this run has 5": dict(width=5),
        r"made with depth 1, this run has 2": dict(depth=2),
        "made with the data's fingerprint .*, this run has": dict(size=16),
        "made with expert_augment none, this run has affine": dict(expert_augment="affine"),
        "made with expert_lr .*, this run has 0.5": dict(expert_lr=0.5),
    }
    for message, changes in cases.items():
        with pytest.raises(ValueError, match=f"expert-.*{message}"):
            load_trajectories(given(folder, **changes), Store(tmp_path))
    with pytest.raises(ValueError, match=r"has 2 files .* but experts=3"):
        load_trajectories(given(folder, experts=3), Store(tmp_path))
    make(folder, dataclasses.replace(SETUP, epochs=SETUP.epochs + 1))  # the same experts, trained for longer
    with pytest.raises(
        ValueError, match=r"expert-\w+.safetensors and expert-\w+.safetensors are both expert 0 of seed 0"
    ):
        load_trajectories(given(folder, threads=2), Store(tmp_path))
    with pytest.raises(ValueError, match="has 0 files"):
        load_trajectories(given(tmp_path), Store(tmp_path))
    break_file(folder / some, "truncated")
    with pytest.raises(ValueError, match=some):
        load_trajectories(given(folder, seed=3), Store(tmp_path))


def test_settings_with_a_folder_of_experts(folder):
    own = SMALL | dict(expert_files=str(folder), expert_batch=SETUP.expert_batch)
    settings = resolve("smoke", own | dict(max_start_epoch=2, policy_max_start_epoch=0))
    preflight(settings)
    assert settings.snapshots() == 3 and str(folder) not in json.dumps(settings.public())
    assert settings.public()["expert_files"] == folder.name
    short = resolve("smoke", own | dict(epochs=30, max_start_epoch=9))
    with pytest.raises(ValueError, match="max_start_epoch=9: the experts' 3 snapshots"):
        preflight(short)
    assert Settings.from_dict({}).public()["expert_files"] == ""
    assert str(folder.parent) not in json.dumps(settings.select(Setup).public())
    assert Repetition(settings).setup("affine").expert_files == ""  # what experts are taught is its subject
