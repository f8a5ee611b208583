"""The settings of the subset table (notebook 05)."""

import dataclasses
import math

from augdistill_core import Config, knob
from augdistill_report.work.students import STUDENTS


@dataclasses.dataclass(frozen=True)
class SubsetConfig(Config):
    """Which subsets, how phis learn on them, and how students are scored there."""

    fractions: str = knob("0.01, 0.1, 0.5", "subsets of the training data in notebook 05: fractions in (0, 1]")
    subset_batch: int = knob(48, "images a student step when phi learns on a subset", low=1)
    subset_iterations: int = knob(25, "outer steps when phi, or pixels, learn on a subset", low=1)
    subset_repeats: int = knob(1, "subsets of each size in notebook 05, each with phis of its own; 3 to quote", low=1)
    subset_lrs: str = knob("0.02", "step sizes of its students, one of which validation chooses for each method")
    subset_rows: str = knob("", "rows of its table beside no augmentation, with commas between; empty = every method")
    subset_patience: int = knob(0, "eval_patience of its second budget; 0 = none", low=0)
    subset_epochs: int = knob(0, "passes over a subset in its third, DC-Bench's (1000 is theirs); 0 = none", low=0)
    subset_students: str = knob("", "its students of other architectures, with commas between; those of eval_student")
    subset_eval_steps: int = knob(100, "SGD steps of a student that is scored in notebooks 05 and 07", low=2)

    def __post_init__(self):
        super().__post_init__()
        _ = self.fraction_list, self.lr_list, self.student_list  # each refuses what is not such a list

    def listed(self, key: str, high: float, what: str) -> list[float]:
        """The different numbers, above 0 and at most `high`, that a setting holds; there must be one."""
        try:
            values = [float(part) for part in getattr(self, key).split(",")]
        except ValueError:
            values = []
        fit = all(0 < v <= high and v < math.inf for v in values)
        if not values or not fit or len(set(values)) < len(values):
            raise ValueError(f"{key}={getattr(self, key)!r}: must be different {what}, with commas between")
        return values

    @property
    def fraction_list(self) -> list[float]:
        return self.listed("fractions", 1, "numbers in (0, 1]")

    @property
    def lr_list(self) -> list[float]:
        return self.listed("subset_lrs", math.inf, "step sizes above 0")

    @property
    def student_list(self) -> list[str]:
        names = [part.strip() for part in self.subset_students.split(",") if part.strip()]
        if not set(names) <= set(STUDENTS):
            known = ", ".join(STUDENTS)
            raise ValueError(f"subset_students={self.subset_students!r}: must be among {known}, with commas between")
        return names

    def public(self) -> dict:
        return super().public() | {"phis": ", ".join(path.name for path in self.phi_files), "cluster": ""}
