"""Data: every set is split once and for all, stratified, standardised by its training images; subsets are nested.

The references are scikit-learn's own array, the bytes of the published files as this test reads them, and for the
resizing the weights written out. What needs real data runs where AUGDISTILL_DATA names a folder that has them; small
sets in the same formats are made here for the rest.
"""

import gzip
import hashlib
import http.server
import io
import itertools
import os
import pickle
import struct
import tarfile
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_folder
from PIL import Image
from sklearn.datasets import load_digits as sklearn_digits
from torchvision import datasets

from augdistill_core import DistillConfig
from augdistill_report.commands.cli import main
from augdistill_report.data import sources as data_files
from augdistill_report.data.datasets import Split, check_name, load, load_data, split_indices, standardised
from augdistill_report.data.folders import resized
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
}


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


@pytest.mark.parametrize("size, to", [(8, 3), (9, 4), (28, 16), (4, 10)])
def test_bytes_are_resized_with_a_triangle_as_wide_as_the_step(size, to):
    raw = torch.randint(256, (2, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    scale = size / to
    centres = (torch.arange(to, dtype=torch.float64) + 0.5) * scale - 0.5
    distance = (centres[:, None] - torch.arange(size)) / max(scale, 1)
    weights = (1 - distance.abs()).clamp(min=0)
    weights /= weights.sum(1, keepdim=True)
    expected = weights @ raw.double() @ weights.T
    assert (resized(raw, to).double() - expected).abs().max() <= 0.5 + 1e-4


def test_a_channel_without_any_contrast_is_refused():
    blank = torch.full((6, 1, 4, 4), 7, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"blank.*same everywhere"):
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


def idx(array) -> bytes:
    """An idx file of bytes (LeCun's format): 0, 0, 8 = uint8, the number of axes, their lengths, the bytes."""
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def mnist_files(seed=0) -> dict[str, bytes]:
    """200 training and 30 test images of 8x8 noise in ten classes."""
    rng, files = np.random.default_rng(seed), {}
    for name, count in (("train", 200), ("t10k", 30)):
        files[f"{name}-images-idx3-ubyte"] = idx(rng.integers(0, 256, (count, 8, 8), dtype=np.uint8))
        files[f"{name}-labels-idx1-ubyte"] = idx(rng.permutation(np.arange(count, dtype=np.uint8) % 10))
    return files


def make_mnist(root: Path, kind="MNIST", seed=0) -> Path:
    folder = root / kind / "raw"
    folder.mkdir(parents=True)
    for name, content in mnist_files(seed).items():
        (folder / name).write_bytes(content)
    return folder


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def cifar_files(kind, monkeypatch, classes=10) -> dict[str, bytes]:
    """A small set in CIFAR's format by file, with torchvision's md5 sums replaced by those of these files."""
    rng, key = np.random.default_rng(0), kind.meta["key"]
    label = "fine_labels" if key.startswith("fine") else "labels"
    files = {kind.meta["filename"]: pickle.dumps({key: [f"class {c}" for c in range(classes)]})}
    for file, _ in [*kind.train_list, *kind.test_list]:
        data = rng.integers(0, 256, (20 * classes, 3072), dtype=np.uint8)
        files[file] = pickle.dumps({"data": data, label: [i % classes for i in range(20 * classes)]})
    for table in ("train_list", "test_list"):
        monkeypatch.setattr(kind, table, [[file, md5(files[file])] for file, _ in getattr(kind, table)])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": md5(files[kind.meta["filename"]])})
    return files


def make_cifar(root: Path, kind, monkeypatch, **options) -> Path:
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    for name, content in cifar_files(kind, monkeypatch, **options).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(autouse=True)
def nowhere(monkeypatch, tmp_path):
    """No data set of this machine is found, unless a test says where; nothing is kept from one test to the next."""
    monkeypatch.delenv("AUGDISTILL_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load_data.cache_clear()


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


def rows(split) -> torch.Tensor:
    """A split's labels and bytes `[n, 1 + C H W]`."""
    return torch.cat([split.labels[:, None].byte(), split.raw.flatten(1)], 1)


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
    folder = next(iter(data_files.files(name))).parts[0]
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
    assert data.fingerprint == FINGERPRINTS.get(name, data.fingerprint)  # nobody here has CIFAR-100 yet
    assert data.shape == (3, 32, 32) and [len(getattr(data, k)) for k in SPLITS] == [45_000, 5_000, 10_000]
    check_against_pickles(data, REAL / kind.base_folder, kind)


@pytest.mark.parametrize("preset", ["fashion-small", "mnist-small", "cifar10-small"])
def test_presets_for_published_sets_fit_them(preset):
    from augdistill_report.commands.preflight import preflight
    from augdistill_report.settings import resolve

    preflight(resolve(preset, {"data": real(resolve(preset).dataset)}))


# --- where they are looked for, and what is wrong with them -----------------------------------------------------------


def test_roots_are_looked_into_in_order(tmp_path, monkeypatch):
    first, second, cache = tmp_path / "first", tmp_path / "second", tmp_path / "cache" / "augdistill"
    make_mnist(cache)
    monkeypatch.setenv("AUGDISTILL_DATA", str(second))
    first.mkdir()
    assert load("mnist", 0, str(first)).where == str(cache)
    make_mnist(second)
    assert load("mnist", 0, str(first)).where == str(second)
    make_mnist(first)
    assert load("mnist", 0, str(first)).where == str(first)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list(data_files.roots().values())[-1] == tmp_path / ".cache" / "augdistill"


def test_a_missing_set_says_where_it_was_looked_for_and_what_helps(tmp_path, monkeypatch):
    monkeypatch.setenv("AUGDISTILL_DATA", str(tmp_path / "mine"))
    (tmp_path / "given").mkdir()
    with pytest.raises(ValueError, match="'cifar100': not found") as error:
        load("cifar100", 0, str(tmp_path / "given"))
    for place in ("given", "mine", "cache/augdistill"):
        assert str(tmp_path / place / "cifar-100-python") in str(error.value)
    assert "augdistill data fetch cifar100" in str(error.value)
    with pytest.raises(ValueError, match=r"data=.*nosuch.*no such folder"):
        load("mnist", 0, str(tmp_path / "nosuch"))


@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte"])
@pytest.mark.parametrize("how", ["missing", "empty", "short", "long", "foreign"])
def test_a_damaged_idx_file_is_named(tmp_path, file, how):
    path = make_mnist(tmp_path) / file
    content = path.read_bytes()
    changed = {"empty": b"", "short": content[:-1], "long": content + b"x", "foreign": gzip.compress(content)}
    path.unlink() if how == "missing" else path.write_bytes(changed[how])
    with pytest.raises(ValueError, match=f"{path} is {'missing' if how == 'missing' else 'damaged'}.*data fetch mnist"):
        load("mnist", 0, str(tmp_path))


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("how", ["missing", "short", "bit"])
def test_a_damaged_pickle_is_named_and_never_opened(tmp_path, monkeypatch, file, how):
    path = make_cifar(tmp_path, datasets.CIFAR10, monkeypatch) / file
    content = path.read_bytes()
    changed = {"short": content[: len(content) // 2], "bit": content[:20] + bytes((content[20] ^ 1,)) + content[21:]}
    path.unlink() if how == "missing" else path.write_bytes(changed[how])
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(ValueError, match=f"{path} is {'missing' if how == 'missing' else 'damaged .md5'}"):
        load("cifar10", 0, str(tmp_path))


def test_labels_that_fit_no_class_or_not_the_images_are_refused(tmp_path):
    path = make_mnist(tmp_path) / "train-labels-idx1-ubyte"
    path.write_bytes(idx(np.arange(200, dtype=np.uint8)))
    with pytest.raises(ValueError, match="'mnist': labels beyond its 10 classes"):
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


# --- folders of images ------------------------------------------------------------------------------------------------


def test_a_folder_is_a_data_set(tmp_path):
    root = make_folder(tmp_path / "pets", count=20)
    (root / ".hidden").mkdir()
    (root / "cat" / ".ipynb_checkpoints").mkdir()
    (root / "cat" / ".ipynb_checkpoints" / "00-checkpoint.png").write_bytes((root / "cat" / "00.png").read_bytes())
    (root / "cat" / "._00.png").write_bytes(b"what macOS leaves")
    (root / "README.txt").write_text("not a class")
    (root / "cat" / "notes.txt").write_text("not an image")
    data = load(f"folder:{root}", 12)
    assert data.classes == ("cat", "dog") and data.shape == (3, 12, 12) and data.name == f"folder:{root}"
    assert [per_class(getattr(data, k).labels)[:2] for k in SPLITS] == [[14, 14], [2, 2], [4, 4]]
    ours = {bytes(row) for k in SPLITS for row in rows(getattr(data, k)).numpy()}
    theirs = {
        bytes([label]) + np.asarray(Image.open(path)).transpose(2, 0, 1).tobytes()
        for label, c in enumerate(("cat", "dog"))
        for path in (root / c).glob("[!.]*.png")
    }
    assert ours == theirs and len(ours) == 40
    assert load(f"folder:{root}", 12).fingerprint == data.fingerprint
    moved = root.rename(tmp_path / "elsewhere")
    assert load(f"folder:{moved}", 12).fingerprint == data.fingerprint


def test_images_of_many_sizes_and_modes_become_one_tensor(tmp_path):
    root = make_folder(tmp_path, size=(9, 17))
    for i, mode in enumerate(["L", "1", "P", "RGBA", "LA", "CMYK"]):
        image = Image.new("RGB", (20 + i, 30), (200, 10 * i, 5)).convert(mode)
        image.save(tmp_path / "cat" / f"x{mode}.{'tif' if mode == 'CMYK' else 'png'}")
    Image.new("P", (5, 5)).save(tmp_path / "cat" / "transparent.png", transparency=bytes([0, 128, 255]))
    data = load(f"folder:{root}", 16)
    assert data.shape == (3, 16, 16) and sum(len(getattr(data, k)) for k in SPLITS) == 27


def test_grey_images_have_one_channel(tmp_path):
    assert load(f"folder:{make_folder(tmp_path, mode='L')}", 8).shape == (1, 8, 8)


def test_a_camera_s_orientation_is_followed(tmp_path):
    root = make_folder(tmp_path, count=6)
    upright = np.zeros((12, 12, 3), np.uint8)
    upright[:6] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # held upside down
    for c in ("cat", "dog"):
        for path in (root / c).iterdir():
            Image.fromarray(upright[::-1].copy()).save(path, exif=exif)
    data = load(f"folder:{root}", 12)
    assert (data.train.raw[:, 0, :6] == 255).all() and (data.train.raw[:, 0, 6:] == 0).all()


def test_folders_that_are_no_data_set(tmp_path):
    def refused(match):
        with pytest.raises(ValueError, match=match):
            load(f"folder:{tmp_path}", 8)

    with pytest.raises(ValueError, match=r"dataset='folder:/nowhere.*no such folder"):
        load("folder:/nowhere/at/all", 8)
    refused("at least two; has \\[\\]")
    make_folder(tmp_path, ["cat"])
    refused("at least two; has \\['cat'\\]")
    (tmp_path / "dog").mkdir()
    refused("class dog has 0 images")
    (tmp_path / "dog").rmdir()
    make_folder(tmp_path, ["dog"], count=5)
    refused("class dog has 5 images.*at least 6")


@pytest.mark.parametrize("how", ["cut", "text", "empty", "deep"])
def test_a_broken_image_is_named(tmp_path, how):
    root = make_folder(tmp_path, size=(64, 64))
    path = root / "dog" / "03.png"
    if how == "deep":
        Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(path)
    else:
        path.write_bytes({"cut": path.read_bytes()[:900], "text": b"hello", "empty": b""}[how])
    with pytest.raises(ValueError, match=f"{path} is no image that can be read"):
        load(f"folder:{root}", 8)


# --- the command line -------------------------------------------------------------------------------------------------


def test_check_says_what_it_found(tmp_path, capsys):
    make_mnist(tmp_path)
    assert main(["data", "check", "mnist", "--data", str(tmp_path)]) == 0
    data, said = load("mnist", 0, str(tmp_path)), capsys.readouterr().out
    for fact in (str(tmp_path), "1 x 8 x 8", "180 train, 20 validation, 30 test", f"{data.mean.item():.4f}"):
        assert fact in said
    assert f"fingerprint: {data.fingerprint}" in said and f"std: {data.std.item():.4f}" in said
    lines = [line.split() for line in said.splitlines()]
    assert ["0", "-", "zero", "18", "2", "3"] in lines
    assert main(["data", "check", "digits", "--size", "16"]) == 0 and "1 x 16 x 16" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["check", "mnist"], "not found.*fetch mnist"),
        (["check", "cats"], "dataset='cats'"),
        (["check", "digits", "--size", "-1"], "size=-1"),
        (["fetch", "digits"], "'digits': nothing to download"),
        (["fetch", "folder:x"], "nothing to download"),
        (["fetch", "mnist", "--mirror", "http://example.com/"], "must be https"),
        (["fetch", "mnist", "--mirror", "file:///etc/"], "must be https"),
        (["fetch", "mnist", "--mirror", "http://127.0.0.1.example.com/"], "must be https"),
        (["fetch", "mnist", "--mirror", "http://127.0.0.1:9/"], "Connection refused"),
        (["fetch", "mnist", "--mirror", "https://host.invalid/"], "host.invalid"),
    ],
)
def test_what_cannot_be_done_is_exit_code_2(arguments, says, capsys, tmp_path):
    assert main(["data", *arguments]) == 2
    error = capsys.readouterr().err
    assert pytest.raises(ValueError, match=says).matches(ValueError(error)), error
    assert not list(tmp_path.iterdir())


# --- downloading, from a server of the test's own ---------------------------------------------------------------------


@pytest.fixture
def server():
    """(URL, what it serves by path): bytes, or a tuple (status, headers, body)."""
    served = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers, body = 404, {}, b""
            if (found := served.get(self.path)) is not None:
                status, headers, body = found if isinstance(found, tuple) else (200, {}, found)
            self.send_response(status)
            for key, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.05))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", served
        server.shutdown()
        thread.join()


@pytest.fixture
def mnist_server(server, monkeypatch):
    url, served = server
    archives = {f"{name}.gz": gzip.compress(content) for name, content in mnist_files().items()}
    monkeypatch.setattr(datasets.MNIST, "resources", [(name, md5(content)) for name, content in archives.items()])
    served.update({f"/m/{name}": content for name, content in archives.items()})
    return url, served


def test_fetch_then_check(mnist_server, tmp_path, capsys):
    url, served = mnist_server
    fetch = ["data", "fetch", "mnist", "--mirror", f"{url}/m/", "--data", str(tmp_path / "new" / "root")]
    assert main(fetch) == 0
    out, progress = capsys.readouterr()
    assert "180 train" in out and progress.count(" MB") == 4
    make_mnist(tmp_path / "reference")
    assert load("mnist", 0, str(tmp_path / "new/root")).fingerprint in out
    assert f"fingerprint: {load('mnist', 0, str(tmp_path / 'reference')).fingerprint}" in out
    names = sorted(p.name for p in (tmp_path / "new/root").rglob("*") if p.is_file())
    assert names == sorted(mnist_files())  # the archives are not kept, nor anything else
    served.clear()
    assert main(fetch) == 0 and " MB" not in capsys.readouterr().err  # it is there: nothing is downloaded


def test_fetch_goes_to_the_cache_or_where_the_environment_says(mnist_server, tmp_path, monkeypatch):
    fetch = ["data", "fetch", "mnist", "--mirror", f"{mnist_server[0]}/m"]
    assert main(fetch) == 0
    assert (tmp_path / "cache/augdistill/MNIST/raw/t10k-labels-idx1-ubyte").is_file()
    monkeypatch.setenv("AUGDISTILL_DATA", str(tmp_path / "mine"))
    assert main(fetch) == 0
    assert (tmp_path / "mine/MNIST/raw/t10k-labels-idx1-ubyte").is_file()


def test_fetch_unpacks_cifar_s_archive(server, monkeypatch, tmp_path):
    (url, served), kind, archive = server, datasets.CIFAR10, io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, content in [
            *cifar_files(kind, monkeypatch).items(),
            ("readme.html", b"more"),
            ("../../out", b"evil"),
        ]:
            info = tarfile.TarInfo(f"{kind.base_folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    served[f"/{kind.filename}"] = archive.getvalue()
    monkeypatch.setattr(kind, "tgz_md5", md5(archive.getvalue()))
    assert main(["data", "fetch", "cifar10", "--mirror", url, "--data", str(tmp_path / "root")]) == 0
    assert load("cifar10", 0, str(tmp_path / "root")).shape == (3, 32, 32)
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {str(p.name) for p in data_files.files("cifar10")}
    (tmp_path / "root" / kind.base_folder / "data_batch_2").write_bytes(b"half")
    assert main(["data", "fetch", "cifar10", "--mirror", url, "--data", str(tmp_path / "root")]) == 0  # mends it


@pytest.mark.parametrize("how", ["changed", "cut", "absent", "error", "leaves TLS", "hangs up"])
def test_a_download_that_goes_wrong_leaves_nothing(mnist_server, tmp_path, capsys, how):
    url, served = mnist_server
    path = "/m/t10k-images-idx3-ubyte.gz"
    good = served[path]
    served[path], says = {
        "changed": (good[:-1] + b"x", "md5 .*torchvision's table says"),
        "cut": ((200, {}, good[:50]), "50 bytes with md5"),
        "absent": (None, "Not Found"),
        "error": ((500, {}, b""), "Internal Server Error"),
        "leaves TLS": ((302, {"Location": "http://example.com/x"}, b""), "example.com.*must be https"),
        "hangs up": ((200, {"Content-Length": str(len(good))}, good[:50]), "50 bytes with md5|IncompleteRead"),
    }[how]
    root = tmp_path / "root"
    fetch = ["data", "fetch", "mnist", "--mirror", f"{url}/m", "--data", str(root)]
    assert main(fetch) == 2
    error = capsys.readouterr().err
    assert pytest.raises(ValueError, match=says).matches(ValueError(error)), error
    assert "t10k-images" in error and "--mirror" in error and not root.exists()
    served[path] = good
    assert main(fetch) == 0  # a clean restart


def test_an_interruption_leaves_no_half_file(mnist_server, tmp_path, monkeypatch, capsys):
    url, _ = mnist_server
    fetch = ["data", "fetch", "mnist", "--mirror", f"{url}/m", "--data", str(tmp_path / "root")]
    replace, calls = os.replace, []

    def stopped(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        replace(*arguments)

    monkeypatch.setattr(os, "replace", stopped)
    assert main(fetch) == 130
    left = [p for p in (tmp_path / "root").rglob("*") if p.is_file()]
    assert len(left) == 2 and all(p.read_bytes() == mnist_files()[p.name] for p in left)
    assert main(["data", "check", "mnist", "--data", str(tmp_path / "root")]) == 2
    assert "is missing" in capsys.readouterr().err
    monkeypatch.setattr(os, "replace", replace)
    assert main(fetch) == 0


def test_a_place_that_cannot_be_written_is_said(mnist_server, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["data", "fetch", "mnist", "--mirror", f"{mnist_server[0]}/m", "--data", str(tmp_path / "file")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_the_sources_known_here_speak_tls():
    for name in data_files.PUBLISHED:
        archives, folders = data_files.sources(name)
        assert folders and all(folder.startswith("https://") and folder.endswith("/") for folder in folders)
        assert all(len(sum) == 32 for _, sum in archives)
