"""What the report needs around the method: data, evaluation, artefacts, plots, the runner. Notebooks import from here.

A notebook opens its run with `open_run`; everything else hangs on what that returns.
"""

from augdistill_core import PHIS
from augdistill_report.files.phi_files import load_phi
from augdistill_report.places import NOTEBOOKS
from augdistill_report.run import open_run
from augdistill_report.show.image_grids import image_grid
from augdistill_report.studies.grid import read_grid
from augdistill_report.studies.unseen import repetitions
from augdistill_report.studies.why import Case
from augdistill_report.work.jobs import Subset
from augdistill_report.work.probes import phi_images, student_path
from augdistill_report.work.statistics import markdown_table, outcomes, stop_mark, summary, tenths

__all__ = [
    "NOTEBOOKS",
    "PHIS",
    "Case",
    "Subset",
    "image_grid",
    "load_phi",
    "markdown_table",
    "open_run",
    "outcomes",
    "phi_images",
    "read_grid",
    "repetitions",
    "stop_mark",
    "student_path",
    "summary",
    "tenths",
]
