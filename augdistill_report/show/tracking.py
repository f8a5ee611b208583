"""Sends curves and pictures to an experiment tracker: TensorBoard, Weights & Biases, or trackio.

Each row that a notebook trains is one run in the tracker, named after the notebook and the row, with its settings. The
notebook's pictures are another run. Everything is sent once, when it is finished: `tracked/<tracker>.json` lists it.
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
    shutil.rmtree(place, ignore_errors=True)  # otherwise the curves of earlier settings would overlap
    with SummaryWriter(place) as writer:
        writer.add_text("settings", f"```\n{as_json(config)}```")
        for step, numbers in enumerate(curve):
            for key, value in numbers.items():
                writer.add_scalar(key, value, step)
        for path in pictures:
            writer.add_image(path.stem, np.asarray(Image.open(path).convert("RGB")), dataformats="HWC")


def to_wandb(folder: Path, group: str, name: str, config: dict, curve: list[dict], pictures: list[Path]) -> None:
    """A run in the project `augdistill`; wandb's variables apply (WANDB_MODE=offline keeps it in tracked/wandb)."""
    import wandb

    quiet = wandb.Settings(silent=True, disable_git=True, x_disable_stats=True)
    about = dict(project=PROJECT, group=group, name=f"{group}/{name}", config=config, dir=folder, settings=quiet)
    with wandb.init(**about) as run:
        for step, numbers in enumerate(curve):
            run.log(numbers, step=step)
        for path in pictures:
            run.log({path.stem: wandb.Image(str(path))})


def to_trackio(folder: Path, group: str, name: str, config: dict, curve: list[dict], pictures: list[Path]) -> None:
    """A run in the project `augdistill`, in TRACKIO_DIR: see it with `trackio show --project augdistill`."""
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
    """A `ValueError` that says what to install if the tracker's package is missing."""
    if track != "none" and importlib.util.find_spec(track) is None:
        raise ValueError(f"track={track!r}: the package is not installed; pip install {track}")


def numbers(record: dict) -> dict[str, float]:
    """The numbers in a record of `distill`; those that phi reports as "phi/<name>"."""
    flat = record | {f"phi/{key}": value for key, value in record.get("phi", {}).items()}
    return {k: float(v) for k, v in flat.items() if isinstance(v, int | float) and k != "iteration"}


def already_sent(folder: Path, track: str) -> dict[str, str]:
    """What was sent from a run's folder to a tracker: a digest of the content by run ("<notebook>/<row>")."""
    note = folder / "tracked" / f"{track}.json"
    return read_json(note, "tracked")["sent"] if note.exists() else {}


class Tracker:
    """Sends a notebook's curves and pictures to the tracker with that name; "none" sends nothing."""

    def __init__(self, track: str, folder: Path, notebook: str):
        """A `ValueError` if the tracker's package is missing, or the file that lists what was sent is damaged."""
        check_tracker(track)
        self.track, self.folder, self.notebook = track, folder, notebook
        already_sent(folder, track)  # fails now, not after an hour of work

    def curve(self, name: str, config: dict, history: list[dict]) -> None:
        """Send the numbers of every record, by iteration."""
        self.send(name, config, [numbers(record) for record in history], [])

    def pictures(self, paths: list[Path]) -> None:
        """Send PNG files under their names."""
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
        with contextlib.redirect_stdout(io.StringIO()):  # keeps the tracker's output out of the notebook
            TRACKERS[self.track](place, self.notebook, name, config, curve, pictures)
        write_json(place / f"{self.track}.json", "tracked", {"sent": sent | {run: own}})
