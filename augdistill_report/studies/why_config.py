"""The settings of the study of notebook 04."""

import dataclasses

from augdistill_core import Config, knob


@dataclasses.dataclass(frozen=True)
class WhyConfig(Config):
    """How long the study of notebook 04 trains its phis and students, how often, and which of its rows are shown."""

    why_iterations: int = knob(0, "outer steps of the phis in notebook 04; 0 = as in its grid file", low=0)
    why_eval_steps: int = knob(0, "SGD steps of each scored student in notebook 04; 0 = as in its grid file", low=0)
    why_rows: str = knob("short", "rows shown in notebook 04: the important ones, or all", choices=("short", "whole"))
    why_repeats: int = knob(1, "repetitions of each row of notebook 04: the first seeds of its grid file", low=1)
