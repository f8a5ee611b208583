"""What the explorer's test files share: a run, and what its page says."""

import re
import time
from pathlib import Path

from augdistill_report import open_run


def run_in(folder: Path, name: str = "smoke", **changes):
    return open_run("06_phi_explorer", {"preset": "smoke", "out": str(folder / name), **changes})


def told(page, *errors: str) -> None:
    """Check the errors that the page showed, in their order, and mark them as read."""
    assert len(page.errors) == len(errors), page.errors
    for error, pattern in zip(page.errors, errors, strict=True):
        assert re.search(pattern, str(error)), error
    page.errors.clear()


def said(page) -> str:
    """The text of the status line, with what is behind its "more"."""
    return re.sub("( …)? <details><summary>more</summary>|</details>", "", page.status.value)


def wait(page, seconds: float = 60.0) -> str:
    deadline = time.monotonic() + seconds
    while page.background.busy:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return said(page)
