"""The paths of the notebooks, presets and runs: in the clone, or where `pip install .` has installed them."""

import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of the clone; when installed, the folder that holds the packages
IN_CLONE = (ROOT / "notebooks" / "presets").is_dir()
# where pip puts data files with --target, and in an environment, and with --user
PREFIXES = (ROOT, sysconfig.get_path("data"), sysconfig.get_path("data", sysconfig.get_preferred_scheme("user")))
CANDIDATES = [ROOT / "notebooks", *(Path(base) / "share" / "augdistill" / "notebooks" for base in PREFIXES)]
NOTEBOOKS = next((place for place in CANDIDATES if (place / "presets").is_dir()), CANDIDATES[-2])
PRESETS = NOTEBOOKS / "presets"
RUNS = (ROOT if IN_CLONE else Path.cwd()) / "runs"
