"""How easy each training image is for the experts, and the subsets that are selected by it.

An image is easy if the experts give its label a high probability early and stably: the mean over their snapshots (the
first, at initialisation, left out). A subset then is a window of that order within each class. At 10 % a window of
medium difficulty is better than random images, and the easiest images are worse (as BWS finds; Choi et al. 2024).
"""

import dataclasses

import torch
from torch import Tensor, nn

from augdistill_core import logits_of, unflatten
from augdistill_report.data.datasets import Split
from augdistill_report.files.store import Store
from augdistill_report.work.experts import load_trajectories, own_experts
from augdistill_report.work.jobs import Job, Subset
from augdistill_report.work.setup import Setup

PLACES = (0.0, 0.15, 0.3, 0.45, 0.6)  # of windows that validation selects from: 0 = the easiest images, 1 = the hardest

LOOKS = 24  # snapshots that are measured, in all: evenly spaced, equally many of each expert

MOMENTS = 3  # snapshots of each expert, at least: of many experts, only the first 8 are measured


@dataclasses.dataclass(frozen=True)
class Difficulty(Job):
    """The experts' mean probability of each training image's own label: `probability` `[n]`, high = easy."""

    kind = "difficulty"

    def spec(self):
        spec = super().spec()
        return spec | {"setup": spec["setup"] | {"augment": None}}  # of the unroll: experts do not use it

    def needs(self):
        return own_experts(self.setup)

    def work(self, store, tick):
        train, experts = self.data.train, load_trajectories(self.setup, store)
        count, times = looks(len(experts.trajectories), experts.snapshots)
        used = experts.trajectories[:count]
        found = torch.zeros(len(train), dtype=torch.float64)
        for done, (trajectory, time) in enumerate((expert, time) for expert in used for time in times):
            theta = unflatten(experts.student, trajectory[time].to(train.images.device).float())
            found += label_probability(experts.student, theta, train).cpu()
            tick(done + 1, len(used) * len(times))
        return {"probability": (found / (len(used) * len(times))).float()}, {}


def looks(experts: int, snapshots: int) -> tuple[int, list[int]]:
    """How many of so many experts are measured, and at which of so many snapshots of each: `LOOKS` in all."""
    used = min(experts, LOOKS // MOMENTS)
    return used, torch.linspace(1, snapshots - 1, LOOKS // used).round().int().unique().tolist()


@torch.no_grad()
def label_probability(student: nn.Module, theta: list[Tensor], split: Split) -> Tensor:
    """`[n]`: the probability of each image's own label, from a student with parameters `theta` (as `unflatten`)."""
    parts = [(part.labels, logits_of(student, theta, part.images).softmax(1)) for part in split.batches(512)]
    return torch.cat([p.gather(1, labels[:, None]).squeeze(1) for labels, p in parts])


def subset_index(subset: Subset, setup: Setup, store: Store | None) -> Tensor:
    """Positions `[n]` of a subset's images in the training split. A window is ranked by the setup's own experts."""
    ease = None if subset.window is None else Difficulty(setup).stored(store)[0]["probability"]
    return subset.index(setup.load(), ease)


def ranking(subset: Subset, setup: Setup) -> list[Difficulty]:
    """The job that a window of difficulty needs; [] for random images."""
    return [] if subset.window is None else [Difficulty(setup)]
