"""The paths of the notebooks, presets and runs: in the clone, or where `pip install .` has installed them."""

import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of the clone
IN_CLONE = (ROOT / "notebooks" / "presets").is_dir()
NOTEBOOKS = ROOT / "notebooks" if IN_CLONE else Path(sysconfig.get_path("data")) / "share" / "augdistill" / "notebooks"
PRESETS = NOTEBOOKS / "presets"
RUNS = (ROOT if IN_CLONE else Path.cwd()) / "runs"
