"""The differentiable unroll: N steps of SGD, and their exact gradient.

The gradients in every batch, in soft labels, in alpha and in the start are exact in each memory mode. "graph" keeps
autograd's whole graph, which grows with N. "replay" keeps about twenty parameter vectors and the graph of one step, for
any N. "captured" is replay whose two step functions are CUDA graphs. `make bench` compares the others with the official
code, which uses the graph; see docs/performance.md.

Replay uses the student only through two functions, a pair of `Steps`: replace them to make it faster on other hardware.
"""

import copy
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn

from augdistill_method.capture import Captured
from augdistill_method.precision import arithmetic
from augdistill_method.student import check_student, flatten, logits_of, unflatten

# ----------------------------------------------------------------------------------------------------------------------
# The unroll
# ----------------------------------------------------------------------------------------------------------------------

KEEP = 20  # parameter vectors that replay keeps on a CPU: 26 MB for CIFAR-10's student, less than one step's graph


def unroll(
    student: nn.Module,
    start: Tensor,
    batches: Sequence[Tensor],
    labels: Sequence[Tensor],
    alpha: Tensor | float,
    *,
    memory: str = "graph",
    keep: int | None = None,
) -> Tensor:
    """The parameters `[P]` after N plain SGD steps of size `alpha` from `start` `[P]`, differentiable in all inputs.

    Args:
        batches: N tensors `[B, C, H, W]`; step n is taken on batch n (Algorithm 1, line 12).
        labels: N tensors `[B]` of class numbers, or `[B, K]` of probabilities (soft labels, in `start`'s type).
        memory: "graph" keeps the whole graph, which grows with N. "replay" goes backward with one Hessian-vector
            product per step, and cannot be differentiated twice. "captured" is replay on a CUDA device, with each step
            launched as a whole (`augdistill_method.capture`); a student that cannot be recorded gives a warning, and
            plain replay. "auto" is "captured" on a CUDA device, else the graph if it fits into memory, else replay
            (`choose_memory`, which costs one step). If a phi makes the batches, call that before phi.
        keep: how many of theta_0 .. theta_N replay may keep at once. If that is less than N, it keeps every k-th and
            repeats the steps between them in the backward pass: the same bits, for at most one more gradient per step.
            0 keeps all. None is `KEEP` on a CPU, and all on a CUDA device, where time counts more.

    The student's `precision` holds (`augdistill_method.precision`); with TF32 and memory "graph", run the backward pass
    inside `arithmetic(student)`. Under `torch.no_grad()` nothing is kept. A `ValueError` if an argument does not fit.
    """
    if len(batches) != len(labels):
        raise ValueError(f"{len(batches)} batches and {len(labels)} label vectors: must be equally many")
    check_student(student)
    if memory not in (*MEMORY, "auto"):
        raise ValueError(f"memory={memory!r}: must be one of {', '.join(MEMORY)}, auto")
    if keep is None:
        keep = 0 if start.is_cuda else KEEP
    if keep < 0:
        raise ValueError(f"keep={keep}: must be at least 1, or 0 to keep all of theta_0 .. theta_N")
    alpha = torch.as_tensor(alpha, dtype=start.dtype, device=start.device)
    if batches and (torch.is_grad_enabled() or start.is_cuda or memory == "captured"):
        memory = choose_memory(memory, student, batches[0], labels[0], len(batches))
    with arithmetic(student):
        if not torch.is_grad_enabled():
            *_, end = walk(STEPS.get(memory, eager)(student), start, batches, labels, alpha)
            return end
        if memory in STEPS:
            steps = STEPS[memory](student)
            for images, targets in zip(batches, labels, strict=True):
                steps.prepare(start, images, targets)
            return _Replay.apply(steps, stride(len(batches), keep), start, alpha, *labels, *batches)
        theta = unflatten(student, start if start.requires_grad else start.detach().requires_grad_())
        for images, targets in zip(batches, labels, strict=True):
            grads = step_gradient(student, theta, images, targets, create_graph=True)
            theta = [p - alpha * g for p, g in zip(theta, grads, strict=True)]
        return flatten(theta)


def stride(steps: int, keep: int) -> int:
    """The smallest k for which every k-th of theta_0 .. theta_(N-1), plus k vectors in use, are at most `keep` vectors.

    If there is none, sqrt(N), which minimises their number.
    """
    if keep == 0 or steps < 2:
        return 1
    return next((k for k in range(1, math.isqrt(steps) + 1) if -(-steps // k) + k <= keep), math.isqrt(steps))


def walk(steps: "Steps", start: Tensor, batches, labels, alpha: Tensor) -> Iterator[Tensor]:
    """Yields theta_0 .. theta_N, each `[P]`, without a graph."""
    theta = start.detach()
    yield theta
    for images, targets in zip(batches, labels, strict=True):
        theta = theta - alpha.detach() * steps.gradient(theta, images.detach(), targets.detach())
        yield theta


class _Replay(torch.autograd.Function):
    """The unroll with its own backward pass. With v = dL/dtheta_(n+1), g the gradient of step n and H its Hessian,

        dL/dtheta_n = v - alpha H v,    dL/dx_n = -alpha (d/dx_n)(g . v),    dL/dalpha = - sum_n g . v

    and dL/dy_n = -alpha (d/dy_n)(g . v) for soft labels y_n, where H v and the derivatives of g . v come from one
    backward pass through g . v (Maclaurin et al. 2015, not reversed).
    """

    @staticmethod
    def forward(ctx, steps, every, start, alpha, *fed):
        count = len(fed) // 2  # labels, then batches
        kept = []
        for n, theta in enumerate(walk(steps, start, fed[count:], fed[:count], alpha)):
            if n % every == 0 and n < count:
                kept.append(theta)
        ctx.steps, ctx.every, ctx.count = steps, every, count
        ctx.save_for_backward(alpha, *fed, *kept)
        return theta

    @staticmethod
    def backward(ctx, v):
        if torch.is_grad_enabled():
            raise RuntimeError("unroll(memory='replay') can be differentiated only once; for more, use memory='graph'")
        steps, every, count = ctx.steps, ctx.every, ctx.count
        alpha, *rest = (t.detach() for t in ctx.saved_tensors)
        labels, batches, kept = rest[:count], rest[count : 2 * count], rest[2 * count :]
        d_alpha, d_labels, d_batches = torch.zeros_like(alpha), [None] * count, [None] * count
        with arithmetic(steps.student):
            for first in reversed(range(0, count, every)):
                last = min(first + every, count) - 1
                thetas = list(walk(steps, kept[first // every], batches[first:last], labels[first:last], alpha))
                for n in range(last, first - 1, -1):
                    gv, dx, dy, hv = steps.product(thetas.pop(), batches[n], labels[n], v)
                    d_alpha -= gv
                    d_batches[n] = -alpha * dx
                    d_labels[n] = None if dy is None else -alpha * dy
                    v = v - alpha * hv
        return None, None, v, d_alpha, *d_labels, *d_batches


# ----------------------------------------------------------------------------------------------------------------------
# The two functions of a step: the gradient g(theta), and the product of its derivatives with a vector
# ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Steps:
    """What replay needs of a student. With g = d loss(x, y; theta) / d theta, labels y, and theta, g, v `[P]`:

    gradient(theta, x, y) -> g
    product(theta, x, y, v) -> g . v, (d/dx)(g . v), (d/dy)(g . v), (d/dtheta)(g . v) = H v

    The derivative in y is None if y are class numbers. Both are called without a graph, and return zeros for parameters
    that the loss does not use. The next call may overwrite what they returned. `prepare(theta, x, y)` is called outside
    of autograd before the first calls with tensors of these shapes.
    """

    student: nn.Module
    gradient: Callable[[Tensor, Tensor, Tensor], Tensor]
    product: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None, Tensor]]
    prepare: Callable[[Tensor, Tensor, Tensor], object] = lambda theta, images, labels: None


def step_gradient(student, theta: Sequence[Tensor], images: Tensor, labels: Tensor, create_graph: bool) -> list[Tensor]:
    """d loss / d theta, one tensor per parameter; zero for a parameter that the loss does not use."""
    loss = F.cross_entropy(logits_of(student, theta, images), labels)
    return list(torch.autograd.grad(loss, theta, create_graph=create_graph, allow_unused=True, materialize_grads=True))


def leaves(student: nn.Module, theta: Tensor) -> list[Tensor]:
    """`theta` `[P]` as detached parameters that require gradients."""
    return [p.detach().requires_grad_() for p in unflatten(student, theta)]


def eager(student: nn.Module) -> Steps:
    """The step functions by ordinary autograd, for any student.

    g . v is the derivative of the loss along v. A student with `forward_mode = True` computes it by forward-mode
    differentiation (Pearlmutter 1994), which saves the gradient of every weight; others by a backward pass with graph.
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
        soft = labels  # `F.one_hot` reads the labels on a CPU, which a captured step must not
        if not soft.is_floating_point():
            soft = (labels[:, None] == torch.arange(logits.shape[1], device=labels.device)).to(logits.dtype)
        slope = logits.softmax(1) * soft.sum(1, keepdim=True) - soft  # of the cross entropy
        return (slope * tangents).sum() / len(labels)

    def product(theta, images, labels, v):
        theta, images, labels = leaves(student, theta), images.detach().requires_grad_(), labels.detach()
        soft = [labels.requires_grad_()] if labels.is_floating_point() else []
        with torch.enable_grad():
            gv = (along_forward if forward_mode else along)(theta, images, labels, unflatten(student, v))
            found = torch.autograd.grad(gv, [images, *soft, *theta], allow_unused=True, materialize_grads=True)
        dx, *dy = found[: 1 + len(soft)]
        return gv.detach(), dx, dy[0] if dy else None, flatten(found[1 + len(soft) :])

    return Steps(student, gradient, product)


@functools.cache
def _prepare_forward_mode() -> None:
    """Initialise torch's forward mode once, to silence its own warning about `torch.jit` at the first use (2.15)."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", FutureWarning)
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


@functools.lru_cache(maxsize=2)  # the graphs serve all unrolls of a student
def captured(student: nn.Module, record: Callable | None = None) -> Steps:
    """The step functions of `eager`, each recorded once for each shape of a batch (by `record`: see `Captured`)."""
    steps = eager(student)
    gradient, product = Captured(steps.gradient, record), Captured(steps.product, record)

    def prepare(theta, images, labels):
        gradient.prepare(theta, images, labels)
        product.prepare(theta, images, labels, theta)  # not first in the backward pass, in a thread of autograd's

    return Steps(student, gradient, product, prepare)


STEPS = {"replay": eager, "captured": captured}

MEMORY = ("graph", *STEPS)


# ----------------------------------------------------------------------------------------------------------------------
# The choice of the memory mode
# ----------------------------------------------------------------------------------------------------------------------


def choose_memory(memory: str, student: nn.Module, images: Tensor, labels: Tensor, steps: int) -> str:
    """The memory mode for `steps` student steps on such a batch; any `memory` but "auto" is returned unchanged.

    "captured" on a CUDA device. Elsewhere "graph" if it fits into half of the free memory, for which the size of one
    step's graph is measured, else "replay". A `ValueError` for "captured" without a CUDA device.
    """
    if memory == "captured" and not images.is_cuda:
        raise ValueError("memory='captured': needs a CUDA device; use graph, replay or auto")
    if memory != "auto":
        return memory
    if images.is_cuda:
        return "captured"
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
    """Bytes of memory available on a device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:  # includes memory that Linux can free
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 2**32  # no Linux: nearly every machine has this much


# ----------------------------------------------------------------------------------------------------------------------
# What a number type costs
# ----------------------------------------------------------------------------------------------------------------------


def gradient_cosine(
    student: nn.Module,
    start: Tensor,
    target: Tensor,
    batches: Sequence[Tensor],
    labels: Sequence[Tensor],
    alpha: float,
    *,
    memory: str = "graph",
) -> float:
    """The cosine in [-1, 1] of the gradient in all batches, as `student` computes it, to that in float64.

    The gradient is that of ||end - target||^2 through `unroll`. float64 uses the whole graph, on the same device.
    """
    exact = copy.deepcopy(student).double()
    exact.precision = "float32"  # no rounding to another type

    def gradient(student: nn.Module, memory: str, dtype: torch.dtype) -> Tensor:
        own = [x.detach().to(dtype).requires_grad_() for x in batches]
        with arithmetic(student):
            end = unroll(student, start.to(dtype), own, labels, alpha, memory=memory)
            found = torch.autograd.grad((end - target.to(dtype)).square().sum(), own)
        return torch.cat([g.flatten() for g in found]).double()

    return F.cosine_similarity(
        gradient(student, memory, start.dtype), gradient(exact, "graph", torch.float64), 0
    ).item()
