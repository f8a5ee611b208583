"""Shows the progress of long work in a notebook, a terminal or a log."""

import contextlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

from augdistill_report.files.store import write

REFRESH = 0.5  # seconds between two updates of the progress

LOG_EVERY = 15  # seconds between two lines of progress in a log


class Line(contextlib.AbstractContextManager):
    """A command's progress in one line: updated in place in a terminal, printed every 15 s in a log."""

    def __init__(self):
        self.live, self.last, self.start = sys.stderr.isatty(), -LOG_EVERY, time.monotonic()

    def __exit__(self, *_):
        self.clear()

    def count(self, what: str, done: float, total: float, note: str = "", *, even: bool = True) -> None:
        """Show `done` of `total`, and the estimated time left; the time so far if progress is not `even` in time."""
        share, spent = done / total, time.monotonic() - self.start
        times = f", {spent:.0f} s so far"
        if even:
            times = f", about {spent * (1 - share) / share:.0f} s left" if share > 0.02 else ""
        self.show(f"{done:.1f} of {total} {what}{times}" + (f" | {note}" if note else ""))

    def show(self, text: str) -> None:
        if self.live:
            print(f"\r\033[K{text[: shutil.get_terminal_size().columns - 1]}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self.last > LOG_EVERY:
            self.last = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


class Progress:
    """A progress bar in a notebook (one line of text in a saved notebook); elsewhere a `Line`.

    `augdistill report` cannot see the output of a running cell. So the progress is also written to the file that the
    environment variable AUGDISTILL_PROGRESS names.
    """

    def __init__(self, what: str):
        self.what, self.start, self.last, self.handle = what, time.monotonic(), 0.0, None
        self.line = Line()

    def __call__(self, done: float, total: float, note: str = "") -> None:
        from IPython import get_ipython
        from IPython.display import display

        if self.handle is None and get_ipython() is not None:  # created only now: finished work shows nothing
            self.handle = display({"text/plain": self.what}, raw=True, display_id=True)
        now = time.monotonic()
        if now - self.last < REFRESH and done < total:
            return
        self.last = now
        spent = now - self.start
        left = f", {spent * (total - done) / done:.0f} s left" if done else ""
        text = f"{self.what}: {done:.1f} of {total:g}{left}" if done < total else f"{self.what}: {total:g} done"
        text += f" | {note}" if note else ""
        bar = f'<progress max="{total}" value="{done}"></progress> {text}' if done < total else text
        if self.handle:
            self.handle.update({"text/plain": text, "text/html": bar}, raw=True)
        else:
            self.line.show(text) if done < total else self.line.clear()
        if path := os.environ.get("AUGDISTILL_PROGRESS"):
            with contextlib.suppress(OSError):
                write(Path(path), json.dumps(dict(text=text, fraction=done / total)))
