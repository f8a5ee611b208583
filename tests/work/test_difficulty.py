"""The ranking of images by the experts, and the subsets of one difficulty that are drawn by it."""

import dataclasses

import pytest
import torch

from augdistill_core import unflatten
from augdistill_report.data.datasets import WINDOW, load, window_of
from augdistill_report.files.store import Store
from augdistill_report.settings import resolve
from augdistill_report.work.difficulty import LOOKS, PLACES, Difficulty, looks, subset_index
from augdistill_report.work.experts import load_trajectories
from augdistill_report.work.jobs import Subset
from augdistill_report.work.setup import Setup


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    setup = resolve("smoke", {"width": 4}).select(Setup)
    return setup, setup.load(), Store(tmp_path_factory.mktemp("store"))


def test_an_image_is_as_easy_as_the_experts_find_its_label_probable(world):
    setup, data, store = world
    ease = Difficulty(setup).stored(store)[0]["probability"]
    experts = load_trajectories(setup, store)
    student, means = experts.student.double(), []
    images = data.train.images.double()
    for trajectory in experts.trajectories:
        for time in range(1, experts.snapshots):
            state = dict(
                zip(dict(student.named_parameters()), unflatten(student, trajectory[time].double()), strict=True)
            )
            student.load_state_dict(state)
            means.append(student(images).softmax(1)[torch.arange(len(images)), data.train.labels].detach())
    assert len(means) == setup.experts * setup.epochs  # every snapshot, since there are fewer than 24
    assert torch.allclose(ease.double(), torch.stack(means).mean(0), atol=1e-6)
    unrolled = dataclasses.replace(setup, augment="affine")  # what the unroll does is no matter of the experts
    assert Difficulty(unrolled).spec() == Difficulty(setup).spec()


@pytest.mark.parametrize("experts", [1, 3, 8, 12, 13, 24, 25, 100])
def test_early_and_late_snapshots_are_measured_of_any_number_of_experts(experts):
    used, times = looks(experts, 51)
    assert used == min(experts, 8) and len(times) >= 3 and used * len(times) <= LOOKS
    assert times[0] == 1 and times[-1] == 50 and times == sorted(times)
    assert looks(experts, 2) == (used, [1])  # one epoch, one snapshot


def test_a_window_lies_where_its_place_says():
    ease = torch.rand(300, generator=torch.Generator().manual_seed(1))
    members = torch.arange(0, 300, 3)
    order = members[ease[members].argsort(descending=True)]
    for place in (*PLACES, 1.0):
        first = round(place * 85)
        assert torch.equal(window_of(members, ease, 10, place), order[first : first + 15])
        assert len(window_of(members, ease, 0, place)) == 0
        assert torch.equal(window_of(members, ease, 80, place), order)


@pytest.mark.parametrize("size", [{"fraction": 0.1}, {"per_class": 1}, {"fraction": 0.5}, {"fraction": 1.0}])
def test_a_window_is_stratified_and_of_its_difficulty(world, size):
    setup, data, store = world
    ease, found = Difficulty(setup).stored(store)[0]["probability"], {}
    for window in (0.0, 0.5, 1.0):
        subset = Subset(3, **size, window=window)
        index = subset_index(subset, setup, store)
        usual = Subset(3, **size).index(data)
        assert torch.equal(data.train.labels[index], data.train.labels[usual]) and index.unique().numel() == len(index)
        found[window] = ease[index].mean()
        for c in range(10):
            members = (data.train.labels == c).nonzero().flatten()
            count = int((data.train.labels[index] == c).sum())
            width = min(round(WINDOW * count), len(members))
            by_hand = sorted(members.tolist(), key=lambda i: -ease[i])
            start = round(window * (len(members) - width))
            assert set(index[data.train.labels[index] == c].tolist()) <= set(by_hand[start : start + width])
    if size.get("fraction") == 1.0:
        assert found[0.0] == found[1.0]
    else:
        assert found[0.0] > found[0.5] > found[1.0]
        other = subset_index(Subset(4, **size, window=0.5), setup, store)
        assert not torch.equal(other, subset_index(Subset(3, **size, window=0.5), setup, store)) or "per_class" in size


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(window=1.5), r"window=1.5, skip=0.0: window must be in \[0, 1\]"),
        (dict(window=0.5, skip=0.1), "and skip 0 with it"),
        (dict(window=0.5), "needs the ease of each of the .* training images"),
    ],
)
def test_a_wrong_window_is_named(wrong, said):
    with pytest.raises(ValueError, match=said):
        Subset(0, fraction=0.1, **wrong).index(load("digits", 8))
