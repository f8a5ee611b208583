"""Learn a stochastic augmentation phi(x) by matching training trajectories.

An expert classifier's weights move along a path while it trains on all the data. phi is trained so that a student,
started on that path and trained for a few steps on phi(x) from a handful of real images, lands where the expert did:

    theta_0 = theta*_t,   theta_(n+1) = theta_n - alpha * grad loss(phi(x_n); theta_n),   n = 0 .. N-1
    minimise  || theta_N - theta*_(t+M) ||^2 / || theta*_t - theta*_(t+M) ||^2   over phi and alpha

This is Algorithm 1 of "Dataset distillation by matching training trajectories" (MTT; Cazenavette et al., CVPR 2022)
with phi in the place of the synthetic pixels. The pixels are one phi among others here, so the baseline, the student
report's networks and ours are rows of one table. What it is made of lies in `augdistill_method`, each module readable
alone (student, experts, unroll, phi and its zoo); this module is the door to it: whoever needs a part imports it here.

Shapes: images `[B, C, H, W]` (standardised), labels `[B]` (int64), a student's parameters one flat vector `[P]`,
trajectories `[experts, snapshots, P]`. Randomness is an argument everywhere: a seed, or a CPU `torch.Generator`.
"""

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

# the door: what is not used below is handed on
from augdistill_method.config import Config, knob
from augdistill_method.experts import (
    ExpertConfig,
    TrainingState,
    Trajectories,
    snapshots_every,
    train_expert,
    train_experts,
    train_together,
)
from augdistill_method.measures import distance_moved, rms
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
    make_phi,
    origin,
    register_phi,
)
from augdistill_method.random import draw_base, minibatches, randn, seeded
from augdistill_method.state import DistillState
from augdistill_method.student import ConvNet, check_images, flatten, initial_parameters, logits_of, sgd, unflatten
from augdistill_method.transforms import affine, color, flip, turn_hue, warp
from augdistill_method.unroll import MEMORY, choose_memory, unroll
from augdistill_method.zoo.policy import per_image


def matching_loss(end: Tensor, target: Tensor, start: Tensor) -> Tensor:
    """||end - target||^2 / ||start - target||^2 for one end `[P]` (MTT, equation 2).

    With ends `[K, P]` of K independent draws (of phi, and of the batches): the mean over their pairs of
    <end_i - target, end_j - target>, over the same. Its expectation is ||E end - target||^2 alone; the ordinary loss
    adds the variance of `end` to it, and so punishes a stochastic phi for being stochastic, and alpha for the noise of
    small batches.
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
    draws: int = knob(
        1,
        "unrolls an iteration, of independent batches and draws of phi; 2 leave their variance out of the loss",
        low=1,
    )
    phi_optimizer: str = knob("Adam", "any of torch.optim")
    phi_lr: float = knob(1e-3, "its step size", low=0)
    phi_momentum: float = knob(0.0, "its momentum, where it has one", low=0, high=1)
    alpha: float = knob(0.02, "the student's step size, or where it starts", low=1e-12)
    alpha_mode: str = knob(
        "log",
        "learn its logarithm; the same, but held while the loss is not below 1; learn it raw; or fix it",
        choices=("log", "held", "raw", "fixed"),
    )
    alpha_optimizer: str = knob("Adam", "any of torch.optim")
    alpha_lr: float = knob(0.01, "its step size", low=0)
    alpha_momentum: float = knob(0.0, "its momentum, where it has one", low=0, high=1)
    memory: str = knob("auto", "of the unroll: keep the graph, replay it, or as it fits", choices=(*MEMORY, "auto"))
    real_batch: int = knob(256, "real images on which real_loss is taken", low=1)
    minutes: float = knob(0.0, "minutes after which it stops, whatever it has reached; 0 = none", low=0)


EXPLODED = 100.0  # phi(x) this many times as large as x is no image any more: the run stops

LOST = 1e6  # and so does a loss as large as this: the student ends a thousand distances from its target

STATES = {  # in which an iteration teaches phi nothing, whatever the loss says
    "exploded": "phi(x) is over 10 times as large as x: a student with instance norm hides it; use a smaller phi_lr",
    "alpha below zero": "the student climbs its loss; learn alpha in its logarithm, or fix it",
    "alpha at zero": "the student stands still (it goes less than 2 % of the way), so the loss is 1 whatever phi does; "
    "use a larger alpha, fix it, or give it a smaller alpha_lr",
}


@dataclasses.dataclass(frozen=True)
class Stop:
    """Why a run stopped before its last iteration.

    `kind` is "diverged" (the loss, its gradient or phi(x) exploded), "alpha" (alpha is not above zero at the end) or
    "minutes" (its time ran out); `reason` is a sentence with the iteration, the settings and what to try.
    """

    kind: str
    reason: str

    def __str__(self):
        return self.reason


@dataclasses.dataclass
class Distilled:
    """What `distill` returns: the trained phi, alpha (> 0), a record an iteration, and why it stopped early, if so."""

    phi: Phi
    alpha: float
    history: list[dict]
    stopped: Stop | None = None


class StepSize(nn.Module):
    """alpha, the student's step size: learned in its logarithm (so it stays positive), learned raw, or fixed."""

    of_logarithm = ("log", "held")

    def __init__(self, alpha: float, mode: str, like: Tensor):
        super().__init__()
        self.mode = mode
        value = torch.tensor(alpha, dtype=like.dtype, device=like.device)
        self.value = nn.Parameter(value.log() if mode in self.of_logarithm else value, requires_grad=mode != "fixed")

    def forward(self) -> Tensor:
        return self.value.exp() if self.mode in self.of_logarithm else self.value


def dead_state(scale: float, alpha: float, moved: float | None) -> str:
    """The one of `STATES` that an iteration is in, "" if phi can learn from it.

    `scale` is how many times as large as x phi(x) is; `moved` is ||theta_N - theta_0|| / ||target - theta_0||: below
    .02 it holds the loss between .98^2 and 1.02^2.
    """
    if scale > 10:
        return "exploded"
    if alpha < 0:
        return "alpha below zero"
    return "alpha at zero" if moved is not None and moved < 0.02 else ""


def alpha_is_held(config: DistillConfig, history: list[dict]) -> bool:
    """With alpha "held": whether the loss of the last 10 iterations is not below 1 on average.

    While phi teaches nothing, the loss is above 1 and alpha would run to zero, where phi gets no gradient any more.
    """
    losses = [record["loss"] for record in history[-10:]]
    return config.alpha_mode == "held" and not sum(losses) < len(losses)


def check_distill(phi: Phi, images: Tensor, labels: Tensor, experts: Trajectories, config: DistillConfig, real) -> None:
    """Everything about `distill`'s arguments that can be refused before work starts, as a `ValueError`."""
    check_images(experts.student, images, labels)
    check_phi(phi, images, labels)
    if config.objective == "trajectory":
        try:
            experts.segment(0, config.max_start_epoch, config.expert_epochs)
        except ValueError as error:
            raise ValueError(f"max_start_epoch={config.max_start_epoch}: {error}") from None
    elif config.alpha_mode == "held":
        raise ValueError("alpha_mode='held': is for the matching loss, which is 1 where nothing is learned; use 'log'")
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


def record_of(run: DistillState, loss: Tensor, alpha: Tensor, start_epoch: int, scale: float, moved) -> dict:
    """What is kept of an iteration, once its gradient is known; warns of the first in each of `STATES`."""
    record = dict(iteration=len(run.history), loss=loss.item(), alpha=alpha.item(), start_epoch=start_epoch)
    record |= {"phi": watched} if (watched := getattr(run.phi, "report", dict)()) else {}
    record["grad_norm"] = sum(float(p.grad.square().sum()) for p in run.of_phi) ** 0.5
    state = dead_state(scale, record["alpha"], moved)
    if state and state not in {r["state"] for r in run.history}:
        warnings.warn(f"iteration {record['iteration']}: {state}: {STATES[state]}", stacklevel=3)
    run.history.append(record | dict(scale=scale, moved=moved, state=state))
    return run.history[-1]


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
        on_iteration: called with each record, before the step is taken; may stop the run by raising. A record holds
            iteration, loss, alpha, start_epoch, grad_norm (of phi's gradient), scale (how many times as large as x
            phi(x) is, by root mean square), phi (what it reports of itself, if anything), moved (how far the student
            went, in distances to the target) and state
            ("", or one of `STATES`; the first iteration in each is a warning).
        on_step: called after each step with a function that gives the run's state, of tensors and plain values.
        resume: such a state: the run goes on from there, and ends (from equal arguments) with the bits of one that was
            never stopped, if phi keeps all that changes in its parameters and buffers. `iterations` and `minutes` may
            be others than those of the run that it comes from.

    A loss or a gradient that is not finite, a loss over `LOST`, or a phi(x) over `EXPLODED` times as large as x (which
    a student with instance norm hides from the loss) stops the run. The end of its `minutes` stops it too, after the
    current iteration. A raw alpha may fall below zero during a run, as in MTT's code, since it often comes back: the
    records say so (`state`). But a run that ends there has learned no step size, so that is a stop as well. Unless it
    was stopped by its minutes alone, phi and alpha are those of the last iteration that could learn: one with a finite
    loss and an alpha above zero.
    A phi that cannot learn (`check_phi`), or whose parameters receive no gradient, is a `ValueError`.
    """
    check_distill(phi, images, labels, experts, config, real)
    student, steps = experts.student, config.syn_steps * config.draws
    of_step = config.batch_syn or config.episode * len(labels.unique()) or len(labels)
    memory = choose_memory(config.memory, student, images[:of_step], labels, steps)
    step_size = StepSize(config.alpha, config.alpha_mode, images)
    run, stopped = DistillState(phi, step_size, config, seed, memory), None
    if resume:
        run.load_state_dict(resume)

    while len(run.history) < config.iterations and not stopped:
        if run.history and run.seconds >= run.budget:
            done = f"at iteration {len(run.history)} of {config.iterations}"
            stopped = Stop("minutes", f"minutes={config.minutes:g} ran out {done}")
            break
        start_epoch, start, target = draw_segment(experts, config, run.generator)
        start, target, alpha = start.to(images), target.to(images), run.step_size()
        base = draw_base(labels, config.episode, run.generator)
        ends, scales = [], []
        for _ in range(config.draws):
            batches = draw_steps(base, config, run.generator)
            fed, scale = draw_batches(phi, augment, images, labels, base, batches, config, run.memory, run.noise)
            scales.append(scale)
            ends.append(unroll(student, start, fed, [labels[b] for b in batches], alpha, memory=run.memory))
        if config.objective == "trajectory":
            loss = matching_loss(ends[0] if len(ends) == 1 else torch.stack(ends), target, start)
        else:
            loss = real_loss(student, ends, *real, config.real_batch, run.generator)

        finite = run.backward(loss)
        record = record_of(run, loss, alpha, start_epoch, max(scales), distance_moved(start, ends[0], target))
        if on_iteration is not None:
            on_iteration(record)
        stopped = divergence(config, finite=finite, **record)
        if not stopped:
            run.step(hold_alpha=alpha_is_held(config, run.history))
            if on_step is not None:
                on_step(run.state_dict)

    if not diverged(stopped):  # nothing has looked at the last step yet
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
    """Why an iteration, or (without one) the last step, ends a run, with what to try; None if it does not."""
    finite = finite and all(map(math.isfinite, (loss, alpha, grad_norm)))
    bounded = finite and abs(loss) <= LOST and scale <= EXPLODED
    if bounded and (alpha > 0 or iteration is not None):  # below zero it may come back, as long as the run goes on
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
        remedy = "alpha has run away: use a smaller alpha_lr, or fix it"
    else:
        remedy = "use a smaller alpha, or a smaller phi_lr"
    return Stop("diverged", f"diverged {when}: {seen} ({by}); {remedy}")


def diverged(stopped: Stop | dict | None) -> bool:
    """Whether a run was stopped by what it did (`divergence`), and not by its `minutes`.

    `stopped` is that of `Distilled`, or as a stored result has it: `{"kind": ..., "reason": ...}`, {} without a stop.
    """
    if not stopped:
        return False
    return (stopped["kind"] if isinstance(stopped, dict) else stopped.kind) != "minutes"


@torch.no_grad()
def next_scale(run: DistillState, images: Tensor, labels: Tensor, config: DistillConfig) -> float:
    """How many times as large as x phi(x) would be in the first student step of another iteration; draws nothing."""
    generator, noise = run.generator.clone_state(), run.noise.clone_state()
    base = draw_base(labels, config.episode, generator)
    batches = draw_steps(base, config, generator)[:1]
    return draw_batches(run.phi, None, images, labels, base, batches, config, "graph", noise)[1]


def draw_segment(
    experts: Trajectories, config: DistillConfig, generator: torch.Generator
) -> tuple[int, Tensor, Tensor]:
    """Lines 4-7: a start snapshot t <= T+ of a random expert and the target M snapshots later: (t, start, target).

    For the objective "real_loss" the start is a new random initialisation, and there is no target but itself.
    """
    if config.objective == "real_loss":
        start = initial_parameters(experts.student, generator)
        return 0, start, start
    expert = int(torch.randint(len(experts.trajectories), (), generator=generator))
    start_epoch = int(torch.randint(config.max_start_epoch + 1, (), generator=generator))
    return start_epoch, *experts.segment(expert, start_epoch, config.expert_epochs)


def draw_steps(base: Tensor, config: DistillConfig, generator: torch.Generator) -> list[Tensor]:
    """Indices of the batch of each of one unroll's N student steps, from those of the iteration's base set."""
    return [base[b] for b in itertools.islice(minibatches(len(base), config.batch_syn, generator), config.syn_steps)]


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

    if memory != "graph":
        draw = functools.partial(checkpoint, draw, use_reentrant=False)
    fed = [draw(x, labels[b], b, *seed) for x, b, seed in zip(sources, batches, seeds, strict=True)]
    return fed, max(scales, key=lambda scale: math.inf if math.isnan(scale) else scale)


def real_loss(
    student: nn.Module, ends: list[Tensor], images: Tensor, labels: Tensor, batch: int, generator: torch.Generator
) -> Tensor:
    """The mean loss of students that end there `[P]`, on `batch` real images drawn at random."""
    pick = torch.randint(len(images), (batch,), generator=generator)
    logits = [logits_of(student, unflatten(student, end), images[pick]) for end in ends]
    return torch.stack([F.cross_entropy(z, labels[pick]) for z in logits]).mean()
