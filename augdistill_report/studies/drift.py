"""The drift of each method: how far its students end from the mean movement of training on all the data.

An expert's movement is largely batch noise. The ordinary matching loss includes that noise, which no image can match;
the drift does not. From one snapshot, several students take an expert's steps on all the data, with the experts'
augmentation: the mean of their movements is the target. Other students take equally many such steps on a subset, by a
method. The remaining distance is the squared distance of their mean movement to the target, divided by the squared
norm of the target: 0 = like all the data, 1 = no movement.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from augdistill_core import augmented, flatten, labels_under, minibatches, seeded, sgd, snapshots_every
from augdistill_report.data.augmentations import augmentation
from augdistill_report.data.datasets import Split
from augdistill_report.work.difficulty import subset_index
from augdistill_report.work.experts import load_trajectories, own_experts
from augdistill_report.work.jobs import Job
from augdistill_report.work.scoring import Evaluation
from augdistill_report.work.setup import Setup

NOISE = "noise (share of an expert's squared movement)"

MOST_EXPERTS = 3  # the largest number of trajectories that are used

BRANCHES = 4  # students per snapshot: inner products of mean movements are estimated from pairs


def branches(
    student: nn.Module, start: Tensor, split: Split, through: list[Callable | None], setup: Setup, *seed
) -> Tensor:
    """`[BRANCHES, P]`: the movements of students from `start` `[P]` in an expert's steps between two snapshots.

    They train on the images of `split`; each batch passes through each of `through`. Each student has its own batches
    and samples. If the experts use momentum, it starts at zero.
    """

    def batches(k: int) -> Iterator[tuple[Tensor, Tensor]]:
        noise = seeded(*seed, k, "noise")  # separate, so that all methods get the same batches of a subset
        for i in minibatches(len(split), setup.expert_batch, seeded(*seed, k)):
            images, labels = split.images[i], split.labels[i]
            with torch.no_grad():
                for method in through:
                    images = augmented(method, images, labels, i, noise)
                labels = labels_under(through[0], labels, i)
            yield images, labels

    steps = snapshots_every(len(setup.load().train), setup)[0]
    ends = []
    for k in range(BRANCHES):
        rates = setup.expert_lr, setup.expert_momentum, setup.expert_decay
        *_, (model, _) = itertools.islice(sgd(student, start, batches(k), *rates), steps)
        ends.append(flatten(model.parameters()).detach() - start)
    return torch.stack(ends).double()


def common(moves: Tensor, others: Tensor | None = None) -> float:
    """<E a, E b> from independent samples `[K, P]` of a and b; without `others` ||E a||^2, by the mean over pairs."""
    if others is not None:
        return float(moves.mean(0) @ others.mean(0))
    products = moves @ moves.T
    return float(products.sum() - products.trace()) / (len(moves) * (len(moves) - 1))


@dataclasses.dataclass(frozen=True)
class Drift(Job):
    """The job that measures the drift of each method from snapshot `start` of the experts.

    The result has lists with one value per expert: `length`, the squared norm of the target; `noise`, the rest of an
    expert's expected squared movement; and `remaining`, by method id, the squared distance of its mean movement to the
    target.
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
            name: (data.train.take(subset_index(job.subset, job.setup, store)), [job.phi(store), job.augment()])
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
    """The remaining distance of each method, over the squared norm of the target: (value, standard error or None).

    The standard error is None for one expert. The entry `NOISE` is the noise over an expert's whole squared movement.
    """
    length, noise = np.array(found["length"]), np.array(found["noise"])

    def ratio(above: np.ndarray, below: np.ndarray) -> tuple[float, float | None]:
        value, n = above.sum() / below.sum(), len(above)
        errors = (above - value * below) / below.mean()  # the error of a ratio of means, to first order
        return float(value), float(errors.std(ddof=1) / n**0.5) if n > 1 else None

    return {NOISE: ratio(noise, length + noise)} | {
        name: ratio(np.array(remaining), length) for name, remaining in found["remaining"].items()
    }
