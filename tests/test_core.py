"""The matching loss and distillation, each against a reference of another make.

Distillation is compared with Algorithm 1 written in torch.func and stepped by torch.optim, its gradient also with
finite differences; the losses with values worked out on paper.
"""

import copy
import dataclasses
import itertools
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from toys import STUDENTS, assert_near, built, mlp, toy

from augdistill_core import (
    LOST,
    ConvNet,
    DistillConfig,
    ExpertConfig,
    Phi,
    Trajectories,
    distill,
    diverged,
    flatten,
    initial_parameters,
    make_phi,
    matching_loss,
    seeded,
    train_experts,
    unroll,
)

START, TARGET = torch.tensor([0.0, 0, 0]), torch.tensor([2.0, 0, 0])


@pytest.mark.parametrize(
    "end, loss",
    [
        (TARGET, 0),
        (START, 1),
        (torch.tensor([1.0, 1, 0]), 0.5),  # (1 + 1) / 4
        (torch.stack([TARGET, TARGET]), 0),
        (torch.stack([START, START]), 1),
        (torch.stack([START, TARGET]), 0),
        (torch.tensor([[1.0, 1, 0], [3, 1, 1]]), 0),  # <(-1, 1, 0), (1, 1, 1)> = 0
        (torch.tensor([[1.0, 2, 0], [3, 4, 1]]), 1.75),  # <(-1, 2, 0), (1, 4, 1)> = 7
        (torch.tensor([[1.0, 2, 0], [3, 4, 1], [2, 1, 2]]), 15 / 12),  # pairs 7, 2 and 6; their mean 5
    ],
)
def test_matching_loss_by_hand(end, loss):
    assert matching_loss(end, TARGET, START).item() == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("draws", [2, 3])
def test_several_draws_leave_the_variance_out(draws):
    """Over every combination of noises from a finite set, so that the expectations are exact."""
    generator = seeded(0)
    noises = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    noises = noises - noises.mean(0)
    mean, target, start = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    distance = (start - target).square().sum()
    several = [matching_loss(mean + torch.stack(e), target, start) for e in itertools.product(noises, repeat=draws)]
    one = [matching_loss(mean + e, target, start) for e in noises]
    bias = (mean - target).square().sum() / distance
    variance = noises.square().sum(1).mean() / distance
    torch.testing.assert_close(torch.stack(several).mean(), bias, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.stack(one).mean(), bias + variance, rtol=1e-12, atol=0)
    assert variance > 0.1 * bias


def test_pairs_of_one_draw_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 3\).*at least 2"):
        matching_loss(TARGET[None], TARGET, START)


ALPHA = 0.0625


def config(**changes):
    """Two outer steps of two student steps, by plain SGD."""
    defaults = dict(iterations=2, syn_steps=2, expert_epochs=1, max_start_epoch=2, alpha=ALPHA, alpha_mode="raw")
    plain = dict(phi_optimizer="SGD", alpha_optimizer="SGD", phi_lr=0.1, alpha_lr=0.01)
    return DistillConfig(**{**defaults, **plain, **changes})


@pytest.fixture(scope="module")
def experts():
    """Two experts of four snapshots after the first, in double precision, trained on the toy data."""
    student = built(lambda: ConvNet(1, 3, 8, width=4, depth=1))
    return train_experts(student, *toy(24), ExpertConfig(experts=2, epochs=4, expert_lr=0.1, expert_batch=6), 0)


class Spy(Phi):
    """Another phi, and a record of what it was given and gave in training (a mere look at it takes no gradient)."""

    def __init__(self, phi):
        super().__init__()
        self.phi, self.seen = phi, []
        self.conditional, self.bound = phi.conditional, phi.bound

    def forward(self, images, *, labels, index, generator):
        out = self.phi(images, labels=labels, index=index, generator=generator)
        if torch.is_grad_enabled():
            self.seen.append((images, labels, index, out.detach().clone()))
        return out


def pixels(images):
    return make_phi("pixels", images, 3, seed=0)


def noisy(images, scale=0.3):
    """A stochastic, smooth phi that does something."""
    phi = make_phi("unet_noise", images, 3, seed=0)
    with torch.no_grad():
        phi.last.weight.add_(scale * torch.randn(phi.last.weight.shape, generator=seeded(0), dtype=images.dtype))
    return phi


def algorithm_1(student, theta, images, labels, config, batches):
    """The pixels, alpha and losses of Algorithm 1 with one segment, written as a function and its gradient.

    `batches[iteration][step]` are indices into the images.
    """
    names = [name for name, _ in student.named_parameters()]
    shapes = [p.shape for p in student.parameters()]
    begin, target = theta[0, 0], theta[0, config.expert_epochs]

    def student_loss(weights, x, y):
        return F.cross_entropy(functional_call(student, weights, (x,)), y)

    def matching(x, value, indices):
        alpha = value.exp() if config.alpha_mode == "log" else value
        pieces = begin.split([s.numel() for s in shapes])
        weights = {n: p.reshape(s) for n, p, s in zip(names, pieces, shapes, strict=True)}
        for index in indices:
            slope = torch.func.grad(student_loss)(weights, x[index], labels[index])
            weights = {n: w - alpha * slope[n] for n, w in weights.items()}
        end = torch.cat([w.flatten() for w in weights.values()])
        return torch.sum((end - target) ** 2) / torch.sum((begin - target) ** 2)

    x, value = images.clone(), torch.tensor(config.alpha, dtype=torch.float64)
    value = value.log() if config.alpha_mode == "log" else value
    optimizers = []
    for tensor, kind, lr, momentum in (
        (x, config.phi_optimizer, config.phi_lr, config.phi_momentum),
        (value, config.alpha_optimizer, config.alpha_lr, config.alpha_momentum),
    ):
        options = dict(momentum=momentum) if momentum else {}
        optimizers.append(getattr(torch.optim, kind)([tensor], lr=lr, **options))
    losses = []
    for indices in batches:
        (x.grad, value.grad), loss = torch.func.grad_and_value(matching, argnums=(0, 1))(x, value, indices)
        losses.append(loss.item())
        for optimizer in optimizers:
            optimizer.step()
    return x, (value.exp() if config.alpha_mode == "log" else value).item(), losses


@pytest.mark.parametrize(
    "build", [STUDENTS["convnet"], mlp, STUDENTS["shared weights"]], ids=["convnet", "mlp", "shared"]
)
@pytest.mark.parametrize(
    "changes",
    [
        dict(iterations=1),
        dict(iterations=3, syn_steps=4, batch_syn=4, alpha_mode="log"),
        dict(iterations=3, phi_momentum=0.9, alpha_momentum=0.5, noise="once", batch_syn=2),
        dict(draws=3, expert_epochs=3, phi_optimizer="Adam", alpha_optimizer="Adam"),
        dict(phi_optimizer="RMSprop", phi_momentum=0.5, alpha_optimizer="Adagrad", phi_lr=0.01),
    ],
    ids=str,
)
def test_pixels_and_alpha_are_those_of_algorithm_1_by_hand(build, changes):
    student, (images, labels) = built(build), toy(6)
    begin = parameters_to_vector(built(build, seed=1).parameters()).detach()
    theta = (begin + 0.1 * torch.randn(4, len(begin), generator=seeded(0), dtype=torch.float64).cumsum(0))[None]
    settings, fed = config(max_start_epoch=0, **changes), []

    def watch(x, *, index, **_):  # after phi, in every student step of every draw
        fed.append(index)
        return x

    phi = pixels(images)
    result = distill(phi, images, labels, Trajectories(student, theta), settings, seed=3, augment=watch)
    steps, unrolls = settings.syn_steps, settings.draws
    assert len(fed) == settings.iterations * unrolls * steps
    batches = [fed[i : i + steps] for i in range(0, len(fed), steps * unrolls)]
    x, alpha, losses = algorithm_1(student, theta, images, labels, settings, batches)
    assert_near(phi.pixels.detach(), x, x - images, rel=1e-9)
    assert result.alpha - ALPHA == pytest.approx(alpha - ALPHA, rel=1e-9) and alpha != ALPHA
    assert [h["loss"] for h in result.history] == pytest.approx(losses, rel=1e-10)
    assert phi.pixels.dtype == torch.float64 and result.phi is phi and result.stopped is None


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(noise="once", batch_syn=2),
        dict(draws=2, batch_syn=4),
        dict(draws=3, noise="once", episode=1),
        dict(objective="real_loss", draws=2, real_batch=8),
        dict(objective="real_loss", noise="once", episode=1),
    ],
    ids=str,
)
@pytest.mark.parametrize("augment", [False, True], ids=["bare", "augmented"])
def test_the_gradient_is_that_of_finite_differences(changes, augment):
    """The loss is a smooth function of phi's parameters and of alpha once the seed is fixed: differentiate that."""
    student, (images, labels) = built(mlp), toy(6)
    experts = train_experts(student, *toy(12, seed=1), ExpertConfig(experts=2, epochs=4, expert_lr=0.1), 0)

    def shake(x, *, generator, **_):
        return x * (1 + 0.3 * torch.randn(len(x), 1, 1, 1, generator=generator, dtype=x.dtype))

    def run(shift=0.0, alpha=ALPHA, lr=0.0):
        phi = noisy(images)
        with torch.no_grad():
            before = parameters_to_vector(phi.parameters())
            vector_to_parameters(before + shift, phi.parameters())
            settings = config(iterations=1, alpha=alpha, phi_lr=lr, alpha_lr=lr / 4096, **changes)  # alpha stays > 0
        options = dict(seed=0, augment=shake if augment else None, real=toy(9, seed=2))
        result = distill(phi, images, labels, experts, settings, **options)
        return result, before - parameters_to_vector(phi.parameters()).detach()

    stepped, slope = run(lr=1.0)
    direction = torch.randn(slope.shape, generator=seeded(1), dtype=torch.float64) * slope.abs().mean() + slope
    direction, h = direction / direction.norm(), 1e-5
    up, down = (run(shift=sign * h * direction)[0].history[0]["loss"] for sign in (1, -1))
    assert (up - down) / (2 * h) == pytest.approx(float(slope @ direction), rel=1e-5)
    assert stepped.history[0]["grad_norm"] == pytest.approx(slope.norm().item(), rel=1e-9) and slope.norm() > 1e-4
    h = 2**-13
    up, down = (run(alpha=ALPHA + sign * h)[0].history[0]["loss"] for sign in (1, -1))
    assert (up - down) / (2 * h) == pytest.approx(4096 * (ALPHA - stepped.alpha), rel=1e-4)


@pytest.mark.parametrize("mode", ["raw", "log", "fixed"])
def test_alpha_starts_where_the_configuration_says_in_double_precision(experts, mode):
    images, labels = toy(6)
    result = distill(pixels(images), images, labels, experts, config(alpha=0.02, alpha_mode=mode), seed=0)
    assert result.history[0]["alpha"] == pytest.approx(0.02, rel=1e-14)


@pytest.mark.parametrize("objective", ["trajectory", "real_loss"])
def test_a_run_is_repeated_bit_by_bit(objective, rng_untouched):
    images, labels = toy(9, dtype=torch.float32)
    before, student = images.clone(), ConvNet(1, 3, 8, width=4, depth=1)
    experts = train_experts(student, images, labels, ExpertConfig(experts=2, epochs=4, expert_batch=4), 0)
    own = flatten(student.parameters())

    def run(seed):
        phi = noisy(images)
        settings = config(objective=objective, iterations=4, batch_syn=2, episode=2, draws=2, alpha_lr=1e-4)
        result = distill(phi, images, labels, experts, settings, seed=seed, real=(images, labels))
        assert all(p.grad is None for p in phi.parameters())
        return result.history, result.alpha, flatten(phi.parameters())

    with rng_untouched():
        history, alpha, theta = run(0)
    torch.manual_seed(5)
    again = run(0)
    assert history == again[0] and alpha == again[1] and torch.equal(theta, again[2])
    other = run(1)
    assert history != other[0] and alpha != other[1] and not torch.equal(theta, other[2])
    assert [h["iteration"] for h in history] == [0, 1, 2, 3]
    assert torch.equal(images, before) and torch.equal(flatten(student.parameters()), own)


def test_every_phi_of_one_seed_meets_the_same_segments_and_batches(experts):
    images, labels = toy(9)
    spies = [Spy(pixels(images)), Spy(noisy(images)), Spy(make_phi("distnet2", images, 3, seed=1))]
    settings = config(iterations=6, batch_syn=4)
    runs = [distill(spy, images, labels, experts, settings, seed=0).history for spy in spies]
    starts, indices = ([[h["start_epoch"] for h in r] for r in runs], [[s[2].tolist() for s in p.seen] for p in spies])
    assert starts[0] == starts[1] == starts[2] and indices[0] == indices[1] == indices[2]


def test_segments_start_at_every_allowed_snapshot_of_every_expert(experts):
    images, labels = toy(6)
    identity = make_phi("identity", images, 3, seed=0)
    settings = config(iterations=40, max_start_epoch=2, expert_epochs=2, alpha_lr=0)
    history = distill(identity, images, labels, experts, settings, seed=0).history
    seen = {(h["start_epoch"], h["loss"]) for h in history}  # with nothing learned, a segment has one loss
    expected = set()
    for expert, begin in itertools.product(range(2), range(3)):
        start, target = experts.theta[expert, begin], experts.theta[expert, begin + 2]
        end = unroll(experts.student, start, [images] * 2, [labels] * 2, ALPHA).detach()
        expected.add((begin, ((end - target).norm() / (start - target).norm()).item() ** 2))
    assert len(seen) == 6
    assert [x for pair in sorted(seen) for x in pair] == pytest.approx([x for pair in sorted(expected) for x in pair])


def test_real_loss_is_the_mean_loss_on_real_images_from_a_new_initialisation(experts):
    """Two iterations with nothing learned: the real set is one image again and again, so its draw does not matter."""
    (images, labels), (real, real_labels) = toy(6), toy(1, seed=8)
    identity = make_phi("identity", images, 3, seed=0)
    settings = config(objective="real_loss", alpha_lr=0, real_batch=2)
    data = (real.expand(5, -1, -1, -1), real_labels.expand(5))
    history = distill(identity, images, labels, experts, settings, seed=4, real=data).history

    model, generator = copy.deepcopy(experts.student), seeded(4, "distill")
    vector_to_parameters(initial_parameters(experts.student, generator), model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=ALPHA)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    assert history[0]["loss"] == pytest.approx(F.cross_entropy(model(real), real_labels).item(), rel=1e-10)
    assert history[1]["loss"] != pytest.approx(history[0]["loss"], rel=1e-3)  # another initialisation


def test_real_loss_of_several_draws_is_their_mean(experts):
    """Each draw's own images, as the phi gave them, train a module by torch."""
    (images, labels), (real, real_labels) = toy(6), toy(1, seed=8)
    spy = Spy(noisy(images, scale=3))
    settings = config(objective="real_loss", iterations=1, draws=3, alpha=0.5)
    data = (real.expand(5, -1, -1, -1), real_labels.expand(5))
    history = distill(spy, images, labels, experts, settings, seed=4, real=data).history
    start, losses = initial_parameters(experts.student, seeded(4, "distill")), []
    for draw in (spy.seen[0:2], spy.seen[2:4], spy.seen[4:6]):
        model = copy.deepcopy(experts.student)
        vector_to_parameters(start.clone(), model.parameters())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _, targets, _, fed in draw:
            optimizer.zero_grad()
            F.cross_entropy(model(fed), targets).backward()
            optimizer.step()
        losses.append(F.cross_entropy(model(real), real_labels).item())
    assert history[0]["loss"] == pytest.approx(sum(losses) / 3, rel=1e-10)
    assert max(losses) - min(losses) > 1e-3


@pytest.mark.parametrize("objective, alpha_lr", [("trajectory", 1e-4), ("real_loss", 0.01)])
def test_distillation_lowers_its_loss(experts, objective, alpha_lr):
    images, labels = toy(6, seed=3)
    learn = dict(phi_optimizer="Adam", phi_lr=0.1, alpha_lr=alpha_lr, syn_steps=5)
    settings = config(objective=objective, iterations=40, **learn)
    history = distill(pixels(images), images, labels, experts, settings, seed=0, real=toy(60, seed=4)).history
    losses = [h["loss"] for h in history]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("noise, calls", [("step", 3), ("once", 1)])
def test_phi_is_drawn_in_every_step_or_once_an_unroll(experts, noise, calls, draws):
    images, labels = toy(6)
    spy, fed = Spy(noisy(images)), []
    settings = config(iterations=2, syn_steps=3, noise=noise, draws=draws)
    distill(spy, images, labels, experts, settings, seed=0, augment=lambda x, **_: fed.append(x.detach()) or x)
    assert len(spy.seen) == 2 * draws * calls and len(fed) == 2 * draws * 3
    for i in range(0, len(fed), 3):  # the student's steps within one unroll
        assert torch.equal(fed[i], fed[i + 1]) == torch.equal(fed[i], fed[i + 2]) == (noise == "once")
    assert len({x.sum().item() for *_, x in spy.seen}) == len(spy.seen)  # the draws are independent


def test_two_draws_leave_the_noise_of_the_batches_out_too(experts):
    """One step, on two images of six: E end is where the mean gradient leads, whichever batches were drawn."""
    images, labels = toy(6)
    settings = config(iterations=400, syn_steps=1, batch_syn=2, max_start_epoch=0, alpha_mode="fixed", phi_lr=0)
    start, target = experts.segment(0, 0, settings.expert_epochs)
    one = Trajectories(experts.student, experts.theta[:1])

    def after(*batch):
        return unroll(experts.student, start, [images[list(batch)]], [labels[list(batch)]], ALPHA).detach()

    ends = torch.stack([after(*pair) for pair in itertools.combinations(range(6), 2)])
    mean = ends.mean(0)
    assert_near(mean, after(*range(6)), mean - start, rel=1e-9)
    bias = float(matching_loss(mean, target, start))
    variance = float(torch.stack([matching_loss(end, target, start) for end in ends]).mean()) - bias
    for draws, expected in ((1, bias + variance), (2, bias)):
        several = dataclasses.replace(settings, draws=draws)
        losses = [h["loss"] for h in distill(pixels(images), images, labels, one, several, seed=0).history]
        error = np.std(losses) / len(losses) ** 0.5
        assert abs(np.mean(losses) - expected) < 4 * error < 0.5 * variance


@pytest.mark.parametrize("noise", ["step", "once"])
def test_an_episode_is_so_many_images_of_each_class_drawn_afresh(experts, noise):
    images, labels = toy(21)
    spy, fed = Spy(make_phi("identity", images, 3, seed=0)), []

    def watch(x, *, labels, index, **_):
        fed.append((x, labels, index, x))
        return x

    settings = config(iterations=5, syn_steps=6, episode=2, batch_syn=4, noise=noise, alpha_lr=0)
    distill(spy, images, labels, experts, settings, seed=0, augment=watch)
    for x, targets, index, _ in spy.seen + fed:  # each image stays with its label and index
        assert torch.equal(x, images[index]) and torch.equal(targets, labels[index])
    bases = []
    for i in range(0, len(fed), 6):
        sizes = [len(index) for _, _, index, _ in fed[i : i + 6]]
        epochs = [torch.cat([index for _, _, index, _ in fed[j : j + 2]]) for j in range(i, i + 6, 2)]
        bases.append(frozenset(epochs[0].tolist()))
        assert sizes == [4, 2] * 3 and {frozenset(e.tolist()) for e in epochs} == {bases[-1]}
        assert torch.bincount(labels[epochs[0]]).tolist() == [2, 2, 2] and len(bases[-1]) == 6
    assert len(bases) == 5 and len(set(bases)) > 1


@pytest.mark.parametrize("batch, sizes", [(0, [6] * 6), (4, [4, 2] * 3), (9, [6] * 6)])
def test_batches_smaller_than_the_base_set_go_through_it(experts, batch, sizes):
    images, labels = toy(6)
    spy = Spy(pixels(images))
    distill(spy, images, labels, experts, config(iterations=1, syn_steps=6, batch_syn=batch, alpha_lr=0), seed=0)
    indices = [index for _, _, index, _ in spy.seen]
    assert [len(i) for i in indices] == sizes
    steps = 6 // sizes.count(sizes[0]) if batch == 4 else 1
    for k in range(0, 6, steps):
        assert sorted(torch.cat(indices[k : k + steps]).tolist()) == list(range(6))


def test_fixed_alpha_stays_and_the_logarithm_keeps_it_positive(experts):
    images, labels = toy(6)

    def alphas(mode):
        settings = config(iterations=4, alpha_mode=mode, alpha=1.0, alpha_optimizer="Adam", alpha_lr=2.0)
        result = distill(make_phi("pixels", images, 3, 0), images, labels, experts, settings, seed=0)
        return [h["alpha"] for h in result.history] + [result.alpha]

    assert alphas("fixed") == [1.0] * 5
    with pytest.warns(UserWarning, match="alpha below zero"):
        *raw, end = alphas("raw")
    assert end > 0  # one that ran below zero is not what comes out
    log = alphas("log")
    assert raw[0] == log[0] == 1 and min(raw) < 0 < min(log) and len(set(log)) == 5


@pytest.mark.parametrize("mode", ["raw", "log", "fixed"])
def test_the_identity_is_distilled_like_any_phi(experts, mode):
    images, labels = toy(6)
    identity = make_phi("identity", images, 3, seed=0)
    result = distill(identity, images, labels, experts, config(alpha_mode=mode), seed=0)
    assert len(result.history) == 2 and result.history[0]["grad_norm"] == 0
    assert (result.alpha != ALPHA) == (mode != "fixed")


@pytest.mark.parametrize("phi_lr", [100, 1000])
def test_divergence_warns_and_leaves_the_last_phi_that_worked(experts, phi_lr):
    images, labels = toy(6, dtype=torch.float32)
    student = copy.deepcopy(experts.student).float()
    single = Trajectories(student, experts.theta.float())

    def run(iterations):
        phi = make_phi("distnet2", images, 3, seed=0)
        start = flatten(phi.parameters())
        if iterations == 0:
            return None, start, start
        settings = config(iterations=iterations, syn_steps=5, phi_lr=phi_lr, alpha_lr=1e-6)
        return distill(phi, images, labels, single, settings, seed=0), flatten(phi.parameters()), start

    with pytest.warns(UserWarning) as caught:
        result, theta, start = run(50)
    last = result.history[-1]
    states = {record["state"] for record in result.history} - {""}
    assert len(caught) == 1 + len(states) and str(caught[-1].message) == str(result.stopped)
    assert f"iteration {last['iteration']}:" in result.stopped.reason
    assert last["iteration"] == len(result.history) - 1 < 49
    finite = [torch.tensor([h["loss"], h["grad_norm"]]).isfinite().all() for h in result.history]
    bad = [h for h, fine in zip(result.history, finite, strict=True) if not fine or h["scale"] > 100]
    assert bad == [last]
    assert theta.isfinite().all() and torch.tensor(result.alpha).isfinite()
    assert torch.equal(theta, start) == (last["iteration"] == 1)
    # that is what the iteration before the last began with
    assert result.alpha == result.history[-2]["alpha"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(theta, run(last["iteration"] - 1)[1])


# --- what keeps phi from learning is named ---------------------------------------------------------------------------


def states_of(result):
    return [record["state"] for record in result.history]


def test_a_student_that_stands_still_is_named_while_it_lasts(experts):
    """alpha at zero holds the loss at exactly 1, and phi's gradient at zero."""
    images, labels = toy(6)
    settings = config(iterations=3, alpha=1e-9, alpha_lr=0)
    with pytest.warns(UserWarning, match="iteration 0: alpha at zero: the student hardly moves") as caught:
        result = distill(pixels(images), images, labels, experts, settings, seed=0)
    assert len(caught) == 1 and states_of(result) == ["alpha at zero"] * 3
    for record in result.history:
        assert record["loss"] == pytest.approx(1, abs=1e-6) and record["grad_norm"] < 1e-6
    # and it ends where alpha comes back: Adam lifts its logarithm by 5 in every step
    settings = config(iterations=3, alpha=1e-4, alpha_mode="log", alpha_optimizer="Adam", alpha_lr=5.0)
    with pytest.warns(UserWarning, match="alpha at zero"):
        result = distill(pixels(images), images, labels, experts, settings, seed=0)
    assert states_of(result)[0] == "alpha at zero" and states_of(result)[-1] == ""


def test_a_student_that_climbs_is_named(experts):
    images, labels = toy(6)
    settings = config(iterations=3, alpha=0.01, alpha_lr=0.1)
    with pytest.warns(UserWarning, match="alpha below zero"):
        result = distill(make_phi("identity", images, 3, 0), images, labels, experts, settings, seed=0)
    assert [record["alpha"] < 0 for record in result.history] == [s == "alpha below zero" for s in states_of(result)]
    assert "alpha below zero" in states_of(result)


BELOW_ZERO = {  # runs in which alpha, from .5, leaves the positive numbers: how they end
    "in the last step": (dict(iterations=1, alpha_lr=0.1), "alpha"),
    "twice, at last in the last step": (dict(iterations=4, alpha_lr=0.05), "alpha"),
    "then the run diverges": (dict(iterations=20, alpha_lr=0.2), "diverged"),
    "and its minutes end": (dict(iterations=3, alpha_lr=0.2, minutes=1e-9), "alpha"),
    "to zero, though learned in its logarithm": (dict(iterations=2, alpha_mode="log", alpha_lr=1e4), "alpha"),
}


@pytest.mark.parametrize("case", BELOW_ZERO)
def test_what_comes_out_is_the_last_state_that_could_learn(experts, case):
    """No result has an alpha that is not above zero, and each that had to step back for it names why."""
    images, labels = toy(6)
    changes, kind = BELOW_ZERO[case]
    settings = config(alpha=0.5, phi_lr=0.01, **changes)
    phi, before = pixels(images), []

    def on_iteration(record):
        before.append((record["alpha"], abs(record["loss"]) <= LOST, phi.pixels.detach().clone()))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = distill(phi, images, labels, experts, settings, seed=0, on_iteration=on_iteration)
    assert result.stopped.kind == kind and diverged(result.stopped)
    assert diverged(dataclasses.asdict(result.stopped)) and not diverged(None) and not diverged({})
    assert f"alpha_lr={settings.alpha_lr:g})" in result.stopped.reason
    good = [k for k, (alpha, bounded, _) in enumerate(before) if alpha > 0 and bounded]
    assert good and result.alpha == before[good[-1]][0] > 0
    assert torch.equal(phi.pixels, before[good[-1]][2])


def test_an_alpha_that_comes_back_from_below_zero_stops_nothing(experts):
    """As in MTT's code: the student report's own setting does so on CIFAR-10."""
    images, labels = toy(6)
    settings = config(iterations=20, alpha=0.5, alpha_lr=0.05, alpha_momentum=0.5)
    with pytest.warns(UserWarning, match="alpha below zero"):
        result = distill(make_phi("identity", images, 3, 0), images, labels, experts, settings, seed=0)
    assert "alpha below zero" in states_of(result) and result.alpha > 0
    assert result.stopped is None and len(result.history) == 20


def test_an_exploded_phi_is_named_before_it_is_stopped(experts):
    """Twenty times as large as x: the loss does not see it, as the student has instance norm."""
    images, labels = toy(6)
    losses = []
    for gain in (1.0, 20.0):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = distill(gain_phi(gain), images, labels, experts, config(iterations=1, phi_lr=0.0), seed=0)
        losses.append(result.history[0]["loss"])
        assert states_of(result) == (["exploded"] if gain == 20 else [""]) and not result.stopped
        assert [str(w.message)[:22] for w in caught] == (["iteration 0: exploded: "[:22]] if gain == 20 else [])
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_how_far_a_student_moved_is_in_distances_to_its_target(experts):
    images, labels = toy(6)
    settings = config(iterations=1, alpha_lr=0)
    record = distill(make_phi("identity", images, 3, 0), images, labels, experts, settings, seed=3).history[0]
    found = []
    for expert in range(2):
        start, target = experts.segment(expert, record["start_epoch"], 1)
        with torch.no_grad():
            end = unroll(experts.student, start, [images] * 2, [labels] * 2, ALPHA)
        if float(matching_loss(end, target, start)) == pytest.approx(record["loss"], rel=1e-9):
            found.append(float((end - start).norm() / (target - start).norm()))
    assert found and record["moved"] == pytest.approx(found[0], rel=1e-9)
    # with no target there is no distance
    settings = config(iterations=1, objective="real_loss")
    record = distill(pixels(images), images, labels, experts, settings, seed=3, real=(images, labels)).history[0]
    assert record["moved"] is None and record["state"] == ""


class Frozen(Phi):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64), requires_grad=False)

    def forward(self, images, **_):
        return images * self.scale


class Broken(Frozen):
    def forward(self, images, **_):
        return images / (images - images)


class Failing(Frozen):
    def forward(self, images, **_):
        return images * self.nothing  # the line that the error names


class Squeezing(Frozen):
    def forward(self, images, **_):
        return images[..., 1:]


class Shaking(Frozen):
    """It says that it is not random, and is."""

    stochastic = False

    def forward(self, images, *, generator, **_):
        return images + torch.randn(images.shape, generator=generator, dtype=images.dtype)


class Stray(Frozen):
    """Its noise comes from torch's global state."""

    def forward(self, images, **_):
        return images + torch.randn_like(images)


class Doubling(Frozen):
    """It changes the number type."""

    def forward(self, images, **_):
        return images.float()


class Learned(Phi):
    """One number for each class, of which none is seen before it learns."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(6, dtype=torch.float64))


class OfLabels(Learned):
    def forward(self, images, *, labels, **_):
        return images + self.shift[labels].view(-1, 1, 1, 1)


class OfIndex(Learned):
    def forward(self, images, *, index, **_):
        return images + self.shift[index].view(-1, 1, 1, 1)


class Logits(Learned):
    """Its labels are no probabilities."""

    def forward(self, images, **_):
        return images + self.shift.sum()

    def relabel(self, labels, index):
        return F.one_hot(labels, 3).double() * 4 - 1


class Counts(Logits):
    def relabel(self, labels, index):
        return F.one_hot(labels, 3)


class Raw(Logits):
    """They are probabilities as long as nothing is learned."""

    def relabel(self, labels, index):
        return F.one_hot(labels, 3) + self.shift[:3]


LINE = 1 + next(i for i, line in enumerate(Path(__file__).read_text().splitlines()) if "that the error names" in line)


@pytest.mark.parametrize(
    "kind, says",
    [
        (Frozen, r"phi \(Frozen\): every parameter is frozen"),
        (Broken, r"phi \(Broken\): returns values that are not finite before training"),
        (
            Failing,
            rf"phi \(Failing, test_core.py:{LINE}\): AttributeError: 'Failing' object has no attribute 'nothing'",
        ),
        (Squeezing, r"phi \(Squeezing\): Squeezing turned .* into .*: must keep it"),
        (Shaking, r"phi \(Shaking\): draws noise, but its class has stochastic = False; it must be True"),
        (Stray, r"phi \(Stray\): gives two results for one seed; sample its noise from `generator`"),
        (Doubling, r"phi \(Doubling\): Doubling turned torch.float64 into torch.float32: must keep it"),
        (OfLabels, r"phi \(OfLabels\): reads `labels`, but its class has conditional = False; it must be True"),
        (OfIndex, r"phi \(OfIndex\): reads `index`, but its class has bound = False; it must be True"),
        (
            Logits,
            r"phi \(Logits\): relabel returned torch.float64 of shape \(6, 3\) with sums from 1: must be",
        ),
        (Counts, r"phi \(Counts.*\): relabel returned torch.int64 of shape \(6, 3\): must be .* that sum to 1"),
        (Raw, r"phi \(Raw\), after a small change of its parameters: relabel returned .* must be classes"),
    ],
)
def test_a_phi_that_cannot_be_trained_is_refused_by_name(experts, kind, says):
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=says):
        distill(kind(), *toy(6), experts, config(), seed=0)
    assert torch.equal(torch.get_rng_state(), state)  # the look leaves the global state alone


class Counting(Phi):
    """Its buffer counts its calls."""

    def __init__(self, images):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.1, dtype=images.dtype))
        self.register_buffer("calls", torch.zeros((), dtype=images.dtype))

    def forward(self, images, **_):
        self.calls += 1
        return images + self.scale * images.square()


def test_a_phi_s_buffers_are_the_same_in_every_memory_mode(experts):
    """`replay` calls phi twice a step, and a look at phi is no training."""
    images, labels = toy(6)
    found = {}
    for memory in ("graph", "replay"):
        phi = Counting(images)
        distill(phi, images, labels, experts, config(iterations=3, syn_steps=2, memory=memory), seed=0)
        found[memory] = phi
        assert phi.calls == 6
    torch.testing.assert_close(found["replay"].scale, found["graph"].scale)


def test_a_phi_that_diverges_gets_its_buffers_back(experts):
    class Running(Counting):
        def forward(self, images, **_):
            self.calls.fill_(float(self.scale.detach()))  # what was learned, as a running mean does
            return images + self.scale * images

    images, labels = toy(6)
    phi = Running(images)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = distill(phi, images, labels, experts, config(iterations=5, phi_lr=1e9), seed=0)
    assert result.stopped.kind == "diverged" and phi.scale == phi.calls == 0.1


class Detached(Phi):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images, **_):
        return (images * self.scale).detach()


class Cropper(Phi):
    def forward(self, images, **_):
        return images[..., 1:]


class Idle(Phi):
    """Of two parameters it uses one."""

    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))

    def forward(self, images, **_):
        return images * self.used


@pytest.mark.parametrize("mode", ["raw", "fixed"])
def test_a_phi_that_no_gradient_reaches_is_refused(experts, mode):
    with pytest.raises(ValueError, match=r"no gradient reaches phi \(Detached\)"):
        distill(Detached(), *toy(6), experts, config(alpha_mode=mode), seed=0)


def test_a_parameter_that_phi_does_not_use_stands_still(experts):
    phi = Idle().double()
    distill(phi, *toy(6), experts, config(), seed=0)
    assert phi.idle.item() == 1 != phi.used.item()


def test_a_phi_that_changes_the_shape_is_refused_by_name(experts):
    with pytest.raises(ValueError, match=r"Cropper.*\(6, 1, 8, 8\).*\(6, 1, 8, 7\)"):
        distill(Cropper(), *toy(6), experts, config(), seed=0)


def test_distillation_stops_when_on_iteration_raises(experts):
    class Stop(Exception):
        pass

    images, labels = toy(6)
    seen = []

    def stop(record):
        seen.append(record)
        if record["iteration"] == 1:
            raise Stop

    with pytest.raises(Stop):
        distill(pixels(images), images, labels, experts, config(iterations=9, alpha_lr=0), seed=0, on_iteration=stop)
    assert [r["iteration"] for r in seen] == [0, 1]
    assert set(seen[0]) == {"iteration", "loss", "alpha", "start_epoch", "grad_norm", "scale", "moved", "state"}


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda x, y: (x, y + 1), r"labels from 1 to 3: must be integers in \[0, 2\]"),
        (lambda x, y: (x, y - 1), "labels from -1 to 1"),
        (lambda x, y: (x, y.double()), "must be integers"),
        (lambda x, y: (x, y[1:]), r"labels \(5,\)"),
        (lambda x, y: (x[:0], y[:0]), "B at least 1"),
        (lambda x, y: (x[:, 0], y), r"\(6, 8, 8\).*\[B, C, H, W\]"),
        (lambda x, y: (x[..., :4, :4], y), r"\(1, 4, 4\).*\(1, 8, 8\)"),
        (lambda x, y: (x.expand(-1, 3, -1, -1), y), r"\(3, 8, 8\).*\(1, 8, 8\)"),
    ],
)
def test_images_and_labels_that_the_student_cannot_take_are_refused(experts, change, says):
    images, labels = change(*toy(6))
    with pytest.raises(ValueError, match=says):
        distill(make_phi("identity", images, 3, 0), images, labels, experts, config(), seed=0)
    with pytest.raises(ValueError, match=says):
        train_experts(experts.student, images, labels, ExpertConfig(experts=1, epochs=1), 0)


@pytest.mark.parametrize(
    "name, changes, says",
    [
        ("pixels", dict(max_start_epoch=4), "max_start_epoch=4.*ends at snapshot 4"),
        ("pixels", dict(max_start_epoch=2, expert_epochs=3), "max_start_epoch=2.*3 snapshots"),
        ("pixels", dict(objective="real_loss"), r"pass real="),
        ("pixels", dict(episode=1), "episode=1: Pixels is bound"),
        ("identity", dict(episode=3), "episode=3: the smallest class has 2"),
        ("pixels", dict(phi_optimizer="Foo"), "'Foo'.*torch.optim"),
        ("pixels", dict(phi_optimizer="lr_scheduler"), "'lr_scheduler'.*torch.optim"),
        ("identity", dict(alpha_optimizer="Optimizer"), "'Optimizer'.*torch.optim"),
        ("pixels", dict(phi_optimizer="Adam", phi_momentum=0.9), "momentum=0.9: Adam has no momentum"),
        ("identity", dict(alpha_optimizer="Adagrad", alpha_momentum=0.5), "momentum=0.5: Adagrad has no momentum"),
    ],
)
def test_impossible_configurations_are_refused(experts, name, changes, says):
    images, labels = toy(6)
    with pytest.raises(ValueError, match=says):
        distill(make_phi(name, images, 3, 0), images, labels, experts, config(**changes), seed=0)


def test_the_latest_possible_start_is_taken(experts):
    images, labels = toy(6)
    settings = config(max_start_epoch=3, iterations=12)
    history = distill(pixels(images), images, labels, experts, settings, seed=0).history
    assert {h["start_epoch"] for h in history} == {0, 1, 2, 3}


def test_an_exploded_phi_is_divergence_though_instance_norm_hides_it():
    class Gain(Phi):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(1.0))

        def forward(self, images, **_):
            return images * self.gain

    student = ConvNet(1, 3, 8, width=4, depth=1)
    images, labels = torch.randn(6, 1, 8, 8, generator=seeded(0)), torch.arange(6) % 3
    experts = train_experts(student, images, labels, ExpertConfig(experts=1, epochs=3, expert_batch=3), 0)
    config = DistillConfig(iterations=5, syn_steps=2, max_start_epoch=0, phi_optimizer="SGD", phi_lr=1e9)
    with pytest.warns(UserWarning, match="times as large as x"):
        result = distill(Gain(), images, labels, experts, config, seed=0)
    assert len(result.history) == 2 and result.history[1]["scale"] > 100
    assert abs(result.history[1]["loss"]) < 100  # finite, and no explosion to see in it
    assert result.phi.gain == 1.0


def gain_phi(value=1.0):
    """phi(x) = gain x."""

    class Gain(Phi):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(value, dtype=torch.float64))

        def forward(self, images, **_):
            return images * self.gain

    return Gain()


def test_scale_is_what_phi_does_to_each_batch_and_nothing_else(experts):
    images, labels = toy(6)
    images[0] *= 20
    identity = make_phi("identity", images, 3, seed=0)
    for settings in (config(iterations=3, batch_syn=1, alpha_lr=0), config(iterations=3, draws=2, noise="once")):
        result = distill(identity, images, labels, experts, settings, seed=0, augment=lambda x, **_: x * 1000)
        assert not result.stopped and [r["scale"] for r in result.history] == [1.0] * 3
    result = distill(gain_phi(3.0), images, labels, experts, config(iterations=1, phi_lr=0.0), seed=0)
    assert result.history[0]["scale"] == pytest.approx(3.0)


def test_black_images_are_no_explosion(experts):
    images, labels = torch.zeros(6, 1, 8, 8, dtype=torch.float64), torch.arange(6) % 3
    result = distill(make_phi("identity", images, 3, 0), images, labels, experts, config(iterations=1), seed=0)
    assert result.history[0]["scale"] == 0 and not result.stopped


def test_the_last_step_is_looked_at_too(experts):
    images, labels = toy(6)
    with pytest.warns(UserWarning, match="diverged in the last step"):
        phi = gain_phi()
        result = distill(phi, images, labels, experts, config(iterations=1, phi_optimizer="SGD", phi_lr=1e12), seed=0)
    assert "phi_lr=1e+12" in result.stopped.reason and phi.gain == 1 and len(result.history) == 1


@pytest.mark.parametrize("kind", ["LBFGS", "SparseAdam", "Muon", "Optimizer", "lr_scheduler"])
def test_optimizers_that_cannot_serve_are_refused_by_name(experts, kind):
    images, labels = toy(6)
    with pytest.raises(ValueError, match=f"optimizer '{kind}'"):
        distill(gain_phi(), images, labels, experts, config(phi_optimizer=kind), seed=0)


@pytest.mark.parametrize(
    "images, labels, message",
    [
        (lambda x: x, lambda y: y.int(), r"type int64 \(they are torch.int32\)"),
        (lambda x: x.float(), lambda y: y, "images are torch.float32, the student is torch.float64"),
    ],
)
def test_the_wrong_type_is_refused_by_name(experts, images, labels, message):
    x, y = toy(6)
    phi = make_phi("identity", x, 3, 0)
    with pytest.raises(ValueError, match=message):
        distill(phi, images(x), labels(y), experts, config(), seed=0)
    with pytest.raises(ValueError, match=message):  # the real data of the 2018 objective are held to the same
        distill(phi, x, y, experts, config(objective="real_loss"), seed=0, real=(images(x), labels(y)))


def test_an_episode_takes_the_classes_that_are_there(experts):
    images, labels = toy(6)
    there = labels != 1
    settings = config(iterations=1, episode=2)
    distill(make_phi("identity", images, 3, 0), images[there], labels[there], experts, settings, seed=0)
    with pytest.raises(ValueError, match="episode=3: the smallest class has 2 images"):
        distill(make_phi("identity", images, 3, 0), images, labels, experts, config(episode=3), seed=0)


def test_depths_and_sizes_that_leave_nothing_are_refused():
    with pytest.raises(ValueError, match="depth=-1"):
        ConvNet(1, 3, 8, depth=-1)
    with pytest.raises(ValueError, match="4 pixels: 2 valid convolutions"):
        make_phi("distnet2", torch.zeros(2, 1, 4, 4), 3, 0)
