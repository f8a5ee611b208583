"""One folder for the temporary files of a command and of all processes that it starts, from any library."""

import contextlib
import getpass
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

PREFIX = "augdistill-"
OWNER = "owner.lock"  # held by a folder's command while it runs


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Make a new folder the TMPDIR of this process and of those that it starts; remove it at the end.

    Folders that killed commands left are removed first. A lock shows whether a command still runs. The process id in
    the folder's name could not: the system reuses ids, and two containers may share a TMPDIR.
    """
    try:
        outer = Path(tempfile.gettempdir())
    except FileNotFoundError:  # none can be written: then the command says what it cannot write, if anything
        yield Path()
        return
    remove_abandoned(outer)
    before = {key: os.environ.get(key) for key in ("TMPDIR", "TORCHINDUCTOR_CACHE_DIR")}
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=outer))
    try:
        with FileLock(folder / OWNER):
            # keep torch's compiled code where it would be without this folder
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(outer / f"torchinductor_{getpass.getuser()}"))
            os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
            yield folder
    finally:
        tempfile.tempdir = str(outer)
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
        remove(folder)


def remove(folder: Path) -> None:
    """Remove a folder, with retries for two seconds: ending processes may still write to it."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def remove_abandoned(outer: Path) -> None:
    """Remove the folders in `outer` that killed commands left behind."""
    for folder in outer.glob(f"{PREFIX}[0-9]*"):
        # suppressed: the folder is another user's, or its command still runs
        with contextlib.suppress(OSError, Timeout), FileLock(folder / OWNER, timeout=0):
            remove(folder)
