"""What several test files share."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import yaml
from PIL import Image

from augdistill_report.commands.report import notebooks
from augdistill_report.places import ROOT

SWEEPS = ROOT / "notebooks" / "sweeps"
NAMES = [path.stem for path in notebooks()]
TINY = {"iterations": 3, "eval_students": 2}


def make_folder(root: Path, classes=("cat", "dog"), count=10, mode="RGB", size=(12, 12), suffix="png", seed=0) -> Path:
    rng = np.random.default_rng(seed)
    for c in classes:
        (root / c).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(root / c / f"{i:02}.{suffix}")
    return root


def until(true, seconds: float = 600):
    """Wait until `true()` is true, on a machine as busy as it may be; returns what it gave."""
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
    return found


def processes_of(mark: Path, kind: str = "") -> list[str]:
    """The processes (but those of Python's resource trackers) whose environment says that they are of this test.

    `kind` is a part of their command: "ipykernel" for kernels, "loky" for workers.
    """
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"OF_THIS_TEST={mark}".encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return [command for command in found if command and "resource_tracker" not in command and kind in command]


def augdistill(mark: Path, *arguments, **environment) -> subprocess.Popen:
    """The command line as a process of its own, in a session of its own, which `processes_of(mark)` finds."""
    return subprocess.Popen(
        [sys.executable, "-m", "augdistill_report", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=ROOT,
        env=os.environ | {"OF_THIS_TEST": str(mark)} | environment,
    )


def results(folder: Path) -> dict[str, dict]:
    """What a finished run's notebooks have found, by notebook."""
    return {name: json.loads((folder / "results" / f"{name}.json").read_text()) for name in NAMES}


def notebook_of(path: Path, *cells: str) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    notebook.cells[0].metadata["tags"] = ["parameters"]
    notebook.metadata["language_info"] = {"name": "python"}
    path.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, path)


def grid_file(folder: Path, **content) -> Path:
    """A grid over `one_phi.ipynb`, which is copied beside it."""
    folder.mkdir(exist_ok=True)
    shutil.copy(SWEEPS / "one_phi.ipynb", folder)
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"notebook": "one_phi.ipynb", "preset": "smoke", "set": TINY} | content))
    return path


CUT = """
import torch
from augdistill_core import Phi, register_phi


@register_phi("cut")
class Cut(Phi):
    def __init__(self, images, classes):
        super().__init__()
        self.size = torch.nn.Parameter(torch.ones(1))

    def forward(self, images, **_):
        return (self.size * images).detach()


@register_phi("deadly")
def deadly(images, classes):
    import os

    if "JPY_PARENT_PID" in os.environ:  # in the cell's own kernel, not where the sweep is checked
        os.kill(os.getpid(), 9)
    return Cut(images, classes)
"""


SLEEPY = (
    CUT
    + """

@register_phi("sleepy")
class Sleepy(Cut):
    def forward(self, images, **_):
        import time

        time.sleep(600)
"""
)


def found(sweep: Path) -> list[dict]:
    return json.loads((sweep / "mine.json").read_text())["cells"]
