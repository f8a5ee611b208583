"""Data: every set is split once and for all, stratified, standardised by its training images; subsets are nested.

The references are scikit-learn's own array, the bytes of the published files as this test reads them, and for the
resizing the weights written out. What needs real data runs where AUGDISTILL_DATA names a folder that has them; small
sets in the same formats are made here for the rest.
"""

import itertools
import os
import pickle
import re
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from published import idx, make_cifar, make_mnist, rows
from sklearn.datasets import load_digits as sklearn_digits
from torchvision import datasets

from augdistill_core import DistillConfig
from augdistill_report.commands.cli import main
from augdistill_report.data.datasets import Split, check_name, load, split_indices, standardised
from augdistill_report.data.sources import files
from augdistill_report.settings import Settings
from augdistill_report.work.distillation import Distillation
from augdistill_report.work.experts import Expert
from augdistill_report.work.jobs import Subset
from augdistill_report.work.scoring import EvalConfig, Evaluation
from augdistill_report.work.setup import Setup

SPLITS = ("train", "validation", "test")
FINGERPRINTS = {
    "digits": "f71142ca7361afac",
    "mnist": "b1643f01c146738b",
    "fashion": "1c71422ddda588ac",
    "cifar10": "b338d6cf2308e7d5",
    "cifar100": "db9c8b502b7616a7",
}

pytestmark = pytest.mark.usefixtures("nowhere")


@pytest.fixture(scope="module")
def digits():
    return load("digits", 8)


@pytest.fixture(scope="module")
def raw():
    """scikit-learn's digits: pixels 0..16 `[1797, 8, 8]` and labels."""
    data = sklearn_digits()
    return torch.tensor(data.images), torch.tensor(data.target)


def per_class(labels):
    return torch.bincount(labels, minlength=10).tolist()


def test_the_splits_are_a_partition_of_the_1797_digits(digits, raw):
    rows = []
    for split in (getattr(digits, name) for name in SPLITS):
        pixels = (digits.pixels(split.opened().images) * 16).round()
        torch.testing.assert_close(digits.pixels(split.opened().images) * 16, pixels, atol=1e-4, rtol=0)  # inverts
        rows.append(torch.cat([split.labels[:, None], pixels.flatten(1).long()], 1))
    expected = torch.cat([raw[1][:, None], raw[0].flatten(1).long()], 1)
    assert len(expected) == 1797 == sum(map(len, rows))
    # the same images with their labels, each as often: none lost, and none in two splits
    for ours, theirs in zip(
        torch.cat(rows).unique(dim=0, return_counts=True), expected.unique(dim=0, return_counts=True), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_splits_are_stratified(digits, raw):
    for name, share in (("validation", 0.1), ("test", 0.2)):
        counts = per_class(getattr(digits, name).labels)
        assert counts == [round(share * n) for n in per_class(raw[1])]


def test_the_split_never_changes(digits, raw, rng_untouched):
    torch.manual_seed(99)
    with rng_untouched():
        again = load("digits", 8)
    for name in SPLITS:
        assert torch.equal(getattr(again, name).opened().images, getattr(digits, name).opened().images)
        assert torch.equal(getattr(again, name).labels, getattr(digits, name).labels)
    train, validation, test = split_indices(raw[1], (0.1, 0.2))
    assert not set(train.tolist()) & set(validation.tolist()) | set(validation.tolist()) & set(test.tolist())
    # as first made: published numbers hang on these
    assert validation[:6].tolist() == [1, 29, 62, 65, 70, 97] and test[:6].tolist() == [5, 7, 9, 10, 22, 23]


def test_training_images_have_mean_0_and_std_1(digits):
    assert digits.train.images.mean().abs() < 1e-5
    assert digits.train.images.std() == pytest.approx(1, abs=1e-5)
    assert digits.shape == (1, 8, 8) and digits.train.labels.dtype == torch.int64


def test_channels_are_standardised_one_by_one_with_the_training_images_only():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(30, 3, 4, 4, generator=generator) * torch.tensor([0.2, 0.5, 1.0]).view(3, 1, 1)
    indices = torch.arange(30).split((20, 5, 5))
    data = standardised("noise", "ab", pixels, torch.arange(30) % 2, indices)
    for c in range(3):
        mean, std = pixels[:20, c].mean(), pixels[:20, c].std()
        for name, index in zip(SPLITS, indices, strict=True):
            torch.testing.assert_close(getattr(data, name).opened().images[:, c], (pixels[index, c] - mean) / std)
    torch.testing.assert_close(data.pixels(data.test.opened().images), pixels[25:])
    assert data.pixels(data.test.opened().images * 100).aminmax() == (0, 1)


def test_images_are_resized_bilinearly(raw, digits):
    weights = torch.zeros(16, 8, dtype=torch.float64)
    for k in range(16):  # pixel centres: row k of 16 lies at (k + 1/2) / 2 - 1/2 among the 8, clamped to the border
        at = min(max((k + 0.5) / 2 - 0.5, 0), 7)
        low = min(int(at), 6)
        weights[k, low], weights[k, low + 1] = low + 1 - at, at - low
    data, index = load("digits", 16), split_indices(raw[1], (0.1, 0.2))
    assert data.shape == (1, 16, 16)
    expected = weights @ (raw[0][index[2]] / 16) @ weights.T
    torch.testing.assert_close(data.pixels(data.test.opened().images)[:, 0].double(), expected, atol=1e-5, rtol=0)


def test_to_moves_everything(digits):
    moved = digits.to("meta")
    tensors = [t for name in SPLITS for t in (getattr(moved, name).opened().images, getattr(moved, name).labels)]
    assert {t.device.type for t in [*tensors, moved.mean, moved.std]} == {"meta"}
    assert digits.train.images.device.type == "cpu" and moved.classes == digits.classes


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 1.0])
def test_subset_by_fraction_is_stratified(digits, fraction):
    picked = digits.train.take(digits.subset(0, fraction=fraction))
    assert per_class(picked.labels) == [round(fraction * n) for n in per_class(digits.train.labels)]


def test_subset_by_images_a_class(digits):
    index = digits.subset(0, per_class=7)
    assert per_class(digits.train.labels[index]) == [7] * 10 and len(index.unique()) == 70
    assert digits.train.labels[index].tolist() == sorted(digits.train.labels[index].tolist())
    assert torch.equal(digits.train.take(index).images, digits.train.images[index])


def test_subsets_are_nested(digits):
    sizes = [dict(fraction=0.01), dict(per_class=3), dict(fraction=0.1), dict(per_class=40), dict(fraction=0.5)]
    nested = [set(digits.subset(5, **size).tolist()) for size in [*sizes, dict(fraction=1.0)]]
    for small, large in itertools.pairwise(nested):
        assert small < large
    assert nested[-1] == set(range(len(digits.train)))


def test_subset_depends_on_its_seed_alone(digits, rng_untouched):
    with rng_untouched():
        first = digits.subset(0, fraction=0.1)
    torch.manual_seed(7)
    assert torch.equal(first, digits.subset(0, fraction=0.1))
    other = digits.subset(1, fraction=0.1)
    for c in range(10):  # every class is drawn anew
        here, there = (i[digits.train.labels[i] == c].tolist() for i in (first, other))
        assert set(here) != set(there)


@pytest.mark.parametrize(
    "size, says",
    [
        (dict(), "either fraction or per_class"),
        (dict(fraction=0.1, per_class=1), "either fraction or per_class"),
        (dict(fraction=0), "fraction=0: must be in"),
        (dict(fraction=-0.1), "fraction=-0.1: must be in"),
        (dict(fraction=1.5), "fraction=1.5: must be in"),
        (dict(fraction=float("nan")), "fraction=nan: must be in"),
        (dict(fraction=0.001), "fraction=0.001: leaves class 0 of digits empty"),
        (dict(per_class=0), "per_class=0: leaves class 0 of digits empty"),
        (dict(per_class=1000), "per_class=1000: class 0 of digits has 124 training images"),
    ],
)
def test_impossible_subsets_are_refused(digits, size, says):
    with pytest.raises(ValueError, match=says):
        digits.subset(0, **size)


def test_unknown_data_set_is_refused():
    with pytest.raises(ValueError, match=r"'cats'.*digits.*folder:PATH"):
        load("cats", 8)


# --- bytes: what is kept, and what is made of it ----------------------------------------------------------------------


def test_bytes_are_standardised_like_the_floats_they_stand_for():
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(256, (3000, 3, 5, 5), generator=generator, dtype=torch.uint8)
    raw[:, 1] //= 3
    labels, indices = torch.arange(3000) % 2, torch.arange(3000).split((2000, 500, 500))
    ours = standardised("bytes", "ab", raw, labels, indices)
    train = raw[:2000].double() / 255
    for c in range(3):
        assert ours.mean[c].item() == pytest.approx(train[:, c].mean().item(), rel=1e-6)
        assert ours.std[c].item() == pytest.approx(train[:, c].std().item(), rel=1e-6)
    assert ours.test.raw.dtype == torch.uint8 and ours.test.opened().images.dtype == torch.float32
    expected = (raw[2500:].double() / 255 - train.mean((0, 2, 3)).view(3, 1, 1)) / train.std((0, 2, 3)).view(3, 1, 1)
    torch.testing.assert_close(ours.test.opened().images.double(), expected, atol=1e-5, rtol=0)
    assert torch.equal((ours.pixels(ours.test.opened().images) * 255).round().byte(), raw[2500:])


def test_a_batch_is_the_same_floats_as_the_whole(digits):
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(256, (70, 1, 4, 4), generator=generator, dtype=torch.uint8)
    coloured = standardised("bytes", "ab", raw, torch.arange(70) % 2, torch.arange(70).split((50, 10, 10))).train
    for split in (digits.test.opened(), coloured):
        index = torch.randperm(len(split), generator=generator)[:13]
        assert torch.equal(split.take(index).images, split.images[index])
        parts = list(split.batches(16))
        assert [len(p) for p in parts][:-1] == [16] * (len(parts) - 1)
        assert torch.equal(torch.cat([p.images for p in parts]), split.images)
        assert torch.equal(torch.cat([p.labels for p in parts]), split.labels)


def test_making_images_leaves_the_bytes_alone():
    split = Split(torch.rand(4, 1, 2, 2), torch.arange(4), torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
    split.images.mul_(0)
    assert split.raw.min() > 0 and split.images.min() > 0


def test_a_channel_without_any_contrast_is_refused():
    blank = torch.full((6, 1, 4, 4), 7, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"blank.*is constant"):
        standardised("blank", "ab", blank, torch.arange(6) % 2, torch.arange(6).split((2, 2, 2)))


# --- fingerprints -----------------------------------------------------------------------------------------------------


def test_a_fingerprint_stands_for_images_labels_and_split():
    raw = torch.arange(6 * 4, dtype=torch.uint8).view(6, 1, 2, 2)
    labels, indices = torch.arange(6) % 2, torch.arange(6).split((2, 2, 2))

    def of(raw=raw, labels=labels, indices=indices, name="a", where="here"):
        return standardised(name, "ab", raw, labels, indices, where).fingerprint

    assert of() == of(name="b", where="there") == of(raw.clone())
    pixel = raw.clone()
    pixel[5, 0, 1, 1] += 1
    others = [
        of(pixel),
        of(labels=1 - labels),
        of(indices=(indices[0], indices[2], indices[1])),
        of(raw.view(6, 1, 1, 4)),
    ]
    assert len({of(), *others}) == 5


def test_the_digits_fingerprint_never_changes(digits):
    # as first made, of floats k / 16 without rounding: published numbers hang on these images in this split
    assert digits.fingerprint == load("digits").fingerprint == FINGERPRINTS["digits"]
    assert digits.fingerprint != load("digits", 16).fingerprint


def test_results_depend_on_what_the_data_hold_and_not_on_where_they_lie(tmp_path, monkeypatch):
    a, b, c = (tmp_path / name for name in "abc")
    make_mnist(a)
    make_mnist(b)
    make_mnist(c, seed=1)
    monkeypatch.setenv("AUGDISTILL_DATA", str(b))

    def specs(**where):
        setup = Setup(**{"dataset": "mnist", "size": 8, **where})
        distilled = Distillation(setup, "unet", Subset(0, per_class=1), DistillConfig())
        jobs = Expert(setup, 0), distilled, Evaluation(setup, Subset(0, per_class=1), EvalConfig(), distilled)
        return [job.spec() for job in jobs]

    assert specs(data=str(a)) == specs()
    assert all(x != y for x, y in zip(specs(data=str(a)), specs(data=str(c)), strict=True))
    assert str(tmp_path) not in repr(specs(data=str(a)))


# --- published sets, made here in their formats -----------------------------------------------------------------------


@pytest.mark.parametrize("name, kind", [("mnist", "MNIST"), ("fashion", "FashionMNIST")])
def test_idx_files_are_read_as_they_are(tmp_path, name, kind):
    folder = make_mnist(tmp_path, kind)
    check_against_idx(load(name, 0, str(tmp_path)), folder)


@pytest.mark.parametrize("name, kind, classes", [("cifar10", "CIFAR10", 10), ("cifar100", "CIFAR100", 100)])
def test_cifar_s_pickles_are_read_as_they_are(tmp_path, monkeypatch, name, kind, classes):
    kind = getattr(datasets, kind)
    folder = make_cifar(tmp_path, kind, monkeypatch, classes=classes)
    data = load(name, 0, str(tmp_path))
    check_against_pickles(data, folder, kind)
    assert data.classes == tuple(f"class {c}" for c in range(classes))


def check_published(data, train, test, held_out):
    """`train` and `test` are (images `[n, C, H, W]`, labels) as numpy arrays, read by other means."""
    as_rows = [np.concatenate([y[:, None].astype(np.uint8), x.reshape(len(x), -1)], 1) for x, y in (train, test)]
    assert np.array_equal(rows(data.test), as_rows[1])  # the official test split, in its order
    ours = torch.cat([rows(data.train), rows(data.validation)]).numpy()
    assert ours.shape == as_rows[0].shape
    assert sorted(map(bytes, ours)) == sorted(map(bytes, as_rows[0]))  # none lost, none twice
    count = len(data.classes)
    expected = [round(held_out * n) for n in np.bincount(train[1], minlength=count)]
    assert torch.bincount(data.validation.labels, minlength=count).tolist() == expected
    for c in range(data.shape[0]):
        pixels = data.train.raw[:, c].numpy() / 255
        assert data.mean[c].item() == pytest.approx(pixels.mean(), abs=1e-6)
        assert data.std[c].item() == pytest.approx(pixels.std(ddof=1), abs=1e-6)
    # the same split ever after
    train_index, validation_index, _ = split_indices(torch.from_numpy(train[1].astype(np.int64)), (held_out, 0))
    assert not set(train_index.tolist()) & set(validation_index.tolist())
    assert np.array_equal(rows(data.validation), as_rows[0][validation_index])


def check_against_idx(data, folder):
    read = []
    for part in ("train", "t10k"):
        labels = np.frombuffer((folder / f"{part}-labels-idx1-ubyte").read_bytes()[8:], np.uint8)
        images = (folder / f"{part}-images-idx3-ubyte").read_bytes()
        shape = struct.unpack(">3I", images[4:16])
        read.append((np.frombuffer(images[16:], np.uint8).reshape(shape[0], 1, *shape[1:]), labels))
    check_published(data, *read, 0.1)


def check_against_pickles(data, folder, kind):
    def read(table):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pickles older than numpy's rules
            batches = [pickle.loads((folder / file).read_bytes(), encoding="latin1") for file, _ in table]
        labels = [label for b in batches for label in b.get("labels", b.get("fine_labels"))]
        return np.concatenate([b["data"] for b in batches]).reshape(-1, 3, 32, 32), np.array(labels)

    check_published(data, read(kind.train_list), read(kind.test_list), 0.1)


# --- the same on real data --------------------------------------------------------------------------------------------

REAL = Path(os.environ.get("AUGDISTILL_DATA", "/nowhere"))


def real(name: str) -> str:
    folder = next(iter(files(name))).parts[0]
    if not (REAL / folder).is_dir():
        pytest.skip(f"AUGDISTILL_DATA names no folder that holds {folder}")
    return str(REAL)


@pytest.mark.parametrize("name, kind", [("mnist", "MNIST"), ("fashion", "FashionMNIST")])
def test_real_idx_files(name, kind):
    data = load(name, 0, real(name))
    assert data.fingerprint == FINGERPRINTS[name]
    assert data.shape == (1, 28, 28) and [len(getattr(data, k)) for k in SPLITS][2] == 10_000
    check_against_idx(data, REAL / kind / "raw")


@pytest.mark.parametrize("name, kind", [("cifar10", "CIFAR10"), ("cifar100", "CIFAR100")])
def test_real_pickles(name, kind):
    kind = getattr(datasets, kind)
    data = load(name, 0, real(name))
    assert data.fingerprint == FINGERPRINTS[name]
    assert data.shape == (3, 32, 32) and [len(getattr(data, k)) for k in SPLITS] == [45_000, 5_000, 10_000]
    check_against_pickles(data, REAL / kind.base_folder, kind)


@pytest.mark.parametrize("preset", ["fashion-small", "mnist-small", "cifar10-small"])
def test_presets_for_published_sets_fit_them(preset):
    from augdistill_report.commands.preflight import preflight
    from augdistill_report.settings import resolve

    preflight(resolve(preset, {"data": real(resolve(preset).dataset)}))


def test_labels_that_fit_no_class_or_not_the_images_are_refused(tmp_path):
    path = make_mnist(tmp_path) / "train-labels-idx1-ubyte"
    path.write_bytes(idx(np.arange(200, dtype=np.uint8)))
    with pytest.raises(ValueError, match="'mnist': has labels outside its 10 classes"):
        load("mnist", 0, str(tmp_path))
    path.write_bytes(idx(np.zeros(100, np.uint8)))
    with pytest.raises(ValueError, match="200 images but 100 labels"):
        load("mnist", 0, str(tmp_path))


@pytest.mark.parametrize("name", ["cats", "", "folder", "folder:", "digits:", "digits:/tmp", "FOLDER:x"])
def test_names_that_are_none(name):
    with pytest.raises(ValueError, match=r"dataset=.*must be one of digits, mnist, .*folder:PATH"):
        check_name(name)
    with pytest.raises(ValueError, match=r"dataset="):
        Settings(dataset=name)


def test_paths_in_settings_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = Settings(dataset="folder:pictures", data="sets")
    assert settings.dataset == f"folder:{tmp_path / 'pictures'}" and settings.data == str(tmp_path / "sets")
    assert settings.select(Setup).data == settings.data and Settings.from_dict(settings.to_dict()) == settings


# --- the command line -------------------------------------------------------------------------------------------------


def test_check_says_what_it_found(tmp_path, capsys):
    make_mnist(tmp_path)
    assert main(["data", "check", "mnist", "--data", str(tmp_path)]) == 0
    data, said = load("mnist", 0, str(tmp_path)), capsys.readouterr().out
    for fact in (str(tmp_path), "1 x 8 x 8", "180 train, 20 validation, 30 test", f"{data.mean.item():.4f}"):
        assert fact in said
    assert "resized" not in said
    assert f"fingerprint: {data.fingerprint}" in said and f"std: {data.std.item():.4f}" in said
    lines = [line.split() for line in said.splitlines()]
    assert ["0", "-", "zero", "18", "2", "3"] in lines
    assert main(["data", "check", "digits", "--size", "16"]) == 0 and "1 x 16 x 16" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["mnist"], "not found.*fetch mnist"),
        (["cats"], "dataset='cats'"),
        (["digits", "--size", "-1"], "size=-1"),
    ],
)
def test_check_names_what_is_wrong_with_exit_code_2(arguments, says, capsys):
    assert main(["data", "check", *arguments]) == 2
    assert re.search(says, capsys.readouterr().err)
