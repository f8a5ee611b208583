"""Publishing gives the same bytes, refuses uncommitted code, and fills in README."""

import json
import shutil
from pathlib import Path

import pytest
from helpers import NAMES, results

from augdistill_report.commands import publish as gallery
from augdistill_report.places import ROOT


def pretend(folder: Path, **environment) -> None:
    """Change what a run's results say of their environment."""
    for path in (folder / "results").iterdir():
        result = json.loads(path.read_text())
        result["environment"] |= environment
        path.write_text(json.dumps(result))


def test_publishing_gives_the_same_bytes_and_refuses_uncommitted_code(smoke, tmp_path):
    run = tmp_path / "smoke"
    shutil.copytree(smoke, run)
    pretend(run, commit="0" * 40, uncommitted=True)
    with pytest.raises(ValueError, match="uncommitted"):
        gallery.publish("smoke", str(run), tmp_path / "gallery")
    assert not (tmp_path / "gallery").exists()
    pretend(run, uncommitted=False)
    target = gallery.publish("smoke", str(run), tmp_path / "gallery")
    first = {p.name: p.read_bytes() for p in target.iterdir()}
    assert {f"{name}.json" for name in NAMES} | {"learning.gif"} < set(first)
    assert len([name for name in first if name.endswith(".png")]) == sum(
        len(r["figures"]) for r in results(run).values()
    )
    gallery.publish("smoke", str(run), tmp_path / "gallery")
    assert {p.name: p.read_bytes() for p in target.iterdir()} == first
    figures = [f"{name}.png" for notebook in NAMES[:2] for name in results(run)[notebook]["figures"]]
    for path in run.glob("results/0[3-7]*.json"):
        path.unlink()
    with pytest.raises(ValueError, match=r"03_phi_distillation, .* not finished"):
        gallery.publish("smoke", str(run), tmp_path / "some")
    some = gallery.publish("smoke", str(run), tmp_path / "some", only="1,02")
    assert {p.name for p in some.iterdir()} == {f"{name}.json" for name in NAMES[:2]} | set(figures)
    assert all(p.read_bytes() == first[p.name] for p in some.iterdir())
    with pytest.raises(ValueError, match="only='77': there is no notebook 77"):
        gallery.publish("smoke", str(run), tmp_path / "some", only="77")
    with pytest.raises(ValueError, match="holds no run"):
        gallery.publish("smoke", str(tmp_path / "nowhere"), tmp_path / "gallery")


def test_readme_shows_the_published_numbers():
    """The table in README is the one that the published results give."""
    readme = (ROOT / "README.md").read_text()
    published = {n: json.loads((ROOT / "figures" / "digits" / f"{n}.json").read_text()) for n in NAMES}
    assert "<!-- results: digits -->" in readme
    assert gallery.fill(readme, "digits", published) == readme
    assert "<!-- study -->" in readme
    assert gallery.fill_study(readme, ROOT / "figures") == readme
