"""Publishing gives the same bytes, refuses uncommitted code, and fills in the page of results."""

import json
import re
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
from helpers import NAMES, results

from augdistill_report.commands import publish as gallery
from augdistill_report.files.sealed_json import read_json, write_json
from augdistill_report.places import ROOT
from augdistill_report.settings import resolve


def pretend(folder: Path, **environment) -> None:
    """Change the environment in a run's results."""
    for path in (folder / "results").iterdir():
        result = read_json(path, "results")
        result["environment"] |= environment
        write_json(path, "results", result)


def test_publishing_gives_the_same_bytes_and_refuses_uncommitted_code(smoke, tmp_path):
    run = tmp_path / "smoke"
    shutil.copytree(smoke, run)
    pretend(run, commit="0" * 40, uncommitted=True)
    with pytest.raises(ValueError, match="uncommitted"):
        gallery.publish("smoke", str(run), gallery=tmp_path / "gallery")
    assert not (tmp_path / "gallery").exists()
    pretend(run, uncommitted=False)
    target = gallery.publish("smoke", str(run), gallery=tmp_path / "gallery")
    first = {p.name: p.read_bytes() for p in target.iterdir()}
    assert {f"{name}.json" for name in NAMES} | {"learning.gif"} < set(first)
    assert len([name for name in first if name.endswith(".png")]) == sum(
        len(r["figures"]) for r in results(run).values()
    )
    gallery.publish("smoke", str(run), gallery=tmp_path / "gallery")
    assert {p.name: p.read_bytes() for p in target.iterdir()} == first
    figures = [f"{name}.png" for notebook in NAMES[:2] for name in results(run)[notebook]["figures"]]
    for path in run.glob("results/0[3-7]*.json"):
        path.unlink()
    with pytest.raises(ValueError, match=r"03_phi_distillation, .* not finished"):
        gallery.publish("smoke", str(run), gallery=tmp_path / "some")
    some = gallery.publish("smoke", str(run), only="1,02", gallery=tmp_path / "some")
    assert {p.name for p in some.iterdir()} == {f"{name}.json" for name in NAMES[:2]} | set(figures)
    assert all(p.read_bytes() == first[p.name] for p in some.iterdir())
    with pytest.raises(ValueError, match="only='77': there is no notebook 77"):
        gallery.publish("smoke", str(run), only="77", gallery=tmp_path / "some")
    other = gallery.publish("smoke", str(run), only="01", name="other", gallery=tmp_path / "some")
    assert other == tmp_path / "some" / "other" and (other / f"{NAMES[0]}.json").exists()
    with pytest.raises(ValueError, match=r"as='\.\./other': must be the name of a folder"):
        gallery.publish("smoke", str(run), only="01", name="../other", gallery=tmp_path / "some")
    with pytest.raises(ValueError, match="holds no run"):
        gallery.publish("smoke", str(tmp_path / "nowhere"), gallery=tmp_path / "gallery")


def test_a_picture_of_another_run_is_not_published(smoke, tmp_path):
    run, name = tmp_path / "smoke", NAMES[1]
    shutil.copytree(smoke, run)
    pretend(run, commit="0" * 40, uncommitted=False)
    result = results(run)[name]
    picture = run / "figures" / f"{result['figure']}.png"
    shutil.copy(run / "figures" / f"{results(run)[NAMES[0]]['figure']}.png", picture)
    with pytest.raises(ValueError, match=rf"{picture.name}: another run of {name} has replaced .* --only 02 again"):
        gallery.publish("smoke", str(run), only="02", gallery=tmp_path / "gallery")
    assert not (tmp_path / "gallery").exists()
    path = run / "results" / f"{name}.json"  # as older code wrote it: its pictures are taken as they are
    write_json(path, "results", {k: v for k, v in read_json(path, "results").items() if k != "digests"})
    target = gallery.publish("smoke", str(run), only="02", gallery=tmp_path / "gallery")
    assert (target / picture.name).read_bytes() == picture.read_bytes()


@pytest.mark.parametrize("page", gallery.PAGES, ids=lambda page: page.name)
def test_the_tables_are_those_of_the_published_files(page):
    text = page.read_text()
    assert gallery.fill(text) == text
    assert len(re.findall("<!-- table: ", text)) == len(re.findall("<!-- /table -->", text)) >= 1


def numbers_of(value):
    """Every number in a JSON value, in its texts too; and mean and standard deviation of each short list of numbers."""
    if isinstance(value, dict | list):
        for inner in [*value.keys(), *value.values()] if isinstance(value, dict) else value:
            yield from numbers_of(inner)
        if isinstance(value, list) and 1 < len(value) < 10 and all(isinstance(v, float) for v in value):
            yield from (statistics.fmean(value), float(np.std(value, ddof=1)))
    elif isinstance(value, str):
        yield from map(float, re.findall(r"\d+(?:\.\d+)?|\.\d+", value))
    elif isinstance(value, int | float):
        yield float(value)


def texts_of(files) -> set[str]:
    """How the numbers of JSON files may be written: as they are, or in per cent, with up to three decimals."""
    contents = [json.loads(path.read_text()) for path in files]
    found = {abs(number) for content in contents for number in numbers_of(content)}
    texts = {f"{scaled:.{digits}f}" for number in found for scaled in (number, 100 * number) for digits in range(4)}
    return texts | {text.removeprefix("0") for text in texts}


@pytest.mark.parametrize("page", gallery.PAGES, ids=lambda page: page.name)
def test_every_number_in_the_text_is_in_a_published_file(page):
    """A number with a unit or an interval is in the JSON files that its section names, if it is not cited."""
    cited = r"^(\* Published results|The published \d).*?(?=\n\n|\n\*)"
    text = re.sub(cited, "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"(<!-- table: .*? -->).*?<!-- /table -->", r"\1", text, flags=re.DOTALL)
    found = 0
    for section in re.split(r"\n(?=## )", text):
        names = [*re.findall(r"figures/([\w-]+/[\w-]+)\.json", section), *re.findall(r"--preset ([\w-]+)", section)]
        names += [name for table in re.findall(r"<!-- table: \w+(.*?) -->", section) for name in table.split()]
        names += [f"*/{gallery.STUDY}"] * ("<!-- table: study -->" in section)
        if page.name == "README.md":
            names = ["digits/0[357]*", "cifar10-tenth/*", "cifar10-all/*", "cifar10-half/*", "cifar10-labels*/*"]
            names += ["cifar10-selection/*"]
        names = [name if "/" in name else f"{name}/*" for name in names]
        known = texts_of({path for name in names for path in gallery.FIGURES.glob(f"{name}.json")})
        written = re.findall(r"(?<![\w./-])[-+]?(\d*\.\d+|\d+)(?= ?%(?! interval)| points| ±)|± (\d*\.?\d+)", section)
        missing = [a or b for a, b in written if (a or b) not in known]
        assert not missing, f"{section.splitlines()[0]}: {missing}"
        found += len(written)
    assert found > 10


def test_every_published_file_has_a_command():
    """figures/README.md is written by code; each file's preset (or grid) exists, so that its command can be given."""
    assert (gallery.FIGURES / "README.md").read_text() == gallery.gallery_page()
    for path in gallery.FIGURES.glob("*/*.json"):
        content = json.loads(path.read_text())
        if content.get("kind") == "score":
            assert content["command"].startswith("augdistill ")
        elif path.parent.name != gallery.BENCHMARKS:
            resolve(content["preset"], content.get("changes"))
            assert "grid" not in content or (ROOT / "notebooks" / "sweeps" / content["grid"]).exists()
        assert len(content["environment"]["commit"]) == 40, path
    line = gallery.origin_row(gallery.FIGURES / "digits" / "05_subset_evaluation.json")
    assert line["command"].startswith("`augdistill report --preset digits-full --only 05")


def test_the_title_of_a_subset_says_how_many_images_a_class_it_has():
    cifar10 = {"images": {"train": 45_000}, "classes": 10}
    titles = [gallery.subset_title(cifar10, fraction) for fraction in ("0.1", "0.0023", "1")]
    assert titles == ["10 % (450 a class)", "0.23 % (about 10 a class)", "100 %"]
    assert gallery.subset_title({}, "0.1") == "10 %"  # an older file does not say how many images there are


def test_what_is_published_now_comes_before_what_lies_there():
    page = "<!-- table: unseen digits/07_unseen_images -->\nold\n<!-- /table -->\n"
    score = {"mean": 0.5, "std": 0.25, "n": 4, "values": []}
    now = {"digits/07_unseen_images": {"numbers": {"test accuracy": {"mine": score}}}}
    assert "| mine | 50.0 ± 25.0 % (n = 4) |" in gallery.fill(page, now)
    study = "<!-- table: study -->\n<!-- /table -->\n"  # of sweeps alone, not of the notebook that is called alike
    assert gallery.fill(study, {"digits/04_why_phi_failed": {"numbers": {}}}) == gallery.fill(study)
    damaged = "<!-- table: images digits/none -->\n<!-- /table -->\n"
    with pytest.raises((ValueError, OSError), match=r"none\.json"):
        gallery.fill(damaged)


def test_readme_is_short_and_names_files_that_exist():
    """A stranger reads one screen of findings; every link inside the clone leads somewhere."""
    readme = (ROOT / "README.md").read_text()
    assert readme.count("\n") < 170 and len(readme) < 12_000
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
            assert target.startswith("http") or (path.parent / target).exists(), f"{path.name}: {target}"
