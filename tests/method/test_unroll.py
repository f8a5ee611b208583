"""The unroll is N steps of SGD, and its gradients are those of finite differences."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from toys import STUDENTS, assert_near, built, mlp, toy

from augdistill_core import (
    ConvNet,
    flatten,
    seeded,
    unroll,
)


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("build", STUDENTS.values(), ids=STUDENTS)
def test_unroll_is_n_steps_of_torch_sgd(build, steps):
    student = built(build)
    start = parameters_to_vector(built(build, seed=1).parameters()).detach().clone()
    begin, own = start.clone(), copy.deepcopy(student.state_dict())
    data = [toy(5, seed=n) for n in range(steps)]
    batches, labels = [x for x, _ in data], [y for _, y in data]
    end = unroll(student, start, batches, labels, 0.3)
    with torch.no_grad():
        bare = unroll(student, start, batches, labels, torch.tensor(0.3, dtype=torch.float64))

    model = copy.deepcopy(student)
    vector_to_parameters(start.clone(), model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for images, targets in data:
        optimizer.zero_grad()
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()
    expected = parameters_to_vector(model.parameters()).detach()
    assert_near(end, expected, expected - start)
    assert_near(bare, expected, expected - start)
    assert bare.grad_fn is None and not bare.requires_grad and end.requires_grad
    # nothing that was passed has changed
    assert torch.equal(start, begin) and not start.requires_grad
    assert all(torch.equal(value, own[key]) for key, value in student.state_dict().items())
    assert all(p.grad is None for p in student.parameters())


def test_without_grad_every_step_s_graph_is_freed():
    """Under `torch.no_grad()` a start, images and a step size that ask for gradients leave no graph either."""
    student, (images, labels) = built(mlp), toy(4)
    start = flatten(student.parameters())
    alpha = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        end = unroll(student, start, [images.requires_grad_()] * 2, [labels] * 2, alpha)
    assert end.grad_fn is None and not end.requires_grad


@pytest.mark.parametrize(
    "build, size",
    [
        (lambda: mlp(16, 3, 2), 4),
        (lambda: mlp(16, 3, 2, nn.Softplus), 4),
        (lambda: ConvNet(1, 2, 4, width=2, depth=1), 4),
        (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(2, 2), nn.SiLU(), nn.Flatten(), nn.Linear(8, 2)), 4),
    ],
    ids=["tanh", "softplus", "convnet", "norm and SiLU"],
)
def test_unroll_s_gradients_are_those_of_finite_differences(build, size):
    student = built(build)
    images = torch.randn(3, 2, 1, size, size, generator=seeded(0), dtype=torch.float64, requires_grad=True)
    labels = [torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([1, 1])]
    start = parameters_to_vector(built(build, seed=1).parameters()).detach().requires_grad_()
    alpha = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, a, s: unroll(student, s, list(x), labels, a), (images, alpha, start), atol=1e-6, rtol=1e-5
    )


def test_as_many_labels_as_batches_are_needed():
    student, (images, labels) = built(mlp), toy(4)
    with pytest.raises(ValueError, match="2 batches and 1 label"):
        unroll(student, flatten(student.parameters()), [images] * 2, [labels], 0.1)
