"""What an expert's way asks for: where students go from its snapshots, on a part of the data through each method.

An expert's movement is largely the noise of its batches. The ordinary matching loss counts that noise, which no image
can answer for; here it is left out. From one snapshot several students take the expert's own steps on all the data,
through the augmentation that it was trained with: what their ends have in common is where all the data lead. Others
take as many of the same steps on a part of the data, through a method. How far their common way is from that one is
what the method does not make up for: 0 = nothing, it is as all the data; 1 = as much as standing still.
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

NOISE = "noise in the experts' own"

EXPERTS = 3  # at most, whose ways are looked at

BRANCHES = 4  # students from each snapshot, of which pairs tell what they have in common


def branches(
    student: nn.Module, start: Tensor, split: Split, through: list[Callable | None], setup: Setup, *seed
) -> Tensor:
    """`[BRANCHES, P]`: how far students move from `start` `[P]` in an expert's steps between two snapshots.

    On the images of `split`, in every step through each of `through`; each student by batches and draws of its own, and
    from rest, where the experts have momentum.
    """

    def batches(k: int) -> Iterator[tuple[Tensor, Tensor]]:
        noise = seeded(*seed, k, "noise")  # apart, so that all methods meet the same batches of a part
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
    """From snapshot `start` of the experts: what each method, by name, does not make up for.

    A list a measure, a value an expert: `length`, the squared way that all the data lead; `noise`, what an expert's own
    squared movement has beside it; and `missed`, by method, the squared distance of its way from that.
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
        found = {"length": [], "noise": [], "missed": {name: [] for name in through}}
        count = min(EXPERTS, len(experts.trajectories))
        for expert in range(count):
            start = experts.trajectories[expert][self.start].to(data.train.images.device).float()
            all_of_it = branches(student, start, data.train, [taught], setup, *seed, expert, "all")
            length = common(all_of_it)
            found["length"].append(length)
            found["noise"].append(float(all_of_it.square().sum(1).mean()) - length)
            for place, (name, (part, methods)) in enumerate(through.items()):
                way = branches(student, start, part, methods, setup, *seed, expert)
                found["missed"][name].append(common(way) + length - 2 * common(way, all_of_it))
                tick(expert + (place + 1) / len(through), count)
        return {}, found


def shares(found: dict) -> dict[str, tuple[float, float | None]]:
    """What a `Drift` found, in units of the way that all the data lead, and its standard error (of one expert: None).

    The noise is in units of an expert's whole squared movement, and by the name `NOISE`.
    """
    length, noise = np.array(found["length"]), np.array(found["noise"])

    def ratio(above: np.ndarray, below: np.ndarray) -> tuple[float, float | None]:
        value, n = above.sum() / below.sum(), len(above)
        errors = (above - value * below) / below.mean()  # of a ratio of means, to first order
        return float(value), float(errors.std(ddof=1) / n**0.5) if n > 1 else None

    return {NOISE: ratio(noise, length + noise)} | {
        name: ratio(np.array(missed), length) for name, missed in found["missed"].items()
    }
