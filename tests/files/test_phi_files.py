"""A saved phi comes back as it was, is one line of a torchvision pipeline, and is refused where it does not fit."""

import dataclasses
import json
import pickle
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from augdistill_core import Applied, Phi, register_phi, seeded
from augdistill_method import phi as phi_module
from augdistill_method.zoo.policy import Policy
from augdistill_report.commands.apply import BATCH
from augdistill_report.commands.cli import main
from augdistill_report.data.datasets import load
from augdistill_report.data.folders import read_image
from augdistill_report.files.phi_files import load_phi, open_phi, save_phi
from augdistill_report.places import ROOT
from augdistill_report.run import Run
from augdistill_report.settings import resolve

SAVED = ("unet_noise", "unet_noise+policy", "unet_class_noise", "pixels", "identity", "policy")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return Run("mine", resolve("smoke", {"iterations": 2, "phi_lr": 0.03}), tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def jobs(run):
    return {name: run.distillation(name, run.base) for name in SAVED}


@pytest.fixture(scope="module")
def saved(run, jobs):
    """Files of trained phis, by name."""
    return {name: run.save(name, job) for name, job in jobs.items()}


@pytest.fixture(scope="module")
def pixels(run):
    """Twelve images in [0, 1], and their labels."""
    split = run.data.train.take(slice(12))
    return split.raw, split.labels


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["unet_noise", "unet_noise+policy", "unet_class_noise", "identity", "policy"])
@pytest.mark.parametrize("strength, probability", [(1.0, 1.0), (0.4, 0.5)])
def test_it_does_on_pixels_what_phi_does_on_standardised_images(
    run, jobs, saved, pixels, name, strength, probability, rng_untouched
):
    images, labels = pixels
    phi = Applied(jobs[name].stored_phi(run.store).phi, strength, probability)
    given = dict(labels=labels, index=torch.arange(12), generator=seeded(3))
    with torch.no_grad():
        expected = run.data.pixels(phi((images - run.data.mean) / run.data.std, **given))
    with rng_untouched():
        augment = load_phi(saved[name], strength, probability)
        out = augment(images, labels=labels, generator=seeded(3))
    assert torch.equal(out, expected) and not out.requires_grad
    if name == "identity":
        torch.testing.assert_close(out, images)
    else:
        assert (out - images).abs().max() > 0.01  # it was trained: not the identity any more


def test_the_file_says_what_made_it_and_not_where(run, jobs, saved):
    assert saved["unet_noise+policy"] == run.folder / "phis" / "unet_noise_policy.safetensors"
    about = open_phi(saved["unet_noise+policy"]).about
    job = jobs["unet_noise+policy"]
    assert about["phi"] == "unet_noise+policy" and about["shape"] == [1, 8, 8] and about["base_images"] == 10
    assert about["classes"] == list("0123456789") and about["torch"] == torch.__version__
    assert about["data"]["name"] == "digits" and about["data"]["fingerprint"] == run.data.fingerprint
    assert about["subset"] == {"seed": 0, "per_class": 1, "fraction": None, "skip": 0.0, "window": None}
    assert about["config"] == job.config.to_dict() and about["setup"] == job.setup.to_dict()
    assert about["own_source"] == "" and about["stopped"] == {}
    augment = load_phi(saved["unet_noise+policy"])
    assert re.search(rf"unet_noise\+policy, 1x8x8, trained on digits \({run.data.fingerprint}\)", repr(augment))
    assert not any(p.requires_grad for p in augment.parameters())
    # the same work, the same bytes
    before = saved["unet_noise"].read_bytes()
    assert save_phi(run.folder / "again", jobs["unet_noise"], run.store).read_bytes() == before


def test_strength_and_probability_are_saved_and_may_be_changed(run, jobs, pixels, tmp_path):
    path = save_phi(tmp_path / "phi", jobs["policy"], run.store, strength=0.5, probability=0.25)
    assert (load_phi(path).applied.strength, load_phi(path).applied.probability) == (0.5, 0.25)
    assert (load_phi(path, 0.0).applied.strength, load_phi(path, 0.0).applied.probability) == (0.0, 0.25)
    torch.testing.assert_close(load_phi(path, probability=0)(pixels[0]), pixels[0])
    for wrong in ({"strength": -1.0}, {"strength": float("nan")}, {"strength": 100.5}, {"probability": 1.5}):
        (key,) = wrong
        with pytest.raises(ValueError, match=f"{key}="):
            load_phi(path, **wrong)
        with pytest.raises(ValueError, match=f"{key}="):
            save_phi(tmp_path / "other", jobs["policy"], run.store, **wrong)
    assert not (tmp_path / "other").exists()


def test_digits_are_not_flipped_after_loading_either(saved):
    for name in ("policy", "unet_noise+policy"):
        (policy,) = (m for m in load_phi(saved[name]).modules() if isinstance(m, Policy))
        assert "flip" not in policy.kinds and "rotation" in policy.kinds


def test_a_folder_s_place_is_not_in_the_file(run, tmp_path):
    root = make_folder(tmp_path / "private" / "pets", size=(8, 8))
    other = Run("mine", resolve("smoke", {"iterations": 1, "dataset": f"folder:{root}"}), tmp_path / "run")
    path = other.save("pets", other.distillation("policy", other.base))
    assert b"private" not in path.read_bytes() and str(tmp_path).encode() not in path.read_bytes()
    about = load_phi(path).about
    assert about["data"]["name"] == about["setup"]["dataset"] == "folder:pets" and about["classes"] == ["cat", "dog"]


# --- a phi of one's own -----------------------------------------------------------------------------------------------


class Louder(Phi):
    def __init__(self, images, classes):
        super().__init__()
        self.range = torch.nn.Parameter(torch.full(images.shape[1:], 0.1))

    def forward(self, images, *, generator, **_):
        return images + self.range * torch.randn(len(images), 1, 1, 1, generator=generator)


class Remembers(Louder):
    """Keeps something of its base images that is neither parameter nor buffer."""

    def __init__(self, images, classes):
        super().__init__(images, classes)
        self.mean = images.mean().item() + 1

    def forward(self, images, **given):
        return super().forward(images, **given) + self.mean


class Broken(Louder):
    def forward(self, images, **_):
        return images + self.range / 0


def test_a_phi_of_one_s_own_is_loaded_where_it_is_registered(run, pixels):
    register_phi("louder")(Louder)
    path = run.save("louder+policy", run.distillation("louder+policy", run.base))
    assert b"torch.randn" not in path.read_bytes()  # its source stays its user's
    assert load_phi(path)(pixels[0]).shape == pixels[0].shape
    del phi_module._REGISTRY["louder"]
    with pytest.raises(ValueError, match=r"louder.policy.*unknown phi 'louder'.*register it first.*--set phis=FILE"):
        load_phi(path)


class Twice(Phi):
    """One layer under two names."""

    def __init__(self, images, classes):
        super().__init__()
        self.one = self.other = torch.nn.Conv2d(images.shape[1], images.shape[1], 3, padding=1)

    def forward(self, images, **_):
        return images + self.other(torch.tanh(self.one(images)))


def test_a_phi_that_holds_one_layer_twice_is_stored_and_saved(run, pixels):
    register_phi("twice")(Twice)
    job = run.distillation("twice", run.base)
    phi = job.stored_phi(run.store).phi
    assert phi.one.weight is phi.other.weight
    with torch.no_grad():
        expected = run.data.pixels(phi((pixels[0] - run.data.mean) / run.data.std))
    assert torch.equal(load_phi(run.save("twice", job))(pixels[0]), expected)


def test_a_phi_that_has_become_another_is_told_of(run):
    register_phi("mine")(Louder)
    job = run.distillation("mine", run.base)
    path = run.save("mine", job)
    changed = save_phi(run.folder / "changed", dataclasses.replace(job, phi_source="what it was before"), run.store)
    with pytest.warns(UserWarning, match="'mine' was trained with other source"):
        load_phi(changed)
    del phi_module._REGISTRY["mine"]
    phi_module._REGISTRY["mine"] = Policy
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"mine.safe.*'mine', as registered.*other tensors"):
        load_phi(path)


@pytest.mark.parametrize("kind, says", [(Remembers, "'own' differs after it is rebuilt"), (Broken, "not finite")])
def test_what_would_not_come_back_is_not_saved(run, tmp_path, kind, says):
    phi_module._REGISTRY["own"] = kind
    job = run.distillation("own", run.base)
    with pytest.raises(ValueError, match=says):
        save_phi(tmp_path / "own", job, run.store)
    assert not list(tmp_path.iterdir())


# --- damage -----------------------------------------------------------------------------------------------------------


def damaged(path, how):
    content = bytearray(path.read_bytes())
    if how == "truncated":
        return bytes(content[: len(content) // 2])
    if how == "a byte short":
        return bytes(content[:-1])
    if how == "longer":
        return bytes(content) + b"\0"
    if how == "bit of a tensor":
        content[-5] ^= 1
    elif how == "digit of the header":
        at = content.index(b"mean") + len(b'mean\\": [0.')
        content[at] ^= 1
    elif how == "length of the header":
        content[0] ^= 1
    return bytes(content)


@pytest.mark.parametrize(
    "how", ["truncated", "a byte short", "longer", "bit of a tensor", "digit of the header", "length of the header"]
)
def test_a_damaged_file_is_named(saved, tmp_path, how):
    path = tmp_path / "hurt.safetensors"
    path.write_bytes(damaged(saved["unet_noise"], how))
    with pytest.raises(ValueError, match=r"hurt.safetensors is damaged \(.+\)"):
        load_phi(path)


def test_no_flipped_bit_is_taken(saved, tmp_path):
    """Each byte of a file in turn: it is refused, or nothing of what it says has changed (padding)."""
    path = tmp_path / "phi"
    content = saved["policy"].read_bytes()
    whole = open_phi(saved["policy"])
    tensors, about = whole.read(), whole.about
    taken = 0
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
        try:
            found, said = open_phi(path).read(), open_phi(path).about
        except ValueError:
            continue
        taken += 1
        assert said == about and found.keys() == tensors.keys()
        assert all(torch.equal(found[k], tensors[k]) for k in tensors)
    assert taken < 8


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was opened",)


@pytest.mark.parametrize("kind", ["pickle", "torch.save"])
def test_a_pickle_is_never_opened(tmp_path, kind):
    path = tmp_path / "phi.safetensors"
    path.write_bytes(pickle.dumps(Bomb())) if kind == "pickle" else torch.save({"a": torch.ones(2), "b": Bomb()}, path)
    with pytest.raises(ValueError, match=r"phi.safetensors.*a pickle, which may contain code and is never opened"):
        load_phi(path)


def test_foreign_files_are_named(run, saved, tmp_path):
    path = tmp_path / "foreign"
    save_file({"a": torch.ones(2)}, path)
    artefact = next((run.folder / "artefacts").glob("distilled-*.safetensors"))
    for foreign in (path, artefact):
        with pytest.raises(ValueError, match=f"{foreign.name} is not ours.*kind"):
            load_phi(foreign)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="foreign is damaged"):
        load_phi(path)
    for nothing in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ValueError, match=f"{nothing}: no such file"):
            load_phi(nothing)


# --- in a pipeline ----------------------------------------------------------------------------------------------------


def make_folder(root, classes=("cat", "dog"), count=8, mode="L", size=(20, 20)):
    rng = np.random.default_rng(0)
    for c in classes:
        (root / c).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(root / c / f"{i:02}.png")
    return root


def usage_blocks(saved):
    """The Python of docs/usage.md that loads a phi, with a phi of ours in its place."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "usage.md").read_text(), re.DOTALL)
    path = "runs/digits/phis/mine.safetensors"
    return [block.replace(path, str(saved["unet_noise+policy"])) for block in blocks if path in block]


def test_usage_s_pipeline_of_kornia(run, saved):
    (block,) = (block for block in usage_blocks(saved) if "kornia" in block)
    few = run.data.train.take(slice(12))
    torch.manual_seed(0)
    exec(block, names := {"images": few.raw, "labels": few.labels})
    assert names["images"].shape == few.raw.shape and torch.equal(names["labels"], few.labels)
    torch.manual_seed(0)
    exec(block, twice := {"images": few.raw, "labels": few.labels})
    assert torch.equal(twice["again"], names["again"])
    assert 0.001 < (names["images"] - few.raw).abs().mean() < 0.5
    assert 0.001 < (names["again"] - names["images"]).abs().mean() < 0.5


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_readme_s_pipeline_feeds_a_data_loader(saved, tmp_path):
    (block,) = (block for block in usage_blocks(saved) if "torchvision" in block)
    assert "(16, 16)" in block
    exec(block.replace("(16, 16)", "(8, 8)"), names := {})
    data = ImageFolder(make_folder(tmp_path, mode="RGB"), transform=names["pipeline"])

    def epoch(seed):
        torch.manual_seed(seed)
        loader = DataLoader(data, batch_size=4, num_workers=2, multiprocessing_context="fork")
        return torch.cat([images for images, _ in loader])

    first = epoch(0)
    assert first.shape == (16, 1, 8, 8) and -1 <= first.min() < first.max() <= 1
    assert torch.equal(epoch(0), first) and not torch.equal(epoch(1), first)
    pickled = pickle.loads(pickle.dumps(names["pipeline"]))  # what a loader that does not fork does with it
    torch.manual_seed(3)
    again = pickled(data.loader(data.samples[0][0]))
    torch.manual_seed(3)
    assert torch.equal(data[0][0], again)
    # and it is phi: without it the images are others
    plain = v2.Compose([t for t in names["pipeline"].transforms if not hasattr(t, "about")])
    unchanged = torch.stack([plain(image) for image, _ in ImageFolder(tmp_path)])
    assert 0.001 < (first - unchanged).abs().mean() < 0.5


# --- the command ------------------------------------------------------------------------------------------------------


def opened(path):
    """A PNG file's bytes `[H, W]` or `[H, W, C]`."""
    with Image.open(path) as image:
        return np.asarray(image)


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_apply_writes_a_set_s_training_images(run, saved, tmp_path, capsys):
    out, phi = tmp_path / "out", str(saved["unet_class_noise"])
    count = BATCH + 1
    command = ["apply", phi, "--to", "digits", "--count", str(count), "--seed", "5"]
    assert main([*command, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"apply: {10 * count} images of digits in {out}; phi unet_class_noise was trained on digits (" in said
    assert run.data.fingerprint in said
    files = contents(out)
    assert len(files) == 10 * count + 2 and {"grid.png", "apply.json", "0/00000.png", f"9/{BATCH:05}.png"} < set(files)
    augment, train = load_phi(phi), run.data.train
    for c in (0, 7):
        images = train.raw[train.labels == c][:count]
        for first in (0, BATCH):
            generator = seeded(5, "apply", str(c), first, 0)
            expected = augment(images[first : first + BATCH], labels=c, generator=generator)
            for i, image in enumerate(expected, first):
                assert np.array_equal(opened(out / str(c) / f"{i:05}.png"), (image[0] * 255).round().byte().numpy())
    # the same seed, the same bytes; another, others
    assert main([*command, "--out", str(tmp_path / "again")]) == 0 and contents(tmp_path / "again") == files
    assert main([*command[:-1], "6", "--out", str(tmp_path / "other")]) == 0
    other = contents(tmp_path / "other")
    assert other.keys() == files.keys() and sum(other[k] == files[k] for k in files) < 10


def test_apply_goes_on_where_it_was_stopped(saved, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["apply", str(saved["policy"]), "--to", "digits", "--out", str(out), "--count", "40"]
    assert main(command) == 0
    before = contents(out)
    stays = (out / "4" / "00000.png").stat().st_mtime_ns
    for name in ("3/00000.png", "3/00035.png", "9/00001.png", "grid.png"):
        (out / name).unlink()
    assert main(command) == 0 and contents(out) == before
    assert (out / "4" / "00000.png").stat().st_mtime_ns == stays
    capsys.readouterr()
    assert main([*command, "--strength", "0.5"]) == 2
    assert "holds images of other settings" in capsys.readouterr().err and contents(out) == before


def test_ctrl_c_stops_it_and_leaves_whole_files(saved, tmp_path):
    out = tmp_path / "out"
    code = "import sys; from augdistill_report.commands.cli import main; sys.exit(main())"
    options = ["apply", str(saved["policy"]), "--to", "digits", "--out", str(out), "--copies", "500"]
    process = subprocess.Popen([sys.executable, "-c", code, *options], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (out / "0" / "00000_0.png").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and "goes on from there" in error
    assert not [p for p in out.rglob(".*") if p.is_file()]
    for path in out.rglob("*.png"):
        assert opened(path).dtype == np.uint8


def test_apply_to_a_folder(saved, tmp_path, monkeypatch, capsys):
    root = make_folder(tmp_path / "pets", classes=("cat", "dog", "owl"), count=3, size=(30, 20))
    (root / ".hidden").mkdir()
    command = ["apply", str(saved["unet_noise"])]
    monkeypatch.chdir(tmp_path)
    for to, out in ((f"folder:{root}", "a"), (str(root), "b"), ("pets", "c")):
        assert main([*command, "--to", to, "--out", out]) == 0
        named = "pets" if out == "c" else root
        assert f"apply: 9 images of folder:{named} in {tmp_path / out}" in capsys.readouterr().out
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")
    names = {f"{c}/0000{i}.png" for c in ("cat", "dog", "owl") for i in range(3)}
    assert set(contents(tmp_path / "a")) == names | {"grid.png", "apply.json"}
    assert str(tmp_path) not in (tmp_path / "a" / "apply.json").read_text()
    # with no strength, they are the images as the loader reads them
    assert main([*command, "--to", "pets", "--out", "plain", "--strength", "0", "--copies", "2"]) == 0
    assert len(contents(tmp_path / "plain")) == 20
    for name in names:
        image = read_image(root / name.replace("0000", "0"), 8)
        for copy in (0, 1):
            assert np.array_equal(opened(tmp_path / "plain" / name.replace(".png", f"_{copy}.png")), image[0])
    with pytest.raises(ValueError, match="class cat has 3 images"):
        load(f"folder:{root}", 8)  # a data set wants more: apply takes what there is
    # a set of another kind is what it is for: the last line says what phi was trained on
    assert json.loads((tmp_path / "plain" / "apply.json").read_text())["trained on"].startswith("digits (")


def test_apply_to_split_folders_takes_the_training_split(saved, tmp_path, capsys):
    for i, (split, count) in enumerate({"train": 3, "test": 2}.items()):
        make_folder(tmp_path / "pets" / split, count=count, size=(20 + 9 * i, 20))
    (tmp_path / "pets/train/cat/link.png").symlink_to(tmp_path / "pets/test/cat/00.png")
    command = ["apply", str(saved["unet_noise"]), "--to", str(tmp_path / "pets"), "--strength", "0"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    names = {f"{c}/0000{i}.png" for c in ("cat", "dog") for i in range(3)}
    assert set(contents(tmp_path / "out")) == names | {"grid.png", "apply.json"}
    for name in names:
        image = read_image(tmp_path / "pets" / "train" / name.replace("0000", "0"), 8)
        assert np.array_equal(opened(tmp_path / "out" / name), image[0])
    for path in (tmp_path / "pets/train/dog").iterdir():
        path.write_bytes(b"")
    assert main([*command, "--out", str(tmp_path / "again")]) == 2 and not (tmp_path / "again").exists()
    assert re.search(r"3 of 6 images cannot be read: .*dog/00.png.*dog/01.png.*dog/02.png", capsys.readouterr().err)


def test_apply_takes_a_phi_of_one_s_own(run, tmp_path, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "own.py").write_text(next(block for block in blocks if "@register_phi" in block))
    other = Run("mine", resolve("smoke", {"iterations": 1, "phis": str(tmp_path / "own.py")}), run.folder)
    path = other.save("brightness", other.distillation("brightness", other.base))
    del phi_module._REGISTRY["brightness"]
    command = ["apply", str(path), "--to", "digits", "--out", str(tmp_path / "out"), "--count", "1"]
    assert main(command) == 2 and "unknown phi 'brightness'; it is a user's own phi" in capsys.readouterr().err
    assert main([*command, "--set", f"phis={tmp_path / 'own.py'}"]) == 0
    assert len(contents(tmp_path / "out")) == 12


BAD = {
    "no phi": (["nowhere.safetensors"], "nowhere.safetensors: no such file"),
    "no phi's file": (["README"], "README is damaged"),
    "bound": (["pixels"], "'pixels' is bound to the base images"),
    "set": (["policy", "--to", "digit"], "dataset='digit': must be one of digits, .*folder:PATH"),
    "no folder": (["policy", "--to", "folder:nowhere"], "folder:nowhere: there is no such folder"),
    "no classes": (["policy", "--to", "empty"], "folder:empty: must hold a sub-folder for each class"),
    "no images": (["policy", "--to", "void"], "folder:void: class cat has no images"),
    "colour": (["policy", "--to", "colour"], r"00.png is in colour, but phi 'policy' was trained on 1x8x8 images"),
    "classes": (["unet_class_noise", "--to", "grey"], "reads the class and knows 0, 1, .*; has cat, dog"),
    "set's shape": (
        ["policy", "--to", "cifar10"],
        "cifar10: its images are 3x8x8, but phi 'policy' was trained on 1x8x8",
    ),
    "not an image": (["policy", "--to", "broken"], "01.png is not a readable image"),
    "copies": (["policy", "--copies", "0"], "copies=0: must be at least 1"),
    "count": (["policy", "--count", "-1"], "count=-1"),
    "seed": (["policy", "--seed", "-1"], "seed=-1"),
    "strength": (["policy", "--strength", "-1"], r"strength=-1.0: must be in \[0, 100\]"),
    "probability": (["policy", "--probability", "2"], r"probability=2.0: must be in \[0, 1\]"),
    "setting": (["policy", "--set", "phi=unet"], "--set phi: apply takes only phis=FILE"),
    "phis": (["policy", "--set", "phis=nowhere.py"], "phis='.*nowhere.py': no such file"),
    "full folder": (["policy", "--out", "grey"], "--out .*grey: holds files that apply did not make"),
    "own folder": (["policy", "--to", "grey", "--out", "grey/cat/out"], "lies inside the folder of the input images"),
    "a file": (["policy", "--out", "README/out"], "--out .*README/out: cannot be written"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(case, saved, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "grey")
    make_folder(tmp_path / "colour", mode="RGB")
    make_folder(tmp_path / "void", count=0)
    (make_folder(tmp_path / "broken") / "dog" / "01.png").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "README").write_text("no phi")
    if case == "set's shape":
        rgb = load(f"folder:{make_folder(tmp_path / 'rgb', mode='RGB', size=(8, 8))}", 8)
        monkeypatch.setattr("augdistill_report.commands.apply.load", lambda name, size, data: rgb)
    (phi, *arguments), message = BAD[case]
    command = ["apply", str(saved.get(phi, phi)), *arguments]
    command += [] if "--to" in arguments else ["--to", "digits"]
    command += [] if "--out" in arguments else ["--out", "out"]
    before = contents(tmp_path)
    assert main(command) == 2
    error = capsys.readouterr().err.strip()
    assert re.search(message, error) and error.splitlines()[-1].startswith("augdistill: ")
    assert contents(tmp_path) == before and not (tmp_path / "out").exists()
