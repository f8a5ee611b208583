"""Norm, ReLU and pooling as one operation, against torch's own three layers in double precision.

Its derivatives are written by hand: each is held against autograd through the layers, and against finite differences.
"""

import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from augdistill_core import ConvNet, initial_parameters, logits_of, seeded, unflatten
from augdistill_method import fused
from augdistill_method.capture import Captured
from augdistill_method.fused import norm_relu_pool
from augdistill_method.unroll import Steps, eager, step_gradient

SHAPES = [(3, 4, 6, 6), (1, 3, 2, 2), (2, 3, 4, 8), (2, 3, 8, 4)]


def layers(z, gain, shift):
    return F.avg_pool2d(F.relu(F.group_norm(z, z.shape[1], gain, shift)), 2)


def inputs(shape, seed=0):
    """z, gain and shift, and tangents of them, and a cotangent of the output; z far from zero, which sums must bear."""
    generator = seeded(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    values = [1 + draw(*shape), draw(shape[1]), draw(shape[1])]
    return (
        [v.requires_grad_() for v in values],
        [draw(*v.shape) for v in values],
        draw(*F.avg_pool2d(values[0], 2).shape),
    )


def assert_near(found, expected):
    scale = max(e.norm() for e in expected)
    for f, e in zip(found, expected, strict=True):
        assert (f - e).norm() <= 1e-12 * scale and scale > 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_and_its_two_derivatives_are_those_of_the_layers(shape):
    values, tangents, p = inputs(shape)
    found = []
    for function in (norm_relu_pool, layers):
        cotangent = p.clone().requires_grad_()
        out = function(*values)
        first = torch.autograd.grad(out, values, cotangent, create_graph=True)
        product = sum((a * b).sum() for a, b in zip(first, tangents, strict=True))
        second = torch.autograd.grad(product, [*values, cotangent], allow_unused=True, materialize_grads=True)
        found.append([[out], first, second])
    for one, other in zip(*found, strict=True):
        assert_near(one, other)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_its_tangents_and_their_derivatives_are_those_of_the_layers(shape):
    values, tangents, p = inputs(shape)
    eager(ConvNet(1, 2, 4, 1, 1))  # torch's forward mode warns of itself at its first use, unless it was set up
    with forward_ad.dual_level():
        moving = [forward_ad.make_dual(v, t) for v, t in zip(values, tangents, strict=True)]
        tangent = forward_ad.unpack_dual(norm_relu_pool(*moving)).tangent
    found = torch.autograd.grad((tangent * p).sum(), values, allow_unused=True, materialize_grads=True)
    cotangent = p.clone().requires_grad_()
    first = torch.autograd.grad(layers(*values), values, cotangent, create_graph=True)
    product = sum((a * b).sum() for a, b in zip(first, tangents, strict=True))
    *second, expected = torch.autograd.grad(
        product, [*values, cotangent], allow_unused=True, materialize_grads=True
    )  # the tangent is what the gradient's product is linear in
    assert_near([tangent], [expected])
    assert_near(found, second)


def test_finite_differences_agree_twice():
    values, _, _ = inputs((2, 2, 4, 4), seed=1)
    # the map is smooth where no pixel sits within a step of ReLU's kink
    normed = F.group_norm(values[0], 2, *values[1:])
    assert normed.abs().min() > 1e-3
    torch.autograd.gradcheck(norm_relu_pool, values, eps=1e-6, atol=1e-7)
    torch.autograd.gradgradcheck(norm_relu_pool, values, eps=1e-6, atol=1e-6)


def test_any_layout_serves():
    values, _, p = inputs((3, 4, 6, 6))
    z, *rest = values
    turned = z.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    for memory in (torch.contiguous_format, torch.channels_last):
        one = torch.autograd.grad(norm_relu_pool(z, *rest), [z, *rest], p)
        other = torch.autograd.grad(norm_relu_pool(turned, *rest), [turned, *rest], p.contiguous(memory_format=memory))
        assert_near(other, one)


def test_pixels_that_are_all_equal_are_no_division_by_zero():
    z = torch.full((2, 3, 4, 4), 2.0, requires_grad=True)
    out = norm_relu_pool(z, torch.ones(3), torch.ones(3))
    torch.testing.assert_close(out, torch.ones(2, 3, 2, 2))
    (grad,) = torch.autograd.grad(out.square().sum(), z, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), z)[0].isfinite().all()


@pytest.mark.parametrize(("size", "depth"), [(8, 2), (7, 2), (12, 3)])  # 7 and 3 are odd: the layers themselves
def test_a_convnet_is_its_layers_whatever_the_size(size, depth):
    student = ConvNet(2, 3, size, width=4, depth=depth).double()
    images = torch.randn(5, 2, size, size, generator=seeded(0), dtype=torch.float64)
    expected = student.classifier(student.features(images).flatten(1))
    torch.testing.assert_close(student(images), expected, rtol=1e-12, atol=1e-12)


def test_torch_func_takes_a_convnet():
    student = ConvNet(1, 3, 8, width=4, depth=2).double()
    images = torch.randn(5, 1, 8, 8, generator=seeded(0), dtype=torch.float64)
    thetas = torch.stack([initial_parameters(student, k).double() for k in range(3)])
    together = torch.vmap(lambda theta: logits_of(student, unflatten(student, theta), images))(thetas)
    for theta, logits in zip(thetas, together, strict=True):
        torch.testing.assert_close(logits_of(student, unflatten(student, theta), images), logits, rtol=1e-12, atol=0)


@pytest.fixture
def compiled(monkeypatch):
    """The formulas as on a CUDA device, but for inductor: dynamo traces them, and torch runs what it traced."""
    traced = []

    def backend(graph, example):
        traced.append(graph)
        return graph.forward

    monkeypatch.setattr(fused, "compiles", lambda z: not torch._C._len_torch_dispatch_stack())
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    yield traced
    fused.compiled.cache_clear()
    fused.FAILED.clear()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_compiled_formulas_are_exact_captured_ones_too(compiled, monkeypatch, layout):
    student = ConvNet(1, 3, 8, width=4, depth=2).double()
    images = torch.randn(5, 1, 8, 8, generator=seeded(0), dtype=torch.float64).to(memory_format=layout)
    theta, v = (initial_parameters(student, k).double() for k in (0, 1))
    labels = torch.arange(5) % 3

    def derivatives(steps):
        found = steps.gradient(theta, images, labels), *steps.product(theta, images, labels, v)
        return [t.clone() for t in found if t is not None]

    steps = eager(student)
    found = derivatives(steps)
    assert len(compiled) == 8  # forward, backward, the tangent and its backward: of two layers
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        captured = [Captured(f, lambda run: (run, run())) for f in (steps.gradient, steps.product)]
        of_captured = derivatives(Steps(student, *captured))
    graph = graph_of_gradient(student, theta, images, labels, v)
    assert len(compiled) == 10  # and backward through the gradient
    monkeypatch.undo()
    expected = derivatives(steps)
    for one, other in ((found, expected), (of_captured, expected), (graph, expected[1:])):
        for a, b in zip(one, other, strict=True):
            assert_near([a], [b])


def graph_of_gradient(student, theta, images, labels, v):
    """g . v and its derivatives in images and theta, by backward through the gradient's graph."""
    theta, images = theta.clone().requires_grad_(), images.clone().requires_grad_()
    g = torch.cat([a.flatten() for a in step_gradient(student, unflatten(student, theta), images, labels, True)])
    return (g @ v).detach(), *torch.autograd.grad(g @ v, [images, theta])


def test_without_inductor_the_formulas_run_as_they_are_with_one_warning(monkeypatch):
    def refuse(*given, **options):
        raise torch._dynamo.exc.BackendCompilerFailed(refuse, RuntimeError("no C compiler\nfound"), None)

    monkeypatch.setattr(torch, "compile", lambda *given, **options: refuse)
    monkeypatch.setattr(fused, "compiles", lambda z: not fused.FAILED)
    z = torch.randn(2, 3, 4, 4, generator=seeded(0))
    with pytest.warns(UserWarning, match="run without inductor, so they are slower: .*no C compiler") as caught:
        found = [norm_relu_pool(z, torch.ones(3), torch.zeros(3)) for _ in range(2)]
    assert len(caught) == 1
    for one in found:
        torch.testing.assert_close(one, layers(z, torch.ones(3), torch.zeros(3)))
    fused.compiled.cache_clear()
    fused.FAILED.clear()
