"""Learn a stochastic augmentation phi(x) by matching training trajectories.

An expert trajectory is the sequence of a classifier's weights while it trains on all the data. A student starts at a
snapshot of it and trains for a few steps on phi(x), where x are a few real images. phi is trained so that the student
ends where the expert was M snapshots later:

    theta_0 = theta*_t,   theta_(n+1) = theta_n - alpha * grad loss(phi(x_n); theta_n),   n = 0 .. N-1
    minimise  || theta_N - theta*_(t+M) ||^2 / || theta*_t - theta*_(t+M) ||^2   over phi and alpha

This is Algorithm 1 of "Dataset distillation by matching training trajectories" (MTT; Cazenavette et al., CVPR 2022)
with phi instead of the synthetic pixels. The pixels are one phi among others here, so the baseline, the student
report's networks and ours are rows of one table. The building blocks are in `augdistill_method` (student, experts,
unroll, phi and its zoo); each module there can be read alone. All other code imports them from this module only.

Shapes: images `[B, C, H, W]` (standardised), labels `[B]` (int64), a student's parameters as one flat vector `[P]`,
trajectories `[experts, snapshots, P]`. Randomness is always an argument: a seed, or a CPU `torch.Generator`.
"""

import contextlib
import copy
import dataclasses
import functools
import itertools
import math
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# names that are not used below are re-exported: the report imports the method from here alone
from augdistill_method.config import Config, in_short, knob, nearest
from augdistill_method.experts import (
    ExpertConfig,
    TrainingState,
    Trajectories,
    snapshots_every,
    train_expert,
    train_experts,
    train_together,
)
from augdistill_method.measures import at_once, distance_moved, largest_scale, rms, root_mean_square
from augdistill_method.optimizers import make_optimizer
from augdistill_method.phi import (
    PHIS,
    Added,
    Applied,
    Phi,
    Stored,
    Wrapper,
    augmented,
    builders,
    check_phi,
    is_ours,
    labels_under,
    make_phi,
    origin,
    register_phi,
    same_buffers,
)
from augdistill_method.precision import PRECISIONS, arithmetic
from augdistill_method.random import draw_base, minibatches, randn, seeded, to_device
from augdistill_method.state import STATES, DistillState, StepSize, record_of
from augdistill_method.student import (
    ConvNet,
    check_images,
    flatten,
    initial_parameters,
    logits_of,
    sgd,
    sgd_together,
    unflatten,
    with_parameters,
)
from augdistill_method.transforms import affine, color, flip, turn_hue, warp
from augdistill_method.unroll import MEMORY, choose_memory, gradient_cosine, unroll
from augdistill_method.zoo.labels import start_labels, teacher_of
from augdistill_method.zoo.policy import per_image


def matching_loss(end: Tensor, target: Tensor, start: Tensor) -> Tensor:
    """||end - target||^2 / ||start - target||^2 for one end `[P]` (MTT, equation 2).

    With ends `[K, P]` of K independent unrolls (phi and the batches are sampled for each): the mean over pairs i != j
    of <end_i - target, end_j - target>, divided by the same denominator. The expectation of the numerator is
    ||E end - target||^2. The ordinary loss adds the variance of `end`, so it penalises the randomness of phi, and
    penalises alpha for the noise of small batches. A `ValueError` if K is 1.
    """
    miss = end - target
    distance = (start - target).square().sum()
    if end.ndim == 1:
        return miss.square().sum() / distance
    draws = len(miss)
    if draws < 2:
        raise ValueError(f"ends of shape {tuple(end.shape)}: [K, P] must have K at least 2; pass [P] for one unroll")
    pairs = miss.sum(0).square().sum() - miss.square().sum()  # the sum over ordered pairs i != j
    return pairs / (draws * (draws - 1)) / distance


@dataclasses.dataclass(frozen=True)
class DistillConfig(Config):
    """Algorithm 1's constants, named as in MTT's official code where it has a name for them."""

    objective: str = knob(
        "trajectory",
        "trajectory = match the expert's weights (MTT 2022); real_loss = loss on real data after the unroll (2018)",
        choices=("trajectory", "real_loss"),
    )
    iterations: int = knob(300, "outer steps (iterations of Algorithm 1)", low=1)
    syn_steps: int = knob(15, "N: student steps in one unroll", low=1)
    expert_epochs: int = knob(2, "M: snapshots from the start to the target", low=1)
    max_start_epoch: int = knob(6, "T+: the last snapshot that a segment may start at", low=0)
    batch_syn: int = knob(0, "images per student step; 0 = the whole base set", low=0)
    episode: int = knob(0, "images per class, redrawn in each iteration as its base set; 0 = always all images", low=0)
    noise: str = knob("step", "when phi is sampled: in every student step, or once", choices=("step", "once"))
    draws: int = knob(
        1,
        "independent unrolls per iteration (batches and phi resampled); 2 or more remove their variance from the loss",
        low=1,
    )
    phi_optimizer: str = knob("Adam", "optimizer of phi: any of torch.optim")
    phi_lr: float = knob(1e-3, "step size of phi's optimizer", low=0)
    phi_momentum: float = knob(0.0, "momentum of phi's optimizer, if it has one", low=0, high=1)
    alpha: float = knob(0.02, "the student's step size, or its initial value if it is learned", low=1e-12)
    alpha_mode: str = knob(
        "log",
        "log = learn log(alpha); held = log, but constant while the loss is not below 1; raw = learn alpha; fixed",
        choices=("log", "held", "raw", "fixed"),
    )
    alpha_optimizer: str = knob("Adam", "optimizer of alpha: any of torch.optim")
    alpha_lr: float = knob(0.01, "step size of alpha's optimizer", low=0)
    alpha_momentum: float = knob(0.0, "momentum of alpha's optimizer, if it has one", low=0, high=1)
    label_share: float = knob(0.5, "share of the experts in the initial labels of a phi", low=0, high=1)
    label_temperature: float = knob(1.0, "temperature of the experts in these labels", low=0.01, high=100)
    label_snapshots: int = knob(
        10, "snapshots of each expert that these labels average, from the last sixth of its trajectory", low=1
    )
    memory: str = knob(
        "auto",
        "memory mode of the unroll; auto = captured on a CUDA device, else graph if it fits",
        choices=(*MEMORY, "auto"),
    )
    real_batch: int = knob(256, "real images on which real_loss is computed", low=1)
    minutes: float = knob(0.0, "time limit in minutes: the run stops after it; 0 = no limit", low=0)


EXPLODED = 100.0  # norm ratio phi(x) / x: such a phi(x) is no longer an image, so the run stops

LOST = 1e6  # a loss this large stops it too: the student ends 1,000 times as far from the target as it started


@dataclasses.dataclass(frozen=True)
class Stop:
    """Why a run stopped before its last iteration.

    `kind` is "diverged" (the loss, its gradient or phi(x) exploded), "alpha" (alpha is not above zero at the end) or
    "minutes" (the time limit was reached). `reason` is a sentence with the iteration, the settings and what to try.
    """

    kind: str
    reason: str

    def __str__(self):
        return self.reason


@dataclasses.dataclass
class Distilled:
    """What `distill` returns: the trained phi, alpha (> 0), one record per iteration, and why it stopped early."""

    phi: Phi
    alpha: float
    history: list[dict]
    stopped: Stop | None = None


def alpha_is_held(config: DistillConfig, history: list[dict]) -> bool:
    """With alpha_mode "held": whether the mean loss of the last 10 iterations is not below 1.

    While phi is untrained, the loss is above 1 and alpha would decrease to zero, where phi no longer gets a gradient.
    """
    losses = [record["loss"] for record in history[-10:]]
    return config.alpha_mode == "held" and not sum(losses) < len(losses)


def check_distill(phi: Phi, images: Tensor, labels: Tensor, experts: Trajectories, config: DistillConfig, real) -> None:
    """Check `distill`'s arguments before work starts; a `ValueError` names the first that is wrong."""
    check_images(experts.student, images, labels)
    check_phi(phi, images, labels)
    if config.objective == "trajectory":
        try:
            experts.segment(0, config.max_start_epoch, config.expert_epochs)
        except ValueError as error:
            raise ValueError(f"max_start_epoch={config.max_start_epoch}: {error}") from None
    elif config.alpha_mode == "held":
        raise ValueError("alpha_mode='held': needs the matching loss, which is 1 without learning; use 'log'")
    elif real is None:
        raise ValueError("objective='real_loss': pass real=(images, labels), the data on which the loss is computed")
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
    on_step: Callable[[Callable[[], dict]], None] | None = None,
    resume: dict | None = None,
) -> Distilled:
    """Algorithm 1: train `phi` (in place) and alpha on base images `[n, C, H, W]` with labels `[n]`.

    Args:
        experts: the trajectories to match; their student is the student.
        augment: the differentiable augmentation A of line 12, applied after phi in every student step.
        real: images and labels for the objective "real_loss" (Wang et al. 2018), which starts from a new random
            initialisation in each iteration.
        on_iteration: called with each record, before the step is taken; it may stop the run by raising. A record holds
            iteration, loss, alpha, start_epoch, grad_norm (of phi's gradient), scale (rms(phi(x)) / rms(x)), phi (the
            numbers of `Phi.report`, if any), moved (||theta_N - theta_0|| / ||target - theta_0||) and state ("", or one
            of `STATES`; the first iteration in each state gives a warning).
        on_step: called after each step with a function that returns the run's state (tensors and plain values).
        resume: such a state, from which the run continues. With equal arguments it ends with the same bits as a run
            without interruption, if phi keeps all that changes in its parameters and buffers. `iterations` and
            `minutes` may differ from those of the interrupted run.

    A run stops if the loss or a gradient is not finite, the loss is over `LOST`, or phi(x) is over `EXPLODED` times as
    large as x (instance norm in the student hides that from the loss). It also stops after the iteration in which its
    `minutes` end. A raw alpha may become negative during a run, as in MTT's code, since it often recovers: the records
    say so (`state`). A run that ends with such an alpha has learned no step size, so that is a stop as well. After any
    stop but that of `minutes`, phi and alpha are those of the last iteration with a finite loss and alpha > 0.
    A `ValueError` if phi cannot be trained (`check_phi`), or if its parameters receive no gradient.
    """
    check_distill(phi, images, labels, experts, config, real)
    student, steps, classes = experts.student, config.syn_steps * config.draws, labels.cpu()
    of_step = config.batch_syn or config.episode * len(labels.unique()) or len(labels)
    memory = choose_memory(config.memory, student, images[:of_step], labels, steps)
    step_size = StepSize(config.alpha, config.alpha_mode, images)
    run, stopped = DistillState(phi, step_size, config, seed, memory), None
    if resume:
        run.load_state_dict(resume)
    start_labels(phi, experts, images, config.label_share, config.label_temperature, config.label_snapshots)

    while len(run.history) < config.iterations and not stopped:
        if run.history and run.seconds >= run.budget:
            done = f"at iteration {len(run.history)} of {config.iterations}"
            stopped = Stop("minutes", f"the time limit minutes={config.minutes:g} was reached {done}")
            break
        start_epoch, start, target = draw_segment(experts, config, run.generator)
        start, target = (to_device(t, images.device).to(images) for t in (start, target))
        alpha = run.step_size()
        base = draw_base(classes, config.episode, run.generator)
        ends, sizes = [], []
        for _ in range(config.draws):
            batches = [to_device(b, images.device) for b in draw_steps(base, config, run.generator)]
            fed, found = draw_batches(phi, augment, images, labels, base, batches, config, run.memory, run.noise)
            sizes += found
            ends.append(unroll(student, start, fed, batch_labels(phi, labels, batches), alpha, memory=run.memory))
        if config.objective == "trajectory":
            loss = matching_loss(ends[0] if len(ends) == 1 else torch.stack(ends), target, start)
        else:
            loss = real_loss(student, ends, *real, config.real_batch, run.generator)

        with arithmetic(student):
            run.backward(loss)
        moved = distance_moved(start, ends[0], target) if config.objective == "trajectory" else None
        record, finite = record_of(run, loss, alpha, start_epoch, sizes, moved)
        if on_iteration is not None:
            on_iteration(record)
        stopped = divergence(config, finite=finite, **record)
        if not stopped:
            run.step(hold_alpha=alpha_is_held(config, run.history))
            if on_step is not None:
                on_step(run.state_dict)

    if not diverged(stopped):  # the last step has not been checked yet
        scale = next_scale(run, images, labels, config)
        stopped = divergence(config, scale=scale, alpha=run.step_size().item()) or stopped
    if diverged(stopped):
        run.step_back()
    if stopped:
        warnings.warn(stopped.reason, stacklevel=2)
    for p in run.learned:
        p.grad = None
    return Distilled(phi, run.step_size().item(), run.history, stopped)


def divergence(
    config: DistillConfig, *, scale: float, alpha: float, loss=0.0, grad_norm=0.0, finite=True, iteration=None, **_
) -> Stop | None:
    """Why an iteration, or (if `iteration` is None) the last step, stops a run, and what to try; else None."""
    finite = finite and all(map(math.isfinite, (loss, alpha, grad_norm)))
    bounded = finite and abs(loss) <= LOST and scale <= EXPLODED
    if bounded and (alpha > 0 or iteration is not None):  # a negative alpha may recover while the run goes on
        return None
    when, seen = "in the last step", f"phi(x) {scale:.3g} times as large as x"
    if iteration is not None:
        when, seen = f"at iteration {iteration}", f"{seen}, loss {loss:.3g}, phi's gradient {grad_norm:.3g}"
    by = f"{config.phi_optimizer}, phi_lr={config.phi_lr:g}, alpha={alpha:.3g}"
    by += "" if config.alpha_mode == "fixed" else f" by {config.alpha_optimizer}, alpha_lr={config.alpha_lr:g}"
    if bounded:
        return Stop("alpha", f"alpha is not above zero at the end ({by}): {STATES['alpha below zero']}")
    if not scale <= 10:
        remedy = "use a smaller phi_lr"
    elif config.alpha_mode != "fixed" and not 0 < alpha <= 10 * config.alpha:
        remedy = "alpha diverged: use a smaller alpha_lr, or alpha_mode fixed"
    else:
        remedy = "use a smaller alpha, or a smaller phi_lr"
    return Stop("diverged", f"diverged {when}: {seen} ({by}); {remedy}")


def diverged(stopped: Stop | dict | None) -> bool:
    """Whether a run was stopped by `divergence`, and not by its time limit.

    `stopped` is that of `Distilled`, or of a stored result: `{"kind": ..., "reason": ...}`, or {} without a stop.
    """
    if not stopped:
        return False
    return (stopped["kind"] if isinstance(stopped, dict) else stopped.kind) != "minutes"


@torch.no_grad()
def next_scale(run: DistillState, images: Tensor, labels: Tensor, config: DistillConfig) -> float:
    """rms(phi(x)) / rms(x) in the first student step of the next iteration; the generators stay as they are."""
    generator, noise = run.generator.clone_state(), run.noise.clone_state()
    base = draw_base(labels, config.episode, generator)
    batches = draw_steps(base, config, generator)[:1]
    with same_buffers(run.phi):
        sizes = draw_batches(run.phi, None, images, labels, base, batches, config, "graph", noise)[1]
    return largest_scale(at_once(*sizes))


def draw_segment(
    experts: Trajectories, config: DistillConfig, generator: torch.Generator
) -> tuple[int, Tensor, Tensor]:
    """Lines 4-7: a start snapshot t <= T+ of a random expert and the target M snapshots later: (t, start, target).

    For the objective "real_loss" the start is a new random initialisation, and the target is that start.
    """
    if config.objective == "real_loss":
        start = initial_parameters(experts.student, generator)
        return 0, start, start
    expert = int(torch.randint(len(experts.trajectories), (), generator=generator))
    start_epoch = int(torch.randint(config.max_start_epoch + 1, (), generator=generator))
    return start_epoch, *experts.segment(expert, start_epoch, config.expert_epochs)


def draw_steps(base: Tensor, config: DistillConfig, generator: torch.Generator) -> list[Tensor]:
    """Indices of the N batches of one unroll, from the indices `base` of the iteration's base set."""
    return [base[b] for b in itertools.islice(minibatches(len(base), config.batch_syn, generator), config.syn_steps)]


def draw_batches(
    phi, augment, images, labels, base, batches, config: DistillConfig, memory, generator
) -> tuple[list[Tensor], list[Tensor]]:
    """Lines 9-12: phi(x), then the augmentation, for every student step of one unroll.

    Returns N tensors `[B, C, H, W]`, and rms(phi(x)) and rms(x) of each batch of phi. Each step has its own two seeds,
    for phi and for the augmentation. So the backward pass of `memory` "replay" can repeat the samples instead of
    keeping phi's graph for all N steps, and every phi gets the same augmentations.
    """
    seeds = torch.randint(2**62, (len(batches), 2), generator=generator).tolist()
    sizes = []

    def through_phi(x: Tensor, y: Tensor, index: Tensor, own: torch.Generator) -> Tensor:
        out = augmented(phi, x, y, index, own)
        sizes.extend([root_mean_square(out), root_mean_square(x)])
        return out

    if config.noise == "once":
        base = to_device(base, images.device)
        drawn = through_phi(images[base], labels[base], base, generator)
        position = torch.full((len(images),), -1, device=base.device)
        position[base] = torch.arange(len(base), device=base.device)
        sources = [drawn[position[b]] for b in batches]
    else:
        sources = [images[b] for b in batches]

    def draw(x: Tensor, y: Tensor, index: Tensor, seed_phi: int, seed_augment: int) -> Tensor:
        if config.noise == "step":
            x = through_phi(x, y, index, torch.Generator().manual_seed(seed_phi))
        return augmented(augment, x, y, index, torch.Generator().manual_seed(seed_augment))

    if memory != "graph":
        # phi draws by seeds; its second call must not change its buffers again
        def contexts():
            return contextlib.nullcontext(), same_buffers(phi)

        draw = functools.partial(checkpoint, draw, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    fed = [draw(x, labels[b], b, *seed) for x, b, seed in zip(sources, batches, seeds, strict=True)]
    return fed, sizes


def batch_labels(phi, labels: Tensor, batches: list[Tensor]) -> list[Tensor]:
    """The labels of phi(x) in every student step of one unroll: N tensors `[B]`, or `[B, K]` (soft labels)."""
    return [labels_under(phi, labels[b], b) for b in batches]


def real_loss(
    student: nn.Module, ends: list[Tensor], images: Tensor, labels: Tensor, batch: int, generator: torch.Generator
) -> Tensor:
    """The mean loss of the students with parameters `ends` (each `[P]`), on `batch` random real images."""
    pick = to_device(torch.randint(len(images), (batch,), generator=generator), images.device)
    with arithmetic(student):
        logits = [logits_of(student, unflatten(student, end), images[pick]) for end in ends]
    return torch.stack([F.cross_entropy(z, labels[pick]) for z in logits]).mean()
