"""The same settings give the same bits: in a second run, in several processes, by papermill alone, in parallel."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import NAMES, notebook_of, processes_of, results, until

from augdistill_report.commands import report as runner
from augdistill_report.commands.cli import main
from augdistill_report.places import ROOT


def test_a_second_run_reuses_finished_work_and_gives_the_same_bytes(smoke, tmp_path):
    smoke = shutil.copytree(smoke, tmp_path / "smoke")

    def contents():
        return {p: p.read_bytes() for sub in ("results", "figures", "curves") for p in (smoke / sub).rglob("*.*")}

    before, artefacts = contents(), {p: p.stat().st_mtime_ns for p in (smoke / "artefacts").iterdir()}
    # those with the most kinds of jobs: a kernel for each notebook takes longer than their jobs
    assert main(["report", "--preset", "smoke", "--out", str(smoke), "--only", "04,05,07"]) == 0
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


def test_plain_papermill_works(tmp_path):
    command = [sys.executable, "-m", "papermill", ROOT / "notebooks" / "02_baseline_mtt.ipynb", tmp_path / "out.ipynb"]
    parameters = ["-p", "preset", "smoke", "-p", "iterations", "3", "-p", "out", str(tmp_path / "run")]
    subprocess.run([*command, *parameters], check=True, capture_output=True, cwd=tmp_path)
    result = json.loads((tmp_path / "run" / "results" / "02_baseline_mtt.json").read_text())
    assert result["settings"]["iterations"] == 3


def that_meet(folder: Path, **last: str) -> None:
    """Notebooks 01_a and 02_b, each of which waits for the other to have begun; a last cell for each."""
    for own, other in (("01_a", "02_b"), ("02_b", "01_a")):
        begun = f"import pathlib, time; end = time.monotonic() + 60; (pathlib.Path(out) / '{own}').touch()"
        wait = f"while not (pathlib.Path(out) / '{other}').exists() and time.monotonic() < end: time.sleep(0.1)"
        met = f"assert (pathlib.Path(out) / '{other}').exists(), 'waited in vain'"
        notebook_of(folder / f"{own}.ipynb", "preset = ''; out = ''", begun, f"{wait}\n{met}", last.get(own[-1], ""))


def test_notebooks_in_parallel(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "NOTEBOOKS", tmp_path / "notebooks")
    that_meet(tmp_path / "notebooks")
    command = ["report", "--preset", "smoke", "--out", str(tmp_path / "out"), "--set", "workers=2"]
    assert main(command) == 0  # two at a time, unless another number is asked for
    error = capsys.readouterr().err
    assert "01_a: " in error and "02_b: " in error
    assert "s so far" in error and not re.search("notebooks, about", error)  # nobody knows yet how long they take
    assert {"01_a", "02_b"} == set(runner.notebook_seconds(tmp_path / "out"))
    assert len(list((tmp_path / "out" / "artefacts").glob("expert-*.safetensors"))) == 2  # made beforehand, for both


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc to find what is left behind")
def test_a_notebook_that_fails_ends_the_parallel_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "NOTEBOOKS", tmp_path / "notebooks")
    that_meet(tmp_path / "notebooks", a="raise RuntimeError('the last cell is ill')", b="time.sleep(600)")
    monkeypatch.setenv("OF_THIS_TEST", str(tmp_path))  # for the kernels, which inherit it
    start = time.monotonic()
    command = ["report", "--preset", "smoke", "--out", str(tmp_path / "out"), "--set", "notebooks_at_once=2"]
    assert main(command) == 1 and time.monotonic() - start < 120
    assert re.search("01_a failed in cell 4: RuntimeError.*the last cell is ill", capsys.readouterr().err, re.DOTALL)
    until(lambda: not processes_of(tmp_path), 20)
    assert not (tmp_path / "out" / "notebooks" / "02_b.ipynb").exists()


def test_notebooks_in_parallel_give_the_same_numbers(smoke, tmp_path):
    command = ["report", "--preset", "smoke", "--out", str(tmp_path), "--only", "02,03", "--set", "workers=4"]
    assert main([*command, "--set", "notebooks_at_once=2"]) == 0
    for name in NAMES[1:3]:
        ours = json.loads((tmp_path / "results" / f"{name}.json").read_text())
        assert ours["numbers"] == results(smoke)[name]["numbers"]
        assert ours["configuration"] == results(smoke)[name]["configuration"]
    page = (tmp_path / "report.html").read_text()
    assert "Left out" not in page and all(f'<section id="{name}">' in page for name in NAMES[1:3])
