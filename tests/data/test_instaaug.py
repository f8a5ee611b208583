"""InstaAug: what it draws, what it learns and does not, and that its ranges are those that the labels bear."""

import math

import pytest
import torch

from augdistill_core import ConvNet, affine, initial_parameters, minibatches, seeded, sgd
from augdistill_report import open_run
from augdistill_report.data.datasets import load
from augdistill_report.data.instaaug import FURTHEST, KINDS, RANGE_PACE, RGB_KINDS, InstaAug
from augdistill_report.work.jobs import Subset
from augdistill_report.work.scoring import EvalConfig, train_student


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
    assert augment.kinds == list(KINDS | (RGB_KINDS if channels == 3 else {}))
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

    assert told(0.4, 0.7) == pytest.approx([RANGE_PACE, 1])  # below, and inside
    assert told(0.39, 1.2) == pytest.approx([RANGE_PACE**2, 1 / RANGE_PACE])  # further below, and above
    assert told(0.45, 1.1) == pytest.approx([RANGE_PACE**2, 1 / RANGE_PACE])  # both come back by themselves
    assert told(0.451, 1.099) == pytest.approx([RANGE_PACE**3, RANGE_PACE**-2])  # but now they stand still
    assert told(0.6, 0.8) == pytest.approx([RANGE_PACE**3, RANGE_PACE**-2])
    for _ in range(100):
        last = told(0.1, 3.0)
    assert last == pytest.approx([RANGE_PACE**FURTHEST, RANGE_PACE**-FURTHEST], rel=1e-5)


def test_an_evaluation_gives_each_student_one_of_its_own(tmp_path, monkeypatch):
    from augdistill_report.work import scoring as evaluation

    run, made, real = open_run("insta", {"preset": "smoke", "out": str(tmp_path)}), [], evaluation.train_student
    monkeypatch.setattr(evaluation, "train_student", lambda *a, **k: made.append(k["augment"]) or real(*a, **k))
    job = run.evaluation(Subset(0, fraction=0.1), eval_augment="instaaug")
    job.stored(run.store)
    assert all(isinstance(augment, InstaAug) for augment in made) and len(set(map(id, made))) == 2


# --- the ranges that labels bear --------------------------------------------------------------------------------------


class Turns:
    """Two sevens, each upright and turned by half: classes of their own, so ±90 degrees are free; two fours in six
    orientations: ±30. An InstaAug that turns, and a classifier, trained on them together."""

    def __init__(self, reward: float):
        data = load("digits", 12)
        digits = {d: data.train.images[data.train.labels == d][:2].repeat(10, 1, 1, 1) for d in (7, 4)}
        kinds = [(7, 180 * k) for k in range(2)] + [(4, 60 * k) for k in range(6)]
        self.images = torch.cat([turned(digits[d], angle) for d, angle in kinds])
        self.labels = torch.arange(8).repeat_interleave(20)
        self.augment = InstaAug(self.images, 0, kinds=("rotation",), reward=reward)
        student = ConvNet(1, 8, 12, width=8, depth=2)
        self.steps = sgd(student, initial_parameters(student, 3), self.batches(), 0.02, 0.9, 5e-4)

    def batches(self):
        shaking = seeded(1)
        for step, i in enumerate(minibatches(len(self.images), 64, seeded(0))):
            yield self.augment(self.images[i], generator=shaking), self.labels[i]
            if step < 300:  # first the classifier alone
                self.augment.optimizer.zero_grad()
            else:
                self.augment.learn()

    def train(self, steps: int) -> dict[int, float]:
        """Take so many steps; half of the mean range of each digit in degrees, over the last 200 of them."""
        found = {7: [], 4: []}
        for number in range(steps):
            next(self.steps)
            if number >= steps - 200:
                with torch.no_grad():
                    half = self.augment.ends(self.images)[:, 0].mean(1) * 180 / math.pi
                found[7].append(half[self.labels < 2].mean().item())
                found[4].append(half[self.labels >= 2].mean().item())
        return {digit: sum(values) / len(values) for digit, values in found.items()}


def test_it_finds_the_ranges_that_the_labels_bear():
    world = Turns(reward=3.5)  # w = .35
    assert world.augment.ends(world.images).mean().item() == pytest.approx(math.pi / (1 + math.e**2))  # 21 degrees
    found = world.train(1400)
    assert found[7] == pytest.approx(90, abs=5) and found[4] == pytest.approx(30, abs=2), found
    assert torch.equal(world.augment.weight, world.augment.first)  # inside its band all the time


@pytest.mark.parametrize("reward, band", [(0.3, (0.0, 0.12)), (0.1, (0.13, math.pi))], ids=["from above", "from below"])
def test_the_band_holds_where_loss_and_reward_alone_would_leave_it(reward, band):
    """With a loss that punishes turning an image, however little."""
    x = load("digits", 8).train.take(slice(0, 40)).images

    def ended(steps, **options):
        augment = InstaAug(x, 0, kinds=("rotation",), **options)
        augment.first.fill_(reward)
        for step in range(steps):
            (augment(x, generator=seeded(step)) - x).square().mean().backward()
            augment.learn()
        return augment, augment.ends(x).mean().item()

    (low, high), (_, free), (augment, held) = band, ended(400), ended(800, bands={"rotation": band})
    assert not low <= free <= high and low <= held <= high, (free, held)
    assert ((augment.weight > reward) == (free < low)).all()
