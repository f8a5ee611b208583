"""The settings of the study of notebook 04."""

import dataclasses

from augdistill_core import Config, knob


@dataclasses.dataclass(frozen=True)
class WhyConfig(Config):
    """How long the study trains, and how much of it is shown."""

    why_iterations: int = knob(0, "outer steps of the phis in the study of notebook 04; 0 = as its grid says", low=0)
    why_rows: str = knob("short", "which rows of the study notebook 04 shows", choices=("short", "whole"))
