"""Distillation survives: killed anywhere, it goes on from its last checkpoint and ends with the bits of an undisturbed
run; what is damaged is named and not used; a full disk and a budget of minutes lose nothing.
"""

import contextlib
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from augdistill_core import ConvNet, DistillConfig, ExpertConfig, Phi, Stop, distill, diverged, make_phi, train_experts
from augdistill_report.files import checkpoints
from augdistill_report.files.checkpoints import packed, unpacked
from augdistill_report.files.store import Store
from augdistill_report.work.distillation import Distillation
from augdistill_report.work.experts import expert_jobs
from augdistill_report.work.jobs import Subset
from augdistill_report.work.provenance import SOURCES
from augdistill_report.work.scoring import EvalConfig, Evaluation
from augdistill_report.work.setup import Setup

# ----------------------------------------------------------------------------------------------------------------------
# The core: a run that goes on from a state, in every mode
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world():
    """Images `[12, 1, 8, 8]` of three classes, labels, and two experts of four epochs, all float32."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(12) % 3
    images = torch.randn(3, 1, 8, 8, generator=generator)[labels] + torch.randn(12, 1, 8, 8, generator=generator)
    config = ExpertConfig(experts=2, epochs=4, expert_lr=0.1, expert_batch=4)
    return images, labels, train_experts(ConvNet(1, 3, 8, width=4, depth=1), images, labels, config, 0)


class Normed(Phi):
    """Its running mean and its count of batches are buffers that every call changes."""

    stochastic = True

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(1, momentum=0.3)
        self.spread = nn.Parameter(torch.tensor(0.1))

    def forward(self, images, *, generator, **_):
        return images + 0.1 * self.norm(images) + self.spread * torch.randn(images.shape, generator=generator)


class Stopped(Exception):
    pass


def run(world, phi, iterations=5, *, stop=None, resume=None, seed=0, **changes):
    """(result, phi's tensors, the last state): as far as `stop`, where `on_iteration` raises."""
    images, labels, experts = world
    defaults = dict(syn_steps=3, expert_epochs=1, max_start_epoch=3, iterations=iterations, real_batch=4)
    model, states, result = phi(images) if callable(phi) else make_phi(phi, images, 3, 0), [], None

    def on_iteration(record):
        if record["iteration"] == stop:
            raise Stopped

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = distill(
                model,
                images,
                labels,
                experts,
                DistillConfig(**defaults | changes),
                seed=seed,
                augment=lambda x, *, generator, **_: x + 0.1 * torch.randn(x.shape, generator=generator),
                real=(images, labels),
                on_iteration=on_iteration,
                on_step=lambda state: states.append(state()),
                resume=resume,
            )
        except Stopped:
            assert stop is not None
    return result, model.state_dict(), states[-1] if states else None


def through_json(state: dict) -> dict:
    """A state as it comes back from a file."""
    tensors, plain = packed(state)
    return unpacked(tensors, json.loads(json.dumps(plain)))


def same(one, other) -> bool:
    """Equal, bit for bit: nested lists and dictionaries of tensors and plain values (a NaN is itself)."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and (one == other or (one != one and other != other))


def outcome(found) -> list:
    result, tensors, _ = found
    return [result.alpha, result.history, result.stopped, dict(tensors)]


MODES = {
    "as it is": ("unet_noise", dict()),
    "two draws, small batches": ("unet_noise", dict(draws=2, batch_syn=5)),
    "episodes": ("distnet2", dict(episode=2, batch_syn=4)),
    "noise once": ("unet_noise", dict(noise="once", draws=2)),
    "replayed": ("distnet2", dict(memory="replay")),
    "pixels, MTT's own": (
        "pixels",
        dict(phi_optimizer="SGD", phi_lr=10.0, phi_momentum=0.5, alpha_mode="raw", alpha_optimizer="SGD")
        | dict(alpha_lr=1e-4, alpha_momentum=0.5),
    ),
    "real loss": ("unet_noise", dict(objective="real_loss", draws=2)),
    "alpha held": ("pixels", dict(alpha_mode="held", alpha=0.22, phi_lr=0.3)),  # in one iteration of the five
    "alpha fixed": ("unet_noise", dict(alpha_mode="fixed")),
    "identity": ("identity", dict()),
    "a policy, which reports": ("policy", dict(phi_lr=0.1)),
    "buffers": (lambda images: Normed(), dict()),
    "explodes": ("distnet2", dict(phi_optimizer="SGD", phi_lr=700.0)),
    "alpha explodes": ("distnet2", dict(alpha_mode="raw", alpha_optimizer="SGD", alpha_momentum=0.9, alpha_lr=0.1)),
}
OPTIMIZERS = ("Adadelta", "Adafactor", "Adagrad", "Adam", "ASGD", "NAdam", "RMSprop", "Rprop")
MODES |= {kind: ("distnet2", dict(phi_optimizer=kind, alpha_optimizer=kind)) for kind in OPTIMIZERS}
MODES = {name: mode for name, mode in MODES.items() if hasattr(torch.optim, mode[1].get("phi_optimizer", "Adam"))}


@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_was_stopped_ends_with_the_bits_of_one_that_was_not(world, mode, rng_untouched):
    phi, changes = MODES[mode]
    with rng_untouched():
        undisturbed = run(world, phi, **changes)
        length = len(undisturbed[0].history)
        assert (length < 5) == ("explodes" in mode) == diverged(undisturbed[0].stopped) and length > 1
        for stop in {1, length - 1}:
            state = through_json(run(world, phi, stop=stop, **changes)[2])
            assert len(state["history"]) == stop
            again = run(world, phi, resume=state, **changes)
            assert same(outcome(again), outcome(undisturbed))
    alphas = [r["alpha"] for r in undisturbed[0].history]
    assert len(set(alphas)) == {"fixed": 1, "held": 4}.get(changes.get("alpha_mode"), length)


def test_a_run_that_is_stopped_again_and_again(world):
    state = None
    for stop in (1, 2, 4):
        state = run(world, "unet_noise", stop=stop, resume=state)[2]
    for _ in range(2):  # nor does going on change a state
        assert same(outcome(run(world, "unet_noise", resume=state)), outcome(run(world, "unet_noise")))


def test_a_state_after_the_last_step_gives_the_result_at_once(world):
    undisturbed = run(world, "unet_noise")
    again = run(world, "unet_noise", resume=undisturbed[2])
    assert same(outcome(again), outcome(undisturbed)) and again[2] is None
    # what only a look after the last step finds, it finds again
    far = dict(iterations=1, phi_optimizer="SGD", phi_lr=1e8)
    undisturbed = run(world, "distnet2", **far)
    assert undisturbed[0].stopped.reason.startswith("diverged in the last step") and len(undisturbed[0].history) == 1
    assert same(outcome(run(world, "distnet2", resume=undisturbed[2], **far)), outcome(undisturbed))


@pytest.mark.parametrize("part", ["phi", "step_size", "optimizers", "generators", "good"])
def test_every_part_of_a_state_counts(world, part):
    """With one part as it was a step before, the run ends elsewhere: so the comparison above can see it."""
    mode = MODES["explodes"] if part == "good" else MODES["as it is"]
    stop = len(run(world, mode[0], **mode[1])[0].history) - 1
    before, state = (run(world, mode[0], stop=k, **mode[1])[2] for k in (stop - 1, stop))
    parts = [{part: before[part]}]
    if part == "generators":  # each of the two
        parts = [{part: [before[part][0], state[part][1]]}, {part: [state[part][0], before[part][1]]}]
    for change in parts:
        assert not same(
            outcome(run(world, mode[0], resume=state | change, **mode[1])), outcome(run(world, mode[0], **mode[1]))
        )


def test_a_state_is_a_copy(world):
    states = []
    images, labels, experts = world
    config = DistillConfig(iterations=3, syn_steps=2, max_start_epoch=3, expert_epochs=1)
    options = dict(seed=0, on_step=lambda state: states.append((state(), packed(state()))))
    distill(make_phi("unet_noise", images, 3, 0), images, labels, experts, config, **options)
    assert all(same(packed(state)[0], tensors) for state, (tensors, _) in states)
    assert not same(states[0][0]["phi"], states[1][0]["phi"])


@pytest.mark.parametrize("change", ["another phi", "another optimizer", "no state at all"])
def test_a_state_that_does_not_fit_is_refused(world, change):
    state = run(world, "unet_noise", stop=2)[2]
    phi = "distnet2" if change == "another phi" else "unet_noise"
    changes = dict(alpha_mode="fixed") if change == "another optimizer" else {}
    with pytest.raises(ValueError, match="resume: not a state of this phi"):
        run(world, phi, resume={"phi": {}} if change == "no state at all" else state, **changes)


# ----------------------------------------------------------------------------------------------------------------------
# A budget of minutes
# ----------------------------------------------------------------------------------------------------------------------


def test_minutes_stop_after_the_iteration_under_way_and_more_of_them_go_on(world):
    undisturbed = run(world, "unet_noise")
    short = run(world, "unet_noise", minutes=1e-6)
    assert short[0].stopped == Stop("minutes", "the time limit minutes=1e-06 was reached at iteration 1 of 5")
    assert not diverged(short[0].stopped)
    assert same(short[0].history, undisturbed[0].history[:1])
    assert same(short[2]["phi"], dict(short[1]))  # what it returns is where it goes on from
    for more in (0, 60):
        again = run(world, "unet_noise", resume=through_json(short[2]), minutes=more)
        assert same(outcome(again), outcome(undisturbed))
    again = run(world, "unet_noise", resume=short[2], minutes=1e-6)  # with no more of them, it is there
    assert same(outcome(again), outcome(short)) and again[2] is None


def test_minutes_count_what_came_before(world):
    state = run(world, "unet_noise", stop=2)[2]
    assert 0 < state["seconds"] < 60
    spent = run(world, "unet_noise", resume=state | {"seconds": 6.0}, minutes=0.1)
    assert spent[0].stopped == Stop("minutes", "the time limit minutes=0.1 was reached at iteration 2 of 5")
    left = run(world, "unet_noise", resume=state | {"seconds": 6.0}, minutes=60)
    assert left[0].stopped is None and left[2]["seconds"] > 6


def test_a_run_that_ends_in_time_is_not_stopped(world):
    assert run(world, "unet_noise", iterations=1, minutes=1e-6)[0].stopped is None


# ----------------------------------------------------------------------------------------------------------------------
# Losses that explode say which step size it was
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "phi, changes, says",
    [
        ("distnet2", dict(phi_optimizer="SGD", phi_lr=1e4), r"\(SGD, phi_lr=10000, .*\); use a smaller phi_lr"),
        (
            "identity",
            dict(alpha_mode="raw", alpha_optimizer="SGD", alpha_lr=1e9),
            r"alpha=\S+ by SGD, alpha_lr=1e\+09\); alpha diverged: use a smaller alpha_lr, or alpha_mode fixed",
        ),
        ("identity", dict(alpha_mode="fixed", alpha=1e9), r"loss \S+, .*alpha=1e\+09\); use a smaller alpha, or"),
        ("identity", dict(alpha_mode="fixed", alpha=1e38), r"loss nan, .*alpha=1e\+38\); use a smaller alpha, or"),
    ],
)
def test_an_explosion_names_its_iteration_its_setting_and_what_to_try(world, phi, changes, says):
    result, tensors, _ = run(world, phi, **changes)
    last = result.history[-1]["iteration"]
    assert result.stopped.kind == "diverged" and str(result.stopped).startswith(f"diverged at iteration {last}: ")
    assert re.search(says, str(result.stopped)), result.stopped
    assert math.isfinite(result.alpha) and all(t.isfinite().all() for t in tensors.values())
    if last:
        assert result.alpha == result.history[last - 1]["alpha"]
        assert same(
            dict(tensors), run(world, phi, iterations=last - 1, **changes)[2]["phi"] if last > 1 else dict(tensors)
        )


# ----------------------------------------------------------------------------------------------------------------------
# The job, in processes of its own
# ----------------------------------------------------------------------------------------------------------------------

SETUP = Setup(size=8, width=4, depth=1, experts=2, epochs=3)
CONFIG = DistillConfig(iterations=70, syn_steps=2, expert_epochs=1, max_start_epoch=2)
JOB = Distillation(SETUP, "distnet2", Subset(0, per_class=1), CONFIG)


def with_config(**changes) -> Distillation:
    return Distillation(SETUP, JOB.phi, JOB.subset, DistillConfig(**CONFIG.to_dict() | changes))


def often() -> None:
    """A checkpoint after every step."""
    checkpoints.SECONDS, checkpoints.SHARE = 0.0, math.inf


def working(folder: Path) -> Path:
    """The file that holds the id of the process that works in this store."""
    return folder.with_name(f"{folder.name}.pid")


def make(folder: Path) -> None:
    torch.set_num_threads(1)
    often()
    JOB.run(Store(folder), lambda *_: working(folder).write_text(str(os.getpid())))


def make_small_files(folder: Path, largest: int) -> None:
    """The same where no file may hold more bytes than that; what is said of it goes to a file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
    try:
        make(folder)
    except OSError as error:
        (folder / "said.txt").write_text(str(error))


def start(target, *arguments) -> multiprocessing.Process:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["augdistill_report.work.experts", "sklearn.datasets", "pytest"]
    )  # a process in no time
    process = context.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def kill(process) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.join()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Store:
    """A store with the undisturbed result."""
    store = Store(tmp_path_factory.mktemp("undisturbed"))
    JOB.run(store)
    return store


@pytest.fixture
def store(finished, tmp_path) -> Store:
    """A store with the experts alone."""
    for file in finished.folder.glob("expert-*"):
        shutil.copy(file, tmp_path)
    return Store(tmp_path)


@pytest.fixture(scope="module")
def interrupted(finished) -> Path:
    """The checkpoint of the job, which was stopped in iteration 50."""

    def stop(done, total, note=""):
        if done == 51:
            raise Stopped

    store, path = Store(finished.folder / "interrupted"), None
    for file in finished.folder.glob("expert-*"):
        store.folder.mkdir(exist_ok=True)
        shutil.copy(file, store.folder)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(checkpoints, "SECONDS", 0.0)
        patch.setattr(checkpoints, "SHARE", math.inf)
        JOB.run(store, stop)
    (path,) = store.folder.glob("checkpoint-*.safetensors")
    return path


@pytest.fixture
def begun(store, interrupted) -> Store:
    """A store with the experts and the checkpoint."""
    shutil.copy(interrupted, store.folder)
    return store


def progress(store: Store, job=JOB) -> int:
    found = job.checkpoint(store).read()
    return len(found["run"]["history"]) if found else 0


def wait_for_a_checkpoint(store: Store, *processes) -> None:
    """Until one that is new is there, or a process has ended."""
    path = store.path(checkpoints.CHECKPOINT, JOB.checkpoint(store).spec)
    before = path.stat().st_mtime_ns if path.exists() else None
    with contextlib.suppress(FileNotFoundError):
        while all(p.is_alive() for p in processes) and (not path.exists() or path.stat().st_mtime_ns == before):
            time.sleep(0.002)


def left_over(store: Store) -> list[str]:
    """Files in a store that are neither a result, nor what an expert's .json says of one, nor a lock."""
    return [p.name for p in store.folder.iterdir() if p.suffix not in (".safetensors", ".json", ".lock")]


def ended_well(store: Store, finished: Store) -> None:
    assert same(JOB.stored(store)[0], JOB.stored(finished)[0]) and same(JOB.stored(store)[1], JOB.stored(finished)[1])
    assert not JOB.checkpoint(store).read() and not left_over(store)
    assert [p.name for p in store.folder.glob("*.safetensors") if p.name.startswith(("distilled", "check"))] == [
        store.path(JOB.kind, JOB.spec()).name
    ]


def test_killed_at_random_moments_it_ends_with_the_same_bits(store, finished):
    moments, kills, path = random.Random(), [], store.path(JOB.kind, JOB.spec())
    while not path.exists() and len(kills) < 3:
        process = start(make, store.folder)
        wait_for_a_checkpoint(store, process)
        time.sleep(moments.uniform(0, 0.15))
        kill(process)
        if not path.exists():
            kills.append(progress(store))
    assert kills and kills[0] > 0 and kills == sorted(set(kills))  # each goes on where the one before was
    process = start(make, store.folder)
    process.join(60)
    assert process.exitcode == 0
    ended_well(store, finished)


def test_phi_along_the_way_survives(begun, finished):
    assert progress(begun) == 50
    seen = []
    JOB.run(begun, lambda done, total, note="": seen.append(done))
    assert seen[0] == 51
    way, other = (JOB.stored_moments(s) for s in (begun, finished))
    assert list(way) == ["0", "1", "2", "4", "8", "16", "32", "64", "last"]
    assert all(same(dict(way[k].state_dict()), dict(other[k].state_dict())) for k in way)
    ended_well(begun, finished)


def test_two_processes_with_one_distillation_and_one_of_them_killed(store, finished):
    processes = [start(make, store.folder) for _ in range(2)]
    wait_for_a_checkpoint(store, *processes)
    worker = int(working(store.folder).read_text())
    processes.sort(key=lambda process: process.pid != worker)
    assert processes[0].pid == worker
    kill(processes[0])
    processes[1].join(60)  # it waited for the other
    assert processes[1].exitcode == 0 and int(working(store.folder).read_text()) == processes[1].pid
    ended_well(store, finished)


def test_a_checkpoint_is_written_now_and_then(store, monkeypatch):
    """By default a short run writes none; no more often than its share of the time allows."""
    written = []
    monkeypatch.setattr(Store, "save", lambda self, kind, *_: written.append(kind) or time.sleep(0.02))
    of_job = JOB.checkpoint(store)
    for _ in range(3):
        of_job.offer(dict)
    assert not written
    monkeypatch.setattr(checkpoints, "SECONDS", 0.0)
    of_job, begin = JOB.checkpoint(store), time.monotonic()
    while time.monotonic() < begin + 0.5:
        of_job.offer(dict)
    assert written == ["checkpoint"]


# --- what may not be used ---------------------------------------------------------------------------------------------


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    middle = len(content) - len(content) // 4  # among the tensors
    changed = {
        "truncated": content[: len(content) // 2],
        "a byte short": content[:-1],
        "empty": b"",
        "header": content[:8] + b"#" + content[9:],
        "a bit": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "a longer one": content + b"\0",
        "a pickle": pickle.dumps({"run": 1}),
        "text": b"not a checkpoint",
    }
    if how in changed:
        path.write_bytes(changed[how])
    elif how == "torch.save":
        torch.save({"run": 1}, path)
    elif how == "another's":  # a whole file, of another specification
        other = with_config(iterations=9).checkpoint(Store(path.parent))
        other.offer(lambda: {"run": {}, "way": {}})
        other.write()
        other.store.path(checkpoints.CHECKPOINT, other.spec).replace(path)
    else:  # a result in its place
        shutil.copy(next(path.parent.glob("expert-*.safetensors")), path)


KINDS = ["truncated", "a byte short", "empty", "header", "a bit", "a longer one", "a pickle", "text", "torch.save"]


@pytest.mark.parametrize("how", [*KINDS, "another's", "an expert"])
def test_a_damaged_or_foreign_checkpoint_is_named_and_not_used(begun, how):
    path = begun.path(checkpoints.CHECKPOINT, JOB.checkpoint(begun).spec)
    damage(path, how)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=path.name) as caught:
        JOB.run(begun)
    assert ("is not ours" if how in ("another's", "an expert") else "delete it, and run again") in str(caught.value)
    assert "pickle" in str(caught.value) or how not in ("a pickle", "torch.save")
    assert not begun.has(JOB.kind, JOB.spec()) and path.read_bytes() == before


def test_without_the_damaged_checkpoint_it_starts_anew(begun, finished):
    path = begun.path(checkpoints.CHECKPOINT, JOB.checkpoint(begun).spec)
    damage(path, "truncated")
    with pytest.raises(ValueError, match=path.name):
        JOB.run(begun)
    path.unlink()
    JOB.run(begun)
    ended_well(begun, finished)


@pytest.mark.parametrize("kind", ["checkpoint", "distilled"])
def test_no_flipped_bit_goes_unseen(begun, finished, kind):
    """Wherever it is: the file is refused by name, or (in a part that means nothing) is read as it was written."""
    source, spec = (begun, JOB.checkpoint(begun).spec) if kind == "checkpoint" else (finished, JOB.spec())
    path, whole = source.path(kind, spec), source.load(kind, spec)
    content, places, refused = path.read_bytes(), random.Random(0), 0
    spots = [*range(0, 600, 9), *(places.randrange(len(content)) for _ in range(80))]
    try:
        for spot in spots:
            path.write_bytes(content[:spot] + bytes([content[spot] ^ 1 << places.randrange(8)]) + content[spot + 1 :])
            try:
                assert same(list(source.load(kind, spec)), list(whole))
            except ValueError as error:
                assert path.name in str(error)
                refused += 1
    finally:
        path.write_bytes(content)
    assert refused > 0.9 * len(spots)


def test_the_checkpoint_of_other_settings_or_other_code_is_not_found(begun, monkeypatch):
    others = [with_config(iterations=71), with_config(phi_lr=2e-3)]
    others += [Distillation(SETUP, "unet", JOB.subset, CONFIG), Distillation(SETUP, JOB.phi, Subset(1, 1), CONFIG)]
    for other in others:
        assert other.checkpoint(begun).read() is None
    assert with_config(minutes=5).checkpoint(begun).read() is not None
    monkeypatch.setattr(SOURCES, "digest", lambda *modules: "of another version")
    assert JOB.checkpoint(begun).read() is None


# --- a budget ---------------------------------------------------------------------------------------------------------


def test_a_budget_leaves_a_valid_result_and_a_checkpoint_to_go_on_from(store, finished):
    short = with_config(minutes=1e-6)
    short.run(store)
    result = short.stored_phi(store)
    assert (
        str(result.stopped) == "the time limit minutes=1e-06 was reached at iteration 1 of 70"
        and len(result.history) == 1
    )
    assert progress(store) == 1
    scored = Evaluation(SETUP, JOB.subset, EvalConfig(eval_students=2, eval_steps=4), short).stored(store)[1]
    assert len(scored["validation"]) == 2
    seen = []
    JOB.run(store, lambda done, *_: seen.append(done))
    assert seen[0] == 2  # it does not start anew
    assert same(list(JOB.stored(store)), list(JOB.stored(finished))) and progress(store) == 0
    assert len(short.stored(store)[1]["history"]) == 1  # and the short one is what it was


def test_fewer_minutes_neither_use_nor_replace_the_checkpoint_of_more(begun):
    path = begun.path(checkpoints.CHECKPOINT, JOB.checkpoint(begun).spec)
    before, short = path.read_bytes(), with_config(minutes=1e-6)
    short.run(begun)
    assert len(short.stored(begun)[1]["history"]) == 1 and path.read_bytes() == before


def test_a_divergence_leaves_no_checkpoint(store):
    job = with_config(phi_optimizer="SGD", phi_lr=1e6)
    job.run(store)
    assert diverged(job.stored(store)[1]["stopped"]) and progress(store, job) == 0


# --- a full disk, and what a kill leaves ------------------------------------------------------------------------------


def test_a_file_that_does_not_fit_is_an_error_that_loses_nothing(store, finished, interrupted):
    """By the system's own limit of a file's size: the checkpoints, which grow, reach it on the way."""
    process = start(make_small_files, store.folder, interrupted.stat().st_size - 5000)
    process.join(60)
    said = store.folder / "said.txt"
    error = said.read_text()
    assert error.startswith("[Errno 27]") and "the same command continues from there" in error, error
    assert f"{store.folder}/checkpoint-" in error and not store.has(JOB.kind, JOB.spec())
    said.unlink()
    assert not left_over(store) and 0 < progress(store) < 50
    JOB.run(store)
    ended_well(store, finished)


def on_a_full_disk(folder: Path) -> None:
    """Two jobs in a store on a small file system: one finds room for some checkpoints, one for nothing at all."""
    torch.set_num_threads(1)
    often()
    store, filler = Store(folder), folder / "filler"
    for expert in expert_jobs(SETUP):
        expert.run(store)
    before = {p: p.read_bytes() for p in folder.glob("expert-*")}
    for job, size in ((JOB, 160_000), (with_config(iterations=3), 0)):
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        os.truncate(filler, filler.stat().st_size - size)
        try:
            job.run(store)
        except OSError as error:
            print("refused:", error)
        left = set(left_over(store)) - {"filler"}
        assert not left and before == {p: p.read_bytes() for p in folder.glob("expert-*")}
        print("progress:", progress(store, job))
        filler.unlink()
        job.run(store)
        assert store.has(job.kind, job.spec()) and progress(store, job) == 0
    print("done")


def test_a_full_disk_is_an_error_that_loses_nothing(tmp_path):
    """A real file system of two megabytes, mounted in a name space of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=2m none '{disk}'"
    script = f"import sys; from pathlib import Path; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    script += f"import test_checkpoints; test_checkpoints.on_a_full_disk(Path({str(disk)!r}))"

    def apart(command: str) -> subprocess.CompletedProcess:
        apart = ["unshare", "--map-root-user", "--mount", "sh", "-c", command, sys.executable, script]
        return subprocess.run(apart, check=False, capture_output=True, text=True, timeout=120)

    if not shutil.which("unshare") or apart(mount).returncode:
        pytest.skip("this machine lets its users mount no file system")
    done = apart(f'{mount} && exec "$0" -c "$1"')
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[-1] == "done", done.stderr
    refused = [line for line in lines if line.startswith("refused:")]
    assert len(refused) == 2 and all("[Errno 28] No space left on device" in s and str(disk) in s for s in refused)


BIG = {"theta": torch.zeros(16, 2**20)}  # 64 MB: writing them takes a while


def save_big(folder: Path, number: int) -> None:
    Store(folder).save("big", {"number": number}, BIG, {})


def temporaries(store: Store) -> list[Path]:
    return list(store.folder.glob(".big-*.safetensors.*"))


def killed_in_a_write(store: Store, number: int) -> None:
    for _ in range(20):
        process = start(save_big, store.folder, number)
        while not temporaries(store) and process.is_alive():
            pass
        kill(process)
        if temporaries(store):
            return
    pytest.fail("it was never caught in a write")


def test_what_a_kill_leaves_half_written_is_swept_up_and_what_is_being_written_is_not(tmp_path):
    store = Store(tmp_path)
    killed_in_a_write(store, 1)
    assert not store.has("big", {"number": 1})
    (left,) = temporaries(store)
    process = start(save_big, store.folder, 2)
    while len(temporaries(store)) < 2 and process.is_alive():
        pass
    with store.making("small", {}):  # whoever makes anything in this folder
        assert left not in temporaries(store)
    process.join(60)
    assert process.exitcode == 0 and store.load("big", {"number": 2}) and not temporaries(store)
