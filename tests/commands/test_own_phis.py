"""A user's own phi, from a file or a script, works everywhere by its name."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from augdistill_report import settings
from augdistill_report.commands import report as runner
from augdistill_report.commands.cli import main
from augdistill_report.files.store import digest
from augdistill_report.places import ROOT


def readme_s_phi() -> str:
    """The ten lines of README that add a phi."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (mine,) = (block for block in blocks if "@register_phi" in block)
    return mine


def test_every_notebook_takes_a_phi_from_a_file_by_name(smoke, tmp_path):
    (tmp_path / "own.py").write_text(readme_s_phi())
    out = tmp_path / "out"
    # what does not depend on the phi is there
    shutil.copytree(smoke / "artefacts", out / "artefacts")
    shutil.copy(smoke / "config.json", out)
    own = ["--set", f"phis={tmp_path / 'own.py'}", "--set", "phi=brightness"]
    arguments = ["report", "--preset", "smoke", "--out", str(out), *own, "--set", "workers=2"]
    assert main([*arguments, "--only", "03,04,05"]) == 0
    found = {p.stem: json.loads(p.read_text()) for p in (out / "results").iterdir()}
    assert {"brightness", "unet_noise"} <= set(found["03_phi_distillation"]["numbers"])  # beside the usual one
    assert "brightness" in [row["phi"] for row in found["04_why_phi_failed"]["numbers"]["zoo"]]
    assert found["05_subset_evaluation"]["numbers"]["methods"]["phi"] == "phi (brightness)"
    for result in found.values():
        assert result["settings"]["phis"] == "own.py"  # and not where it lies
        assert result["phi_files"] == {"own.py": digest(readme_s_phi())}
        assert str(tmp_path) not in json.dumps(result)
    page = (out / "report.html").read_text()
    assert "changed: phi=brightness, phis=own.py" in page and f"own.py (content {digest(readme_s_phi())})" in page
    # what it says is part of what results depend on
    before = found["03_phi_distillation"]["configuration"]
    (tmp_path / "own.py").write_text(readme_s_phi() + "\n# another\n")
    changed = settings.resolve("smoke", {"phis": str(tmp_path / "own.py"), "phi": "brightness"})
    assert runner.configuration(changed) != before


def test_a_file_of_phis_that_cannot_be_run_is_named(tmp_path, capsys):
    (tmp_path / "own.py").write_text("import nowhere_at_all\n")
    assert (
        main(["report", "--preset", "smoke", "--set", f"phis={tmp_path / 'own.py'}", "--out", str(tmp_path / "o")]) == 2
    )
    assert re.search("phis=.*own.py.*ModuleNotFoundError: No module named 'nowhere_at_all'", capsys.readouterr().err)


@pytest.mark.parametrize("module", [False, True], ids=["in the script", "in a module of its own"])
def test_readme_s_own_phi_runs_in_worker_processes(tmp_path, module):
    """README's own phi works by its name, also in worker processes that run several of its jobs."""
    mine = readme_s_phi()
    assert len([line for line in mine.splitlines() if line.strip()]) <= 10
    script = tmp_path / "script.py"
    (tmp_path / "own_phi.py").write_text(mine)
    script.write_text(
        f"{'import own_phi' if module else mine}\n"
        "if __name__ == '__main__':\n"
        "    from augdistill_report import open_run\n"
        f"    run = open_run('mine', dict(preset='smoke', out={str(tmp_path / 'out')!r}, workers=2))\n"
        "    jobs = {name: run.distillation(name, run.base) for name in ('brightness', 'unet')}\n"
        "    jobs |= {f'lr {k}': run.distillation('brightness', run.base, phi_lr=0.1 / k) for k in (1, 2, 3)}\n"
        "    run.distill(jobs)\n"
        "    scores = run.evaluate({name: run.evaluation(run.base, job) for name, job in jobs.items()})\n"
        "    print(scores['brightness'])\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, script], check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "±" in done.stdout
