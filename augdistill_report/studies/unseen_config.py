"""The settings of policies and episodes (notebooks 05 and 07)."""

import dataclasses

from augdistill_core import Config, knob
from augdistill_report.data.augmentations import AUGMENTATIONS, Choices


@dataclasses.dataclass(frozen=True)
class UnseenConfig(Config):
    """How phis learn that are applied to images that they have not seen."""

    unseen_repeats: int = knob(1, "repetitions of notebook 07, each with its own experts, images and phi", low=1)
    taught_augment: str = knob(
        "affine",
        "the augmentation of the experts that policies and episodes learn from, or kornia:NAME(key=value)",
        choices=Choices("taught_augment", AUGMENTATIONS),
    )
    policy_fraction: float = knob(0.1, "the largest fraction that policies learn on", low=0, high=1)
    policy_max_start_epoch: int = knob(0, "T+ of policies, in notebooks 05 and 07; 0 = the latest possible", low=0)
    policy_iterations: int = knob(35, "outer steps of policies", low=1)
    episode_iterations: int = knob(90, "outer steps of phis that get new images in each step", low=1)
