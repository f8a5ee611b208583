"""What the report needs around the method: data, evaluation, artefacts, plots, the runner. Notebooks import from here.

A notebook opens its run with `open_run`; everything else hangs on what that returns.
"""

from augdistill_report.evaluation import phi_images, student_path
from augdistill_report.jobs import Subset
from augdistill_report.run import open_run, summary, tenths

__all__ = ["Subset", "open_run", "phi_images", "student_path", "summary", "tenths"]
