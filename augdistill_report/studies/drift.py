"""How far students end from the target that all the data set, when they train on a subset by each method.

An expert's movement is largely noise of its batches. The ordinary matching loss counts that noise, which no image can
match; here it is left out. From one snapshot several students take the expert's own steps on all the data, with the
augmentation that the expert was trained with: the mean of their moves is the target. Others take as many of the same
steps on a subset, by a method. The squared distance of their mean move from the target, over the squared length of the
target, is what remains: 0 = as all the data; 1 = as no movement at all.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from augdistill_core import augmented, flatten, minibatches, seeded, sgd, snapshots_every
from augdistill_report.data.augmentations import augmentation
from augdistill_report.data.datasets import Split
from augdistill_report.work.experts import load_trajectories, own_experts
from augdistill_report.work.jobs import Job
from augdistill_report.work.scoring import Evaluation
from augdistill_report.work.setup import Setup

NOISE = "noise (share of an expert's squared movement)"

MOST_EXPERTS = 3  # whose trajectories are looked at

BRANCHES = 4  # students from each snapshot: their mean move is found from pairs


def branches(
    student: nn.Module, start: Tensor, split: Split, through: list[Callable | None], setup: Setup, *seed
) -> Tensor:
    """`[BRANCHES, P]`: how far students move from `start` `[P]` in an expert's steps between two snapshots.

    On the images of `split`, in every step through each of `through`; each student by batches and draws of its own, and
    from rest, where the experts have momentum.
    """

    def batches(k: int) -> Iterator[tuple[Tensor, Tensor]]:
        noise = seeded(*seed, k, "noise")  # apart, so that all methods see the same batches of a subset
        for i in minibatches(len(split), setup.expert_batch, seeded(*seed, k)):
            images, labels = split.images[i], split.labels[i]
            for method in through:
                with torch.no_grad():
                    images = augmented(method, images, labels, i, noise)
            yield images, labels

    steps = snapshots_every(len(setup.load().train), setup)[0]
    ends = []
    for k in range(BRANCHES):
        rates = setup.expert_lr, setup.expert_momentum, setup.expert_decay
        *_, (model, _) = itertools.islice(sgd(student, start, batches(k), *rates), steps)
        ends.append(flatten(model.parameters()).detach() - start)
    return torch.stack(ends).double()


def common(moves: Tensor, others: Tensor | None = None) -> float:
    """<E a, E b> from independent draws `[K, P]` of a and of b; without `others` ||E a||^2: the mean over pairs."""
    if others is not None:
        return float(moves.mean(0) @ others.mean(0))
    products = moves @ moves.T
    return float(products.sum() - products.trace()) / (len(moves) * (len(moves) - 1))


@dataclasses.dataclass(frozen=True)
class Drift(Job):
    """From snapshot `start` of the experts: how far from the target each method ends.

    Finds lists of a value per expert: `length`, the squared length of the target; `noise`, what an expert's own squared
    movement has beside it; and `remaining`, by method id, the squared distance of its mean move from the target.
    """

    start: int
    methods: tuple[tuple[str, Evaluation], ...]

    kind = "drift"

    @property
    def cost(self):
        return len(self.methods)

    def spec(self):
        return super().spec() | {"methods": {name: job.spec() for name, job in self.methods}}

    def needs(self):
        return [*own_experts(self.setup), *(job.distilled for _, job in self.methods if job.distilled)]

    def work(self, store, tick):
        data, setup, student = self.data, self.setup, self.student()
        experts, seed = load_trajectories(setup, store), (setup.seed, "drift", self.start)
        taught = augmentation(setup.expert_augment, data)
        through = {
            name: (data.train.take(job.subset.index(data)), [job.phi(store), job.augment()])
            for name, job in self.methods
        }
        found = {"length": [], "noise": [], "remaining": {name: [] for name in through}}
        count = min(MOST_EXPERTS, len(experts.trajectories))
        for expert in range(count):
            start = experts.trajectories[expert][self.start].to(data.train.images.device).float()
            all_of_it = branches(student, start, data.train, [taught], setup, *seed, expert, "all")
            length = common(all_of_it)
            found["length"].append(length)
            found["noise"].append(float(all_of_it.square().sum(1).mean()) - length)
            for place, (name, (subset, methods)) in enumerate(through.items()):
                moves = branches(student, start, subset, methods, setup, *seed, expert)
                found["remaining"][name].append(common(moves) + length - 2 * common(moves, all_of_it))
                tick(expert + (place + 1) / len(through), count)
        return {}, found


def shares(found: dict) -> dict[str, tuple[float, float | None]]:
    """What remains, over the squared length of the target, and its standard error (None for one expert), by method id.

    By the name `NOISE`: the noise, over an expert's whole squared movement.
    """
    length, noise = np.array(found["length"]), np.array(found["noise"])

    def ratio(above: np.ndarray, below: np.ndarray) -> tuple[float, float | None]:
        value, n = above.sum() / below.sum(), len(above)
        errors = (above - value * below) / below.mean()  # of a ratio of means, to first order
        return float(value), float(errors.std(ddof=1) / n**0.5) if n > 1 else None

    return {NOISE: ratio(noise, length + noise)} | {
        name: ratio(np.array(remaining), length) for name, remaining in found["remaining"].items()
    }
