"""What the report needs around the method: data, evaluation, stored files, plots, commands. Notebooks import from here.

A notebook opens its run with `open_run`, and gets everything else from the `Run` that this returns. Each name below is
imported when it is first used: the command line answers without torch, and can be stopped while torch is imported.
"""

import importlib

_DEFINED_IN = {
    "NOTEBOOKS": "augdistill_report.places",
    "PHIS": "augdistill_core",
    "Case": "augdistill_report.studies.why",
    "Subset": "augdistill_report.work.jobs",
    "image_grid": "augdistill_report.show.image_grids",
    "load_phi": "augdistill_report.files.phi_files",
    "markdown_table": "augdistill_report.work.statistics",
    "open_run": "augdistill_report.run",
    "outcomes": "augdistill_report.work.statistics",
    "phi_images": "augdistill_report.work.probes",
    "read_grid": "augdistill_report.studies.grid",
    "repetitions": "augdistill_report.studies.unseen",
    "score": "augdistill_report.commands.score",
    "stop_mark": "augdistill_report.work.statistics",
    "student_path": "augdistill_report.work.probes",
    "summary": "augdistill_report.work.statistics",
    "tenths": "augdistill_report.work.statistics",
}

__all__ = list(_DEFINED_IN)


def __getattr__(name: str):
    if name not in _DEFINED_IN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_DEFINED_IN[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
