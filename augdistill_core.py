"""Learn a stochastic augmentation phi(x) by matching training trajectories.

An expert classifier's weights move along a path while it trains on all the data. phi is trained so that a student,
started on that path and trained for a few steps on phi(x) from a handful of real images, lands where the expert did:

    theta_0 = theta*_t,   theta_(n+1) = theta_n - alpha * grad loss(phi(x_n); theta_n),   n = 0 .. N-1
    minimise  || theta_N - theta*_(t+M) ||^2 / || theta*_t - theta*_(t+M) ||^2   over phi and alpha

This is Algorithm 1 of "Dataset distillation by matching training trajectories" (MTT; Cazenavette et al., 2022) with phi
in the place of the synthetic pixels. The pixels are one phi among others here, so the baseline, the student report's
networks and ours are rows of one table. Five sections, each readable alone:

    1 Student    2 Experts    3 The differentiable unroll    4 Phi models (augdistill_phis.py)    5 Distillation

Shapes: images `[B, C, H, W]` (standardised), labels `[B]` (int64), a student's parameters one flat vector `[P]`,
trajectories `[experts, snapshots, P]`. Randomness is an argument everywhere (a seed, or a CPU `torch.Generator`).
"""

import copy
import dataclasses
import functools
import hashlib
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from augdistill_config import Config, knob
from augdistill_phis import PHIS, Phi, augmented, make_phi, register_phi  # noqa: F401 (section 4: offered here too)

# ======================================================================================================================
# 0. Randomness: a seed or a generator, which every section takes as an argument
# ======================================================================================================================


def seeded(*path) -> torch.Generator:
    """A CPU generator that depends on the whole `path` (a seed, then names and numbers), e.g. `seeded(0, "expert", 3)`.

    Streams with different paths are independent, so that adding a draw in one place moves no number elsewhere.
    """
    digest = hashlib.sha256(repr(path).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def minibatches(count: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Index batches without end: a new permutation of `count` images each epoch, the last batch of it may be short.

    `batch` 0 or above `count` means all of them, in their own order (no draw: a full batch has no order to draw).
    """
    if batch <= 0 or batch >= count:
        yield from itertools.repeat(torch.arange(count))
    while True:
        yield from torch.randperm(count, generator=generator).split(batch)


# ======================================================================================================================
# 1. Student
# ======================================================================================================================


class ConvNet(nn.Module):
    """The field's ConvNet (Gidaris & Komodakis 2018; MTT): `depth` x [conv3x3, instance norm, ReLU, 2x2 pool], linear.

    Takes `[B, channels, size, size]`, returns logits `[B, classes]`. 320,010 parameters on CIFAR-10 at width 128.
    """

    def __init__(self, channels: int, classes: int, size: int, width: int = 128, depth: int = 3):
        super().__init__()
        if depth < 1 or size >> depth < 1:
            raise ValueError(
                f"depth={depth}: {depth} poolings of {size}x{size} images must be at least 1, and leave something"
            )
        self.shape, self.classes = (channels, size, size), classes
        blocks = []
        for i in range(depth):
            blocks += [
                nn.Conv2d(channels if i == 0 else width, width, 3, padding=1),
                nn.GroupNorm(width, width),  # one channel a group = instance norm without running statistics
                nn.ReLU(),
                nn.AvgPool2d(2),
            ]
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Linear(width * (size >> depth) ** 2, classes)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1:] != self.shape:
            raise ValueError(f"images of shape {tuple(images.shape[1:])}: this student takes {self.shape} (C, H, W)")
        return self.classifier(self.features(images).flatten(1))


def flatten(parameters: Iterable[Tensor]) -> Tensor:
    """Parameters as one flat vector `[P]`: a copy, never an alias of live weights; differentiable."""
    return torch.cat([p.reshape(-1) for p in parameters])


def unflatten(student: nn.Module, theta: Tensor) -> list[Tensor]:
    """The pieces of `theta` `[P]` as views in the shapes of `student`'s parameters (a shared one counts once)."""
    parameters = list(student.parameters())
    sizes = [p.numel() for p in parameters]
    if theta.shape != (sum(sizes),):
        raise ValueError(f"parameters of shape {tuple(theta.shape)}: this student has ({sum(sizes)},)")
    return [piece.view_as(p) for piece, p in zip(theta.split(sizes), parameters, strict=True)]


def logits_of(student: nn.Module, theta: Sequence[Tensor], images: Tensor) -> Tensor:
    """`student`'s logits `[B, classes]` with the parameters `theta` (the pieces, as `unflatten` gives them)."""
    position = {id(p): i for i, p in enumerate(student.parameters())}
    # every place that holds a parameter, once: torch's own tying of shared weights corrupts a module with two names
    replaced = {
        f"{path}.{name}".lstrip("."): theta[position[id(p)]]
        for path, module in student.named_modules()
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False)
    }
    return functional_call(student, replaced, (images,), tie_weights=False)


def initial_parameters(student: nn.Module, seed: int | torch.Generator) -> Tensor:
    """A fresh random initialisation `[P]` of `student`, by every layer's own `reset_parameters`."""
    model = copy.deepcopy(student).cpu()  # the same weights whatever the device
    seed = int(torch.randint(2**62, (), generator=seed)) if isinstance(seed, torch.Generator) else int(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, module in model.named_modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            elif next(module.parameters(recurse=False), None) is not None:
                raise ValueError(
                    f"student's {name or type(module).__name__} holds parameters but has no reset_parameters()"
                )
    return flatten(model.parameters()).detach()


def check_student(student: nn.Module) -> None:
    """Refuse layers whose draws or side effects make a second pass differ from the first, as the unroll needs."""
    for name, module in student.named_modules():
        kind = type(module).__name__
        if getattr(module, "track_running_stats", False) and module.training:
            raise ValueError(
                f"student's {name} ({kind}) changes its running statistics in every pass: build it with "
                "track_running_stats=False, or use GroupNorm"
            )
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 and module.training:
            raise ValueError(f"student's {name} ({kind}) draws from torch's global state: use p=0")


def check_images(student: nn.Module, images: Tensor, labels: Tensor) -> None:
    """A `ValueError` if images or labels are not ones that `student` can take."""
    check_student(student)
    if images.ndim != 4 or len(images) == 0 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"images {tuple(images.shape)} and labels {tuple(labels.shape)}: must be [B, C, H, W] and [B], B at least 1"
        )
    kinds = {p.dtype for p in student.parameters()}
    if {images.dtype} != kinds:
        raise ValueError(f"images are {images.dtype}, the student is {', '.join(map(str, kinds))}: must be the same")
    with torch.no_grad():
        classes = student(images[:1]).shape[1]
    if labels.dtype != torch.int64 or not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"labels from {labels.min().item()} to {labels.max().item()}: must be integers in [0, {classes - 1}], "
            f"of type int64 (they are {labels.dtype})"
        )


def sgd(
    student: nn.Module,
    start: Tensor,
    batches: Iterable[tuple[Tensor, Tensor]],
    lr: float | Callable[[int], float],
    momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> Iterator[tuple[nn.Module, Tensor]]:
    """Train a copy of `student` from `start` `[P]` by torch's SGD; after each step yield the live model and its loss.

    Ordinary, non-differentiable training: experts are made by it, and fresh students are evaluated by it.
    `lr` may be a function of the step number. Copy what you keep: the model goes on changing.
    """
    model = copy.deepcopy(student)
    with torch.no_grad():
        for p, value in zip(model.parameters(), unflatten(student, start), strict=True):
            p.copy_(value)
    rate = lr if callable(lr) else lambda step: lr
    optimizer = torch.optim.SGD(model.parameters(), lr=rate(0), momentum=momentum, weight_decay=weight_decay)
    for step, (images, labels) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = rate(step)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield model, loss.detach()


# ======================================================================================================================
# 2. Experts
# ======================================================================================================================


@dataclasses.dataclass(frozen=True)
class ExpertConfig(Config):
    """How experts are trained. The official recipe on CIFAR-10: 100 x 50 epochs, lr .01, batch 256, nothing else."""

    experts: int = knob(8, "number of expert trajectories", low=1)
    epochs: int = knob(15, "epochs each expert trains for", low=1)
    expert_lr: float = knob(0.02, "SGD step size of the experts", low=1e-12)
    expert_batch: int = knob(64, "images a step", low=1)
    expert_momentum: float = knob(0.0, "SGD momentum", low=0, high=1)
    expert_decay: float = knob(0.0, "weight decay", low=0)
    snapshot_steps: int = knob(0, "steps between two snapshots; 0 = one epoch", low=0)


@dataclasses.dataclass(frozen=True)
class Trajectories:
    """Experts' ways through weight space: `theta` `[experts, snapshots, P]`, snapshot 0 at initialisation."""

    student: nn.Module
    theta: Tensor

    def segment(self, expert: int, start: int, length: int) -> tuple[Tensor, Tensor]:
        """The parameters `[P]` where a segment starts, and those `length` snapshots later."""
        last = self.theta.shape[1] - 1
        if not 1 <= length <= last:
            raise ValueError(f"a segment of {length} snapshots: must be in [1, {last}], at most the whole trajectory")
        if not 0 <= start <= last - length:
            raise ValueError(
                f"start {start} plus {length} snapshots: this trajectory ends at snapshot {last}, "
                f"so the start must be in [0, {last - length}]"
            )
        if not 0 <= expert < len(self.theta):
            raise ValueError(f"expert {expert}: must be in [0, {len(self.theta) - 1}]")
        if torch.equal(self.theta[expert, start], self.theta[expert, start + length]):
            raise ValueError(f"expert {expert} stands still from snapshot {start} on: there is no way to match")
        return self.theta[expert, start], self.theta[expert, start + length]


def snapshots_every(count: int, config: ExpertConfig) -> tuple[int, int]:
    """For `count` training images: the steps between two snapshots, and how many snapshots follow the first."""
    epoch = -(-count // config.expert_batch)
    every = config.snapshot_steps or epoch
    if every > config.epochs * epoch:
        raise ValueError(f"snapshot_steps={every}: must be at most the {config.epochs * epoch} steps that are trained")
    return every, config.epochs * epoch // every


def train_expert(
    student: nn.Module,
    images: Tensor,
    labels: Tensor,
    config: ExpertConfig,
    seed: int,
    expert: int,
    *,
    augment: Callable | None = None,
    on_snapshot: Callable[[int, float], None] | None = None,
) -> Tensor:
    """One expert's way `[snapshots, P]`, the first at its initialisation; it depends on (seed, expert) alone.

    `augment` is called like a phi on every batch; `on_snapshot(snapshot, mean loss since the last)` may report
    progress, and may stop the training by raising. One snapshot an epoch, or every `snapshot_steps` steps.
    """
    check_images(student, images, labels)
    every, snapshots = snapshots_every(len(images), config)
    generator = seeded(seed, "expert", expert)
    start = initial_parameters(student, generator).to(images)
    batches = (
        (augmented(augment, images[i], labels[i], i, generator), labels[i])
        for i in minibatches(len(images), config.expert_batch, generator)
    )
    steps = sgd(student, start, batches, config.expert_lr, config.expert_momentum, config.expert_decay)
    way, losses = [start], []
    for step, (model, loss) in enumerate(itertools.islice(steps, snapshots * every), 1):
        losses.append(loss)
        if step % every == 0:
            way.append(flatten(model.parameters()).detach())
            if on_snapshot is not None:
                on_snapshot(step // every, float(torch.stack(losses).mean()))
            losses.clear()
    return torch.stack(way)


def train_experts(student: nn.Module, images: Tensor, labels: Tensor, config: ExpertConfig, seed: int, **options):
    """`Trajectories` of `config.experts` experts, one after the other; the options are those of `train_expert`."""
    ways = [train_expert(student, images, labels, config, seed, k, **options) for k in range(config.experts)]
    return Trajectories(student, torch.stack(ways))


# ======================================================================================================================
# 3. The differentiable unroll
# ======================================================================================================================


def unroll(
    student: nn.Module,
    start: Tensor,
    batches: Sequence[Tensor],
    labels: Sequence[Tensor],
    alpha: Tensor | float,
    *,
    memory: str = "graph",
) -> Tensor:
    """The parameters `[P]` after N plain SGD steps of size `alpha` from `start` `[P]`, differentiable in all inputs.

    `batches` are N tensors `[B, C, H, W]` with `labels` `[B]`; step n is taken on batch n (Algorithm 1, line 12). Exact
    both ways: `memory` "graph" keeps the whole graph, which grows with N; "replay" keeps theta_0 .. theta_N alone and
    walks back with one Hessian-vector product a step, for a third more work; it cannot be differentiated twice. Under
    `torch.no_grad()` nothing is kept.
    """
    if len(batches) != len(labels):
        raise ValueError(f"{len(batches)} batches and {len(labels)} label vectors: must be as many")
    check_student(student)
    if memory not in MEMORY:
        raise ValueError(f"memory={memory!r}: must be one of {', '.join(MEMORY)}")
    alpha = torch.as_tensor(alpha, dtype=start.dtype, device=start.device)
    if memory == "replay":
        return _Replay.apply(student, labels, start, alpha, *batches)
    if not torch.is_grad_enabled():
        return walk(student, start, batches, labels, alpha)[-1]
    theta = unflatten(student, start if start.requires_grad else start.detach().requires_grad_())
    for images, targets in zip(batches, labels, strict=True):
        grads = step_gradient(student, theta, images, targets, create_graph=True)
        theta = [p - alpha * g for p, g in zip(theta, grads, strict=True)]
    return flatten(theta)


MEMORY = ("graph", "replay")


def step_gradient(student, theta: Sequence[Tensor], images: Tensor, labels: Tensor, create_graph: bool) -> list[Tensor]:
    """d loss / d theta, piece by piece; zero for a parameter that the loss does not use (it stands still)."""
    loss = F.cross_entropy(logits_of(student, theta, images), labels)
    return list(torch.autograd.grad(loss, theta, create_graph=create_graph, allow_unused=True, materialize_grads=True))


def leaves(student: nn.Module, theta: Tensor) -> list[Tensor]:
    """`theta` `[P]` as pieces to differentiate in, cut from whatever made it."""
    return [p.detach().requires_grad_() for p in unflatten(student, theta)]


def walk(student, start: Tensor, batches: Sequence[Tensor], labels: Sequence[Tensor], alpha: Tensor) -> list[Tensor]:
    """theta_0 .. theta_N, each `[P]`, without a graph."""
    way = [start.detach()]
    for images, targets in zip(batches, labels, strict=True):
        with torch.enable_grad():
            grads = step_gradient(student, leaves(student, way[-1]), images.detach(), targets, create_graph=False)
        way.append(way[-1] - alpha.detach() * flatten(grads))
    return way


class _Replay(torch.autograd.Function):
    """The unroll with its way back: with v = dL/dtheta_(n+1), g the gradient of step n and H its Hessian,

        dL/dtheta_n = v - alpha H v,    dL/dx_n = -alpha (d/dx_n)(g . v),    dL/dalpha = - sum_n g . v

    where H v and (d/dx_n)(g . v) come from one backward pass through g (Maclaurin et al. 2015, without the reversal).
    """

    @staticmethod
    def forward(ctx, student, labels, start, alpha, *batches):
        way = walk(student, start, batches, labels, alpha)
        ctx.student, ctx.labels = student, labels
        ctx.save_for_backward(alpha, *batches, *way[:-1])
        return way[-1]

    @staticmethod
    def backward(ctx, v):
        if torch.is_grad_enabled():
            raise RuntimeError("unroll(memory='replay') can be differentiated once only: for more, use memory='graph'")
        student, labels, steps = ctx.student, ctx.labels, len(ctx.labels)
        alpha, *rest = ctx.saved_tensors
        batches, way = rest[:steps], rest[steps:]
        d_alpha, d_batches = torch.zeros_like(alpha), [None] * steps
        for n in reversed(range(steps)):
            theta, x = leaves(student, way[n]), batches[n].detach().requires_grad_()
            with torch.enable_grad():
                g = step_gradient(student, theta, x, labels[n], create_graph=True)
                gv = sum((a * b).sum() for a, b in zip(g, unflatten(student, v), strict=True))
                wanted = [x] if n == 0 and not ctx.needs_input_grad[2] else [x, *theta]
                dx, *hv = torch.autograd.grad(gv, wanted, allow_unused=True, materialize_grads=True)
            d_alpha -= gv.detach()
            d_batches[n] = -alpha * dx
            v = v - alpha * flatten(hv) if hv else None
        return None, None, v, d_alpha, *d_batches


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
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 2**32


def matching_loss(end: Tensor, target: Tensor, start: Tensor) -> Tensor:
    """||end - target||^2 / ||start - target||^2 for one end `[P]` (MTT, equation 2).

    With ends `[K, P]` of K independent draws: the mean over their pairs of <end_i - target, end_j - target>, over the
    same. Its expectation is ||E end - target||^2 alone; the ordinary loss adds the variance of `end` to it and so
    punishes a stochastic phi for being stochastic.
    """
    miss = end - target
    distance = (start - target).square().sum()
    if end.ndim == 1:
        return miss.square().sum() / distance
    draws = len(miss)
    if draws < 2:
        raise ValueError(f"ends of shape {tuple(end.shape)}: [K, P] must hold at least 2 draws; pass [P] for one")
    pairs = miss.sum(0).square().sum() - miss.square().sum()  # the sum over ordered pairs i != j
    return pairs / (draws * (draws - 1)) / distance


# ======================================================================================================================
# 4. Phi models: augdistill_phis.py
# Section 5 needs of them only that they are called as `phi(images, labels=, index=, generator=)`, and their parameters.
# ======================================================================================================================

# ======================================================================================================================
# 5. Distillation
# ======================================================================================================================


@dataclasses.dataclass(frozen=True)
class DistillConfig(Config):
    """Algorithm 1's constants, named as in MTT's official code where it has a name for them."""

    objective: str = knob(
        "trajectory",
        "trajectory = land where the expert did (MTT 2022); real_loss = do well on real data after the unroll (2018)",
        choices=("trajectory", "real_loss"),
    )
    iterations: int = knob(300, "outer steps", low=1)
    syn_steps: int = knob(15, "N: student steps in one unroll", low=1)
    expert_epochs: int = knob(2, "M: snapshots from the start to the target", low=1)
    max_start_epoch: int = knob(6, "T+: the last snapshot that a segment may start at", low=0)
    batch_syn: int = knob(0, "images a student step; 0 = the whole base set", low=0)
    episode: int = knob(0, "images a class drawn afresh each iteration as its base set; 0 = all, always", low=0)
    noise: str = knob("step", "when phi is drawn: afresh in every student step, or once", choices=("step", "once"))
    draws: int = knob(1, "independent unrolls an iteration; 2 or more leave the variance out of the loss", low=1)
    phi_optimizer: str = knob("Adam", "any of torch.optim")
    phi_lr: float = knob(1e-3, "its step size", low=0)
    phi_momentum: float = knob(0.0, "its momentum, where it has one", low=0, high=1)
    alpha: float = knob(0.02, "the student's step size, or where it starts", low=1e-12)
    alpha_mode: str = knob("log", "learn its logarithm, learn it raw, or fix it", choices=("log", "raw", "fixed"))
    alpha_optimizer: str = knob("Adam", "any of torch.optim")
    alpha_lr: float = knob(0.01, "its step size", low=0)
    alpha_momentum: float = knob(0.0, "its momentum, where it has one", low=0, high=1)
    memory: str = knob("auto", "of the unroll: keep the graph, replay it, or as it fits", choices=(*MEMORY, "auto"))
    real_batch: int = knob(256, "real images on which real_loss is taken", low=1)


EXPLODED = 100.0  # phi(x) this many times as large as x is no image any more


@dataclasses.dataclass
class Distilled:
    """What `distill` returns: the trained phi, alpha, one record an iteration, and why it stopped early ("" if not)."""

    phi: Phi
    alpha: float
    history: list[dict]
    stopped: str = ""


def make_optimizer(kind: str, parameters: list[Tensor], lr: float, momentum: float) -> torch.optim.Optimizer:
    """The optimiser of `torch.optim` of that name; a `ValueError` if there is none, or it knows no momentum."""
    build = getattr(torch.optim, kind, None)
    unfit = kind in ("Optimizer", "LBFGS", "SparseAdam")  # no optimiser; wants a closure; wants sparse gradients
    if unfit or not (isinstance(build, type) and issubclass(build, torch.optim.Optimizer)):
        raise ValueError(f"optimizer {kind!r}: must be one in torch.optim that takes plain steps, such as SGD or Adam")
    try:
        return build(parameters, lr=lr, **({"momentum": momentum} if momentum else {}))
    except TypeError:
        raise ValueError(f"momentum={momentum}: {kind} takes none; use 0, or another optimizer such as SGD") from None
    except ValueError as error:  # Muon, for one, takes matrices only
        raise ValueError(f"optimizer {kind!r}: {error}") from None


class StepSize(nn.Module):
    """alpha, the student's step size: learned in its logarithm (so it stays positive), learned raw, or fixed."""

    def __init__(self, alpha: float, mode: str, like: Tensor):
        super().__init__()
        self.mode = mode
        value = torch.tensor(alpha, dtype=like.dtype, device=like.device)
        self.value = nn.Parameter(value.log() if mode == "log" else value, requires_grad=mode != "fixed")

    def forward(self) -> Tensor:
        return self.value.exp() if self.mode == "log" else self.value


def check_distill(phi: Phi, images: Tensor, labels: Tensor, experts: Trajectories, config: DistillConfig, real) -> None:
    """Everything about `distill`'s arguments that can be refused before work starts, as a `ValueError`."""
    check_images(experts.student, images, labels)
    if config.objective == "trajectory":
        try:
            experts.segment(0, config.max_start_epoch, config.expert_epochs)
        except ValueError as error:
            raise ValueError(f"max_start_epoch={config.max_start_epoch}: {error}") from None
    elif real is None:
        raise ValueError("objective='real_loss': pass real=(images, labels), the data on which the loss is taken")
    else:
        check_images(experts.student, *real)
    if config.episode:
        if getattr(phi, "bound", False):
            raise ValueError(f"episode={config.episode}: {type(phi).__name__} is bound to its base images; use 0")
        fewest = int(labels.unique(return_counts=True)[1].min())
        if config.episode > fewest:
            raise ValueError(f"episode={config.episode}: the smallest class has {fewest} images; use at most that")


def distill(
    phi: Phi,
    images: Tensor,
    labels: Tensor,
    experts: Trajectories,
    config: DistillConfig,
    *,
    seed: int,
    augment: Callable | None = None,
    real: tuple[Tensor, Tensor] | None = None,
    on_iteration: Callable[[dict], None] | None = None,
) -> Distilled:
    """Algorithm 1: train `phi` (in place) and alpha on base images `[n, C, H, W]` with labels `[n]`.

    Args:
        experts: the trajectories to match; their student is the student.
        augment: the differentiable augmentation A of line 12, applied after phi in every student step.
        real: images and labels for the objective "real_loss" (Wang et al. 2018), which starts from a new random
            initialisation in each iteration.
        on_iteration: called with each record (iteration, loss, alpha, start_epoch, grad_norm: the norm of phi's
            gradient, scale: how many times as large as x phi(x) is, by root mean square); may stop the run by raising.

    A loss or a gradient that is not finite, or a phi(x) over `EXPLODED` times as large as x (which a student with
    instance norm hides from the loss), stops the run: `stopped` says so, and phi and alpha are the last before that.
    A phi with parameters of which none receives a gradient is a `ValueError`.
    """
    check_distill(phi, images, labels, experts, config, real)
    # two streams, so that every phi of one seed meets the same segments and batches, however much noise it draws
    student, generator, noise = experts.student, seeded(seed, "distill"), seeded(seed, "distill", "noise")
    step_size = StepSize(config.alpha, config.alpha_mode, images)
    of_phi = [p for p in phi.parameters() if p.requires_grad]
    of_alpha = [p for p in step_size.parameters() if p.requires_grad]
    optimizers = []
    if of_phi:
        optimizers.append(make_optimizer(config.phi_optimizer, of_phi, config.phi_lr, config.phi_momentum))
    if of_alpha:
        optimizers.append(make_optimizer(config.alpha_optimizer, of_alpha, config.alpha_lr, config.alpha_momentum))
    learned = of_phi + of_alpha
    good = [p.detach().clone() for p in learned]
    history, stopped = [], ""
    steps = config.syn_steps * config.draws
    memory = choose_memory(config.memory, student, images[: config.batch_syn or None], labels, steps)

    for iteration in range(config.iterations):
        start_epoch, start, target = draw_segment(experts, config, generator)
        start, target, alpha = start.to(images), target.to(images), step_size()
        base = draw_base(labels, config.episode, generator)
        steps = itertools.islice(minibatches(len(base), config.batch_syn, generator), config.syn_steps)
        batches = [base[batch] for batch in steps]
        ends, scales = [], []
        for _ in range(config.draws):
            fed, scale = draw_batches(phi, augment, images, labels, base, batches, config, memory, noise)
            scales.append(scale)
            ends.append(unroll(student, start, fed, [labels[b] for b in batches], alpha, memory=memory))
        if config.objective == "trajectory":
            loss = matching_loss(ends[0] if len(ends) == 1 else torch.stack(ends), target, start)
        else:
            pick = torch.randint(len(real[0]), (config.real_batch,), generator=generator)
            logits = [logits_of(student, unflatten(student, end), real[0][pick]) for end in ends]
            loss = torch.stack([F.cross_entropy(z, real[1][pick]) for z in logits]).mean()

        grads = gradients(loss, learned)
        if of_phi and all(g is None for g in grads[: len(of_phi)]):
            raise ValueError(f"no gradient reaches phi ({type(phi).__name__}): is its output detached?")
        for p, g in zip(learned, grads, strict=True):
            p.grad = torch.zeros_like(p) if g is None else g
        record = dict(iteration=iteration, loss=loss.item(), alpha=alpha.item(), start_epoch=start_epoch)
        record["grad_norm"] = sum(float(p.grad.square().sum()) for p in of_phi) ** 0.5
        record["scale"] = max(scales)
        history.append(record)
        if on_iteration is not None:
            on_iteration(record)
        finite = all(map(math.isfinite, record.values())) and all(p.grad.isfinite().all() for p in learned)
        if not finite or record["scale"] > EXPLODED:
            stopped = (
                f"diverged at iteration {iteration}: phi(x) {record['scale']:.3g} times as large as x, "
                f"loss {record['loss']:.3g}, phi's gradient {record['grad_norm']:.3g} ({config.phi_optimizer}, "
                f"phi_lr={config.phi_lr:g}, alpha={record['alpha']:.3g}); use a smaller phi_lr"
            )
            break
        good = [p.detach().clone() for p in learned]
        for optimizer in optimizers:
            optimizer.step()
    else:  # nothing has looked at the last step yet
        with torch.no_grad():
            scale = draw_batches(phi, None, images, labels, base, batches[:1], config, "graph", noise)[1]
        if not (scale <= EXPLODED and step_size().isfinite()):
            stopped = (
                f"diverged in the last step: phi(x) {scale:.3g} times as large as x ({config.phi_optimizer}, "
                f"phi_lr={config.phi_lr:g}, alpha={step_size().item():.3g}); use a smaller phi_lr"
            )
    if stopped:
        warnings.warn(stopped, stacklevel=2)
        with torch.no_grad():
            for p, value in zip(learned, good, strict=True):
                p.copy_(value)
    for p in learned:
        p.grad = None
    return Distilled(phi, step_size().item(), history, stopped)


def draw_segment(
    experts: Trajectories, config: DistillConfig, generator: torch.Generator
) -> tuple[int, Tensor, Tensor]:
    """Lines 4-7: a start snapshot t <= T+ of a random expert and the target M snapshots later: (t, start, target).

    For the objective "real_loss" the start is a new random initialisation, and there is no target but itself.
    """
    if config.objective == "real_loss":
        start = initial_parameters(experts.student, generator)
        return 0, start, start
    expert = int(torch.randint(len(experts.theta), (), generator=generator))
    start_epoch = int(torch.randint(config.max_start_epoch + 1, (), generator=generator))
    return start_epoch, *experts.segment(expert, start_epoch, config.expert_epochs)


def draw_base(labels: Tensor, episode: int, generator: torch.Generator) -> Tensor:
    """Indices of one iteration's base set: `episode` images of each class, drawn afresh; all images if it is 0."""
    if episode == 0:
        return torch.arange(len(labels))
    classes = [torch.nonzero(labels == c).flatten().cpu() for c in labels.unique()]
    return torch.cat([c[torch.randperm(len(c), generator=generator)[:episode]] for c in classes])


def draw_batches(
    phi, augment, images, labels, base, batches, config: DistillConfig, memory, generator
) -> tuple[list[Tensor], float]:
    """Lines 9-12: phi(x), then the augmentation, for every student step of one unroll: N tensors `[B, C, H, W]`;
    and how many times as large as x phi(x) is at most: the ratio of their root mean squares by batch.

    Each step draws from seeds of its own (one for phi, one for the augmentation), so that with `memory` "replay" the
    way back draws the same again instead of keeping phi's graph for all N steps, and every phi meets the same
    augmentations.
    """
    seeds = torch.randint(2**62, (len(batches), 2), generator=generator).tolist()
    scales = []

    def through_phi(x: Tensor, y: Tensor, index: Tensor, own: torch.Generator) -> Tensor:
        out = augmented(phi, x, y, index, own)
        scales.append(rms(out) / (rms(x) or 1.0))
        return out

    if config.noise == "once":
        drawn = through_phi(images[base], labels[base], base, generator)
        position = torch.full((len(images),), -1)
        position[base] = torch.arange(len(base))
        sources = [drawn[position[b]] for b in batches]
    else:
        sources = [images[b] for b in batches]

    def draw(x: Tensor, y: Tensor, index: Tensor, seed_phi: int, seed_augment: int) -> Tensor:
        if config.noise == "step":
            x = through_phi(x, y, index, torch.Generator().manual_seed(seed_phi))
        return augmented(augment, x, y, index, torch.Generator().manual_seed(seed_augment))

    if memory == "replay":
        draw = functools.partial(checkpoint, draw, use_reentrant=False)
    fed = [draw(x, labels[b], b, *seed) for x, b, seed in zip(sources, batches, seeds, strict=True)]
    return fed, max(scales, key=lambda scale: math.inf if math.isnan(scale) else scale)


def rms(images: Tensor) -> float:
    """The root of the mean square."""
    return float(images.detach().square().mean().sqrt())


def gradients(loss: Tensor, learned: list[Tensor]) -> list[Tensor | None]:
    """d loss / d each tensor of `learned`; None where the loss does not depend on it."""
    if not learned or not loss.requires_grad:
        return [None] * len(learned)
    return list(torch.autograd.grad(loss, learned, allow_unused=True))
