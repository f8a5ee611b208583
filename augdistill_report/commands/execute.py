"""One notebook, executed by papermill in a kernel of its own that ends with it, whatever happens.

The executed copy is whole or not there: while it runs it is a hidden file, and one that fails is NAME.failed.ipynb.
"""

import contextlib
import logging
import os
import re
import signal
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import nbformat
import traitlets
from jupyter_client import AsyncKernelManager


class NotebookFailed(Exception):
    """A notebook raised: its name, the cell and the error's last lines; `reason` is the error alone."""

    def __init__(self, message: str, reason: str = ""):
        super().__init__(message, reason)  # both, so that it travels between processes
        self.reason = reason

    def __str__(self):
        return self.args[0]


class KernelManager(AsyncKernelManager):
    """Kernels over Unix sockets, where there are any (TCP ports can be raced for), that can be ended from outside.

    Each has sockets of its own name: by default two notebooks that run in one folder would share theirs.
    """

    transport = traitlets.CaselessStrEnum(["tcp", "ipc"], "tcp" if os.name == "nt" else "ipc", config=True)
    running: ClassVar[set[int]] = set()  # process ids

    @traitlets.default("ip")
    def _ip_default(self):
        own = f"kernel-{uuid.uuid4().hex[:8]}"  # short: a socket's path has at most 103 characters
        return os.path.join(tempfile.gettempdir(), own) if self.transport == "ipc" else super()._ip_default()

    def format_kernel_cmd(self, extra_arguments=None):
        """Its log would say that it was interrupted whenever a notebook fails: papermill tells that better."""
        return super().format_kernel_cmd([*(extra_arguments or []), "--IPKernelApp.log_level=CRITICAL"])

    async def post_start_kernel(self, **options):
        await super().post_start_kernel(**options)
        self.running.add(self.provisioner.pid)

    async def cleanup_resources(self, restart=False):
        self.running.discard(self.provisioner.pid if self.provisioner else None)
        await super().cleanup_resources(restart)

    @classmethod
    def end_all(cls) -> None:
        """End every kernel that still runs, with its workers: each kernel leads a process group of its own."""
        while cls.running:
            pid = cls.running.pop()
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL) if hasattr(os, "killpg") else os.kill(pid, signal.SIGTERM)


def engine(on_cell: Callable[[int, int], None]):
    """papermill's own engine, telling `on_cell(cell, cells)` about each cell that starts."""
    from papermill.engines import NBClientEngine

    class Engine(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man, kernel_name, **options):
            start = nb_man.cell_start
            cells = len(nb_man.nb.cells)

            def cell_start(cell, cell_index=None, **kwargs):
                on_cell(cell_index or 0, cells)
                return start(cell, cell_index, **kwargs)

            nb_man.cell_start = cell_start
            return super().execute_managed_notebook(nb_man, kernel_name, **options)

    return Engine


def last_words(path: Path) -> str:
    """The errors that an executed notebook wrote to stderr last: out of file handles, a kernel has no other way."""
    outputs = [output for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", [])]
    texts = [output.text for output in outputs if output.get("name") == "stderr"]
    return "\n".join(line for line in (texts or [""])[-1].splitlines() if re.match(r"[\w.]+(Error|Exception)\b", line))


def execute(path: Path, target: Path, parameters: dict, on_cell: Callable[[int, int], None]) -> None:
    """Run the notebook `path`; its executed copy is `target`. A `NotebookFailed` if it raises, or its kernel dies."""
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.engines import papermill_engines
    from papermill.exceptions import PapermillExecutionError

    logging.getLogger("papermill").setLevel(logging.ERROR)  # keys of Settings that one notebook does not list
    papermill_engines.register("augdistill", engine(on_cell))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.stem}.running.ipynb")
    failed = target.with_name(f"{target.stem}.failed.ipynb")
    try:
        papermill.execute_notebook(
            path,
            partial,
            parameters=parameters,
            kernel_name="python3",
            engine_name="augdistill",
            progress_bar=False,
            request_save_on_cell_execute=True,
            kernel_manager_class=KernelManager,
        )
    except PapermillExecutionError as error:
        os.replace(partial, failed)
        said = str(error.evalue).strip() or last_words(failed)
        lines = "\n".join(f"    {line}" for line in said.splitlines()[-5:])
        raise NotebookFailed(
            f"{path.stem} failed in cell {error.cell_index}: {error.ename}\n{lines}\n  as far as it came: {failed}",
            f"{error.ename}: {said}",
        ) from None
    except BaseException as error:  # Ctrl-C leaves papermill without a chance to end its kernel
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # else the cell's task tells of its end at exit
        if isinstance(error, OSError):  # a full disk: papermill does not say which file it could not write
            partial.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, error.filename or str(target)) from None
        if partial.exists():
            os.replace(partial, failed)
        if isinstance(error, DeadKernelError):
            reason = "its kernel died (killed, or out of memory)"
            raise NotebookFailed(f"{path.stem} failed: {reason}\n  as far as it came: {failed}", reason) from None
        raise
    finally:
        KernelManager.end_all()
    os.replace(partial, target)
    failed.unlink(missing_ok=True)
