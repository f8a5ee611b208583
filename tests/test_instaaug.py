"""InstaAug: what it draws, what it learns and does not, and that its ranges are those that the labels bear."""

import math

import pytest
import torch

from augdistill_core import ConvNet, seeded
from augdistill_policies import affine
from augdistill_report import open_run
from augdistill_report.data import load
from augdistill_report.evaluation import train_student
from augdistill_report.instaaug import FURTHEST, KINDS, OF_RGB, PACE, InstaAug
from augdistill_report.jobs import Subset
from augdistill_report.settings import EvalConfig


def images_of(channels, count=40, side=8):
    return torch.randn(count, channels, side, side, generator=seeded(0))


def turned(images, degrees):
    nothing = torch.zeros(len(images))
    return affine(images, nothing + math.radians(degrees), nothing, nothing, nothing, nothing)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_draw_lies_between_the_ends_and_starts_where_the_official_code_does(channels, rng_untouched):
    x = images_of(channels)
    with rng_untouched():
        augment = InstaAug(x, 0)
        out = augment(x, generator=seeded(1))
    assert augment.kinds == list(KINDS | (OF_RGB if channels == 3 else {}))
    assert out.shape == x.shape and out.isfinite().all() and not any(map(torch.equal, out, x))
    assert torch.equal(out, augment(x, generator=seeded(1))) and not torch.equal(out, augment(x, generator=seeded(2)))
    ends = augment.ends(x)
    assert ends.shape == (len(x), len(augment.kinds), 2) and ends.min() >= 0
    torch.testing.assert_close(ends[:, 0], torch.full((len(x), 2), math.pi / (1 + math.e**2)))  # pi sigmoid(-2)
    # rotation alone, by known draws: r high - (1 - r) low
    alone = InstaAug(x, 0, kinds=("rotation",))
    r = torch.rand(len(x), 1, generator=seeded(3))[:, 0]
    angle = (2 * r - 1) * math.pi / (1 + math.e**2)
    nothing = torch.zeros(len(x))
    expected = affine(x, angle, nothing, nothing, nothing, nothing)
    torch.testing.assert_close(alone(x, generator=seeded(3)), expected)


def test_students_learn_it_along_and_repeat_to_the_bit():
    data = load("digits", 8)
    part = data.train.take(slice(0, 40))
    student, config = ConvNet(1, 10, 8, width=4, depth=1), EvalConfig(eval_steps=12, eval_batch=16)

    def trained(seed):
        augment = InstaAug(part.images, 0)
        before = augment.ends(part.images).detach()
        model = train_student(student, None, part.images, part.labels, config, seed, augment=augment)
        assert not torch.equal(augment.ends(part.images), before)
        return [*model.parameters(), *augment.parameters()]

    assert all(map(torch.equal, trained(3), trained(3)))
    assert not any(map(torch.equal, trained(3)[:2], trained(4)[:2]))


def test_without_reward_ranges_fall_and_without_loss_they_grow():
    x, labels = images_of(1), torch.arange(40) % 4
    for reward, grows in ((0.0, False), (1.0, True)):
        augment, probe = InstaAug(x, 0, kinds=("rotation",)), torch.nn.Linear(64, 4)
        augment.first.fill_(reward)
        start = augment.ends(x).mean()
        for step in range(30):
            out = augment(x, generator=seeded(step))
            # what is turned far is far from x: a loss that punishes it, or none
            loss = (out - x).square().mean() if not grows else 0 * out.sum() + 0 * probe(out.flatten(1))[0, labels[0]]
            loss.backward()
            augment.learn()
        assert (augment.ends(x).mean() > start) == grows


def test_the_reward_changes_while_the_range_is_out_of_its_band_and_does_not_come_back():
    augment = InstaAug(images_of(1), 0, kinds=("rotation",), bands={"rotation": (0.5, 1.0)})
    w = augment.first[0, 0].item()

    def told(low, high):
        augment.adapt(torch.tensor([[low, high]]))
        return (augment.weight[0] / w).tolist()

    assert told(0.4, 0.7) == pytest.approx([PACE, 1])  # below, and inside
    assert told(0.39, 1.2) == pytest.approx([PACE**2, 1 / PACE])  # further below, and above
    assert told(0.45, 1.1) == pytest.approx([PACE**2, 1 / PACE])  # both come back by themselves
    assert told(0.451, 1.099) == pytest.approx([PACE**3, PACE**-2])  # but now they stand still
    assert told(0.6, 0.8) == pytest.approx([PACE**3, PACE**-2])
    for _ in range(100):
        last = told(0.1, 3.0)
    assert last == pytest.approx([PACE**FURTHEST, PACE**-FURTHEST], rel=1e-5)


def test_an_evaluation_gives_each_student_one_of_its_own(tmp_path, monkeypatch):
    from augdistill_report import evaluation

    run, made, real = open_run("insta", {"preset": "smoke", "out": str(tmp_path)}), [], evaluation.train_student
    monkeypatch.setattr(evaluation, "train_student", lambda *a, **k: made.append(k["augment"]) or real(*a, **k))
    job = run.evaluation(Subset(0, fraction=0.1), eval_augment="instaaug")
    job.stored(run.store)
    assert all(isinstance(augment, InstaAug) for augment in made) and len(set(map(id, made))) == 2
