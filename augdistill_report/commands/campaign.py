"""`augdistill campaign NAME`: makes the pieces of a list in order of value, within a time limit (`studies/pieces`).

Every finished job is kept, and one that the limit stops goes on from its checkpoint when the same command runs again.
After each piece the results are written: NAME.json (sealed), NAME.md and NAME.png in the run's folder `campaigns`. The
test split is opened once for each row, by its `Score`.
"""

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from augdistill_report.commands.preflight import preflight
from augdistill_report.files.sealed_json import write_json
from augdistill_report.files.store import OutOfTime, Store, write
from augdistill_report.run import folder_config, picture, run_folder, start_folder
from augdistill_report.settings import resolve
from augdistill_report.show.plots import bars
from augdistill_report.studies.pieces import Campaign, Piece, read_campaign
from augdistill_report.work.experts import Expert, Together
from augdistill_report.work.jobs import Job
from augdistill_report.work.progress import Line
from augdistill_report.work.provenance import code_state, environment
from augdistill_report.work.scoring import Score
from augdistill_report.work.statistics import Accuracy, gain, markdown_table, pooled, summary

DONE, WAITING, FAILED = "done", "not started", "failed: "  # states of a piece; the last is followed by the reason

RESERVE = 5.0  # seconds at the end of the time limit (at most a tenth of it), for writing the results

GAIN_OVER_CONTROL = "gain over the first row without a phi on the same images (points, 95 % CI)"


@dataclasses.dataclass
class Row:
    """A piece with what became of it: its state, the CPU seconds of its finished jobs without those of experts (all
    calls together), and its accuracy once it is done."""

    piece: Piece
    state: str = WAITING
    seconds: float = 0.0
    accuracy: Accuracy | None = None

    @property
    def failed(self) -> bool:
        return self.state.startswith(FAILED)

    def found(self, base: dict) -> dict:
        """Its entry in the JSON file; of the settings, those that differ from `base`."""
        entry = {"row": self.piece.row, "images": self.piece.images, "seed": self.piece.settings.seed}
        entry |= {key: getattr(self.piece, key) for key in ("fraction", "phi", "mtt", "only")}
        entry |= {"state": self.state, "seconds": round(self.seconds, 3)}
        if self.accuracy:
            entry |= {"test": self.accuracy.numbers(), "validation": summary(self.accuracy.validation)}
        own = self.piece.settings.public()
        return entry | {"settings": {key: value for key, value in own.items() if value != base.get(key)}}


def campaign(
    name: str, minutes: float, out: str = "", changes: dict | None = None, tiny: bool = False
) -> tuple[Path, list[Row]]:
    """Make the pieces that are missing, for at most so many `minutes`; returns the table's file and all rows.

    A piece that fails (its phi diverged, the memory did not suffice) says so in its row, and the next one is made. A
    `ValueError` before any work says what is wrong with the list, the settings or this machine.
    """
    code_state()  # of now, not of the end
    deadline = time.monotonic() + 60 * minutes - min(RESERVE, 6 * minutes)
    if not 0 < minutes < math.inf:
        raise ValueError(f"--minutes {minutes:g}: must be above 0")
    given = read_campaign(name, changes or {}, tiny)
    base = resolve(given.preset, changes)
    for piece in given.pieces:
        try:
            preflight(piece.settings)
        except ValueError as error:
            raise ValueError(f"{name}: {piece.row!r} on {piece.images}: {error}") from None
    folder = run_folder(given.preset, out)
    if not folder_config(folder):
        start_folder(folder, given.preset, base)
    store, rows = Store(folder / "artefacts", deadline), [Row(piece) for piece in given.pieces]
    target = folder / "campaigns" / f"{given.name}{'-tiny' if tiny else ''}"
    for row in rows:  # what is there already (the first look at a data set may fit ZCA)
        *_, score = jobs = row.piece.jobs(folder)
        row.seconds = spent(jobs, store)
        if store.has(score.kind, score.spec()):
            row.state, row.accuracy = DONE, Accuracy(**score.stored(store)[1])
    write_rows(target, given, base.public(), tiny, rows)
    with Line() as line:
        for row in [row for row in rows if row.state != DONE]:
            if time.monotonic() >= store.deadline:
                break
            before = sum(row.state == DONE for row in rows)
            make(row, folder, store, lambda done, note, at=before: line.count("pieces", at + done, len(rows), note))
            write_rows(target, given, base.public(), tiny, rows)
            if row.failed and not device_works(row.piece.settings.device):
                break  # only a new process can use it again
    return target.with_suffix(".md"), rows


def make(row: Row, folder: Path, store: Store, show) -> None:
    """Make a piece, as far as the store's deadline allows; sets the row's state, seconds and accuracy."""
    torch.set_num_threads(row.piece.settings.threads)
    jobs: list[Job] = []
    try:
        with alarm(store.deadline + RESERVE / 2):
            jobs = row.piece.jobs(folder)
            for number, job in enumerate(jobs):
                if not store.has(job.kind, job.spec()):
                    if time.monotonic() >= store.deadline:
                        raise OutOfTime
                    row.state = run_until(
                        job, store, lambda done, at=number: show((at + done) / len(jobs), row.piece.row)
                    )
                    if row.state != DONE:
                        return
            row.state, row.accuracy = DONE, Accuracy(**jobs[-1].stored(store)[1])
    except OutOfTime:  # between two jobs
        row.state = "stopped by the time limit between two jobs"
    except Exception as error:  # whatever it is, it must not cost the other pieces
        row.state = FAILED + in_one_line(error)
    finally:
        row.seconds = spent(jobs, store)


def spent(jobs: list[Job], store: Store) -> float:
    """The CPU seconds of the finished jobs but experts', which are made once for many pieces."""
    seconds = 0.0
    for job in jobs:
        if not isinstance(job, Expert | Together) and store.has(job.kind, job.spec()):
            with contextlib.suppress(ValueError):  # the piece that uses a damaged file says so in its row
                seconds += store.seconds(job.kind, job.spec())
    return seconds


def run_until(job: Job, store: Store, show) -> str:
    """Run a job until the store's deadline; returns its state. Students have no checkpoint: if their progress shows
    that they cannot finish in time, they are given up at once, so that a smaller piece may still fit."""
    began, share = time.monotonic(), 0.0

    def tick(done, total, note=""):
        nonlocal share
        share = done / total
        show(share)
        left = store.deadline - time.monotonic()
        if isinstance(job, Score) and 0 < share < 1 and (time.monotonic() - began) * (1 - share) / share > left:
            raise OutOfTime

    try:
        job.run(store, tick)
        return DONE
    except OutOfTime:
        spent = time.monotonic() - began
        whole = f", all of it takes about {spent / share / 60:.1f} minutes" if share else ""
        return f"stopped by the time limit in {job.kind} at {100 * share:.0f} %{whole}"


def in_one_line(error: Exception) -> str:
    """An exception's message, with its type if that is not `ValueError`, whose messages are made for people."""
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return f"{kind}{' '.join(str(error).split())[:300]}"


def device_works(device: str) -> bool:
    """Whether a device still computes: after an invalid kernel a process gets nothing but errors from it."""
    try:
        return int(torch.arange(3, device=device).sum()) == 3
    except RuntimeError:
        return False


@contextlib.contextmanager
def alarm(moment: float) -> Iterator[None]:
    """Raise `OutOfTime` in this thread at a moment of `time.monotonic`, for work that does not look at the clock.

    An import is let finish, since a module that was imported by half cannot be used later.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):  # Windows
        yield
        return

    def late(_, frame):
        while frame is not None:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                signal.setitimer(signal.ITIMER_REAL, 0.1)
                return
            frame = frame.f_back
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, max(moment - time.monotonic(), 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- the results ------------------------------------------------------------------------------------------------------


def write_rows(target: Path, given: Campaign, base: dict, tiny: bool, rows: list[Row]) -> None:
    """Write the JSON file, the table and (once a row is done) the picture of what is known now."""
    facts = {"campaign": given.name, "preset": given.preset, "tiny": tiny, "settings": base}
    facts["changes"] = {key: base[key] for key in given.changes}
    facts["environment"] = environment(rows[0].piece.settings.device)
    write_json(target.with_suffix(".json"), "campaign", facts | {"rows": [row.found(base) for row in rows]})
    write(target.with_suffix(".md"), markdown_table(campaign_table(rows)))
    if scores := pooled_rows(rows):
        figure = bars(scores)
        figure.axes[0].set_xlabel("test accuracy (%), a dot for each student")  # their number differs
        write(target.with_suffix(".png"), picture(figure))


def pooled_rows(rows: list[Row]) -> dict[tuple[str, str], Accuracy]:
    """The accuracies of the rows that are done, by row and images; repetitions (other seeds) pooled."""
    return pooled({(row.piece.name, row.piece.settings.seed): row.accuracy for row in by_images(rows) if row.accuracy})


def by_images(rows: list[Row]) -> list[Row]:
    """The rows, those on the same images together."""
    order = list(dict.fromkeys(row.piece.images for row in rows))
    return sorted(rows, key=lambda row: order.index(row.piece.images))


def campaign_table(rows: list[Row]) -> list[dict]:
    """A table's rows: every piece, with n, spread and its gain over its control; or its state, if it is not done."""
    done = pooled_rows(rows)
    lines = {}
    for row in by_images(rows):
        score, state = done.get(row.piece.name), lines.get(row.piece.name, {}).get("state", "")
        lines[row.piece.name] = {
            "images": row.piece.images,
            "row": row.piece.row,
            "test accuracy": f"{score} (n = {len(score.test)} students)" if score else "",
            GAIN_OVER_CONTROL: gain_over_control(rows, row.piece),
            "state": "; ".join(filter(None, [state, "" if row.state == DONE else row.state])),
        }
    return list(lines.values())


def gain_over_control(rows: list[Row], piece: Piece) -> str:
    """The gain of a piece over the first one on the same images that learns no phi, as far as both are done."""
    of_control = [row.piece.name for row in rows if row.piece.images == piece.images and not row.piece.phi]
    if not of_control or piece.name == of_control[0]:
        return ""
    by_name: dict[tuple, dict[int, Accuracy]] = {piece.name: {}, of_control[0]: {}}
    for row in rows:
        if row.accuracy and row.piece.name in by_name:
            by_name[row.piece.name][row.piece.settings.seed] = row.accuracy
    ours, control = by_name.values()
    seeds = [s for s in ours if s in control and len(ours[s].test) == len(control[s].test)]
    scores = {(name, s): found[s] for name, found in by_name.items() for s in seeds}
    return gain(scores, piece.name, of_control[0]) if seeds else ""
