"""`augdistill report`: every notebook in order by papermill, then one page to read.

Whatever can be refused is refused before anything runs. A notebook's executed copy and results replace the old ones
only when it has finished; one that fails is kept as NN_name.failed.ipynb. Finished work is found again by the next run.
"""

import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import ClassVar

import traitlets
from jupyter_client import AsyncKernelManager

from augdistill_report.artefacts import as_json, write
from augdistill_report.html import build_report
from augdistill_report.run import configuration, run_folder, start_folder
from augdistill_report.settings import NOTEBOOKS, Settings, preflight, resolve

LOG_EVERY = 15  # seconds between two lines of progress in a log


class NotebookFailed(Exception):
    """A notebook raised: its name, the cell and the error's last lines."""


def notebooks(only: str = "") -> list[Path]:
    """The report's notebooks in reading order; `only` keeps those whose numbers it lists ("02,03")."""
    every = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    if not only:
        return every
    numbers = [part.strip().zfill(2) for part in only.split(",")]
    known = {path.name[:2]: path for path in every}
    for number in numbers:
        if number not in known:
            raise ValueError(f"only={only!r}: there is no notebook {number}; must be among {', '.join(known)}")
    return [known[number] for number in sorted(set(numbers))]


class Status:
    """One line that says which notebook, which cell, how far and how long: live in a terminal, now and then in a log.

    Time left is counted in notebooks, each weighted with the seconds that it took the last time (equally, if never).
    """

    def __init__(self, names: list[str], seconds: dict[str, float], progress: Path):
        self.names, self.progress = names, progress
        typical = sum(seconds.values()) / len(seconds) if seconds else 1.0
        self.weight = {name: seconds.get(name, typical) for name in names}
        self.start, self.done, self.current, self.cell, self.cells = time.monotonic(), 0.0, "", 0, 1
        self.live, self.last = sys.stderr.isatty(), -LOG_EVERY

    def at(self, name: str, cell: int, cells: int) -> None:
        self.current, self.cell, self.cells = name, cell, cells
        with contextlib.suppress(OSError):
            self.progress.unlink()
        self.show()

    def finished(self, name: str) -> None:
        self.done += self.weight[name]

    def show(self) -> None:
        work = {}
        with contextlib.suppress(OSError, ValueError):
            work = json.loads(self.progress.read_text())
        inside = (self.cell + work.get("fraction", 0.0)) / self.cells
        part = (self.done + self.weight.get(self.current, 0) * inside) / sum(self.weight.values())
        spent = time.monotonic() - self.start
        left = f", about {spent * (1 - part) / part:.0f} s left" if part > 0.02 else ""
        number = self.names.index(self.current) + 1 if self.current in self.names else 0
        line = f"[{number}/{len(self.names)}] {self.current}, cell {self.cell + 1} of {self.cells}{left}"
        line += f" | {work['text']}" if work else ""
        if self.live:
            print(f"\r\033[K{line[: shutil.get_terminal_size().columns - 1]}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self.last > LOG_EVERY:
            self.last = time.monotonic()
            print(line, file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def ticking(status: Status):
    """Look at the status twice a second while a cell runs."""
    stop = threading.Event()

    def loop():
        while not stop.wait(0.5):
            status.show()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        status.clear()


class KernelManager(AsyncKernelManager):
    """Kernels over Unix sockets, where there are any (TCP ports can be raced for), that can be ended from outside."""

    transport = traitlets.CaselessStrEnum(["tcp", "ipc"], "tcp" if os.name == "nt" else "ipc", config=True)
    running: ClassVar[set[int]] = set()  # process ids

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


def engine(status: Status):
    """papermill's own engine, telling `status` about each cell that starts."""
    from papermill.engines import NBClientEngine

    class Engine(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man, kernel_name, **options):
            start = nb_man.cell_start
            cells = len(nb_man.nb.cells)

            def cell_start(cell, cell_index=None, **kwargs):
                status.at(status.current, cell_index or 0, cells)
                return start(cell, cell_index, **kwargs)

            nb_man.cell_start = cell_start
            return super().execute_managed_notebook(nb_man, kernel_name, **options)

    return Engine


def execute(path: Path, folder: Path, parameters: dict, status: Status) -> None:
    """Run one notebook into folder/notebooks; a `NotebookFailed` if it raises."""
    import papermill
    from papermill.engines import papermill_engines
    from papermill.exceptions import PapermillExecutionError

    logging.getLogger("papermill").setLevel(logging.ERROR)  # keys of Settings that one notebook does not list
    papermill_engines.register("augdistill", engine(status))
    target = folder / "notebooks" / path.name
    target.parent.mkdir(exist_ok=True)
    partial = target.with_name(f".{path.stem}.running.ipynb")
    failed = target.with_name(f"{path.stem}.failed.ipynb")
    status.at(path.stem, 0, 1)
    try:
        with ticking(status):
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
        lines = "\n".join(f"    {line}" for line in str(error.evalue).splitlines()[-5:])
        raise NotebookFailed(
            f"{path.stem} failed in cell {error.cell_index}: {error.ename}\n{lines}\n  as far as it came: {failed}"
        ) from None
    except BaseException:  # Ctrl-C leaves papermill without a chance to end its kernel
        if partial.exists():
            os.replace(partial, failed)
        raise
    finally:
        KernelManager.end_all()
    os.replace(partial, target)
    failed.unlink(missing_ok=True)
    status.finished(path.stem)


def report(preset: str, out: str = "", only: str = "", changes: dict | None = None, fresh: bool = False) -> Path:
    """Run the notebooks of a preset with some settings changed; returns the page that they make.

    Raises `ValueError` for anything wrong with the arguments, before anything runs; `NotebookFailed` for a notebook.
    """
    settings: Settings = resolve(preset, changes)
    chosen = notebooks(only)
    preflight(settings)
    folder = run_folder(preset, out)
    start_folder(folder, preset, settings)
    if fresh:
        shutil.rmtree(folder / "artefacts", ignore_errors=True)
    # papermill writes literals: keys that differ from the preset are enough, the notebook resolves them again
    parameters = {"preset": preset, "out": str(folder)} | {k: getattr(settings, k) for k in changes or {}}
    timings = folder / "timings.json"
    seconds = json.loads(timings.read_text()) if timings.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        progress = Path(temporary) / "progress.json"
        os.environ["AUGDISTILL_PROGRESS"] = str(progress)
        status = Status([path.stem for path in chosen], seconds, progress)
        for path in chosen:
            start = time.monotonic()
            execute(path, folder, parameters, status)
            seconds[path.stem] = round(time.monotonic() - start, 1)
            write(timings, as_json(seconds))
            print(f"{path.stem}: {seconds[path.stem]:.0f} s", file=sys.stderr)
    return build_report(folder, configuration(settings))
