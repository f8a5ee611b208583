"""The protocols that distilled sets are scored by: ours, MTT's, DC-Bench's and DD-Ranking's.

A protocol changes how students train (`EvalConfig`); everything else (seeds, the sealed test split, what is selected on
the validation split) is the same for all. The papers' codes select step sizes, and often the best epoch, on the test
split; here the validation split decides, so a score may be a little lower than published.
"""

import dataclasses
import math

PAPERS = dict(eval_students=5, eval_batch=256, eval_momentum=0.9, eval_decay=5e-4, eval_patience=0)
EPOCHS = PAPERS | dict(eval_epochs=1000, eval_augment="dsa")


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How students of a distilled set are trained, as changes of `EvalConfig`, and where that is from.

    student: the architecture of the students, unless another is asked for
    lrs: step sizes, of which the validation split selects one for each row; empty = `eval_lr`, and if that is 0 the
        step size that was learned with the images
    ranked: whether DD-Ranking's two scores belong to it
    """

    source: str
    changes: dict = dataclasses.field(default_factory=dict)
    student: str = "convnet3"
    lrs: tuple[float, ...] = ()
    ranked: bool = False


PROTOCOLS = {
    "ours": Protocol("the preset's own settings (eval_*)", student="convnet"),
    "mtt": Protocol(
        "Cazenavette et al., CVPR 2022: 1,000 epochs at the learned step size, DSA", EPOCHS | {"eval_lr": 0.0}
    ),
    "dc-bench": Protocol("Cui et al., NeurIPS 2022: 1,000 epochs at step size .01, DSA", EPOCHS | {"eval_lr": 0.01}),
    "dc-bench-autoaugment": Protocol(
        "Cui et al., NeurIPS 2022: as dc-bench, with AutoAugment",
        EPOCHS | {"eval_lr": 0.01, "eval_augment": "autoaugment"},
    ),
    "dc-bench-randaugment": Protocol(
        "Cui et al., NeurIPS 2022: as dc-bench, with RandAugment",
        EPOCHS | {"eval_lr": 0.01, "eval_augment": "randaugment"},
    ),
    "dd-ranking": Protocol(
        "Li et al., 2025 (arXiv 2505.13300): 300 epochs, DSA, one of five step sizes",
        PAPERS | dict(eval_epochs=300, eval_augment="dsa"),
        lrs=(0.001, 0.005, 0.01, 0.05, 0.1),
        ranked=True,
    ),
}


def on_unit_scale(value: float) -> float:
    """(e^v - e^-1) / (e - e^-1): DD-Ranking's map of [-1, 1] onto [0, 1]."""
    return (math.exp(value) - math.exp(-1)) / (math.e - math.exp(-1))


def label_robust_score(own: float, random: float, own_hard: float, full: float, weight: float = 0.5) -> float:
    """DD-Ranking's LRS, in [0, 1], from test accuracies in [0, 1]: `weight` IOR - (1 - `weight`) HLR, on a unit scale.

    IOR, the improvement over random: `own` (the set with its labels) - `random` (as many real images, same labels).
    HLR, the hard label recovery: `full` (all the data) - `own_hard` (the set with hard labels).
    """
    return on_unit_scale(weight * (own - random) - (1 - weight) * (full - own_hard))


def augmentation_robust_score(
    own: float, random: float, own_plain: float, random_plain: float, weight: float = 0.5
) -> float:
    """DD-Ranking's ARS, in [0, 1]: the gains over random real images with augmentation (`weight`) and without it."""
    return on_unit_scale(weight * (own - random) + (1 - weight) * (own_plain - random_plain))
