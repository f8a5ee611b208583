"""`augdistill data`: reads a complete data set and describes it, or downloads one."""

from augdistill_report.data.datasets import describe, load
from augdistill_report.data.downloads import fetch


def check_data(name: str, folder: str = "", size: int = 0) -> str:
    """What a data set holds, as text. `size` in pixels resizes its images; 0 does not."""
    text = describe(load(name, size, folder))
    if name.startswith("folder:"):
        text += "\n\nImages of another size are resized to this one, not cropped; --size gives another."
    return text


def fetch_data(name: str, folder: str = "", mirror: str = "") -> str:
    """Download a data set that is missing, then describe it."""
    return describe(load(name, 0, str(fetch(name, mirror, folder))))
