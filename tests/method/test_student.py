"""The student against plain torch, over awkward modules."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector
from toys import STUDENTS, built, mlp, toy

from augdistill_core import (
    ConvNet,
    flatten,
    initial_parameters,
    seeded,
    unflatten,
)


def test_the_field_s_convnet_has_320010_parameters_on_cifar10():
    assert sum(p.numel() for p in ConvNet(3, 10, 32).parameters()) == 320_010


def test_convnet_is_conv_instance_norm_relu_average_pool_then_linear():
    images, _ = toy(4)
    student = built(STUDENTS["convnet"])
    with torch.no_grad():
        for p in student.parameters():  # the norm's weights of one and biases of zero would hide a mistake
            p.add_(torch.randn(p.shape, generator=seeded(1), dtype=p.dtype))
    *blocks, weight, bias = student.parameters()
    h = images
    for w, b, gain, shift in (blocks[:4], blocks[4:]):
        h = F.avg_pool2d(F.relu(F.instance_norm(F.conv2d(h, w, b, padding=1), weight=gain, bias=shift)), 2)
    torch.testing.assert_close(student(images), F.linear(h.flatten(1), weight, bias), rtol=1e-12, atol=1e-12)


def test_a_convnet_too_deep_for_its_images_is_refused():
    with pytest.raises(ValueError, match=r"depth=4.*8x8"):
        ConvNet(1, 3, 8, depth=4)
    assert ConvNet(1, 3, 8, width=2, depth=3)(torch.zeros(2, 1, 8, 8)).shape == (2, 3)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 16, 16), (1, 8, 4)])
def test_images_of_the_wrong_shape_are_refused_with_both_shapes(shape):
    with pytest.raises(ValueError) as error:
        ConvNet(1, 3, 8, depth=2)(torch.zeros(2, *shape))
    assert str(shape) in str(error.value) and "(1, 8, 8)" in str(error.value)


@pytest.mark.parametrize("build", [*STUDENTS.values(), lambda: nn.Linear(3, 1, bias=False)])
def test_flatten_copies_and_unflatten_undoes_it(build):
    student = built(build)
    theta = flatten(student.parameters())
    before = parameters_to_vector(student.parameters()).detach().clone()
    assert torch.equal(theta, before)
    for piece, p in zip(unflatten(student, theta), student.parameters(), strict=True):
        assert torch.equal(piece, p)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1)
    assert torch.equal(theta, before)
    with pytest.raises(ValueError, match=rf"\({len(theta) + 1},\).*\({len(theta)},\)"):
        unflatten(student, torch.zeros(len(theta) + 1))


# two layers that share weights initialise them twice, so there a new module differs
@pytest.mark.parametrize("build", [b for k, b in STUDENTS.items() if k != "shared weights"])
def test_initial_parameters_are_those_of_a_module_built_anew(build, rng_untouched):
    student = built(build, seed=9)
    before = copy.deepcopy(student.state_dict())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        expected = parameters_to_vector(build().parameters()).detach()
    with rng_untouched():
        ours, again, other = (initial_parameters(student.float(), seed) for seed in (5, 5, 6))
    assert torch.equal(ours, expected) and torch.equal(ours, again)
    assert not torch.equal(ours, other) and not ours.requires_grad
    for key, value in student.double().state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=1e-7, atol=1e-7)


def test_initial_parameters_advance_a_generator():
    student, generator = mlp(), seeded(3)
    first, second, again = (initial_parameters(student, g) for g in (generator, generator, seeded(3)))
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_a_layer_that_cannot_be_initialised_is_refused_by_name():
    student = mlp()
    student[1].extra = nn.ParameterList([nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match=r"1\.extra.*reset_parameters"):
        initial_parameters(student, 0)
