"""Executes one notebook by papermill in its own kernel, which always ends with it.

The executed copy is complete or absent: during the run it is a hidden file, and after a failure NAME.failed.ipynb.
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

from augdistill_report.commands.failures import NotebookFailed

QUIET_ASYNCIO = "__import__('logging').getLogger('asyncio').setLevel('CRITICAL')"  # else a stopped kernel lists tasks


class KernelManager(AsyncKernelManager):
    """Kernels that can be ended from outside, over Unix sockets where there are any: two kernels may get one TCP port.

    Each kernel has its own socket name: by default two notebooks that run in one folder would share theirs.
    """

    transport = traitlets.CaselessStrEnum(["tcp", "ipc"], "tcp" if os.name == "nt" else "ipc", config=True)
    running: ClassVar[set[int]] = set()  # process ids

    @traitlets.default("ip")
    def _ip_default(self):
        own = f"kernel-{uuid.uuid4().hex[:8]}"  # short: a socket's path has at most 103 characters
        return os.path.join(tempfile.gettempdir(), own) if self.transport == "ipc" else super()._ip_default()

    def format_kernel_cmd(self, extra_arguments=None):
        """Silence the kernel's log: it reports an interrupt whenever a notebook fails; papermill's error is better."""
        quiet = ["--IPKernelApp.log_level=CRITICAL", f"--IPKernelApp.exec_lines={QUIET_ASYNCIO}"]
        return super().format_kernel_cmd([*(extra_arguments or []), *quiet])

    async def post_start_kernel(self, **options):
        await super().post_start_kernel(**options)
        self.running.add(self.provisioner.pid)

    async def cleanup_resources(self, restart=False):
        self.running.discard(self.provisioner.pid if self.provisioner else None)
        await super().cleanup_resources(restart)

    @classmethod
    def end_all(cls) -> None:
        """Kill every kernel that still runs, with its workers: each kernel leads its own process group."""
        while cls.running:
            pid = cls.running.pop()
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL) if hasattr(os, "killpg") else os.kill(pid, signal.SIGTERM)


def engine(on_cell: Callable[[int, int], None]):
    """papermill's own engine, which also calls `on_cell(index, number of cells)` when a cell starts."""
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
    """The last errors in a notebook's stderr: a kernel without free file handles cannot report an error otherwise."""
    outputs = [output for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", [])]
    texts = [output.text for output in outputs if output.get("name") == "stderr"]
    return "\n".join(line for line in (texts or [""])[-1].splitlines() if re.match(r"[\w.]+(Error|Exception)\b", line))


def execute(path: Path, target: Path, parameters: dict, on_cell: Callable[[int, int], None]) -> None:
    """Run the notebook `path` and write its executed copy to `target`.

    A `NotebookFailed` if a cell raises or the kernel dies; an `OSError` names a file that could not be written.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.engines import papermill_engines
    from papermill.exceptions import PapermillExecutionError

    logging.getLogger("papermill").setLevel(logging.ERROR)  # it warns of settings that a notebook does not list
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
            f"{path.stem} failed in cell {error.cell_index}: {error.ename}\n{lines}\n  the copy until there: {failed}",
            f"{error.ename}: {said}",
        ) from None
    except BaseException as error:  # after Ctrl-C papermill cannot end its kernel
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # else asyncio logs the cancelled cell at exit
        if isinstance(error, OSError):  # a full disk: papermill does not say which file it could not write
            partial.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, error.filename or str(target)) from None
        if partial.exists():
            os.replace(partial, failed)
        if isinstance(error, DeadKernelError):
            reason = "its kernel died (killed, or out of memory)"
            raise NotebookFailed(f"{path.stem} failed: {reason}\n  the copy until there: {failed}", reason) from None
        raise
    finally:
        KernelManager.end_all()
    os.replace(partial, target)
    failed.unlink(missing_ok=True)
