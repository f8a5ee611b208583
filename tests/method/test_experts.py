"""Experts against plain torch SGD: together as alone, stopped and resumed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from toys import STUDENTS, Shared, StandIn, assert_near, built, mlp, toy

from augdistill_core import (
    ExpertConfig,
    Trajectories,
    flatten,
    initial_parameters,
    seeded,
    sgd,
    train_expert,
    train_experts,
    train_together,
)
from augdistill_method import student as student_module
from augdistill_method.capture import Captured
from augdistill_report.data.augmentations import DSA


def experts_config(**changes):
    return ExpertConfig(**{**dict(experts=1, epochs=3, expert_lr=0.1, expert_batch=4), **changes})


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(snapshot_steps=1),
        dict(snapshot_steps=2),
        dict(snapshot_steps=9),
        dict(expert_momentum=0.9, expert_decay=0.01, snapshot_steps=4),
        dict(expert_batch=10),
        dict(expert_batch=64),
    ],
    ids=str,
)
@pytest.mark.parametrize("build", [STUDENTS["convnet"], Shared], ids=["convnet", "shared"])
def test_an_expert_is_a_module_trained_by_torch(build, changes):
    images, labels = toy(10)
    student, config = built(build), experts_config(**changes)
    report = []
    way = train_expert(student, images, labels, config, 7, 2, on_snapshot=lambda *a: report.append(a))

    generator = seeded(7, "expert", 2)
    model = copy.deepcopy(student)
    vector_to_parameters(initial_parameters(student, generator), model.parameters())
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config.expert_lr, momentum=config.expert_momentum, weight_decay=config.expert_decay
    )
    steps, losses = [parameters_to_vector(model.parameters()).detach().clone()], []
    for _ in range(config.epochs):
        full = config.expert_batch >= 10
        order = torch.arange(10) if full else torch.randperm(10, generator=generator)
        for index in order.split(config.expert_batch):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[index]), labels[index])
            loss.backward()
            optimizer.step()
            steps.append(parameters_to_vector(model.parameters()).detach().clone())
            losses.append(loss.item())
    every = config.snapshot_steps or -(-10 // config.expert_batch)
    expected = torch.stack(steps[::every])
    assert way.shape == expected.shape and not way.requires_grad
    assert torch.equal(way[0], expected[0])
    torch.testing.assert_close(way, expected, rtol=1e-12, atol=1e-13)
    assert len(way.unique(dim=0)) == len(way)  # no snapshot is an alias of the live weights
    assert [k for k, _ in report] == list(range(1, len(expected)))
    means = [sum(losses[i : i + every]) / every for i in range(0, len(losses) - every + 1, every)]
    assert [m for _, m in report] == pytest.approx(means, rel=1e-12)


def test_an_expert_depends_on_the_seed_and_its_number_alone(rng_untouched):
    images, labels = toy(10, dtype=torch.float32)
    student = STUDENTS["convnet"]()
    before = flatten(student.parameters())
    with rng_untouched():
        three = train_experts(student, images, labels, experts_config(experts=3), 0)
    torch.manual_seed(1)
    two = train_experts(student, images, labels, experts_config(experts=2), 0)
    assert three.theta.shape[:2] == (3, 4) and three.student is student
    assert torch.equal(three.theta[:2], two.theta)
    assert torch.equal(three.theta[2], train_expert(student, images, labels, experts_config(), 0, 2))
    assert len(three.theta[:, 0].unique(dim=0)) == 3
    assert not torch.equal(train_experts(student, images, labels, experts_config(), 1).theta[0], three.theta[0])
    assert torch.equal(flatten(student.parameters()), before)


def test_an_expert_sees_its_images_through_the_augmentation():
    images, labels = toy(10)
    student, seen = built(mlp), []

    def blacken(batch, *, labels, index, generator):
        seen.append((batch, labels, index, generator))
        return batch * 0

    plain = train_expert(student, images, labels, experts_config(), 0, 0)
    black = train_expert(student, images, labels, experts_config(), 0, 0, augment=blacken)
    assert torch.equal(plain[0], black[0]) and not torch.equal(plain[1], black[1])
    first = slice(0, 64 * 6)  # the layer that black images leave without a gradient
    assert torch.equal(black[-1][first], black[0][first]) and not torch.equal(plain[-1][first], plain[0][first])
    for batch, batch_labels, index, generator in seen:
        assert torch.equal(batch, images[index]) and torch.equal(batch_labels, labels[index])
        assert isinstance(generator, torch.Generator)
    assert len(seen) == 9


def test_expert_training_stops_when_on_snapshot_raises():
    class Stop(Exception):
        pass

    seen = []

    def stop(snapshot, loss):
        seen.append(snapshot)
        if snapshot == 2:
            raise Stop

    with pytest.raises(Stop):
        train_experts(built(mlp), *toy(10), experts_config(), 0, on_snapshot=stop)
    assert seen == [1, 2]


@pytest.mark.parametrize(("snapshot_steps", "left"), [(0, 2), (1, 4), (2, 2), (4, 2)])
def test_a_time_budget_stops_an_expert_at_the_end_of_an_epoch(snapshot_steps, left):
    """Three steps an epoch, and no time: what is there is the beginning of the whole way, at least one snapshot."""
    options = dict(epochs=4, snapshot_steps=snapshot_steps)
    whole = train_expert(built(mlp), *toy(10), experts_config(**options), 0, 0)
    for minutes, length in ((1e-9, left), (60, len(whole))):
        cut = train_expert(built(mlp), *toy(10), experts_config(**options, expert_minutes=minutes), 0, 0)
        assert torch.equal(cut, whole[:length])


@pytest.mark.parametrize(
    ("options", "images", "captured"),
    [
        ({}, 512, False),
        (dict(expert_momentum=0.9, expert_decay=0.01, snapshot_steps=2), 8, True),
        (dict(expert_momentum=0.9, expert_decay=0.01), 1, True),
    ],
    ids=["all at once", "two at once, captured", "one after the other, captured"],
)
@pytest.mark.parametrize("build", STUDENTS.values(), ids=STUDENTS)
def test_experts_trained_together_are_those_trained_alone(build, options, images, captured, monkeypatch):
    monkeypatch.setattr(student_module, "IMAGES_AT_ONCE", images)
    recorder = StandIn()
    if captured:  # as on a CUDA device
        monkeypatch.setattr(student_module, "launched", lambda step, device: Captured(step, recorder))
    student, config, reports = built(build), experts_config(**options), []
    ways = train_together(
        student, *toy(10), config, 3, [4, 0, 1], augment=DSA(), on_snapshot=lambda *a: reports.append(a)
    )
    for k, way, column in zip((4, 0, 1), ways, range(3), strict=True):
        alone = []
        expected = train_expert(
            student, *toy(10), config, 3, k, augment=DSA(), on_snapshot=lambda *a, to=alone: to.append(a)
        )
        torch.testing.assert_close(way, expected, rtol=1e-9, atol=1e-12)
        assert [n for n, _ in reports] == [n for n, _ in alone]
        assert [float(losses[column]) for _, losses in reports] == pytest.approx([loss for _, loss in alone], rel=1e-9)
    assert recorder.recordings == 2 * captured  # whole batches, and the last of an epoch


def test_experts_of_which_not_all_fit_are_trained_in_parts(monkeypatch):
    student, parts, vmap = built(mlp), [], torch.vmap
    whole = train_together(student, *toy(10), experts_config(), 0, range(5))

    def small(function, chunk_size):
        parts.append(chunk_size)
        if chunk_size > 2:
            raise torch.OutOfMemoryError("no room")
        return vmap(function, chunk_size=chunk_size)

    monkeypatch.setattr(torch, "vmap", small)
    torch.testing.assert_close(
        train_together(student, *toy(10), experts_config(), 0, range(5)), whole, rtol=1e-12, atol=0
    )
    assert parts[:3] == [5, 3, 2] and set(parts[3:]) == {2}  # found once, kept
    monkeypatch.setattr(torch, "vmap", lambda function, chunk_size: small(function, 9))
    two = train_together(student, *toy(10), experts_config(), 0, range(2))  # one after the other
    torch.testing.assert_close(two, whole[:2], rtol=1e-12, atol=0)
    monkeypatch.setattr(student_module, "logits_of", lambda *given: small(None, 9))
    with pytest.raises(torch.OutOfMemoryError):
        train_together(student, *toy(10), experts_config(), 0, range(2))


def test_experts_of_different_lengths_are_cut_to_the_shortest():
    ways = [torch.randn(k, 5, generator=seeded(k)) for k in (4, 3, 6)]
    with pytest.warns(UserWarning, match="3 to 6 snapshots, all are cut to the first 3"):
        theta = Trajectories(mlp(), ways).theta
    assert torch.equal(theta, torch.stack([way[:3] for way in ways]))


def test_snapshots_further_apart_than_the_training_is_long_are_refused():
    with pytest.raises(ValueError, match="snapshot_steps=10: must be at most the 9 training steps"):
        train_experts(built(mlp), *toy(10), experts_config(snapshot_steps=10), 0)


def test_a_segment_is_its_two_snapshots():
    theta = torch.arange(2 * 4 * 3.0).view(2, 4, 3)
    way = Trajectories(mlp(), theta)
    for expert, start, length in [(0, 0, 3), (1, 2, 1), (1, 0, 2)]:
        begin, end = way.segment(expert, start, length)
        assert torch.equal(begin, theta[expert, start]) and torch.equal(end, theta[expert, start + length])


@pytest.mark.parametrize(
    "expert, start, length, message",
    [
        (0, -1, 1, r"start -1 plus 1 snapshots.* snapshot 3.*\[0, 2\]"),
        (0, 3, 1, "start 3 plus 1 snapshots.* snapshot 3"),
        (0, 2, 2, r"start 2 plus 2 snapshots.*\[0, 1\]"),
        (0, 0, 0, r"segment of 0 snapshots: must be in \[1, 3\]"),
        (0, 2, -1, "segment of -1 snapshots"),
        (0, 0, 4, "segment of 4 snapshots"),
        (2, 0, 1, r"expert 2: must be in \[0, 1\]"),
        (-1, 0, 1, "expert -1"),
        (0, 1, 2, "expert 0 does not move after snapshot 1"),
    ],
)
def test_a_segment_that_is_none_is_refused(expert, start, length, message):
    with pytest.raises(ValueError, match=message):
        Trajectories(mlp(), torch.zeros(2, 4, 3)).segment(expert, start, length)


def test_sgd_follows_a_schedule():
    images, labels = toy(6)
    student = built(STUDENTS["convnet"])
    start = initial_parameters(student, 0)
    steps = sgd(student, start, [(images, labels)] * 4, lambda step: 0.3 / (step + 1), momentum=0.5)
    *_, (model, _) = steps
    reference = copy.deepcopy(student)
    vector_to_parameters(start.clone(), reference.parameters())
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.3, momentum=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(reference(images), labels).backward()
        optimizer.step()
        schedule.step()
    ours, theirs = (parameters_to_vector(m.parameters()).detach() for m in (model, reference))
    assert_near(ours, theirs, theirs - start)
