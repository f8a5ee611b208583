"""The differentiable unroll: N steps of SGD, and their exact gradient. Section 3 of `augdistill_core`.

`unroll` is exact in every batch, in alpha and in the start, whichever of its ways is taken: "graph" keeps all that
autograd wants, which grows with N; "replay" keeps some twenty parameter vectors and one step's graph, however large N
is; "compiled" is replay with its two step functions under torch.compile. Ours against the official code's way, which is
the graph: `make bench`, and README's "Speed and memory".

A step enters replay through two functions only, a pair of `Steps`: replace them to make it faster elsewhere.
"""

import dataclasses
import functools
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from augdistill_method.student import check_student, flatten, logits_of, parameter_positions, unflatten

# ----------------------------------------------------------------------------------------------------------------------
# The unroll
# ----------------------------------------------------------------------------------------------------------------------

KEEP = 20  # parameter vectors that replay holds at once: 26 MB for CIFAR-10's student, less than one step's graph


def unroll(
    student: nn.Module,
    start: Tensor,
    batches: Sequence[Tensor],
    labels: Sequence[Tensor],
    alpha: Tensor | float,
    *,
    memory: str = "graph",
    keep: int = KEEP,
) -> Tensor:
    """The parameters `[P]` after N plain SGD steps of size `alpha` from `start` `[P]`, differentiable in all inputs.

    Args:
        batches, labels: N tensors `[B, C, H, W]` and `[B]`; step n is taken on batch n (Algorithm 1, line 12).
        memory: "graph" keeps the whole graph, which grows with N. "replay" walks back with one Hessian-vector product a
            step, and cannot be differentiated twice. "compiled" is replay under torch.compile: the first steps of each
            shape take a minute, and it needs a C++ compiler. "auto" keeps the graph if it fits (`choose_memory`), which
            costs a step to find out; a phi in front of the batches wants the choice made before it is drawn.
        keep: how many of theta_0 .. theta_N replay may hold at once. With fewer than N it keeps every k-th, and takes
            the steps between them a second time on the way back: the same bits for up to a gradient a step more. 0
            keeps them all.

    Under `torch.no_grad()` nothing is kept.
    """
    if len(batches) != len(labels):
        raise ValueError(f"{len(batches)} batches and {len(labels)} label vectors: must be as many")
    check_student(student)
    if memory not in (*MEMORY, "auto"):
        raise ValueError(f"memory={memory!r}: must be one of {', '.join(MEMORY)}, auto")
    if keep < 0:
        raise ValueError(f"keep={keep}: must be at least 1, or 0 for all parameters on the way")
    alpha = torch.as_tensor(alpha, dtype=start.dtype, device=start.device)
    if batches and torch.is_grad_enabled():
        memory = choose_memory(memory, student, batches[0], labels[0], len(batches))
    if memory in STEPS:
        return _Replay.apply(STEPS[memory](student), stride(len(batches), keep), labels, start, alpha, *batches)
    if not torch.is_grad_enabled():
        *_, end = walk(eager(student), start, batches, labels, alpha)
        return end
    theta = unflatten(student, start if start.requires_grad else start.detach().requires_grad_())
    for images, targets in zip(batches, labels, strict=True):
        grads = step_gradient(student, theta, images, targets, create_graph=True)
        theta = [p - alpha * g for p, g in zip(theta, grads, strict=True)]
    return flatten(theta)


def stride(steps: int, keep: int) -> int:
    """The smallest k so that every k-th of theta_0 .. theta_(N-1) and the k at work are at most `keep` vectors.

    Where no k is small enough, sqrt(N), which makes them fewest.
    """
    if keep == 0 or steps < 2:
        return 1
    return next((k for k in range(1, math.isqrt(steps) + 1) if -(-steps // k) + k <= keep), math.isqrt(steps))


def walk(steps: "Steps", start: Tensor, batches, labels, alpha: Tensor) -> Iterator[Tensor]:
    """theta_0 .. theta_N, each `[P]`, without a graph."""
    theta = start.detach()
    yield theta
    for images, targets in zip(batches, labels, strict=True):
        theta = theta - alpha.detach() * steps.gradient(theta, images.detach(), targets)
        yield theta


class _Replay(torch.autograd.Function):
    """The unroll with its way back: with v = dL/dtheta_(n+1), g the gradient of step n and H its Hessian,

        dL/dtheta_n = v - alpha H v,    dL/dx_n = -alpha (d/dx_n)(g . v),    dL/dalpha = - sum_n g . v

    where H v and (d/dx_n)(g . v) come from one backward pass through g . v (Maclaurin et al. 2015, not reversed).
    """

    @staticmethod
    def forward(ctx, steps, every, labels, start, alpha, *batches):
        kept = []
        for n, theta in enumerate(walk(steps, start, batches, labels, alpha)):
            if n % every == 0 and n < len(batches):
                kept.append(theta)
        ctx.steps, ctx.every, ctx.labels = steps, every, labels
        ctx.save_for_backward(alpha, *batches, *kept)
        return theta

    @staticmethod
    def backward(ctx, v):
        if torch.is_grad_enabled():
            raise RuntimeError("unroll(memory='replay') can be differentiated once only: for more, use memory='graph'")
        steps, every, labels = ctx.steps, ctx.every, ctx.labels
        alpha, *rest = ctx.saved_tensors
        batches, kept = rest[: len(labels)], rest[len(labels) :]
        d_alpha, d_batches = torch.zeros_like(alpha), [None] * len(labels)
        for first in reversed(range(0, len(labels), every)):
            last = min(first + every, len(labels)) - 1
            way = list(walk(steps, kept[first // every], batches[first:last], labels[first:last], alpha))
            for n in range(last, first - 1, -1):
                gv, dx, hv = steps.product(way.pop(), batches[n].detach(), labels[n], v)
                d_alpha -= gv
                d_batches[n] = -alpha * dx
                v = v - alpha * hv
        return None, None, None, v, d_alpha, *d_batches


# ----------------------------------------------------------------------------------------------------------------------
# The two functions that a step consists of, g(theta) and the product of its derivatives with a vector
# ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Steps:
    """What replay knows of a student. With g = d loss(x, labels; theta) / d theta, and all of theta, g, v `[P]`:

    gradient(theta, x, labels) -> g
    product(theta, x, labels, v) -> g . v, (d/dx)(g . v) in x's shape, (d/dtheta)(g . v) = H v

    Both are called without a graph, return new tensors, and give zeros for parameters that the loss does not use.
    """

    gradient: Callable[[Tensor, Tensor, Tensor], Tensor]
    product: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def step_gradient(student, theta: Sequence[Tensor], images: Tensor, labels: Tensor, create_graph: bool) -> list[Tensor]:
    """d loss / d theta, piece by piece; zero for a parameter that the loss does not use (it stands still)."""
    loss = F.cross_entropy(logits_of(student, theta, images), labels)
    return list(torch.autograd.grad(loss, theta, create_graph=create_graph, allow_unused=True, materialize_grads=True))


def leaves(student: nn.Module, theta: Tensor) -> list[Tensor]:
    """`theta` `[P]` as pieces to differentiate in, cut from whatever made it."""
    return [p.detach().requires_grad_() for p in unflatten(student, theta)]


def eager(student: nn.Module) -> Steps:
    """Plain autograd, for any student.

    g . v is the derivative of the loss along v. A student with `forward_mode = True` gets it by carrying tangents
    forward (Pearlmutter 1994), which spares the gradient of every weight; any other by a backward pass with a graph.
    """

    forward_mode = getattr(student, "forward_mode", False)
    if forward_mode:
        _prepare_forward_mode()

    def gradient(theta, images, labels):
        with torch.enable_grad():
            return flatten(step_gradient(student, leaves(student, theta), images, labels, create_graph=False))

    def along(theta, images, labels, v):
        g = step_gradient(student, theta, images, labels, create_graph=True)
        return sum((a * b).sum() for a, b in zip(g, v, strict=True))

    def along_forward(theta, images, labels, v):
        with forward_ad.dual_level():
            moving = [forward_ad.make_dual(p, t) for p, t in zip(theta, v, strict=True)]
            logits, tangents = forward_ad.unpack_dual(logits_of(student, moving, images))
        slope = logits.softmax(1) - F.one_hot(labels, logits.shape[1])  # of the cross entropy
        return (slope * tangents).sum() / len(labels)

    def product(theta, images, labels, v):
        theta, images = leaves(student, theta), images.detach().requires_grad_()
        with torch.enable_grad():
            gv = (along_forward if forward_mode else along)(theta, images, labels, unflatten(student, v))
            dx, *hv = torch.autograd.grad(gv, [images, *theta], allow_unused=True, materialize_grads=True)
        return gv.detach(), dx, flatten(hv)

    return Steps(gradient, product)


@functools.cache
def _prepare_forward_mode() -> None:
    """Torch sets up its forward mode at the first use, and (2.15) warns of its own use of `torch.jit` there."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", FutureWarning)
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


def compiled(student: nn.Module) -> Steps:
    """Both functions under torch.compile: for long runs, since each shape of batch is compiled first.

    On a CUDA device each is captured as a graph (mode "reduce-overhead"), so that its kernels are launched at once;
    that has not been run yet on such a device.
    """
    cuda = next(student.parameters()).is_cuda
    if not cuda and not any(shutil.which(c) for c in (os.environ.get("CXX", ""), "g++", "clang++", "c++")):
        raise ValueError("memory='compiled': needs a C++ compiler (g++ or clang++) on the PATH; or use memory='replay'")
    # names, not the parameters themselves, so that another student of the same structure finds the code that is there
    static = student, tuple(parameter_positions(student).items()), tuple(p.shape for p in student.parameters())
    return Steps(*(functools.partial(function, *static) for function in _compiled(cuda)))


@functools.cache
def _compiled(cuda: bool) -> tuple[Callable, Callable]:
    """The two functions of (student, names and positions, shapes, theta, ...)."""

    def loss(student, names, shapes, theta, images, labels):
        if images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)  # what the compiler fuses best
        pieces = [p.view(shape) for p, shape in zip(theta.split([s.numel() for s in shapes]), shapes, strict=True)]
        logits = functional_call(student, {name: pieces[i] for name, i in names}, (images,), tie_weights=False)
        return F.cross_entropy(logits, labels)

    gradient = torch.func.grad(loss, 3)

    def product(student, names, shapes, theta, images, labels, v):
        def along(theta, images):
            return (gradient(student, names, shapes, theta, images, labels) * v).sum()

        (hv, dx), gv = torch.func.grad_and_value(along, (0, 1))(theta, images)
        return gv, dx, hv

    options = dict(fullgraph=True, dynamic=False, mode="reduce-overhead" if cuda else None)
    return torch.compile(gradient, **options), torch.compile(product, **options)


STEPS = {"replay": eager, "compiled": compiled}

MEMORY = ("graph", *STEPS)


# ----------------------------------------------------------------------------------------------------------------------
# Which way to take
# ----------------------------------------------------------------------------------------------------------------------


def choose_memory(memory: str, student: nn.Module, images: Tensor, labels: Tensor, steps: int) -> str:
    """ "graph" if the whole graph of `steps` student steps on such a batch fits half of the free memory, else "replay".

    The graph of one step is measured, not guessed. Anything but "auto" is returned as it is.
    """
    if memory != "auto":
        return memory
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    theta = leaves(student, flatten(student.parameters()).to(images))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        grads = step_gradient(student, theta, images, labels[: len(images)], create_graph=True)
        flatten(grads)
    return "graph" if steps * sum(kept.values()) < 0.5 * free_memory(images.device) else "replay"


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:  # what Linux could free counts too
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 2**32  # elsewhere: a guess that few machines fall short of
