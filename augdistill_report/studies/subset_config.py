"""The settings of the subset table (notebook 05)."""

import dataclasses
import math

from augdistill_core import Config, knob
from augdistill_report.work.students import STUDENTS


@dataclasses.dataclass(frozen=True)
class SubsetConfig(Config):
    """Which subsets are used, how phis learn on them, and how students are scored."""

    fractions: str = knob("0.01, 0.1, 0.5", "subsets of the training data in notebook 05: fractions in (0, 1]")
    subset_batch: int = knob(48, "images per student step when phi learns on a subset", low=1)
    subset_iterations: int = knob(25, "outer steps when phi or pixels learn on a subset", low=1)
    subset_repeats: int = knob(
        1, "repetitions in notebook 05: subsets of the seeds seed, seed + 1 ..., each with its own phis", low=1
    )
    subset_lrs: str = knob("0.02", "step sizes of the students; one per method is selected on the validation split")
    subset_rows: str = knob("", "methods to compare with no augmentation, separated by commas; empty = the usual ones")
    subset_by: str = knob(
        "random",
        "images of a subset: random, or a window of difficulty whose place validation selects for no augmentation",
        choices=("random", "window"),
    )
    subset_patience: int = knob(0, "eval_patience of the second budget in notebook 05; 0 = none", low=0, high=19)
    subset_epochs: int = knob(0, "epochs of the third training budget in notebook 05 (DC-Bench: 1000); 0 = none", low=0)
    subset_students: str = knob("", "other student architectures in notebook 05, separated by commas")
    subset_eval_steps: int = knob(100, "SGD steps of each scored student in notebooks 05 and 07", low=2)

    def __post_init__(self):
        super().__post_init__()
        _ = self.fraction_list, self.lr_list, self.student_list  # each raises a ValueError for a wrong list

    def listed(self, key: str, high: float, what: str) -> list[float]:
        """The numbers in a setting: at least one, all different, in (0, `high`]; else a `ValueError`."""
        try:
            values = [float(text) for text in getattr(self, key).split(",")]
        except ValueError:
            values = []
        fit = all(0 < v <= high and v < math.inf for v in values)
        if not values or not fit or len(set(values)) < len(values):
            raise ValueError(f"{key}={getattr(self, key)!r}: must be different {what}, separated by commas")
        return values

    @property
    def fraction_list(self) -> list[float]:
        return self.listed("fractions", 1, "numbers in (0, 1]")

    @property
    def lr_list(self) -> list[float]:
        return self.listed("subset_lrs", math.inf, "step sizes above 0")

    @property
    def student_list(self) -> list[str]:
        names = [name.strip() for name in self.subset_students.split(",") if name.strip()]
        if not set(names) <= set(STUDENTS):
            known = ", ".join(STUDENTS)
            raise ValueError(f"subset_students={self.subset_students!r}: must be among {known}, separated by commas")
        return names
