"""How far from the target students end, by each method: against plain SGD and closed forms."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from augdistill_core import DistillConfig, seeded
from augdistill_report.files.store import Store
from augdistill_report.settings import resolve
from augdistill_report.show import subset_plots
from augdistill_report.studies import drift
from augdistill_report.work.distillation import Distillation
from augdistill_report.work.experts import load_trajectories
from augdistill_report.work.jobs import Subset
from augdistill_report.work.scoring import EvalConfig, Evaluation
from augdistill_report.work.setup import Setup

# the whole set in one batch: nothing is left to chance
WHOLE = dict(expert_batch=100_000, expert_lr=0.1, epochs=3, snapshot_steps=1, expert_augment="none")


def evaluation(setup: Setup, fraction: float, distilled=None, **changes) -> Evaluation:
    return Evaluation(setup, Subset(0, fraction=fraction), EvalConfig(**changes), distilled)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("store"))


def step(setup: Setup, start: torch.Tensor, images, labels) -> torch.Tensor:
    """How far one step of torch's SGD moves a student."""
    student = setup.student(setup.load())
    vector_to_parameters(start.clone(), student.parameters())
    optimizer = torch.optim.SGD(student.parameters(), lr=setup.expert_lr)
    F.cross_entropy(student(images), labels).backward()
    optimizer.step()
    return parameters_to_vector(student.parameters()).detach() - start


@pytest.mark.parametrize("start", [0, 2])
def test_without_noise_it_is_the_distance_of_two_steps(store, start):
    setup = resolve("smoke", WHOLE).select(Setup)
    train = setup.load().train
    methods = (("subset", evaluation(setup, 0.1)), ("all", evaluation(setup, 1.0)))
    found = drift.Drift(setup, start, methods).stored(store)[1]
    for expert, trajectory in enumerate(load_trajectories(setup, store).trajectories):
        subset = train.take(Subset(0, fraction=0.1).index(setup.load()))
        where, there = (step(setup, trajectory[start], split.images, split.labels) for split in (train, subset))
        length, remaining = float(where.square().sum()), float((there - where).square().sum())
        assert found["length"][expert] == pytest.approx(length, rel=1e-3)
        assert found["remaining"]["subset"][expert] == pytest.approx(remaining, rel=1e-3)
        assert abs(found["noise"][expert]) < 1e-3 * length > abs(found["remaining"]["all"][expert])
        assert remaining > 0.01 * length


def test_what_two_have_in_common_leaves_their_noise_out():
    """Over every pair of noises from a finite set, so that the expectations are exact."""
    noises = torch.randn(5, 4, generator=seeded(0), dtype=torch.float64)
    noises -= noises.mean(0)
    one, other = torch.randn(2, 4, generator=seeded(1), dtype=torch.float64)
    pairs = list(itertools.product(noises, repeat=2))
    own = np.mean([drift.common(one + torch.stack(pair)) for pair in pairs])
    assert own == pytest.approx(float(one @ one))
    across = np.mean([drift.common((one + a)[None], (other + b)[None]) for a, b in pairs])
    assert across == pytest.approx(float(one @ other))


def test_all_the_data_with_the_experts_augmentation_reach_the_target_but_for_chance(store):
    """Small batches and an augmentation: the noise is left out on both sides; a subset does not reach the target."""
    settings = resolve("smoke", dict(experts=3, expert_augment="affine", max_start_epoch=1, iterations=1))
    setup = settings.select(Setup)
    phi = Distillation(setup, "policy", Subset(0, fraction=0.1), settings.select(DistillConfig))
    methods = {
        "as the experts": evaluation(setup, 1.0, eval_augment="affine"),
        "subset": evaluation(setup, 0.1),
        "phi": evaluation(setup, 0.1, phi),
        "phi, not applied": evaluation(setup, 0.1, phi, phi_strength=0.0),
        "phi, then affine": evaluation(setup, 0.1, phi, eval_augment="affine"),
    }
    found = drift.Drift(setup, 2, tuple(methods.items())).stored(store)[1]
    remaining = found["remaining"]
    assert remaining["phi, not applied"] == remaining["subset"] and remaining["phi"] != remaining["subset"]
    assert remaining["phi, then affine"] != remaining["phi"]
    shares = drift.shares(found)
    value, error = shares["as the experts"]
    assert abs(value) < 4 * error + 0.02 and shares["subset"][0] > 0.1 > value
    assert 0 < shares[drift.NOISE][0] < 1


def test_shares_in_closed_form():
    found = {"length": [1.0, 3.0], "noise": [1.0, 1.0], "remaining": {"a": [0.5, 1.5], "b": [1.0, 0.0]}}
    shares = drift.shares(found)
    assert shares[drift.NOISE][0] == pytest.approx(2 / 6) and shares["a"] == pytest.approx((0.5, 0.0))
    value, error = shares["b"]  # 1/4: what each differs by from it, .75 and -.75, in mean lengths of 2
    assert (value, error) == pytest.approx((0.25, np.std([0.375, -0.375], ddof=1) / 2**0.5))
    one = {"length": [2.0], "noise": [2.0], "remaining": {"a": [1.0]}}
    assert drift.shares(one) == {drift.NOISE: (0.5, None), "a": (0.5, None)}


def test_the_picture_has_a_curve_a_method():
    found = {
        0: {drift.NOISE: (0.1, 0.0), "no augmentation": (0.5, 0.1)},
        40: {drift.NOISE: (0.7, 0.1), "no augmentation": (2, None)},
    }
    figure = subset_plots.drift_panels({"1 %": {"all": found}, "10 %": {"all": found}}, drift.NOISE)
    assert [len(axis.containers) for axis in figure.axes] == [2, 2, 0]  # a method, and the noise; the legend
    said = [t.get_text().replace("\n", " ") for t in figure.axes[-1].get_legend().get_texts()]
    assert said == ["no augmentation", drift.NOISE]
