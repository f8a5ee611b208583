"""A finished report is complete, and wrong arguments are refused before anything runs."""

import html
import json
import re

import nbformat
import pytest
from helpers import NAMES, make_folder, notebook_of, results
from PIL import Image

from augdistill_report import open_run, settings
from augdistill_report.commands import publish as gallery
from augdistill_report.commands import report as runner
from augdistill_report.commands.cli import main
from augdistill_report.explorer.page import STATIC_NOTE
from augdistill_report.places import ROOT
from augdistill_report.run import Run
from augdistill_report.settings import Settings


def test_a_finished_run_s_folder_is_complete(smoke):
    config = json.loads((smoke / "config.json").read_text())
    assert Settings.from_dict(config["settings"]) == settings.resolve("smoke")
    for name, result in results(smoke).items():
        notebook = nbformat.read(smoke / "notebooks" / f"{name}.ipynb", as_version=4)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert all(cell.execution_count for cell in code)
        # no warning, no error: what a reader sees is what was meant
        assert not [o for cell in code for o in cell.outputs if o.get("name") == "stderr" or o.output_type == "error"]
        assert result["settings"] == config["settings"]
        assert {"python", "torch", "device", "commit", "uncommitted"} <= set(result["environment"])
        assert result["numbers"]
        for figure in result["figures"]:
            assert (smoke / "figures" / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    assert (smoke / "figures" / "learning.gif").read_bytes().startswith(b"GIF89a")
    curve = (smoke / "curves" / "02_baseline_mtt" / "pixels__MTT_.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in curve] == list(range(4))
    assert not list(smoke.glob("notebooks/.*")) and not list(smoke.glob("**/*.failed.ipynb"))


def test_every_accuracy_says_its_mean_deviation_and_n(smoke):
    def summaries(value):
        if isinstance(value, dict) and "mean" in value:
            yield value
        elif isinstance(value, dict | list):
            for part in value.values() if isinstance(value, dict) else value:
                yield from summaries(part)

    scores = list(summaries([result["numbers"] for result in results(smoke).values()]))
    assert len(scores) > 100
    steps = {cell["settings"]["eval_steps"] for cell in results(smoke)["04_why_phi_failed"]["numbers"]["cells"]}
    assert steps == {6}  # why_eval_steps, not those of the grid file
    for score in scores:
        values = score["values"]
        mean = sum(values) / len(values)
        deviation = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
        assert score["n"] == len(values) >= 2
        assert score["mean"] == pytest.approx(mean) and score["std"] == pytest.approx(deviation)


def test_the_page_reads_offline_and_holds_every_notebook(smoke):
    page = (smoke / "report.html").read_text()
    for name in NAMES:
        assert f'<section id="{name}">' in page
    assert not re.search(r'(src|href)="(https?:)?//', page)
    contents = re.findall('href="#(.*?)"', page.partition("</nav>")[0])
    assert contents == ["front", *NAMES] and all(f'id="{name}"' in page for name in contents)
    found = results(smoke)
    # every figure, and each notebook's key figure on its card and at its head, and one on the front page
    shown = sum(len(result["figures"]) for result in found.values()) + 2 * len(NAMES) + 1
    assert page.count('src="data:image/png;base64,') == shown
    for name, result in found.items():
        assert result["headline"] and page.count(html.escape(result["headline"], quote=False)) >= 3, name
        assert f'href="results/{name}.json"' in page
    assert page.count('<details class="code">') > 20
    images = next(iter(found.values()))["images"]
    counts = f"{images['train']:,} training, {images['validation']} validation, {images['test']} test"
    assert f"Data: digits, 8x8 pixels, 10 classes ({counts} images) · preset smoke<" in page
    assert sum(images.values()) == 1797 and "Its numbers mean nothing." in page
    # in the place of the explorer's widgets, which only a kernel brings to life, a line that says how
    assert "widget-view+json" not in page and STATIC_NOTE in page


def test_a_hundred_classes_and_one_expert_make_a_picture_that_can_be_read(tmp_path):
    names = [f"class_of_things_{k}" for k in range(100)]
    folder, out = make_folder(tmp_path / "things", names, size=(8, 8)), tmp_path / "out"
    changes = [f"dataset=folder:{folder}", "experts=1", "epochs=3", "max_start_epoch=1", "fractions=0.5"]
    given = [part for change in changes for part in ("--set", change)]
    assert main(["report", "--preset", "smoke", "--out", str(out), "--only", "01", *given]) == 0
    notebook = nbformat.read(out / "notebooks" / "01_expert_trajectories.ipynb", as_version=4)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [o for o in outputs if o.get("name") == "stderr" or "nan" in str(o.get("data", {}).get("text/markdown"))]
    with Image.open(out / "figures" / "data.png") as picture:
        width, height = picture.size
    assert width < 1100 and height < 600
    assert json.loads((out / "results" / "01_expert_trajectories.json").read_text())["headline"].startswith("1 expert ")


def test_results_of_another_configuration_are_not_reused(tmp_path):
    run = ["report", "--preset", "smoke", "--out", str(tmp_path)]
    assert main([*run, "--only", "01"]) == 0
    assert main([*run, "--only", "02", "--set", "iterations=2"]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "preset smoke · changed: iterations=2<" in page
    assert "Left out" in page and '<section id="02_baseline_mtt">' in page
    assert '<section id="01_expert_trajectories">' not in page
    curve = (tmp_path / "curves" / "02_baseline_mtt" / "pixels__MTT_.jsonl").read_text().splitlines()
    assert len(curve) == 2
    with pytest.raises(ValueError, match=r"01_expert_trajectories.* not finished"):
        gallery.publish("smoke", str(tmp_path), gallery=tmp_path / "gallery")


def test_the_page_shows_no_picture_and_no_copy_of_another_run(tmp_path, monkeypatch):
    """The settings of a run are in its picture, its headline and its output."""
    monkeypatch.setattr(runner, "NOTEBOOKS", tmp_path / "notebooks")
    start = """from PIL import Image
from augdistill_report import open_run
run = open_run({!r}, globals())
run.figure(Image.new("RGB", (4, 4), (run.settings.eval_steps, 0, 0)), {!r})
print("ran with", run.settings.eval_steps)"""
    for name in ("01_first", "02_second"):
        end = f'run.finish(headline=f"{name}: {{run.settings.eval_steps}} steps", figure="{name}")'
        notebook_of(tmp_path / "notebooks" / f"{name}.ipynb", "preset = ''; out = ''", start.format(name, name), end)
    out = tmp_path / "out"

    def page(only: str, steps: int) -> str:
        arguments = ["--out", str(out), "--only", only, "--set", f"eval_steps={steps}"]
        assert main(["report", "--preset", "smoke", *arguments]) == 0
        return (out / "report.html").read_text()

    def by_papermill(steps: int) -> Run:
        run = open_run("02_second", {"preset": "smoke", "out": str(out), "eval_steps": steps})
        run.figure(Image.new("RGB", (4, 4), (steps, 0, 0)), "02_second")
        return run

    page("02", 20)
    by_papermill(30)  # stopped before its last cell: the results are still those of 20 steps
    shown = page("01", 20)
    assert "02_second: 20 steps" in shown and "ran with 20" in shown
    assert 'alt="01 first"' in shown and shown.count('alt="02 second"') == 1  # the one that the copy itself holds
    assert "another run has replaced them in figures/: 02_second.png." in shown and "--only 02</code>" in shown
    shown = page("02", 20)
    assert shown.count('alt="02 second"') > 1 and "has replaced" not in shown

    by_papermill(30).finish(headline="02_second: 30 steps", figure="02_second")
    shown = page("01", 30)  # the results of 02 are those of 30 steps, the copy is that of 20
    assert "01_first: 30 steps" in shown and "ran with 20" not in shown and "02_second: 30 steps" not in shown
    assert "run with other settings or other code: 02_second." in shown


BAD = {
    "preset": (["--preset", "digit"], "preset='digit'.*digits.*smoke"),
    "preset file": (["--preset", "nowhere.yaml"], "nowhere.yaml"),
    "key": (["--set", "iteration=3"], "unknown key 'iteration'.*iterations"),
    "no value": (["--set", "iterations"], "must be key=value"),
    "word": (["--set", "iterations=ten"], "iterations='ten': must be an int"),
    "negative": (["--set", "iterations=-1"], "iterations='-1': must be at least 1"),
    "alpha": (["--set", "alpha=0"], "alpha='0'"),
    "nan": (["--set", "phi_lr=nan"], "phi_lr='nan'"),
    "phi": (["--set", "phi=unett"], "unknown phi 'unett'.*unet_noise"),
    "bound phi": (["--set", "phi=pixels"], "phi='pixels': 'pixels' has parameters for each of its base images"),
    "bound part": (
        ["--only", "05", "--set", "phi=unet+labels"],
        "phi='unet.labels': 'labels' has .* notebook 05 applies",
    ),
    "augmentation": (["--set", "augment=dsaa"], "augment='dsaa': must be one of none, affine, flip_affine, dsa"),
    "data set": (["--set", "dataset=cats"], "dataset='cats'.*digits.*folder:PATH"),
    "data folder": (["--set", "dataset=folder:/nowhere"], "dataset='folder:/nowhere'.*no such folder"),
    "data root": (["--set", "dataset=mnist", "--set", "data=/nowhere"], "data='/nowhere'.*no such folder"),
    "phis": (["--set", "phis=nowhere.py"], "phis='.*nowhere.py': no such file"),
    "optimizer": (["--set", "phi_optimizer=Adamm"], "phi_optimizer='Adamm'"),
    "momentum": (["--set", "phi_momentum=0.5"], "phi_optimizer='Adam'.*momentum"),
    "too many images": (["--set", "images_per_class=1000"], "images_per_class=1000: too many .*124 training images"),
    "start": (["--set", "max_start_epoch=4"], r"max_start_epoch=4.*\[0, 3\]"),
    "snapshots": (["--set", "snapshot_steps=10000"], "snapshot_steps=10000"),
    "depth": (["--set", "depth=9"], "depth=9"),
    "fractions": (["--set", "fractions=0.1,2"], "fractions='0.1,2'"),
    "fraction twice": (["--set", "fractions=0.1,0.10"], "must be different numbers"),
    "empty class": (["--set", "fractions=0.001"], "fractions='0.001': fraction=0.001: leaves class"),
    "notebook": (["--only", "02,77"], "no notebook 77"),
    "file as folder": (["--out", str(ROOT / "README.md")], "cannot be written|Not a directory"),
    "foreign folder": (["--out", str(ROOT / "tests")], "holds files but no run"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name_before_anything_runs(case, capsys, tmp_path):
    arguments, message = BAD[case]
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    preset = [] if "--preset" in arguments else ["--preset", "smoke"]
    assert main(["report", *preset, *out, *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_learned_labels_are_refused_only_for_the_notebook_that_applies_phi_to_other_images(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "NOTEBOOKS", tmp_path / "notebooks")
    notebook_of(tmp_path / "notebooks" / "03_phi_distillation.ipynb", "preset = ''; out = ''; phi = ''")
    out = ["--out", str(tmp_path / "out")]
    assert main(["report", "--preset", "smoke", *out, "--only", "03", "--set", "phi=labels+unet_noise"]) == 0


def test_a_preset_file_of_ones_own(capsys, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("preset: 1\n")
    assert main(["report", "--preset", str(mine), "--out", str(tmp_path / "out")]) == 2
    assert re.search("mine.yaml.*unknown key 'preset'", capsys.readouterr().err)
    mine.write_text("- a list")
    assert main(["report", "--preset", str(mine), "--out", str(tmp_path / "out")]) == 2
    mine.write_text("phi_lr: 1e-3  # a string to YAML 1.1\nepochs: 9\n")
    assert settings.resolve(str(mine)).phi_lr == 1e-3


def test_a_failing_notebook_names_its_cell_and_keeps_the_old_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "NOTEBOOKS", tmp_path / "notebooks")
    cells = ["preset = ''; out = ''", "print('fine')", "raise RuntimeError('the third cell is ill')"]
    notebook_of(tmp_path / "notebooks" / "07_ill.ipynb", *cells)
    out = tmp_path / "out"
    assert main(["report", "--preset", "smoke", "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert re.search("07_ill failed in cell 3: RuntimeError.*the third cell is ill", error, re.DOTALL)
    kept = nbformat.read(out / "notebooks" / "07_ill.failed.ipynb", as_version=4)
    assert any("fine" in str(cell.get("outputs")) for cell in kept.cells)
    assert not (out / "notebooks" / "07_ill.ipynb").exists()
