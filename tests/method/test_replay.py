"""Replay gives the gradients of the whole graph, to rounding, and keeps nothing of a step but its parameters.

The reference is autograd through the whole graph in double precision, over the table of awkward students.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import STUDENTS, assert_near, built, toy

import augdistill_core
from augdistill_core import (
    ConvNet,
    DistillConfig,
    ExpertConfig,
    choose_memory,
    distill,
    initial_parameters,
    logits_of,
    make_phi,
    seeded,
    train_experts,
    unflatten,
    unroll,
)
from augdistill_method import unroll as unroll_module
from augdistill_method.unroll import eager, stride
from augdistill_report.data.augmentations import RandomAffine


def soft_labels(labels, classes=3):
    """Weights `[B, K]` that do not sum to one, so that no derivative may rely on it; to be differentiated in."""
    noise = torch.rand(len(labels), classes, generator=seeded(5), dtype=torch.float64)
    return (F.one_hot(labels, classes) + noise).requires_grad_()


def inputs(student, steps, seed=0, batch=5):
    """Start, batches, labels and alpha, all to be differentiated in."""
    images, labels = toy(steps * batch, seed)
    start = initial_parameters(student, seed).double().requires_grad_()
    batches = [x.clone().requires_grad_() for x in images.split(batch)]
    return start, batches, labels.split(batch), torch.tensor(0.05, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(("steps", "soft"), [(1, False), (2, True), (20, False), (20, True)])
@pytest.mark.parametrize("build", STUDENTS.values(), ids=STUDENTS)
def test_replay_is_exact_in_every_batch_in_soft_labels_in_alpha_and_in_start(build, steps, soft):
    student = built(build)
    start, batches, labels, alpha = inputs(student, steps)
    labels = [soft_labels(y) for y in labels] if soft else labels
    asked = [start, alpha, *batches, *(labels if soft else [])]
    weight = torch.randn(len(start), generator=seeded(3), dtype=torch.float64)
    found = {}
    for memory in ("graph", "replay"):
        end = unroll(student, start, batches, labels, alpha, memory=memory)
        found[memory] = end, *torch.autograd.grad((end * weight).sum(), asked)
    for whole, replayed in zip(*found.values(), strict=True):
        assert (whole - replayed).norm() <= 1e-12 * whole.norm() and whole.norm() > 0


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("build", STUDENTS.values(), ids=STUDENTS)
def test_a_step_s_product_is_that_of_its_gradient(build, soft):
    """The pair that replay is made of, each alone, against autograd through plain functions of one flat vector."""
    student = built(build)
    images, labels = toy(7)
    labels = soft_labels(labels) if soft else labels
    theta, v = (initial_parameters(student, k).double() for k in (0, 1))

    def slope(theta, images):
        loss = F.cross_entropy(logits_of(student, unflatten(student, theta), images), labels)
        return torch.autograd.grad(loss, theta, create_graph=True)[0]

    whole, seen = theta.clone().requires_grad_(), images.clone().requires_grad_()
    g = slope(whole, seen)
    product = (g @ v, *torch.autograd.grad(g @ v, [seen, *([labels] if soft else []), whole]))
    found = eager(student)
    assert_near(found.gradient(theta, images, labels), g, g)
    results = found.product(theta, images, labels, v)
    assert (results[2] is not None) == soft
    for one, other in zip((r for r in results if r is not None), product, strict=True):
        assert_near(one, other, other)
        assert not one.requires_grad


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_keeping_fewer_parameters_gives_the_same_bits(steps):
    student = built(STUDENTS["convnet"]).float()
    start, batches, labels, alpha = (
        x.float().detach().requires_grad_() if isinstance(x, torch.Tensor) else x for x in inputs(student, steps)
    )
    batches = [x.detach().float().requires_grad_() for x in batches]
    found, held = [], []
    for keep in (0, 1, 2, 6, 11, 100):
        end = unroll(student, start, batches, labels, alpha, memory="replay", keep=keep)
        held.append(len(end.grad_fn.saved_tensors) - 1 - 2 * steps)
        found.append([end, *torch.autograd.grad(end.square().sum(), [start, alpha, *batches])])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert torch.equal(one, two)
    assert held[0] == held[-1] == steps and all(h <= steps for h in held)


@pytest.mark.parametrize(("steps", "keep", "every"), [(1, 20, 1), (19, 20, 1), (20, 20, 2), (50, 20, 3), (50, 0, 1)])
def test_every_k_th_is_kept(steps, keep, every):
    assert stride(steps, keep) == every
    for n in range(1, 400):
        k = stride(n, keep)
        assert 1 <= k <= n and (not keep or -(-n // k) + k <= max(keep, 2 * n**0.5 + 2))


def test_a_negative_number_to_keep_is_refused():
    student = built(STUDENTS["mlp"])
    with pytest.raises(ValueError, match="keep=-1: must be at least 1, or 0"):
        unroll(student, *inputs(student, 1), memory="replay", keep=-1)


def test_only_what_is_asked_for_is_needed():
    student = built(STUDENTS["convnet"])
    start, batches, labels, alpha = inputs(student, 3)
    plain = [x.detach() for x in batches]
    one = [*plain[:1], batches[1], *plain[2:]]
    for memory in ("graph", "replay"):
        (d_alpha,) = torch.autograd.grad(
            unroll(student, start.detach(), plain, labels, alpha, memory=memory).sum(), alpha
        )
        (d_one,) = torch.autograd.grad(
            unroll(student, start.detach(), one, labels, 0.05, memory=memory).sum(), batches[1]
        )
        assert d_alpha.norm() > 0 and d_one.norm() > 0


def test_a_second_derivative_is_a_clear_error():
    student = built(STUDENTS["mlp"])
    start, batches, labels, alpha = inputs(student, 2)
    end = unroll(student, start, batches, labels, alpha, memory="replay")
    with pytest.raises(RuntimeError, match=r"only once.*memory='graph'"):
        torch.autograd.grad(end.square().sum(), alpha, create_graph=True)


def saved_bytes(function) -> int:
    """Bytes of all distinct tensors that the graph of `function`'s result keeps alive."""
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        result = function()
    assert result.requires_grad
    return sum(kept.values())


def test_replay_keeps_a_step_s_parameters_and_images_and_nothing_else():
    student = ConvNet(1, 3, 8, width=16, depth=2).double()
    for steps in (1, 4, 9):
        start, batches, labels, alpha = inputs(student, steps, batch=6)
        end = unroll(student, start, batches, labels, alpha, memory="replay")
        kept = sum(t.numel() for t in end.grad_fn.saved_tensors)
        assert kept == 1 + steps * (len(start) + batches[0].numel() + len(labels[0]))
        assert end.grad_fn.next_functions[-1][0].variable is batches[-1]  # nothing between it and its inputs
        graph = saved_bytes(lambda: unroll(student, start, batches, labels, alpha))  # noqa: B023
        assert graph > 8 * 5 * kept


@pytest.fixture(scope="module")
def world():
    images, labels = toy(12, dtype=torch.float64)
    student = ConvNet(1, 3, 8, width=4, depth=1).double()
    return images, labels, train_experts(student, images, labels, ExpertConfig(experts=2, epochs=4, expert_batch=4), 0)


@pytest.mark.parametrize("phi", ["unet_noise", "distnet2", "pixels", "identity"])
@pytest.mark.parametrize("change", [{}, {"draws": 2, "batch_syn": 5}, {"noise": "once"}, {"objective": "real_loss"}])
def test_distillation_is_the_same_through_phi_noise_and_augmentation(world, phi, change):
    images, labels, experts = world
    found = []
    for memory in ("graph", "replay"):
        config = DistillConfig(iterations=3, syn_steps=4, max_start_epoch=2, memory=memory, real_batch=8, **change)
        made = make_phi(phi, images, 3, seed=0)
        result = distill(made, images, labels, experts, config, seed=0, augment=RandomAffine(), real=(images, labels))
        found.append([r[k] for r in result.history for k in ("loss", "alpha", "grad_norm")])
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_phi_s_graph_is_not_kept_for_every_step(world):
    images, labels, _ = world
    phi, generator = make_phi("unet_noise", images, 3, 0), seeded(0)
    config, base = DistillConfig(), torch.arange(len(images))

    def kept(memory, steps):
        def draw():
            fed = augdistill_core.draw_batches(
                phi, None, images, labels, base, [base] * steps, config, memory, generator
            )
            return torch.stack(fed[0])

        return saved_bytes(draw)

    step = images.numel() * 8
    assert kept("replay", 8) - kept("replay", 4) <= 4.1 * step  # at most the images of a step, and its labels
    assert kept("graph", 8) - kept("graph", 4) > 4 * 20 * step


def test_auto_keeps_the_graph_while_it_fits(monkeypatch):
    images, labels = toy(6)
    student = built(STUDENTS["convnet"])
    start = initial_parameters(student, 0)
    one = saved_bytes(lambda: unroll(student, start, [images], [labels], torch.tensor(0.1, requires_grad=True)))
    walked = unroll(student, start, [images], [labels], 0.1).detach()
    for free, expected in ((2.5 * 100 * one, "graph"), (1.0 * 100 * one, "replay")):
        monkeypatch.setattr(unroll_module, "free_memory", lambda device, free=free: free)
        assert choose_memory("auto", student, images, labels, 100) == expected
        assert choose_memory("replay", student, images, labels, 100) == "replay"
        end = unroll(student, start.requires_grad_(), [images] * 100, [labels] * 100, 0.1, memory="auto")
        assert (type(end.grad_fn).__name__ == "_ReplayBackward") == (expected == "replay")
        with torch.no_grad():
            assert torch.equal(unroll(student, start, [images], [labels], 0.1, memory="auto"), walked)
    assert choose_memory("graph", student, images, labels, 10**9) == "graph"
    monkeypatch.undo()
    assert 2**20 < unroll_module.free_memory(images.device) < 2**50


@pytest.mark.parametrize(("change", "size"), [({}, 12), ({"batch_syn": 5}, 5), ({"episode": 2}, 6)], ids=str)
def test_memory_is_chosen_for_the_images_of_one_step(world, monkeypatch, change, size):
    images, labels, experts = world
    seen = []

    def watch(memory, student, images, labels, steps):
        seen.append((len(images), steps))
        return "graph"

    monkeypatch.setattr(augdistill_core, "choose_memory", watch)
    config = DistillConfig(iterations=1, syn_steps=4, draws=3, max_start_epoch=2, **change)
    distill(make_phi("unet", images, 3, 0), images, labels, experts, config, seed=0)
    assert seen == [(size, 12)]


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.BatchNorm1d(6), "BatchNorm1d.*track_running_stats=False"),
        (nn.InstanceNorm1d(6, track_running_stats=True), "InstanceNorm1d.*running"),
        (nn.Dropout(0.5), "Dropout.*p=0"),
    ],
)
def test_students_that_cannot_be_walked_twice_are_refused_with_the_way_out(layer, message):
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), layer, nn.Linear(6, 3)).double()
    start, batches, labels, alpha = inputs(student, 2)
    for memory in ("graph", "replay"):
        with pytest.raises(ValueError, match=message):
            unroll(student, start, batches, labels, alpha, memory=memory)
    images, labels = toy(6)
    with pytest.raises(ValueError, match=message):
        train_experts(student, images, labels, ExpertConfig(experts=1, epochs=1), 0)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(6, track_running_stats=False), nn.Dropout(0.0)])
def test_their_harmless_forms_are_taken(layer):
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), layer, nn.Linear(6, 3)).double()
    start, batches, labels, alpha = inputs(student, 3)
    ends = [unroll(student, start, batches, labels, alpha, memory=m) for m in ("graph", "replay")]
    torch.testing.assert_close(*ends, rtol=1e-12, atol=0)


def test_an_unknown_way_is_refused():
    student = built(STUDENTS["mlp"])
    with pytest.raises(ValueError, match=r"memory='both'.*graph, replay"):
        unroll(student, *inputs(student, 1), memory="both")
