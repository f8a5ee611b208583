"""The report runs as a user runs it: the command line on the `smoke` preset, plain papermill, and everything wrong."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from helpers import processes_of

from augdistill_report import settings
from augdistill_report.commands import publish as gallery
from augdistill_report.commands import report as runner
from augdistill_report.commands.cli import main
from augdistill_report.places import ROOT
from augdistill_report.settings import Settings

NAMES = [path.stem for path in runner.notebooks()]


@pytest.fixture(scope="session")
def smoke(tmp_path_factory) -> Path:
    """A finished run of the smoke preset."""
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    assert main(["report", "--preset", "smoke", "--out", str(folder)]) == 0
    return folder


def results(folder: Path) -> dict[str, dict]:
    return {name: json.loads((folder / "results" / f"{name}.json").read_text()) for name in NAMES}


def test_a_run_leaves_all_that_it_promises(smoke):
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
    scores = [v for r in results(smoke).values() for v in r["numbers"].values() if isinstance(v, dict) and "mean" in v]
    assert len(scores) > 15
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
    assert page.count('src="data:image/png;base64,') == sum(len(r["figures"]) for r in results(smoke).values())
    assert page.count('<details class="code">') > 20
    # in the place of the explorer's widgets, which only a kernel brings to life, a line that says how
    assert "widget-view+json" not in page and "Here stands the explorer's page" in page


def test_a_second_run_reuses_finished_work_and_gives_the_same_bytes(smoke, tmp_path):
    def contents():
        return {p: p.read_bytes() for sub in ("results", "figures", "curves") for p in (smoke / sub).rglob("*.*")}

    before, artefacts = contents(), {p: p.stat().st_mtime_ns for p in (smoke / "artefacts").iterdir()}
    assert main(["report", "--preset", "smoke", "--out", str(smoke)]) == 0
    assert contents() == before
    assert {p: p.stat().st_mtime_ns for p in (smoke / "artefacts").iterdir()} == artefacts


def test_two_processes_give_the_same_bits_as_one(smoke, tmp_path):
    arguments = ["report", "--preset", "smoke", "--out", str(tmp_path), "--only", "3", "--set", "workers=2"]
    assert main(arguments) == 0
    (name,) = (n for n in NAMES if n.startswith("03"))
    ours = json.loads((tmp_path / "results" / f"{name}.json").read_text())
    assert ours["numbers"] == results(smoke)[name]["numbers"]
    for picture in ours["figures"]:
        assert (tmp_path / "figures" / f"{picture}.png").read_bytes() == (
            smoke / "figures" / f"{picture}.png"
        ).read_bytes()


def test_another_configuration_is_never_mistaken_for_this_one(tmp_path):
    run = ["report", "--preset", "smoke", "--out", str(tmp_path)]
    assert main([*run, "--only", "01"]) == 0
    assert main([*run, "--only", "02", "--set", "iterations=2"]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "Left out" in page and '<section id="02_baseline_mtt">' in page
    assert '<section id="01_expert_trajectories">' not in page
    curve = (tmp_path / "curves" / "02_baseline_mtt" / "pixels__MTT_.jsonl").read_text().splitlines()
    assert len(curve) == 2
    with pytest.raises(ValueError, match=r"01_expert_trajectories.* not finished"):
        gallery.publish("smoke", str(tmp_path), tmp_path / "gallery")


def test_plain_papermill_works(tmp_path):
    command = [sys.executable, "-m", "papermill", ROOT / "notebooks" / "02_baseline_mtt.ipynb", tmp_path / "out.ipynb"]
    parameters = ["-p", "preset", "smoke", "-p", "iterations", "3", "-p", "out", str(tmp_path / "run")]
    subprocess.run([*command, *parameters], check=True, capture_output=True, cwd=tmp_path)
    result = json.loads((tmp_path / "run" / "results" / "02_baseline_mtt.json").read_text())
    assert result["settings"]["iterations"] == 3


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
    "bound phi": (["--set", "phi=pixels"], "phi='pixels'"),
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


def test_a_preset_file_of_ones_own(capsys, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("preset: 1\n")
    assert main(["report", "--preset", str(mine), "--out", str(tmp_path / "out")]) == 2
    assert re.search("mine.yaml.*unknown key 'preset'", capsys.readouterr().err)
    mine.write_text("- a list")
    assert main(["report", "--preset", str(mine), "--out", str(tmp_path / "out")]) == 2
    mine.write_text("phi_lr: 1e-3  # a string to YAML 1.1\nepochs: 9\n")
    assert settings.resolve(str(mine)).phi_lr == 1e-3


def test_a_failing_notebook_says_where_and_keeps_what_was_there(tmp_path, monkeypatch, capsys):
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


def notebook_of(path: Path, *cells: str) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    notebook.cells[0].metadata["tags"] = ["parameters"]
    notebook.metadata["language_info"] = {"name": "python"}
    path.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, path)


def that_meet(folder: Path, **last: str) -> None:
    """Notebooks 01_a and 02_b, each of which waits for the other to have begun; a last cell for each."""
    for own, other in (("01_a", "02_b"), ("02_b", "01_a")):
        begun = f"import pathlib, time; end = time.monotonic() + 60; (pathlib.Path(out) / '{own}').touch()"
        wait = f"while not (pathlib.Path(out) / '{other}').exists() and time.monotonic() < end: time.sleep(0.1)"
        met = f"assert (pathlib.Path(out) / '{other}').exists(), 'waited in vain'"
        notebook_of(folder / f"{own}.ipynb", "preset = ''; out = ''", begun, f"{wait}\n{met}", last.get(own[-1], ""))


def test_notebooks_side_by_side(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "NOTEBOOKS", tmp_path / "notebooks")
    that_meet(tmp_path / "notebooks")
    command = ["report", "--preset", "smoke", "--out", str(tmp_path / "out"), "--set", "notebooks_at_once=2"]
    assert main(command) == 0
    error = capsys.readouterr().err
    assert "01_a: " in error and "02_b: " in error
    assert {"01_a", "02_b"} == set(json.loads((tmp_path / "out" / "timings.json").read_text()))
    assert len(list((tmp_path / "out" / "artefacts").glob("expert-*.safetensors"))) == 2  # made beforehand, for both


def wait_for_the_end_of(mark: Path) -> None:
    deadline = time.monotonic() + 20
    while (left := processes_of(mark)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not left


# --- notebooks as files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", runner.notebooks(), ids=lambda path: path.stem)
def test_a_notebook_is_in_order(path):
    import papermill

    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    assert not any(cell.outputs or cell.execution_count for cell in code)
    lengths = sorted(
        len(cell.source.splitlines()) for cell in code if "parameters" not in cell.metadata.get("tags", [])
    )
    assert lengths[len(lengths) // 2] < 10 and lengths[-1] <= 30
    declared = papermill.inspect_notebook(str(path))
    assert {"preset", "out"} < set(declared) <= set(Settings.names()) | {"preset", "out"}
    types = {field.name: field.type.__name__ for field in settings.dataclasses.fields(Settings)}
    for name, parameter in declared.items():
        assert parameter["help"]
        assert parameter["inferred_type_name"] == types.get(name, "str")


# --- publishing -------------------------------------------------------------------------------------------------------


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


def readme_s_phi() -> str:
    """The phi that README adds in ten lines."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (mine,) = (block for block in blocks if "@register_phi" in block)
    return mine


def test_every_notebook_takes_a_phi_from_a_file_by_name(tmp_path):
    (tmp_path / "own.py").write_text(readme_s_phi())
    out, own = tmp_path / "out", ["--set", f"phis={tmp_path / 'own.py'}", "--set", "phi=brightness"]
    arguments = ["report", "--preset", "smoke", "--out", str(out), *own, "--set", "workers=2"]
    assert main([*arguments, "--only", "03,04,05"]) == 0
    found = {p.stem: json.loads(p.read_text()) for p in (out / "results").iterdir()}
    assert "brightness" in found["03_phi_distillation"]["numbers"]
    assert "brightness" in [row["phi"] for row in found["04_why_phi_failed"]["numbers"]["zoo"]]
    assert any(name.startswith("brightness, ") for name in found["05_subset_evaluation"]["numbers"])
    for result in found.values():
        assert result["settings"]["phis"] == "own.py"  # and not where it lies
        assert str(tmp_path) not in json.dumps(result)
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
    """The phi that README adds in ten lines is taken by name, also by processes that take several jobs of it."""
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
