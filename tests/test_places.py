"""Where an installed package finds its notebooks and presets."""

import os
import shutil
import subprocess
import sys

from augdistill_report.places import ROOT


def test_a_package_installed_by_target_finds_the_presets_beside_it(tmp_path):
    (tmp_path / "augdistill_report").mkdir()
    for name in ("__init__.py", "places.py"):
        shutil.copy(ROOT / "augdistill_report" / name, tmp_path / "augdistill_report")
    presets = tmp_path / "share" / "augdistill" / "notebooks" / "presets"
    shutil.copytree(ROOT / "notebooks" / "presets", presets)
    code = "from augdistill_report.places import NOTEBOOKS, PRESETS, RUNS; print(NOTEBOOKS, PRESETS, RUNS, sep='\\n')"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    (tmp_path / "empty").mkdir()
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "empty",
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert found.stdout.split("\n")[:3] == [str(presets.parent), str(presets), str(tmp_path / "empty" / "runs")]
