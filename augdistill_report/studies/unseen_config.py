"""The settings of policies and episodes (notebooks 05 and 07)."""

import dataclasses

from augdistill_core import Config, knob
from augdistill_report.data.augmentations import AUGMENTATIONS, Choices


@dataclasses.dataclass(frozen=True)
class UnseenConfig(Config):
    """How phis for unseen images learn."""

    unseen_repeats: int = knob(1, "repetitions of notebook 07, each with its own experts, images and phi", low=1)
    taught_augment: str = knob(
        "affine",
        "augmentation of the experts that policies and episodes learn from, or kornia:NAME(key=value)",
        choices=Choices("taught_augment", AUGMENTATIONS),
    )
    policy_fraction: float = knob(0.1, "largest subset (fraction) that policies learn on", low=0, high=1)
    policy_max_start_epoch: int = knob(0, "T+ of policies in notebooks 05 and 07; 0 = the last possible", low=0)
    policy_iterations: int = knob(35, "outer steps of policies", low=1)
    episode_iterations: int = knob(90, "outer steps of phis trained in episodes", low=1)
