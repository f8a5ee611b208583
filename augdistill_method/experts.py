"""Experts: classifiers trained on all the data, and the trajectories of their weights.

An expert depends only on (seed, its number): not on how many experts there are, on whether they are trained one by one
or all at once, or on whether the training was interrupted and resumed.
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
from augdistill_method.random import minibatches, seeded, to_device
from augdistill_method.student import check_images, flatten, initial_parameters, sgd, sgd_together


@dataclasses.dataclass(frozen=True)
class ExpertConfig(Config):
    """How experts are trained. MTT on CIFAR-10: 100 experts x 50 epochs, lr .01, batch 256, no momentum, no decay."""

    experts: int = knob(8, "number of expert trajectories", low=1)
    epochs: int = knob(15, "training epochs of each expert", low=1)
    expert_lr: float = knob(0.02, "SGD step size of the experts", low=1e-12)
    expert_batch: int = knob(64, "images per training step of the experts", low=1)
    expert_momentum: float = knob(0.0, "SGD momentum of the experts", low=0, high=1)
    expert_decay: float = knob(0.0, "weight decay of the experts", low=0)
    snapshot_steps: int = knob(0, "steps between two snapshots; 0 = one epoch", low=0)
    expert_minutes: float = knob(0.0, "time limit per expert in minutes, checked after each epoch; 0 = no limit", low=0)


@dataclasses.dataclass(frozen=True)
class Trajectories:
    """Expert trajectories: `trajectories[expert][snapshot]` are parameters `[P]`, snapshot 0 at initialisation.

    A trajectory is a tensor `[snapshots, P]`, or any sequence of such snapshots, for example a file that is read one
    snapshot at a time. If a time limit made some shorter, all are cut to the shortest, with a warning.
    """

    student: nn.Module
    trajectories: Sequence[Sequence[Tensor]]

    def __post_init__(self):
        shortest, longest = self.snapshots, max(map(len, self.trajectories))
        if shortest < longest:
            warnings.warn(
                f"the experts hold {shortest} to {longest} snapshots, all are cut to the first {shortest} "
                "(some reached expert_minutes, or their files come from different settings)",
                stacklevel=3,
            )

    @property
    def snapshots(self) -> int:
        """The number of snapshots of the shortest trajectory."""
        return min(map(len, self.trajectories))

    @property
    def theta(self) -> Tensor:
        """All trajectories as one tensor `[experts, snapshots, P]`: large, and read again at each access."""
        return torch.stack([torch.stack([one[t] for t in range(self.snapshots)]) for one in self.trajectories])

    def segment(self, expert: int, start: int, length: int) -> tuple[Tensor, Tensor]:
        """The parameters `[P]` at snapshot `start` and `length` snapshots later; a `ValueError` if there are none."""
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
            raise ValueError(f"expert {expert} does not move after snapshot {start}: there is nothing to match")
        return begin, end


def snapshots_every(count: int, config: ExpertConfig) -> tuple[int, int]:
    """For `count` training images: the steps between two snapshots, and the number of snapshots after the first."""
    epoch = -(-count // config.expert_batch)
    every = config.snapshot_steps or epoch
    if every > config.epochs * epoch:
        raise ValueError(f"snapshot_steps={every}: must be at most the {config.epochs * epoch} training steps")
    return every, config.epochs * epoch // every


@dataclasses.dataclass
class TrainingState:
    """The training state of E experts at the end of an epoch: training resumed from it ends with the same bits.

    `on_epoch` gets the live state, which training changes: copy at once what you keep.
    """

    theta: Tensor  # [E, P]
    velocity: Tensor  # [E, P], the momentum buffer
    generators: list[torch.Generator]  # one per expert
    snapshots: list[Tensor]  # [E, P] each, on the CPU
    losses: list[Tensor] = dataclasses.field(default_factory=list)  # [E] each, the mean loss before each later snapshot
    rest: list[Tensor] = dataclasses.field(default_factory=list)  # [E] each, losses since the last snapshot
    seconds: float = 0.0  # of training so far

    def state_dict(self) -> dict:
        """The state as lists of tensors and plain values (the live tensors, not copies)."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return values | {"generators": [own.get_state() for own in self.generators]}

    @classmethod
    def from_state_dict(cls, state: dict, rows: Sequence[int], parameters: int, images: Tensor) -> "TrainingState":
        """The training state of the experts in `rows` of a stored state, on the device of `images`.

        A `ValueError` unless it is complete, has `parameters` values per snapshot and the type of `images`.
        """
        wide, narrow = (len(rows), parameters), (len(rows),)
        try:
            every = {key: state[key] for key in ("snapshots", "losses", "rest")}
            every |= {"theta": [state["theta"]], "velocity": [state["velocity"]]}
            own = {key: [t[list(rows)] for t in tensors] for key, tensors in every.items()}
            own |= {k: [t.to(images.device) for t in tensors] for k, tensors in own.items() if k != "snapshots"}
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
            raise ValueError(f"not a training state of these experts ({error})") from None


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
    """One expert trajectory `[snapshots, P]`, from its initialisation on; it depends only on (seed, expert).

    Args:
        augment: called like a phi on every batch.
        on_snapshot: called with (snapshot, mean loss since the last one); it may stop the training by raising.
        on_epoch: called with the training state at the end of each epoch.
        resume: such a state, from which training continues (`on_snapshot` is called for its snapshots too).

    There is one snapshot per epoch, or per `snapshot_steps` steps. At the time limit `expert_minutes` the trajectory
    ends with the last snapshot of the current epoch, so its length depends on the machine's speed, not on the seed.
    A `ValueError` that names the step if a loss or a parameter is not finite.
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
    """The trajectories `[E, snapshots, P]` of the experts with these numbers, trained together (`sgd_together`).

    Each equals the result of `train_expert` up to rounding: it has its own start, batches and samples. This is for a
    GPU, which a single expert leaves mostly idle; on a CPU one process per core is faster. `on_snapshot` gets the
    losses `[E]`. The time limit `expert_minutes` is that of all of them together.
    """
    check_images(student, images, labels)
    at = resume or initial_state(student, images, seed, experts)
    batches = zip(*(expert_batches(images, labels, config, augment, own) for own in at.generators), strict=True)
    options = config.expert_lr, config.expert_momentum, config.expert_decay, at.velocity
    steps = sgd_together(student, at.theta, batches, *options)
    return record_trajectories(at, steps, Tensor.clone, len(images), config, experts, on_snapshot, on_epoch)


def initial_state(student: nn.Module, images: Tensor, seed: int, experts: Sequence[int]) -> TrainingState:
    """The initial training state of the experts with these numbers."""
    generators = [seeded(seed, "expert", k) for k in experts]
    start = torch.stack([initial_parameters(student, own) for own in generators]).to(images)
    return TrainingState(start, torch.zeros_like(start), generators, [to_host(start)])


def to_host(theta: Tensor) -> Tensor:
    """Parameters in the CPU's memory. A copy from a CUDA device is complete after the next wait for the device."""
    if not theta.is_cuda:
        return theta
    return torch.empty_like(theta, device="cpu", pin_memory=True).copy_(theta, non_blocking=True)


def expert_batches(
    images: Tensor, labels: Tensor, config: ExpertConfig, augment: Callable | None, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """An endless sequence of an expert's batches. No batch is sampled ahead, so `generator` can be saved any time."""
    for drawn in minibatches(len(images), config.expert_batch, generator):
        i = to_device(drawn, images.device)
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
    """Train on `count` images and return the trajectories `[E, snapshots, P]`.

    `steps` yields (model, losses `[E]`) after each step; `read` copies theta `[E, P]` from the model.
    """
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
        if step % every == 0:
            at.snapshots.append(to_host(at.theta))
        check_finite(at, step, config, experts)
        if step % every == 0:
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
    if at.theta.is_cuda:
        torch.cuda.synchronize()
    return torch.stack(at.snapshots, 1)


def check_finite(at: TrainingState, step: int, config: ExpertConfig, experts: Sequence[int]) -> None:
    """A `ValueError` with expert and step if theta, or a loss since the last snapshot, is not finite."""
    bad = torch.nonzero(~torch.stack(at.rest).isfinite()).tolist()
    bad += [[len(at.rest) - 1, e] for e in torch.nonzero(~at.theta.isfinite().all(1)).flatten().tolist()]
    if bad:
        of_rest, which = bad[0]
        raise ValueError(
            f"expert {experts[which]} diverged: its loss is {float(at.rest[of_rest][which]):.3g} at step "
            f"{step - len(at.rest) + of_rest + 1} (expert_lr={config.expert_lr:g}, "
            f"expert_momentum={config.expert_momentum:g}); use a smaller expert_lr, for example a third of it"
        )


def train_experts(
    student: nn.Module, images: Tensor, labels: Tensor, config: ExpertConfig, seed: int, **options
) -> Trajectories:
    """The `Trajectories` of `config.experts` experts: trained all at once on a GPU, one by one on a CPU.

    `options` are `augment` and `on_snapshot`, as in `train_expert` and `train_together`.
    """
    arguments, experts = (student, images, labels, config, seed), range(config.experts)
    if images.is_cuda:
        return Trajectories(student, train_together(*arguments, experts, **options))
    return Trajectories(student, [train_expert(*arguments, k, **options) for k in experts])
