"""Data: the digits are split once and for all, stratified, standardised by the training set; subsets are nested.

The reference is scikit-learn's own array, and for the resizing the bilinear weights written out.
"""

import itertools

import pytest
import torch
from sklearn.datasets import load_digits as sklearn_digits

from augdistill_report.data import load, split_indices, standardised

SPLITS = ("train", "validation", "test")


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
        pixels = (digits.pixels(split.images) * 16).round()
        torch.testing.assert_close(digits.pixels(split.images) * 16, pixels, atol=1e-4, rtol=0)  # inverts
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
        assert torch.equal(getattr(again, name).images, getattr(digits, name).images)
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
            torch.testing.assert_close(getattr(data, name).images[:, c], (pixels[index, c] - mean) / std)
    torch.testing.assert_close(data.pixels(data.test.images), pixels[25:])
    assert data.pixels(data.test.images * 100).max() == 1 and data.pixels(data.test.images * 100).min() == 0


def test_images_are_resized_bilinearly(raw, digits):
    weights = torch.zeros(16, 8, dtype=torch.float64)
    for k in range(16):  # pixel centres: row k of 16 lies at (k + 1/2) / 2 - 1/2 among the 8, clamped to the border
        at = min(max((k + 0.5) / 2 - 0.5, 0), 7)
        low = min(int(at), 6)
        weights[k, low], weights[k, low + 1] = low + 1 - at, at - low
    data, index = load("digits", 16), split_indices(raw[1], (0.1, 0.2))
    assert data.shape == (1, 16, 16)
    expected = weights @ (raw[0][index[2]] / 16) @ weights.T
    torch.testing.assert_close(data.pixels(data.test.images)[:, 0].double(), expected, atol=1e-5, rtol=0)


def test_to_moves_everything(digits):
    moved = digits.to("meta")
    tensors = [t for name in SPLITS for t in (getattr(moved, name).images, getattr(moved, name).labels)]
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
