"""What the report needs around the method: data, evaluation, artefacts, plots, the runner. Notebooks import from here.

A notebook opens its run with `open_run`; everything else hangs on what that returns.
"""

from augdistill_core import PHIS
from augdistill_report.evaluation import phi_images, student_path
from augdistill_report.grid import read_grid
from augdistill_report.jobs import Subset
from augdistill_report.numbers import markdown, summary, tenths
from augdistill_report.phi_files import load_phi
from augdistill_report.run import open_run
from augdistill_report.settings import NOTEBOOKS
from augdistill_report.study import Case
from augdistill_report.unseen import repetitions

__all__ = [
    "NOTEBOOKS",
    "PHIS",
    "Case",
    "Subset",
    "load_phi",
    "markdown",
    "open_run",
    "phi_images",
    "read_grid",
    "repetitions",
    "student_path",
    "summary",
    "tenths",
]
