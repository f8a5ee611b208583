"""What every test file shares: one thread, every warning reported each time, a check that global randomness is left."""

import contextlib
import os
import signal
from pathlib import Path

import loky
import pytest
import torch
from filelock import FileLock

from augdistill_method import phi as phis
from augdistill_report.commands.cli import main

# a shell starts what runs in its background deaf to Ctrl-C, and so would be the commands that the tests stop by it
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
torch.set_warn_always(True)  # torch reports some warnings once a process, so which test failed would hang on the order


# the files that take longest come first, else one of them may start last and run alone; the first makes `smoke`, which
# others wait for, and the second needs none
FIRST = ["test_reruns", "test_cluster", "test_endings", "test_own_phis", "test_sweep", "test_subsets", "test_app"]


def pytest_collection_modifyitems(items):
    place = {name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(FIRST)))


@pytest.fixture
def rng_untouched():
    """A context manager: what runs inside must neither draw from torch's global generator nor seed it."""

    @contextlib.contextmanager
    def check():
        before = torch.get_rng_state()
        yield
        assert torch.equal(before, torch.get_rng_state()), "the global random state has changed"

    return check


@pytest.fixture(scope="module", autouse=True)
def phis_of_one_file():
    """Phis that a test file registers are forgotten behind it, here and by workers that would serve the next one."""
    before = dict(phis._REGISTRY)
    yield
    loky.get_reusable_executor(reuse=True).shutdown(wait=True, kill_workers=True)
    phis._REGISTRY.clear()
    phis._REGISTRY.update(before)


@pytest.fixture(scope="session")
def smoke(tmp_path_factory) -> Path:
    """A finished run of the smoke preset, to be read or copied: one for all processes of a test session.

    It is made here, unless the environment names one that this code has made (AUGDISTILL_SMOKE, as in .ci/run).
    """
    if given := os.environ.get("AUGDISTILL_SMOKE"):
        return Path(given)
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "smoke"
    with FileLock(folder.with_suffix(".lock")):
        if not (done := folder.with_suffix(".done")).exists():  # report.html is there after the first notebook
            assert main(["report", "--preset", "smoke", "--out", str(folder)]) == 0
            done.touch()
    return folder
