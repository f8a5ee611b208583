"""Experts: classifiers that train on all the data, and the way that their weights take. Section 2 of `augdistill_core`.

Each expert depends on (seed, its number) alone, however many are trained beside it, whether one by one or all at once,
and whether its training was stopped and went on, or not.
"""

import dataclasses
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from augdistill_method.config import Config, knob
from augdistill_method.phi import augmented
from augdistill_method.random import minibatches, seeded
from augdistill_method.student import check_images, flatten, initial_parameters, sgd, sgd_together


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
    expert_minutes: float = knob(0.0, "minutes after which each expert stops at the end of its epoch; 0 = none", low=0)


@dataclasses.dataclass(frozen=True)
class Trajectories:
    """Expert trajectories: `trajectories[expert][snapshot]` are parameters `[P]`, snapshot 0 at initialisation.

    A trajectory is a tensor `[snapshots, P]`, or anything with such items and such a length: a file that is read by the
    snapshot, for one. All count as cut to the shortest (with a warning), where a time budget left some short.
    """

    student: nn.Module
    trajectories: Sequence[Sequence[Tensor]]

    def __post_init__(self):
        shortest, longest = self.snapshots, max(map(len, self.trajectories))
        if shortest < longest:
            warnings.warn(
                f"the experts hold {shortest} to {longest} snapshots, all are cut to the first {shortest} "
                "(expert_minutes ran out for some, or their files are of several trainings)",
                stacklevel=3,
            )

    @property
    def snapshots(self) -> int:
        """How many snapshots every way holds."""
        return min(map(len, self.trajectories))

    @property
    def theta(self) -> Tensor:
        """All of it as one tensor `[experts, snapshots, P]`: read anew each time, and large."""
        return torch.stack([torch.stack([way[t] for t in range(self.snapshots)]) for way in self.trajectories])

    def segment(self, expert: int, start: int, length: int) -> tuple[Tensor, Tensor]:
        """The parameters `[P]` where a segment starts, and those `length` snapshots later."""
        last = self.snapshots - 1
        if not 1 <= length <= last:
            raise ValueError(f"a segment of {length} snapshots: must be in [1, {last}], at most the whole trajectory")
        if not 0 <= start <= last - length:
            raise ValueError(
                f"start {start} plus {length} snapshots: this trajectory ends at snapshot {last}, "
                f"so the start must be in [0, {last - length}]"
            )
        if not 0 <= expert < len(self.trajectories):
            raise ValueError(f"expert {expert}: must be in [0, {len(self.trajectories) - 1}]")
        begin, end = self.trajectories[expert][start], self.trajectories[expert][start + length]
        if torch.equal(begin, end):
            raise ValueError(f"expert {expert} stands still from snapshot {start} on: there is no way to match")
        return begin, end


def snapshots_every(count: int, config: ExpertConfig) -> tuple[int, int]:
    """For `count` training images: the steps between two snapshots, and how many snapshots follow the first."""
    epoch = -(-count // config.expert_batch)
    every = config.snapshot_steps or epoch
    if every > config.epochs * epoch:
        raise ValueError(f"snapshot_steps={every}: must be at most the {config.epochs * epoch} steps that are trained")
    return every, config.epochs * epoch // every


@dataclasses.dataclass
class TrainingState:
    """E experts in training: all that it takes to go on from the end of an epoch, and end with the same bits.

    `on_epoch` is handed the live one: what is to last, in a file or elsewhere, must be copied there and then.
    """

    theta: Tensor  # [E, P]
    velocity: Tensor  # [E, P], of the momentum
    generators: list[torch.Generator]  # one an expert
    snapshots: list[Tensor]  # [E, P] each
    losses: list[Tensor] = dataclasses.field(default_factory=list)  # [E] each, the mean before every later snapshot
    rest: list[Tensor] = dataclasses.field(default_factory=list)  # [E] each, of the steps since the last snapshot
    seconds: float = 0.0  # spent so far

    def state_dict(self) -> dict:
        """All of it as lists of tensors and plain values (the live ones, no copies)."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return values | {"generators": [own.get_state() for own in self.generators]}

    @classmethod
    def from_state_dict(cls, state: dict, rows: Sequence[int], parameters: int, images: Tensor) -> "TrainingState":
        """The experts of these rows of a state, to go on from, on the device of the images.

        A `ValueError` unless it is whole, of students of so many parameters, and of the images' type.
        """
        wide, narrow = (len(rows), parameters), (len(rows),)
        try:
            every = {key: state[key] for key in ("snapshots", "losses", "rest")}
            every |= {"theta": [state["theta"]], "velocity": [state["velocity"]]}
            own = {key: [t[list(rows)].to(images.device) for t in tensors] for key, tensors in every.items()}
            for key, tensors in own.items():
                right = wide if key in ("theta", "velocity", "snapshots") else narrow
                for t in tensors:
                    if (tuple(t.shape), t.dtype) != (right, images.dtype):
                        raise ValueError(f"{key} is {tuple(t.shape)} {t.dtype}, must be {right} {images.dtype}")
            if not own["snapshots"] or len(own["snapshots"]) != len(own["losses"]) + 1:
                raise ValueError(f"{len(own['snapshots'])} snapshots with {len(own['losses'])} losses")
            generators = [torch.Generator() for _ in rows]
            for generator, row in zip(generators, rows, strict=True):
                generator.set_state(state["generators"][row])
            single = {"theta": own.pop("theta")[0], "velocity": own.pop("velocity")[0]}
            return cls(**single, **own, generators=generators, seconds=float(state["seconds"]))
        except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"no state of these experts in training ({error})") from None


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
    on_epoch: Callable[[TrainingState], None] | None = None,
    resume: TrainingState | None = None,
) -> Tensor:
    """One expert's way `[snapshots, P]`, the first at its initialisation; it depends on (seed, expert) alone.

    `augment` is called like a phi on every batch; `on_snapshot(snapshot, mean loss since the last)` may report
    progress, and may stop the training by raising. One snapshot an epoch, or every `snapshot_steps` steps. Where
    `expert_minutes` run out, the way ends with the last snapshot of the epoch under way (how many, no seed decides).
    `on_epoch` is handed the training at the end of each epoch; passed as `resume`, it goes on from there
    (`on_snapshot` is told of the snapshots that it brings, too). A loss or parameters that are not finite are a
    `ValueError` that names the step.
    """
    check_images(student, images, labels)
    at = resume or initial_state(student, images, seed, [expert])
    batches = expert_batches(images, labels, config, augment, at.generators[0])
    options = config.expert_lr, config.expert_momentum, config.expert_decay, at.velocity[0]
    steps = ((model, loss[None]) for model, loss in sgd(student, at.theta[0], batches, *options))

    def read(model: nn.Module) -> Tensor:
        return flatten(model.parameters()).detach()[None]

    def tell(snapshot: int, losses: Tensor) -> None:
        if on_snapshot is not None:
            on_snapshot(snapshot, float(losses))

    return record_trajectories(at, steps, read, len(images), config, [expert], tell, on_epoch)[0]


def train_together(
    student: nn.Module,
    images: Tensor,
    labels: Tensor,
    config: ExpertConfig,
    seed: int,
    experts: Sequence[int],
    *,
    augment: Callable | None = None,
    on_snapshot: Callable[[int, Tensor], None] | None = None,
    on_epoch: Callable[[TrainingState], None] | None = None,
    resume: TrainingState | None = None,
) -> Tensor:
    """The ways `[E, snapshots, P]` of the experts of these numbers, all trained at once, as many as memory holds.

    Each is what `train_expert` makes of its number, to rounding: its own start, batches and draws. For a GPU, which one
    expert of the recipe leaves idle; on a CPU one process a core is faster. `on_snapshot` is told the losses `[E]`;
    `expert_minutes` counts for all of them together.
    """
    check_images(student, images, labels)
    at = resume or initial_state(student, images, seed, experts)
    batches = zip(*(expert_batches(images, labels, config, augment, own) for own in at.generators), strict=True)
    options = config.expert_lr, config.expert_momentum, config.expert_decay, at.velocity
    steps = sgd_together(student, at.theta, batches, *options)
    return record_trajectories(at, steps, Tensor.clone, len(images), config, experts, on_snapshot, on_epoch)


def initial_state(student: nn.Module, images: Tensor, seed: int, experts: Sequence[int]) -> TrainingState:
    """The experts of these numbers where they start."""
    generators = [seeded(seed, "expert", k) for k in experts]
    start = torch.stack([initial_parameters(student, own) for own in generators]).to(images)
    return TrainingState(start, torch.zeros_like(start), generators, [start])


def expert_batches(
    images: Tensor, labels: Tensor, config: ExpertConfig, augment: Callable | None, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """An expert's batches without end. Nothing is drawn ahead: the generator's state is that of the last one given."""
    for i in minibatches(len(images), config.expert_batch, generator):
        yield augmented(augment, images[i], labels[i], i, generator), labels[i]


def record_trajectories(
    at: TrainingState,
    steps: Iterator,
    read: Callable,
    count: int,
    config: ExpertConfig,
    experts: Sequence[int],
    on_snapshot: Callable | None,
    on_epoch: Callable | None,
) -> Tensor:
    """The ways `[E, snapshots, P]` of a training on `count` images: `steps` yield what `read` copies theta from, and
    the losses `[E]`."""
    every, snapshots = snapshots_every(count, config)
    epoch = -(-count // config.expert_batch)
    began = time.monotonic() - at.seconds
    deadline = 60 * config.expert_minutes or math.inf
    for snapshot, mean in enumerate(at.losses, 1):
        if on_snapshot is not None:
            on_snapshot(snapshot, mean)
    done = len(at.losses) * every + len(at.rest)
    for step, (state, losses) in enumerate(itertools.islice(steps, snapshots * every - done), done + 1):
        at.rest.append(losses)
        if step % every and step % epoch:
            continue
        at.theta = read(state)
        check_finite(at, step, config, experts)
        if step % every == 0:
            at.snapshots.append(at.theta)
            at.losses.append(torch.stack(at.rest).mean(0))
            at.rest.clear()
            if on_snapshot is not None:
                on_snapshot(step // every, at.losses[-1])
        if step % epoch == 0:
            at.seconds = time.monotonic() - began
            if on_epoch is not None:
                on_epoch(at)
            if len(at.snapshots) > 1 and at.seconds > deadline:
                break
    return torch.stack(at.snapshots, 1)


def check_finite(at: TrainingState, step: int, config: ExpertConfig, experts: Sequence[int]) -> None:
    """A `ValueError` that says which expert diverged, at which step: a loss since the last snapshot, or theta."""
    bad = torch.nonzero(~torch.stack(at.rest).isfinite()).tolist()
    bad += [[len(at.rest) - 1, e] for e in torch.nonzero(~at.theta.isfinite().all(1)).flatten().tolist()]
    if bad:
        of_rest, which = bad[0]
        raise ValueError(
            f"expert {experts[which]} diverged: its loss is {float(at.rest[of_rest][which]):.3g} at step "
            f"{step - len(at.rest) + of_rest + 1} (expert_lr={config.expert_lr:g}, "
            f"expert_momentum={config.expert_momentum:g}); use a smaller expert_lr, a third of it say"
        )


def train_experts(
    student: nn.Module, images: Tensor, labels: Tensor, config: ExpertConfig, seed: int, **options
) -> Trajectories:
    """`Trajectories` of `config.experts` experts: all at once on a GPU, one after the other on a CPU.

    The options are `augment` and `on_snapshot` of `train_expert` and `train_together`.
    """
    arguments, experts = (student, images, labels, config, seed), range(config.experts)
    if images.is_cuda:
        return Trajectories(student, train_together(*arguments, experts, **options))
    return Trajectories(student, [train_expert(*arguments, k, **options) for k in experts])
