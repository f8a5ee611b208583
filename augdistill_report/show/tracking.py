"""Curves and pictures in a tracker too, beside the files: TensorBoard, Weights & Biases, or trackio.

What a notebook trains is a run there, named after the notebook and the row, with its settings; the pictures are a run
of the notebook's own. Everything is sent once it is finished, so that the processes that work need not know of it, and
once only: `tracked/<tracker>.json` says what was sent.
"""

import contextlib
import importlib.util
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from augdistill_report.files.sealed_json import read_json, write_json
from augdistill_report.files.store import as_json, digest

PROJECT = "augdistill"


def to_tensorboard(folder: Path, group: str, name: str, config: dict, curve: list[dict], pictures: list[Path]) -> None:
    """Event files in tracked/tensorboard/<notebook>/<row>: `tensorboard --logdir runs/<preset>/tracked/tensorboard`."""
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

    place = folder / "tensorboard" / group / name
    shutil.rmtree(place, ignore_errors=True)  # what other settings left there would be drawn over it
    with SummaryWriter(place) as writer:
        writer.add_text("settings", f"```\n{as_json(config)}```")
        for step, numbers in enumerate(curve):
            for key, value in numbers.items():
                writer.add_scalar(key, value, step)
        for path in pictures:
            writer.add_image(path.stem, np.asarray(Image.open(path).convert("RGB")), dataformats="HWC")


def to_wandb(folder: Path, group: str, name: str, config: dict, curve: list[dict], pictures: list[Path]) -> None:
    """A run of the project `augdistill`, as its own variables say (WANDB_MODE=offline keeps it in tracked/wandb)."""
    import wandb

    quiet = wandb.Settings(silent=True, disable_git=True, x_disable_stats=True)
    about = dict(project=PROJECT, group=group, name=f"{group}/{name}", config=config, dir=folder, settings=quiet)
    with wandb.init(**about) as run:
        for step, numbers in enumerate(curve):
            run.log(numbers, step=step)
        for path in pictures:
            run.log({path.stem: wandb.Image(str(path))})


def to_trackio(folder: Path, group: str, name: str, config: dict, curve: list[dict], pictures: list[Path]) -> None:
    """A run of the project `augdistill`, where TRACKIO_DIR says: `trackio show --project augdistill`."""
    import trackio

    about = dict(project=PROJECT, group=group, name=f"{group}/{name}", config=config, embed=False, auto_log_gpu=False)
    run = trackio.init(**about)
    for step, numbers in enumerate(curve):
        run.log(numbers, step=step)
    for path in pictures:
        run.log({path.stem: trackio.Image(str(path))})
    run.finish()


TRACKERS: dict[str, Callable] = {"tensorboard": to_tensorboard, "trackio": to_trackio, "wandb": to_wandb}


def check_tracker(track: str) -> None:
    """A `ValueError` that says what to install, if the package of this tracker is missing."""
    if track != "none" and importlib.util.find_spec(track) is None:
        raise ValueError(f"track={track!r}: the package is not installed; pip install {track}")


def numbers(record: dict) -> dict[str, float]:
    """What of a record of `distill` is a number; what phi reports of itself as "phi/<name>"."""
    flat = record | {f"phi/{key}": value for key, value in record.get("phi", {}).items()}
    return {k: float(v) for k, v in flat.items() if isinstance(v, int | float) and k != "iteration"}


def already_sent(folder: Path, track: str) -> dict[str, str]:
    """What a run's folder has sent to a tracker: a digest of the content by run there ("<notebook>/<row>")."""
    note = folder / "tracked" / f"{track}.json"
    return read_json(note, "tracked")["sent"] if note.exists() else {}


class Tracker:
    """Sends to the tracker of that name what a notebook makes; "none" sends nothing."""

    def __init__(self, track: str, folder: Path, notebook: str):
        """A `ValueError` if the tracker's package is missing, or if the note of what was sent is damaged."""
        check_tracker(track)
        self.track, self.folder, self.notebook = track, folder, notebook
        already_sent(folder, track)  # now, not after an hour of work

    def curve(self, name: str, config: dict, history: list[dict]) -> None:
        """The numbers of every record, by iteration."""
        self.send(name, config, [numbers(record) for record in history], [])

    def pictures(self, paths: list[Path]) -> None:
        """PNG files, under their names."""
        self.send("pictures", {}, [], paths)

    def send(self, name: str, config: dict, curve: list[dict], pictures: list[Path]) -> None:
        if self.track == "none":
            return
        sent = already_sent(self.folder, self.track)
        run, content = f"{self.notebook}/{name}", {"curve": curve, "config": config}
        own = digest(content | {path.name: path.read_bytes().hex() for path in pictures})
        if sent.get(run) == own:
            return
        place = self.folder / "tracked"
        place.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stdout(io.StringIO()):  # the notebook is for its reader
            TRACKERS[self.track](place, self.notebook, name, config, curve, pictures)
        write_json(place / f"{self.track}.json", "tracked", {"sent": sent | {run: own}})
