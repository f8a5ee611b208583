"""Every kind of stored tensor file, damaged and forged: a `ValueError` or `OSError` that names it, or what was written.

A few rounds by default; AUGDISTILL_FUZZ=1000 in the environment takes so many of each kind.
"""

import json
import os
import random
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from augdistill_core import DistillConfig, train_together
from augdistill_report.files import checkpoints
from augdistill_report.files.expert_files import ExpertFile
from augdistill_report.files.phi_files import load_phi, open_phi, save_phi
from augdistill_report.files.store import FORMAT, SealedFile, Store, write_sealed
from augdistill_report.work.distillation import Distillation
from augdistill_report.work.experts import Expert, Together, checkpoint_of, train_resumable
from augdistill_report.work.jobs import Subset
from augdistill_report.work.scoring import EvalConfig, Evaluation
from augdistill_report.work.setup import Setup

ROUNDS = int(os.environ.get("AUGDISTILL_FUZZ", "25"))

SETUP = Setup(size=8, width=4, depth=1, experts=2, epochs=2)
CONFIG = DistillConfig(iterations=3, syn_steps=1, expert_epochs=1, max_start_epoch=1)

JOB = Distillation(SETUP, "unet", Subset(0, per_class=1), CONFIG)
TRAINING = Together(SETUP, (0, 1))


class Halted(Exception):
    pass


def read_expert(path):
    file = ExpertFile(path)
    return [file.spec, file.about, list(file)]


def read_phi(path):
    augment = load_phi(path)
    augment(torch.zeros(2, 1, 8, 8), generator=torch.Generator())
    return [open_phi(path).about, augment.state_dict()]


def read_result(path):
    return [
        Store(path.parent).load(JOB.kind, JOB.spec(), JOB.form),
        JOB.stored_moments(Store(path.parent))["last"].state_dict(),
    ]


def read_students(path):
    job = evaluation()
    models, accuracies = job.students(Store(path.parent), lambda *_: None)
    return [Store(path.parent).load(job.kind, job.spec(), job.form), accuracies, [m.state_dict() for m in models]]


def read_run(path):
    store = Store(path.parent)
    return JOB.checkpoint(store).read(lambda found: JOB.checked(found, store))


def read_training(path):
    """As far as the training goes on from it: its first epoch stops it."""
    kept, at = checkpoint_of(TRAINING, Store(path.parent)), []

    def stop(snapshot, losses):
        at.append((snapshot, losses))
        raise Halted

    with pytest.raises(Halted):
        train_resumable(TRAINING, train_together, [0, 1], kept, stop)
    return [kept.read(), at]


def read_zca(path):
    return Store(path.parent).load("zca", ZCA)


ZCA = {"data": "abc", "shape": [10, 1, 2, 2], "eps": 0.1}

READERS = {
    "expert": read_expert,
    "saved phi": read_phi,
    "distilled": read_result,
    "students": read_students,
    "checkpoint of a distillation": read_run,
    "checkpoint of experts": read_training,
    "zca": read_zca,
}


def evaluation() -> Evaluation:
    return Evaluation(SETUP, JOB.subset, EvalConfig(eval_students=2, eval_steps=2), JOB)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file of each kind, each in a folder with what its readers need beside it."""
    folder = tmp_path_factory.mktemp("files")
    store = Store(folder)

    def stop_at(limit):
        def stop(done, total, note=""):
            if done == limit:
                raise Halted

        return stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "SECONDS", 0.0)
        patch.setattr(checkpoints, "SHARE", 1e9)
        with pytest.raises(Halted):
            TRAINING.run(store, stop_at(2))
        training = checkpoint_of(TRAINING, store)
        for expert in (0, 1):
            Expert(SETUP, expert).run(store)
        with pytest.raises(Halted):
            JOB.run(store, stop_at(3))
        run = JOB.checkpoint(store)
        shutil.copytree(folder, folder / "kept")
        JOB.run(store)
    evaluation().run(store)
    store.save("zca", ZCA, {"mean": torch.rand(1, 2, 2), "matrix": torch.eye(4), "inverse": torch.eye(4)}, {})
    kept = Store(folder / "kept")
    return {
        "expert": store.path("expert", Expert(SETUP, 0).spec()),
        "saved phi": save_phi(folder / "phi.safetensors", JOB, store, strength=0.5),
        "distilled": store.path(JOB.kind, JOB.spec()),
        "students": store.path(evaluation().kind, evaluation().spec()),
        "checkpoint of a distillation": kept.path(checkpoints.CHECKPOINT, run.spec),
        "checkpoint of experts": kept.path(checkpoints.CHECKPOINT, training.spec),
        "zca": store.path("zca", ZCA),
    }


def equal(one, other) -> bool:
    """Bit for bit, a NaN being itself."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and (one == other or (one != one and other != other))


def flipped(content: bytes, draw: random.Random) -> bytes:
    """With one to three bits flipped, half of them in the header."""
    changed, header = bytearray(content), int.from_bytes(content[:8], "little") + 8
    for _ in range(draw.randint(1, 3)):
        changed[draw.randrange(header if draw.random() < 0.5 else len(content))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(content: bytes, draw: random.Random) -> bytes:
    """Truncated, longer, or with a piece left out or repeated."""
    at, length = draw.randrange(len(content)), draw.randint(1, 64)
    head, tail = content[:at], content[at:]
    return draw.choice((head, content + content[:length], head + tail[length:], head + tail[:length] + tail))


def edited(content: bytes, draw: random.Random) -> bytes:
    """With a digit or a letter of the header's text replaced: valid JSON most of the time, and not sealed again."""
    changed, header = bytearray(content), int.from_bytes(content[:8], "little") + 8
    places = [at for at in range(8, header) if chr(content[at]).isalnum()]
    at = draw.choice(places)
    changed[at] = ord(draw.choice("0123456789") if chr(content[at]).isdigit() else draw.choice("abcxyz"))
    return bytes(changed)


@pytest.mark.parametrize("how", [flipped, cut, edited], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", READERS)
def test_a_damaged_file_is_named_or_means_what_it_meant(files, kind, how):
    path, read, draw = files[kind], READERS[kind], random.Random(f"{kind} {how.__name__}")
    content, whole, refused = path.read_bytes(), READERS[kind](files[kind]), 0
    try:
        for _ in range(ROUNDS):
            path.write_bytes(how(content, draw))
            try:
                assert equal(read(path), whole)
            except (ValueError, OSError) as error:
                assert path.name in str(error), error
                refused += 1
    finally:
        path.write_bytes(content)
    assert refused > 0.7 * ROUNDS and equal(read(path), whole)


# --- forged: what is wrong is sealed again ----------------------------------------------------------------------------


def parts(path) -> tuple[dict, dict]:
    """The header's content and the tensors of a file."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no dict)
        return json.loads(file.metadata()[FORMAT]), tensors


def places_in(value, found=()) -> list[tuple]:
    """The places of all that is in a JSON value, as the keys that lead there."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, v in inside for place in [(*found, key), *places_in(v, (*found, key))]]


WRONG = (None, True, -1, 10**30, 1e300, float("nan"), "x", "", [], [[]], {}, {"a": 1})

NOTHING = object()


def changed(value, place: tuple, new):
    """A copy with something else in a place, or NOTHING there."""
    value = json.loads(json.dumps(value))
    inside = value
    for key in place[:-1]:
        inside = inside[key]
    if new is NOTHING:
        del inside[place[-1]]
    else:
        inside[place[-1]] = new
    return value


@pytest.mark.filterwarnings("ignore:.*was trained with other source")
@pytest.mark.parametrize("kind", READERS)
def test_a_forged_header_is_named_or_read(files, kind):
    """Any value of it of another type, out of range, or missing: never another error than one that names the file."""
    path, read, draw = files[kind], READERS[kind], random.Random(kind)
    content, (said, tensors) = path.read_bytes(), parts(path)
    places, refused = places_in(said["about"]), 0
    try:
        for _ in range(ROUNDS):
            # the shallow places as often as the many deep ones
            place = draw.choice([p for p in places if len(p) <= draw.randint(1, 6)])
            about = changed(said["about"], place, draw.choice((*WRONG, NOTHING)))
            write_sealed(path, said["kind"], about, tensors)
            try:
                read(path)
            except (ValueError, OSError) as error:
                assert path.name in str(error), error
                refused += 1
    finally:
        path.write_bytes(content)
    assert refused > 0.2 * ROUNDS


@pytest.mark.parametrize("kind", READERS)
def test_forged_tensors_are_named(files, kind):
    """Sealed again without a tensor, or with one of another type or shape."""
    path, read = files[kind], READERS[kind]
    content, (said, tensors) = path.read_bytes(), parts(path)
    name = "last/" + next(iter(JOB.fresh_phi().state_dict())) if kind == "distilled" else sorted(tensors)[0]
    others = [{k: t for k, t in tensors.items() if k != name}]
    others += [tensors | {name: other} for other in (tensors[name].to(torch.int16), torch.zeros(2, 3, 4, 5, 6))]
    try:
        for other in others if kind != "zca" else []:
            write_sealed(path, said["kind"], said["about"], other)
            with pytest.raises(ValueError, match=path.name):
                read(path)
    finally:
        path.write_bytes(content)


HOSTILE = {
    "nesting": "[" * 10**5,
    "nested about": '{"kind": "phi", "digests": {}, "seal": "x", "about": {"a": ' + "[" * 10**5 + "]" * 10**5 + "}}",
    "no JSON": "{",
    "a list": "[1]",
    "nothing": "{}",
    "a long number": '{"kind": ' + "9" * 10**4 + "}",
}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("how", HOSTILE)
def test_a_hostile_header_is_named(files, kind, how):
    path = files[kind]
    content = path.read_bytes()
    try:
        path.write_bytes(save({"a": torch.ones(2)}, {FORMAT: HOSTILE[how]}))
        with pytest.raises(ValueError, match=rf"{path.name} is damaged"):
            READERS[kind](path)
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("kind", ["expert", "saved phi", "zca"])  # a result that is not there is made
@pytest.mark.parametrize("how", ["a folder", "a link to nowhere", "a pipe", "nothing"])
def test_what_is_no_file_is_named(files, kind, how, tmp_path):
    path = files[kind]
    aside = path.replace(tmp_path / "aside")
    try:
        if how == "a folder":
            path.mkdir()
        elif how == "a pipe":
            os.mkfifo(path)
        elif how == "a link to nowhere":
            path.symlink_to(tmp_path / "nowhere")
        with pytest.raises(ValueError, match=f"{path.name}: no such file"):
            READERS[kind](path)
    finally:
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
        aside.replace(path)


# --- what a phi's file may not say ------------------------------------------------------------------------------------

PHI = {
    "data": (("data",), NOTHING),
    "shape": (("shape",), NOTHING),
    "subset": (("subset",), NOTHING),
    "setup": (("setup",), NOTHING),
    "160 GB": (("shape",), [1, 200000, 200000]),
    "no channels": (("shape",), [0, 8, 8]),
    "sides": (("shape",), [1, 8, 16]),
    "base images": (("base_images",), 10**12),
    "classes": (("classes",), ["a", "a"]),
    "std 0": (("data", "std"), [0.0]),
    "std tiny": (("data", "std"), [1e-300]),
    "mean nan": (("data", "mean"), [float("nan")]),
    "two means": (("data", "mean"), [0.1, 0.2]),
    "zca": (("setup", "zca"), True),
    "probability": (("probability",), 1.5),
    "strength": (("strength",), -1.0),
    "huge strength": (("strength",), 10**30),
    "fraction": (("subset", "fraction"), 0.5),
    "unknown key": (("subset", "other"), 0.5),
}


@pytest.mark.parametrize("what", PHI)
def test_a_phi_s_header_is_checked_whole(files, what, tmp_path):
    said, tensors = parts(files["saved phi"])
    (place, new), path = PHI[what], tmp_path / "forged.safetensors"
    write_sealed(path, "phi", changed(said["about"], place, new), tensors)
    if what == "base images":  # which unet does not keep, so they cost nothing
        load_phi(path)
        pixels = changed(said["about"], ("phi",), "pixels") | {"base_images": 10**12}
        write_sealed(path, "phi", pixels, {"pixels": torch.zeros(10, 1, 8, 8)})
    with pytest.raises(ValueError, match=r"forged\.safetensors"):
        load_phi(path)


def test_a_phi_that_is_not_finite_is_refused(files, tmp_path):
    said, tensors = parts(files["saved phi"])
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] = float("nan")
    write_sealed(tmp_path / "forged", "phi", said["about"], tensors)
    with pytest.raises(ValueError, match=f"forged is damaged .{name} has values that are not finite"):
        load_phi(tmp_path / "forged")


def test_the_same_content_is_the_same_bytes_and_every_tensor_is_read_alone(tmp_path):
    tensors = {str(k): torch.full((3,), float(k)) for k in range(12)}
    for name in ("a", "b"):
        write_sealed(tmp_path / name, "thing", {"b": [1, float("inf")], "a": "ü"}, tensors)
        tensors = dict(reversed(tensors.items()))
    content = (tmp_path / "a").read_bytes()
    assert content == (tmp_path / "b").read_bytes()
    at = content.rindex(torch.full((3,), 11.0).numpy().tobytes())
    (tmp_path / "a").write_bytes(content[:at] + b"\1" + content[at + 1 :])
    file = SealedFile(tmp_path / "a", "thing")  # opening reads no tensor
    assert file.about == {"b": [1, float("inf")], "a": "ü"} and torch.equal(file["10"], tensors["10"])
    with pytest.raises(ValueError, match=r"a is damaged .11: its values"):
        file["11"]
