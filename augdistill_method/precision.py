"""The number type of a student's convolutions: float32, TF32 or bf16.

Parameters, step size, norms' statistics, logits, loss and all products of parameter vectors are float32 in each of
them. `gradient_cosine` in `unroll` tells what a precision costs: the cosine of the unroll's gradient to float64's.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

PRECISIONS = {
    "float32": "as it says: without TF32, which torch lets cuDNN's convolutions use unless told otherwise",
    "tf32": "products of float32 numbers rounded to 10 bits, on a CUDA device only",
    "bf16": "the images between two layers, and the convolutions' weights, are rounded to 8 bits",
}


def precision_of(student: nn.Module) -> str:
    """The student's `precision`; "float32" if it does not have this attribute."""
    return getattr(student, "precision", "float32")


@contextlib.contextmanager
def arithmetic(student: nn.Module) -> Iterator[None]:
    """In this block CUDA uses TF32 if that is the student's precision, else not; then torch's settings return."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = precision_of(student) == "tf32"
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value
