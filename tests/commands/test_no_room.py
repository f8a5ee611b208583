"""If files can no longer be written or opened, the last line names the file and the reason."""

import os
import subprocess
import sys

import nbformat
import pytest

from augdistill_report.commands.execute import NotebookFailed, execute
from augdistill_report.run import Run
from augdistill_report.settings import resolve

resource = pytest.importorskip("resource", reason="limits are those of a POSIX system")

LIMITED = "import resource; resource.setrlimit(resource.{limit}, ({value}, {value}));"
COMMAND = "import sys; from augdistill_report.commands.cli import main; sys.exit(main())"


@pytest.fixture
def apply(tmp_path):
    """`augdistill apply` under a limit: the exit code and the last line."""
    run = Run("mine", resolve("smoke", {"iterations": 1}), tmp_path / "run")
    phi = run.save("policy", run.distillation("policy", run.base))

    def command(limit: str, value) -> tuple[int, str]:
        code = LIMITED.format(limit=limit, value=value) + COMMAND
        options = ["apply", str(phi), "--to", "digits", "--count", "40", "--out", str(tmp_path / "out")]
        done = subprocess.run([sys.executable, "-c", code, *options], check=False, capture_output=True, text=True)
        return done.returncode, (done.stdout + done.stderr).splitlines()[-1]

    return command


def test_apply_on_a_full_disk_names_the_file_and_goes_on_later(apply, tmp_path):
    code, last = apply("RLIMIT_FSIZE", 2048)  # less than the picture of all takes
    assert code == 1 and str(tmp_path / "out" / "grid.png") in last and "File too large" in last
    assert not list((tmp_path / "out").glob(".*"))
    assert apply("RLIMIT_FSIZE", -1)[0] == 0
    code, last = apply("RLIMIT_FSIZE", 0)
    assert code != 0 and str(tmp_path / "out") in last and "File too large" in last


def test_apply_needs_few_open_files(apply):
    code, last = apply("RLIMIT_NOFILE", 40)
    assert code == 0, last


def notebook(path, source: str):
    cells = [nbformat.v4.new_code_cell("preset = ''"), nbformat.v4.new_code_cell(source)]
    content = nbformat.v4.new_notebook(cells=cells)
    content.metadata["language_info"] = {"name": "python"}
    nbformat.write(content, path)
    return path


def test_a_notebook_on_a_full_disk_names_its_file(tmp_path):
    path = notebook(tmp_path / "07_mine.ipynb", "print('x' * 9999)")
    code = LIMITED.format(limit="RLIMIT_FSIZE", value=4096) + (
        "import sys; from pathlib import Path; from augdistill_report.commands.execute import execute\n"
        "try:\n"
        "    execute(Path(sys.argv[1]), Path(sys.argv[2]), {}, lambda *_: None)\n"
        "except OSError as error:\n"
        "    print(error)\n"
    )
    target = tmp_path / "out" / "07_mine.ipynb"
    environment = os.environ | {"IPYTHONDIR": str(tmp_path / "ipython")}
    done = subprocess.run(
        [sys.executable, "-c", code, path, target], check=False, capture_output=True, text=True, env=environment
    )
    assert done.stdout.strip() == f"[Errno 27] File too large: '{target}'", done.stderr
    assert not list((tmp_path / "out").iterdir())


def test_a_kernel_without_a_free_file_says_why(tmp_path):
    """Its own report of the error fails, too, so only stderr has the reason."""
    source = (
        "import builtins, os, sys\n"
        "def no_more(*_, **__):\n"
        "    raise OSError(24, 'Too many open files', '/some/module.py')\n"
        "get_ipython().InteractiveTB.structured_traceback = no_more\n"
        "raise OSError(24, 'Too many open files', '/some/picture.png')\n"
    )
    with pytest.raises(NotebookFailed) as caught:
        execute(notebook(tmp_path / "07_mine.ipynb", source), tmp_path / "out" / "07_mine.ipynb", {}, lambda *_: None)
    assert "[Errno 24] Too many open files: '/some/picture.png'" in str(caught.value)
    assert "picture.png" in caught.value.reason and "Traceback" not in str(caught.value)
