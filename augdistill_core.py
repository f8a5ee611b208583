"""Learn a stochastic augmentation phi(x) by matching training trajectories.

An expert classifier's weights move along a path while it trains on all the data. phi is trained so that a student,
started on that path and trained for a few steps on phi(x) from a handful of real images, lands where the expert did:

    theta_0 = theta*_t,   theta_(n+1) = theta_n - alpha * grad loss(phi(x_n); theta_n),   n = 0 .. N-1
    minimise  || theta_N - theta*_(t+M) ||^2 / || theta*_t - theta*_(t+M) ||^2   over phi and alpha

This is Algorithm 1 of "Dataset distillation by matching training trajectories" (MTT; Cazenavette et al., 2022) with phi
in the place of the synthetic pixels. The pixels are one phi among others here, so the baseline, the student report's
networks and ours are rows of one table. Five sections, each readable alone, of which this module holds the last:

    1 Student (augdistill_student.py)   2 Experts (augdistill_experts.py)
    3 The differentiable unroll (augdistill_unroll.py)   4 Phi models (augdistill_phis.py, augdistill_policies.py)
    5 Distillation: of the others it needs what it imports, and of a phi that it is called as
      `phi(images, labels=, index=, generator=)`, and its parameters

Shapes: images `[B, C, H, W]` (standardised), labels `[B]` (int64), a student's parameters one flat vector `[P]`,
trajectories `[experts, snapshots, P]`. Randomness is an argument everywhere: a seed,
or a CPU `torch.Generator` (augdistill_random.py).
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

from augdistill_config import Config, knob
from augdistill_experts import (  # noqa: F401 (section 2: offered here too)
    ExpertConfig,
    Trajectories,
    Underway,
    snapshots_every,
    train_expert,
    train_experts,
    train_together,
)
from augdistill_phis import PHIS, Phi, augmented, make_phi, register_phi  # noqa: F401 (section 4: offered here too)
from augdistill_policies import Policy  # noqa: F401 (section 4: registers the policies)
from augdistill_random import minibatches, seeded
from augdistill_student import (  # noqa: F401 (section 1: offered here too)
    ConvNet,
    check_images,
    flatten,
    initial_parameters,
    logits_of,
    sgd,
    sgd_together,
    unflatten,
)
from augdistill_unroll import MEMORY, choose_memory, matching_loss, unroll


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


def check_phi(phi: Phi, images: Tensor, labels: Tensor) -> None:
    """A `ValueError` for a phi that can't be trained, by one look at a few base images: it changes the shape, returns
    what is not finite, draws from something else than its generator, or has every parameter frozen."""
    name, few = type(phi).__name__, slice(0, 8)
    index = torch.arange(len(labels))[few]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        one, other = (augmented(phi, images[few], labels[few], index, seeded(0, "look")) for _ in range(2))
    if not one.isfinite().all():
        raise ValueError(f"phi ({name}): returns values that are not finite before it is trained at all")
    if not torch.equal(one, other):
        raise ValueError(
            f"phi ({name}): gives two results for one seed; its noise must be drawn from `generator`, or no run repeats"
        )
    parameters = list(phi.parameters())
    if parameters and not any(p.requires_grad for p in parameters):
        raise ValueError(f"phi ({name}): every parameter is frozen (requires_grad=False); there is nothing to learn")


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


class DistillState:
    """All that `distill` carries from one iteration to the next: phi, alpha, their optimisers, and where the draws are.

    `state_dict` is a copy of it in tensors and plain values, `load_state_dict` goes on from there.
    """

    def __init__(self, phi: Phi, images: Tensor, config: DistillConfig, seed: int, memory: str):
        self.phi, self.step_size = phi, StepSize(config.alpha, config.alpha_mode, images)
        parts = (
            (phi, config.phi_optimizer, config.phi_lr, config.phi_momentum),
            (self.step_size, config.alpha_optimizer, config.alpha_lr, config.alpha_momentum),
        )
        self.of_phi, self.of_alpha = ([p for p in part.parameters() if p.requires_grad] for part, *_ in parts)
        learned = zip((self.of_phi, self.of_alpha), parts, strict=True)
        self.optimizers = [make_optimizer(kind, own, lr, momentum) for own, (_, kind, lr, momentum) in learned if own]
        # two streams, so that every phi of one seed meets the same segments and batches, however much noise it draws
        self.generator, self.noise = seeded(seed, "distill"), seeded(seed, "distill", "noise")
        self.good = [p.detach().clone() for p in self.learned]  # the last that gave a loss to learn from
        self.history: list[dict] = []
        self.memory = memory  # of the unroll: another rounds differently
        self.budget, self.begun = 60 * config.minutes or math.inf, time.monotonic()

    @property
    def learned(self) -> list[Tensor]:
        return self.of_phi + self.of_alpha

    @property
    def seconds(self) -> float:
        """How long it took to come here, runs that were stopped included; what goes over the budget is not counted."""
        return min(time.monotonic() - self.begun, self.budget)

    def backward(self, loss: Tensor) -> bool:
        """Differentiate the loss; whether all of the gradient is finite."""
        grads = gradients(loss, self.learned)
        if self.of_phi and all(g is None for g in grads[: len(self.of_phi)]):
            raise ValueError(f"no gradient reaches phi ({type(self.phi).__name__}): is its output detached?")
        for p, g in zip(self.learned, grads, strict=True):
            p.grad = torch.zeros_like(p) if g is None else g
        return all(bool(p.grad.isfinite().all()) for p in self.learned)

    def record(self, loss: Tensor, alpha: Tensor, start_epoch: int, scale: float, moved: float | None) -> dict:
        """What is kept of this iteration, once its gradient is known; warns of the first in each of `STATES`."""
        record = dict(iteration=len(self.history), loss=loss.item(), alpha=alpha.item(), start_epoch=start_epoch)
        record |= {"phi": watched} if (watched := getattr(self.phi, "report", dict)()) else {}
        record["grad_norm"] = sum(float(p.grad.square().sum()) for p in self.of_phi) ** 0.5
        state = dead_state(scale, record["alpha"], moved)
        if state and state not in {r["state"] for r in self.history}:
            warnings.warn(f"iteration {record['iteration']}: {state}: {STATES[state]}", stacklevel=3)
        self.history.append(record | dict(scale=scale, moved=moved, state=state))
        return self.history[-1]

    def step(self, hold_alpha: bool) -> None:
        """Line 15: a step of phi's optimiser and of alpha's."""
        self.good = [p.detach().clone() for p in self.learned]
        for p in self.of_alpha if hold_alpha else []:
            p.grad = None  # its optimiser passes over it
        for optimizer in self.optimizers:
            optimizer.step()

    @torch.no_grad()
    def step_back(self) -> None:
        """Undo the last step, of phi and alpha."""
        for p, value in zip(self.learned, self.good, strict=True):
            p.copy_(value)

    def state_dict(self) -> dict:
        """A copy: nested dictionaries and lists of tensors, numbers and strings."""
        state = {
            "phi": dict(self.phi.state_dict()),
            "step_size": dict(self.step_size.state_dict()),
            "optimizers": [[o.state.get(p, {}) for p in o.param_groups[0]["params"]] for o in self.optimizers],
            "good": self.good,
            "generators": [self.generator.get_state(), self.noise.get_state()],
            "history": self.history,
            "memory": self.memory,
            "seconds": self.seconds,
        }
        return copy.deepcopy(state)

    def load_state_dict(self, state: dict) -> None:
        """Go on from there; a `ValueError` unless it is of such a phi and such optimisers."""
        state = copy.deepcopy(state)
        try:
            self.phi.load_state_dict(state["phi"])
            self.step_size.load_state_dict(state["step_size"])
            for optimizer, found in zip(self.optimizers, state["optimizers"], strict=True):
                own = {k: values for k, values in enumerate(found) if values}
                optimizer.load_state_dict({"state": own, "param_groups": optimizer.state_dict()["param_groups"]})
            self.good = [v.to(p) for v, p in zip(state["good"], self.learned, strict=True)]
            for generator, value in zip((self.generator, self.noise), state["generators"], strict=True):
                generator.set_state(value)
            self.history, self.memory = state["history"], state["memory"]
            self.begun = time.monotonic() - state["seconds"]
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"resume: not a state of this phi and these optimizers ({error})") from None


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
    a student with instance norm hides from the loss), stops the run: `stopped` says so, and phi and alpha are the last
    before that. So does the end of its `minutes`, after the iteration under way (how many, no seed decides).
    A phi that cannot learn (`check_phi`), or whose parameters receive no gradient, is a `ValueError`.
    """
    check_distill(phi, images, labels, experts, config, real)
    student, steps = experts.student, config.syn_steps * config.draws
    of_step = config.batch_syn or config.episode * len(labels.unique()) or len(labels)
    memory = choose_memory(config.memory, student, images[:of_step], labels, steps)
    run, stopped = DistillState(phi, images, config, seed, memory), ""
    if resume:
        run.load_state_dict(resume)

    while len(run.history) < config.iterations and not stopped:
        if run.history and run.seconds >= run.budget:
            stopped = f"minutes={config.minutes:g} ran out at iteration {len(run.history)} of {config.iterations}"
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
        record = run.record(loss, alpha, start_epoch, max(scales), moved(start, ends[0], target))
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
        warnings.warn(stopped, stacklevel=2)
    for p in run.learned:
        p.grad = None
    return Distilled(phi, run.step_size().item(), run.history, stopped)


def divergence(
    config: DistillConfig, *, scale: float, alpha: float, loss=0.0, grad_norm=0.0, finite=True, iteration=None, **_
) -> str:
    """Why an iteration, or (without one) the last step, ends a run, with what to try; "" if it does not."""
    finite = finite and all(map(math.isfinite, (loss, alpha, grad_norm)))
    if finite and abs(loss) <= LOST and scale <= EXPLODED:
        return ""
    when, seen = "in the last step", f"phi(x) {scale:.3g} times as large as x"
    if iteration is not None:
        when, seen = f"at iteration {iteration}", f"{seen}, loss {loss:.3g}, phi's gradient {grad_norm:.3g}"
    if not scale <= 10:
        remedy = "use a smaller phi_lr"
    elif config.alpha_mode != "fixed" and not abs(alpha) <= 10 * config.alpha:
        remedy = "alpha has run away: use a smaller alpha_lr, or fix it"
    else:
        remedy = "use a smaller alpha, or a smaller phi_lr"
    by = f"{config.phi_optimizer}, phi_lr={config.phi_lr:g}, alpha={alpha:.3g}"
    by += "" if config.alpha_mode == "fixed" else f" by {config.alpha_optimizer}, alpha_lr={config.alpha_lr:g}"
    return f"diverged {when}: {seen} ({by}); {remedy}"


def diverged(stopped: str) -> bool:
    """Whether a run was stopped by what it did (`divergence`), and not at the end of its `minutes`."""
    return stopped.startswith("diverged")


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
    expert = int(torch.randint(len(experts.ways), (), generator=generator))
    start_epoch = int(torch.randint(config.max_start_epoch + 1, (), generator=generator))
    return start_epoch, *experts.segment(expert, start_epoch, config.expert_epochs)


def draw_base(labels: Tensor, episode: int, generator: torch.Generator) -> Tensor:
    """Indices of one iteration's base set: `episode` images of each class, drawn afresh; all images if it is 0."""
    if episode == 0:
        return torch.arange(len(labels))
    classes = [torch.nonzero(labels == c).flatten().cpu() for c in labels.unique()]
    return torch.cat([c[torch.randperm(len(c), generator=generator)[:episode]] for c in classes])


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


def moved(start: Tensor, end: Tensor, target: Tensor) -> float | None:
    """How far a student went, in distances to its target; None where there is no target but the start."""
    distance = (target - start).norm()
    return float((end - start).detach().norm() / distance) if distance else None


def rms(images: Tensor) -> float:
    """The root of the mean square."""
    return float(images.detach().square().mean().sqrt())


def gradients(loss: Tensor, learned: list[Tensor]) -> list[Tensor | None]:
    """d loss / d each tensor of `learned`; None where the loss does not depend on it."""
    if not learned or not loss.requires_grad:
        return [None] * len(learned)
    return list(torch.autograd.grad(loss, learned, allow_unused=True))
