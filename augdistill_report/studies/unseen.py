"""Phis for unseen images: what notebook 07 trains and scores, in one repetition.

It uses three ideas that the student report did not have: episodes (phi gets new images in each iteration, as when it is
used), experts trained with an augmentation (which phi can learn from them), and two draws (a loss that does not
penalise randomness).
"""

import dataclasses
import math

import numpy as np

from augdistill_core import DistillConfig, Phi, snapshots_every
from augdistill_report.data.augmentations import AUGMENTATIONS, RandomAffine, augmentation_for
from augdistill_report.data.datasets import Dataset
from augdistill_report.settings import Settings
from augdistill_report.work.distillation import Distillation
from augdistill_report.work.jobs import Subset
from augdistill_report.work.own_code import own_source
from augdistill_report.work.probes import Probe
from augdistill_report.work.scoring import Evaluation
from augdistill_report.work.setup import Setup

POOL = 0.2  # the fraction of each class (its first images) left out of phi's training; phi is scored on some of them

CONDITIONED, POLICY = "unet_class_noise", "policy"

# phis trained in episodes; `phi_lr` if it differs from the run's own (which is for the U-Net; the MLP's is not tuned)
OF_EPISODES = {
    "class-blind U-Net": dict(phi="unet_noise"),
    "class-blind MLP": dict(phi="mlp_noise", phi_lr=1e-3),
    "conditioned U-Net": dict(phi=CONDITIONED),
}

ALONE = {  # controls: one component of a phi
    "conditioned U-Net of a blank image": ("conditioned U-Net", "stored"),
    "class-blind MLP, phi(x) - x alone": ("class-blind MLP", "added"),
}


@dataclasses.dataclass(frozen=True)
class Repetition:
    """One repetition, with its own experts, images and phis from the seed of `settings`."""

    settings: Settings

    @property
    def few(self) -> Subset:
        """A few images per class, which no phi trained in episodes has seen."""
        return Subset(self.settings.seed, per_class=self.settings.images_per_class)

    @property
    def rest(self) -> Subset:
        """The training data of the phis trained in episodes: all but the `POOL`."""
        return Subset(self.settings.seed, fraction=1 - POOL, skip=POOL)

    def setup(self, augment: str) -> Setup:
        """The setup with experts trained with this augmentation; without `expert_files`, which have only one."""
        return self.settings.select(Setup, expert_augment=augment, expert_files="")

    def distillation(self, phi: str, subset: Subset, augment: str, **changes) -> Distillation:
        config = self.settings.select(
            DistillConfig, **dict(objective="trajectory", alpha_mode="held", draws=1) | changes
        )
        return Distillation(self.setup(augment), phi, subset, config, own_source(phi))

    @property
    def late(self) -> dict:
        """Changes of `DistillConfig` for large subsets: late segments of the expert trajectories too, as in DATM."""
        s = self.settings
        snapshots = snapshots_every(len(s.load().train), s)[1]
        start = s.policy_max_start_epoch or snapshots - s.expert_epochs
        return dict(iterations=s.policy_iterations, batch_syn=s.subset_batch, max_start_epoch=start, episode=0)

    def ranges(self) -> dict[str, Distillation]:
        """Policies to recover the ranges of the experts' augmentation: two draws, ordinary loss, and a control."""
        taught_augment, everything = self.settings.taught_augment, Subset(self.settings.seed, fraction=1.0)
        return {
            "two draws": self.distillation(POLICY, everything, taught_augment, draws=2, **self.late),
            "ordinary loss": self.distillation(POLICY, everything, taught_augment, **self.late),
            "two draws, experts without augmentation": self.distillation(
                POLICY, everything, "none", draws=2, **self.late
            ),
        }

    def episodes(self) -> dict[str, Distillation]:
        """Phis trained on new images in each iteration; they are scored on none of these images.

        A `ValueError` if `images_per_class` is too large for that.
        """
        s = self.settings
        data = s.load()
        if set(self.few.index(data).tolist()) & set(self.rest.index(data).tolist()):
            raise ValueError(
                f"images_per_class={s.images_per_class}: must be at most {POOL:.0%} of the smallest class of "
                f"{data.name}, which is left out of the training of phis"
            )
        options = dict(iterations=s.episode_iterations, episode=s.images_per_class)
        return {
            name: self.distillation(subset=self.rest, augment=s.taught_augment, **options | phi)
            for name, phi in OF_EPISODES.items()
        }

    def evaluation(
        self, subset: Subset, distilled: Distillation | None = None, only: str = "", **changes
    ) -> Evaluation:
        changes = dict(eval_steps=self.settings.subset_eval_steps, eval_epochs=0) | changes
        config = self.settings.eval_config(distilled is not None, **changes)
        setup = distilled.setup if distilled else self.setup(self.settings.taught_augment)
        return Evaluation(setup, subset, config, distilled, only)


def repetitions(settings: Settings) -> list[Repetition]:
    """`settings.unseen_repeats` repetitions, each with its own seed."""
    return [Repetition(dataclasses.replace(settings, seed=settings.seed + k)) for k in range(settings.unseen_repeats)]


def holds(phi: Phi, data: Dataset) -> int:
    """The number of a phi's parameters, in images of the data set: how many images it could store."""
    return round(sum(p.numel() for p in phi.parameters()) / math.prod(data.shape))


def truth(settings: Settings) -> dict[str, float]:
    """The ranges of the experts' augmentation, by the kinds of a policy; empty if it has no such ranges."""
    if settings.taught_augment not in AUGMENTATIONS:  # one of kornia's
        return {}
    augment = augmentation_for(settings.taught_augment, settings.dataset)
    if not isinstance(augment, RandomAffine):
        return {}
    of = {"rotation": augment.rotation, "scale": augment.scale, "shift_x": augment.shift, "shift_y": augment.shift}
    return of | ({"flip": augment.flip} if augment.flip else {})


def recovered(histories: list[list[dict]]) -> dict[str, list[float]]:
    """Each kind's range: the geometric mean over the last quarter of a run, one value per repetition."""
    found: dict[str, list[float]] = {}
    for history in histories:
        for kind in history[-1]["phi"]:
            values = [record["phi"][kind] for record in history[-max(1, len(history) // 4) :]]
            found.setdefault(kind, []).append(float(np.exp(np.mean(np.log(values)))))
    return found


FACTORS = (0.0, 0.5, 1.0, 1.5, 2.0)  # on a true range, for which the loss is measured

SEGMENTS = 8  # trajectory segments on which the loss is measured, the same for all ranges


def around(distilled: Distillation, truth: dict[str, float]) -> dict[tuple[str, float], Probe]:
    """Probes of a policy with the experts' ranges, one of them multiplied by a factor; by kind and factor."""
    return {
        (kind, factor): Probe(
            distilled.setup, distilled, segments=SEGMENTS, ranges=tuple((truth | {kind: factor * truth[kind]}).items())
        )
        for kind in truth
        for factor in FACTORS
    }


def valleys(found: dict[tuple[str, float, int], dict]) -> dict[str, dict[float, tuple[float, float]]]:
    """By kind and factor: the excess of the two-draw loss over that at the experts' ranges, and its standard error.

    `found` holds the results of probes, by kind, factor and repetition. Differences are taken on the same segment; mean
    and standard error are over the segments of all repetitions.
    """
    losses: dict[tuple[str, float], np.ndarray] = {}
    for (kind, factor, _), p in found.items():
        unbiased = np.subtract(p["loss"], p["variance"])
        losses[kind, factor] = np.append(losses.get((kind, factor), []), unbiased)
    curves: dict[str, dict[float, tuple[float, float]]] = {}
    for (kind, factor), values in losses.items():
        over = values - losses[kind, 1.0]
        error = float(over.std(ddof=1) / len(over) ** 0.5)
        curves.setdefault(kind, {})[factor] = (float(over.mean()), error)
    return curves
