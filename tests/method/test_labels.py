"""Learned labels, against plain autograd in double precision, the mixture on paper, and a plain loop of SGD."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call
from toys import assert_near, built, toy

from augdistill_core import (
    Applied,
    ConvNet,
    DistillConfig,
    ExpertConfig,
    distill,
    draw_segment,
    initial_parameters,
    labels_under,
    make_phi,
    seeded,
    teacher_of,
    train_experts,
)
from augdistill_report.work.scoring import EvalConfig, train_student

SHARE, TEMPERATURE, SNAPSHOTS, PACE = 0.4, 2.0, 2, 3.0
IMAGES, LABELS = toy(9)


@pytest.fixture(scope="module")
def experts():
    student = built(lambda: ConvNet(1, 3, 8, width=4, depth=1))
    return train_experts(student, *toy(24), ExpertConfig(experts=2, epochs=6, expert_lr=0.1, expert_batch=6), 0)


def config(**changes):
    plain = dict(iterations=1, syn_steps=3, expert_epochs=1, max_start_epoch=0, alpha=0.05, alpha_mode="fixed")
    rest = dict(phi_optimizer="SGD", phi_lr=1.0, label_share=SHARE)
    rest |= dict(label_temperature=TEMPERATURE, label_snapshots=SNAPSHOTS)
    return DistillConfig(**plain | rest | changes)


def logits(student, theta, x):
    names, shapes = zip(*((n, p.shape) for n, p in student.named_parameters()), strict=True)
    pieces = theta.split([s.numel() for s in shapes])
    return functional_call(student, {n: p.view(s) for n, p, s in zip(names, pieces, shapes, strict=True)}, (x,))


def mixture(experts):
    ends = [theta for t in experts.trajectories for theta in (t[-1], t[-2])]  # 1 is a sixth of 6 epochs
    means = [(logits(experts.student, theta, IMAGES) / TEMPERATURE).softmax(1) for theta in ends]
    return (SHARE * torch.stack(means).mean(0) + (1 - SHARE) * F.one_hot(LABELS, 3).double()).detach()


@pytest.mark.parametrize("name", ["labels", "labels+pixels", "pixels+labels", "labels_mixed", "labels_mixed+pixels"])
@pytest.mark.parametrize("objective", ["trajectory", "real_loss"])
@pytest.mark.parametrize("memory", ["graph", "replay"])
def test_the_gradient_of_labels_and_images_is_exact(experts, name, objective, memory):
    phi = make_phi(name, IMAGES, 3, seed=0)
    assert torch.equal(labels_under(phi, LABELS, torch.arange(9)).argmax(1), LABELS)  # hard before they are started
    made, real = config(memory=memory, objective=objective, real_batch=5), toy(20, seed=1)
    result = distill(phi, IMAGES, LABELS, experts, made, seed=0, real=real)
    learned, free = "mixed" not in name, "pixels" in name

    student, generator = experts.student, seeded(0, "distill")
    _, start, target = draw_segment(experts, made, generator)
    x, change = IMAGES.clone().requires_grad_(), torch.zeros(9, 3, dtype=torch.float64, requires_grad=True)
    y = (mixture(experts).clamp(min=1e-4).log() + PACE * change).softmax(1) if learned else mixture(experts)
    theta = start.detach().requires_grad_()
    for _ in range(made.syn_steps):
        loss = -(y * logits(student, theta, x).log_softmax(1)).sum(1).mean()
        theta = theta - made.alpha * torch.autograd.grad(loss, theta, create_graph=True)[0]
    if objective == "trajectory":
        outer = (theta - target).square().sum() / (start - target).square().sum()
    else:
        pick = torch.randint(20, (5,), generator=generator)
        outer = F.cross_entropy(logits(student, theta, real[0][pick]), real[1][pick])
    assert result.history[0]["loss"] == pytest.approx(outer.item(), rel=1e-10)
    state = result.phi.state_dict()
    if learned:
        moved = next(t for key, t in state.items() if key.endswith("change"))
        assert_near(-moved, torch.autograd.grad(outer, change, retain_graph=True)[0], moved, 1e-9)
    if free:
        moved = next(t for key, t in state.items() if key.endswith("pixels")) - IMAGES
        assert_near(-moved, torch.autograd.grad(outer, x)[0], moved, 1e-9)
    index = torch.tensor([7, 0, 3])
    now = labels_under(Applied(result.phi, probability=0.5), LABELS[index], index)
    assert torch.allclose(now.sum(1), torch.ones(3, dtype=torch.float64))
    if not learned:
        torch.testing.assert_close(now, mixture(experts)[index])


def test_a_resumed_run_ends_with_the_same_labels_and_a_second_start_changes_nothing(experts):
    states, whole = [], make_phi("labels+pixels", IMAGES, 3, seed=0)
    long = config(iterations=4, phi_optimizer="Adam", phi_lr=0.01, batch_syn=4, draws=2)
    distill(whole, IMAGES, LABELS, experts, long, seed=0, on_step=lambda state: states.append(state()))
    again = make_phi("labels+pixels", IMAGES, 3, seed=0)
    distill(again, IMAGES, LABELS, experts, long, seed=0, resume=states[1])
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    soft = again.phis[0].soft.clone()
    distill(again, IMAGES, LABELS, experts, config(label_share=0.9), seed=0)
    assert torch.equal(soft, again.phis[0].soft)


def test_students_train_on_these_labels(experts):
    phi = make_phi("labels_mixed", IMAGES, 3, seed=0)
    distill(phi, IMAGES, LABELS, experts, config(), seed=0)
    plain = dict(eval_steps=6, eval_batch=9, eval_lr=0.1, eval_momentum=0.0, eval_decay=0.0)
    found = train_student(experts.student, phi, IMAGES, LABELS, EvalConfig(**plain), 0)
    theta, y = initial_parameters(experts.student, seeded(0)), mixture(experts)
    for step in range(6):
        theta = theta.detach().requires_grad_()
        loss = -(y * logits(experts.student, theta, IMAGES).log_softmax(1)).sum(1).mean()
        theta = theta - (0.1 if step < 3 else 0.01) * torch.autograd.grad(loss, theta)[0]
    torch.testing.assert_close(torch.nn.utils.parameters_to_vector(found.parameters()), theta, rtol=1e-9, atol=1e-12)


def test_the_teacher_is_a_mean_over_late_snapshots(experts):
    """Of 13 snapshots the last sixth are three; more cannot be asked for, and one is the last alone."""
    student, trajectories = experts.student, [torch.cat([t, t.flip(0)])[:13] for t in experts.trajectories]
    long = dataclasses.replace(experts, trajectories=trajectories)
    for snapshots, times in ((1, [12]), (2, [10, 12]), (3, [10, 11, 12]), (50, [10, 11, 12])):
        means = [logits(student, t[time], IMAGES).softmax(1) for t in trajectories for time in times]
        found = teacher_of(long, snapshots=snapshots)(IMAGES)
        torch.testing.assert_close(found, torch.stack(means).mean(0))


def test_two_phis_with_labels_in_one_chain_are_refused():
    phi = make_phi("labels+labels_mixed", IMAGES, 3, seed=0)
    with pytest.raises(ValueError, match="two phis of a chain give labels; use one"):
        labels_under(phi, LABELS, torch.arange(9))
