"""Publishing gives the same bytes, refuses uncommitted code, and fills in README."""

import json
import shutil
from pathlib import Path

import pytest
from helpers import NAMES, results

from augdistill_report.commands import publish as gallery
from augdistill_report.files.sealed_json import read_json, write_json
from augdistill_report.places import ROOT
from augdistill_report.studies.grid import panel_and_name


def pretend(folder: Path, **environment) -> None:
    """Change what a run's results say of their environment."""
    for path in (folder / "results").iterdir():
        result = read_json(path, "results")
        result["environment"] |= environment
        write_json(path, "results", result)


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


def in_today_s_form(published: dict[str, dict]) -> dict[str, dict]:
    """Results that were published when keys were "METHOD, 10%" and "few: METHOD", as they are stored now."""
    five, seven = (published[name]["numbers"] for name in ("05_subset_evaluation", "07_unseen_images"))
    if "methods" in five:
        return published
    equal: dict = {}
    for name, score in five.items():
        method, comma, part = name.rpartition(", ")
        if comma and part.endswith("%") and "mean" in score and ": " not in method:
            equal.setdefault(method, {})[f"{float(part.rstrip('%')) / 100:g}"] = score
    few = {name.removeprefix("few: "): score for name, score in seven.items() if name.startswith("few: ")}
    numbers = {"methods": {method: method for method in equal}, "test accuracy": {"equal updates": equal}}
    return published | {
        "05_subset_evaluation": {"numbers": numbers},
        "07_unseen_images": {"numbers": {"test accuracy": few}},
    }


def test_readme_shows_the_published_numbers(tmp_path):
    """The tables in README are those that the published results give; heads follow with the next publication."""
    readme = (ROOT / "README.md").read_text()
    published = {n: read_json(ROOT / "figures" / "digits" / f"{n}.json", "results") for n in NAMES}

    def rows(text: str) -> list[str]:
        return [line for line in text.splitlines() if line.startswith("|") and "±" in line]

    assert "<!-- results: digits -->" in readme
    filled = gallery.fill(readme, "digits", in_today_s_form(published))
    assert rows(filled) == rows(readme) and len(rows(filled)) > 30
    assert "<!-- study -->" in readme
    for path in (ROOT / "figures").glob("*/why_phi_failed.json"):
        result = read_json(path, "sweep")
        for cell in result["cells"]:
            if "panel" not in cell:  # published when a row was "panel: name"
                cell["panel"], cell["row"] = panel_and_name(cell["row"])
        (tmp_path / path.parent.name).mkdir()
        (tmp_path / path.parent.name / path.name).write_text(json.dumps(result))
    assert gallery.fill_study(readme, tmp_path) == readme
