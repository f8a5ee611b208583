"""No process and no temporary file outlives a command, however it ends: real commands, real signals."""

import os
import shutil
import signal
import tempfile
from pathlib import Path

import nbformat
import pytest
from helpers import NAMES, SLEEPY, TINY, augdistill, grid_file, processes_of, results, until

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc to see processes")
STOPPED = "augdistill: stopped; what was finished is kept, the same command goes on from there"
LONG = ["--set", "syn_steps=9999", "--set", "workers=2"]  # nobody waits for its end


@pytest.fixture
def temporary():
    """The test's own TMPDIR. Its name is short, since sockets are made in it."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def catches(pid: int, number: int) -> bool:
    """Whether a process handles a signal itself."""
    status = Path(f"/proc/{pid}/status").read_text()
    (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (number - 1) & 1)


MOMENTS = {
    "before the imports": lambda pid, temporary: catches(pid, signal.SIGTERM),
    "while torch is imported": lambda pid, temporary: "libtorch" in Path(f"/proc/{pid}/maps").read_text(),
    "when it has begun": lambda pid, temporary: folders(temporary),
    "with a kernel": lambda pid, temporary: processes_of(temporary, "ipykernel"),
    "with workers": lambda pid, temporary: len(processes_of(temporary, "loky")) == 2,
}


@pytest.mark.parametrize(
    "moment, how",
    [*((moment, signal.SIGINT) for moment in MOMENTS), *((m, signal.SIGTERM) for m in list(MOMENTS)[1::2])],
)
def test_a_stop_is_one_line_and_130_at_any_moment(temporary, tmp_path, moment, how):
    command = ["report", "--preset", "smoke", "--out", tmp_path / "out", "--only", "02", *LONG]
    process = augdistill(temporary, *command, TMPDIR=str(temporary))
    until(lambda: MOMENTS[moment](process.pid, temporary))
    process.send_signal(how)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 130, error
    progress = ("of 1 notebooks", "data: scikit-learn")
    assert [line for line in error.splitlines() if line and not any(p in line for p in progress)] == [STOPPED]
    until(lambda: not processes_of(temporary), 60)
    if folders(temporary):  # a kernel that had just been started wrote to it once more
        another_command(temporary)
    assert not folders(temporary)


def test_ctrl_c_in_a_terminal_while_workers_start_is_one_line_too(temporary, tmp_path):
    """A terminal sends Ctrl-C to every process of the command."""
    command = ["experts", "train", "--preset", "smoke", "--out", tmp_path, "--set", "workers=2", "--set", "epochs=9999"]
    process = augdistill(temporary, *command, TMPDIR=str(temporary))
    until(lambda: processes_of(temporary, "loky"))
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 130 and "Traceback" not in error and error.count(STOPPED) == 1
    until(lambda: not processes_of(temporary), 60)


@pytest.mark.parametrize(
    "command, workers",
    [
        (["report", "--only", "02", "--set", "syn_steps=9999"], 2),  # a kernel, and two workers of it
        (["experts", "train", "--set", "epochs=9999"], 2),  # of the command
    ],
    ids=["of a notebook", "of the command"],
)
def test_a_killed_command_s_workers_end_and_the_next_command_removes_its_files(temporary, tmp_path, command, workers):
    options = ["--preset", "smoke", "--out", tmp_path / "out", "--set", "workers=2"]
    process = augdistill(temporary, *command, *options, TMPDIR=str(temporary))
    until(lambda: len(processes_of(temporary, "loky")) == workers)
    another_command(temporary)
    assert len(folders(temporary)) == 1  # what still runs is let alone
    process.kill()
    process.communicate()
    until(lambda: not processes_of(temporary), 60)  # it was 140 to 160 s
    (left,) = folders(temporary)
    assert left.startswith(f"augdistill-{process.pid}-")
    another_command(temporary)
    assert not folders(temporary)


def another_command(temporary: Path) -> None:
    process = augdistill(temporary, "data", "check", "digits", TMPDIR=str(temporary))
    process.communicate(timeout=120)
    assert process.returncode == 0


def folders(temporary: Path) -> list[str]:
    """All files that commands left in their TMPDIR, except the cache of torch's compiled code."""
    return [path.name for path in temporary.iterdir() if not path.name.startswith("torchinductor")]


@pytest.mark.parametrize(
    "everyone, changes, workers",
    [
        (True, [], 2),
        (False, [], 2),
        (False, ["--only", "02,03", "--set", "workers=4", "--set", "notebooks_at_once=2"], 6),  # with two that run them
    ],
    ids=["Ctrl-C in a terminal", "SIGINT to the command alone", "side by side"],
)
def test_ctrl_c_keeps_finished_results_and_leaves_no_process(smoke, tmp_path, everyone, changes, workers):
    out = tmp_path / "out"
    shutil.copytree(smoke, out)
    before = results(out)
    process = augdistill(tmp_path, "report", "--preset", "smoke", "--out", out, "--only", "02", *LONG, *changes)
    until(lambda: len(processes_of(tmp_path, "loky")) == workers)
    (os.killpg if everyone else os.kill)(process.pid, signal.SIGINT)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 130, error
    assert STOPPED in error
    assert "never retrieved" not in error  # which asyncio says, pages long, of the cell that was given up
    until(lambda: not processes_of(tmp_path), 60)
    # 01 has the new settings now or the old ones still, whole; the others were not touched
    assert {name: r for name, r in results(out).items() if name > "02"} == {n: r for n, r in before.items() if n > "02"}
    for name in NAMES:
        nbformat.validate(nbformat.read(out / "notebooks" / f"{name}.ipynb", as_version=4))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_sweep_keeps_finished_cells_and_leaves_no_process(tmp_path, how):
    (tmp_path / "mine.py").write_text(SLEEPY)
    rows = {"quick": {"iterations": 4}, "slow": {"phi": "sleepy"}}  # what has more iterations starts first
    rows["slow too"] = rows["slow"] | {"seed": 1}
    path = grid_file(tmp_path / "grid", rows=rows, set=TINY | {"phis": str(tmp_path / "mine.py")})
    process = augdistill(tmp_path, "sweep", path, "--out", tmp_path / "run", "--set", "workers=2")
    until(lambda: list((tmp_path / "run").glob("artefacts/cell-*.safetensors")))
    process.send_signal(how)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 130 and STOPPED in error, error
    until(lambda: not processes_of(tmp_path), 60)
    assert len(list((tmp_path / "run").glob("artefacts/cell-*.safetensors"))) == 1
