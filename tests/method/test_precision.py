"""Number types: what each costs, what stays float32, and that torch's own settings return."""

import copy

import pytest
import torch
from toys import built, mlp, toy

from augdistill_core import ConvNet, gradient_cosine, initial_parameters, seeded, sgd, unroll
from augdistill_method.precision import arithmetic
from augdistill_method.student import sgd_together
from augdistill_report.settings import Settings
from augdistill_report.work.setup import Setup


def inputs(precision, steps=4):
    """Student, start, target, batches and labels in float32."""
    student = ConvNet(1, 3, 8, width=8, depth=2, precision=precision)
    images, labels = toy(6 * steps, dtype=torch.float32)
    start = initial_parameters(student, 0)
    target = start + 0.01 * torch.randn(len(start), generator=seeded(0))
    return student, start, target, images.split(6), labels.split(6)


@pytest.mark.parametrize("memory", ["graph", "replay"])
@pytest.mark.parametrize(("precision", "low", "high"), [("float32", 1 - 1e-9, 1), ("bf16", 0.99, 0.99999)])
def test_the_cosine_of_the_gradient_to_float64(precision, low, high, memory):
    found = gradient_cosine(*inputs(precision), 0.02, memory=memory)
    assert low <= found <= high + 1e-12


def test_with_bf16_images_between_the_layers_are_rounded_and_nothing_else():
    student, start, _, (images,), labels = inputs("bf16", 1)
    exact = copy.deepcopy(student)
    exact.precision = "float32"
    logits, right = student(images), exact(images)
    assert logits.dtype == torch.float32 and 1e-5 < (logits - right).norm() / right.norm() < 0.05
    assert not torch.equal(logits, logits.bfloat16().float())  # the last layer is float32
    asked = [start.clone().requires_grad_(), images.clone().requires_grad_(), torch.tensor(0.1, requires_grad=True)]
    for memory in ("graph", "replay"):
        end = unroll(student, asked[0], [asked[1]], labels, asked[2], memory=memory)
        found = torch.autograd.grad(end.square().sum(), asked)
        assert {t.dtype for t in (end, *found)} == {torch.float32}


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_tf32_is_on_for_a_student_of_that_precision_and_for_nobody_else(precision):
    seen = []

    def flags():
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    class Looks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(flags())
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            seen.append(flags())
            return g

    class Student(torch.nn.Linear):
        def forward(self, images):
            return super().forward(Looks.apply(images.flatten(1)) if images.requires_grad else images.flatten(1))

    student = built(lambda: Student(64, 3))
    student.precision = precision
    images, labels = toy(4)
    x, start, before = images.clone().requires_grad_(), initial_parameters(student, 0).double(), flags()
    for memory in ("graph", "replay"):
        end = unroll(student, start, [x, x], [labels, labels], 0.1, memory=memory)
        assert flags() == before
        if memory == "replay":  # its backward pass sets them itself
            torch.autograd.grad(end.square().sum(), x)
    next(sgd(student, start, [(x, labels)], 0.1))
    next(sgd_together(student, start[None], [[(x, labels)]], 0.1))
    assert len(seen) > 8 and set(seen) == {(precision == "tf32",) * 2}
    with pytest.raises(KeyError), arithmetic(student):
        raise KeyError
    assert flags() == before


def test_a_wrong_precision_is_refused():
    with pytest.raises(ValueError, match="precision='half': must be one of float32, tf32, bf16"):
        ConvNet(1, 3, 8, depth=2, precision="half")
    with pytest.raises(ValueError, match=r"precision=.*half.*float32, tf32, bf16"):
        Setup(precision="half")
    with pytest.raises(ValueError, match="precision='tf32': a CPU does not have it; use device=cuda, or"):
        Setup(precision="tf32")
    assert Setup(precision="tf32", device="cuda").precision == "tf32"
    with pytest.raises(ValueError, match="memory='captured': needs a CUDA device; use device=cuda, or"):
        Settings(memory="captured")
    assert gradient_cosine(built(mlp), *inputs_of(built(mlp)), 0.1) == pytest.approx(1)  # a student without a precision


def inputs_of(student):
    start = initial_parameters(student, 0).double()
    images, labels = toy(4)
    return start, start + 0.1, [images], [labels]
