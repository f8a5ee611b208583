"""The form of each notebook file: title, parameters, cell lengths, no outputs."""

import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from augdistill_report import settings
from augdistill_report.commands import report as runner
from augdistill_report.places import ROOT
from augdistill_report.settings import Settings


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


def test_outputs_of_a_notebook_that_was_run_and_saved_stay_out_of_git(tmp_path):
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / "notebooks", clone / "notebooks")
    shutil.copy(ROOT / "Makefile", clone)
    (clone / ".venv").symlink_to(Path(sys.prefix), target_is_directory=True)
    (clone / ".gitignore").write_text("/.venv\n")

    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org", *arguments]
        return subprocess.run(command, cwd=clone, check=True, capture_output=True, text=True).stdout

    git("init", "--quiet")
    git("add", "-A")
    git("commit", "--quiet", "-m", "first")
    subprocess.run(["make", "clean-notebooks"], cwd=clone, check=True, capture_output=True)
    subprocess.run(["make", "clean-notebooks"], cwd=clone, check=True, capture_output=True)  # twice does nothing more
    assert (clone / ".git" / "info" / "attributes").read_text().count("nbstripout") == 1
    path = clone / "notebooks" / "01_expert_trajectories.ipynb"
    notebook = nbformat.read(path, as_version=4)
    code = next(cell for cell in notebook.cells if cell.cell_type == "code")
    code.outputs, code.execution_count = [nbformat.v4.new_output("stream", text="shown")], 7
    notebook.metadata.language_info |= {"version": "3.11.7", "mimetype": "text/x-python"}  # as JupyterLab saves it
    nbformat.write(notebook, path)
    assert not git("diff")  # `git status` names a file of another size until it is added
    git("add", "--update")
    assert not git("status", "--porcelain") and "shown" in path.read_text()
    code.source += "\n# mine"
    nbformat.write(notebook, path)
    assert '+    "# mine"' in git("diff")
