"""`augdistill export`: what a run has distilled, in a form that other codes read, with a card that says what it is.

`augdistill score` reads it back: to the same bits, but from a folder of images, which holds 8 bits a value.
"""

from pathlib import Path

import torch

from augdistill_core import Applied, augmented, labels_under, seeded
from augdistill_report.data.datasets import Dataset, Split
from augdistill_report.files.distilled_sets import DistilledSet, write_set
from augdistill_report.files.phi_files import load_phi
from augdistill_report.run import row_file, stored_row
from augdistill_report.settings import Settings
from augdistill_report.studies.subjects import label_bytes
from augdistill_report.work.jobs import Subset
from augdistill_report.work.provenance import environment
from augdistill_report.work.scoring import EvalConfig
from augdistill_report.work.setup import Setup, public_name


def refuse_others(row: str, changes: dict, used: tuple[str, ...]) -> None:
    """A `ValueError` that names the first setting in `changes` that does not exist, or that no such export uses."""
    Settings.refuse_unknown(changes)
    for key, value in changes.items():
        if key not in used:
            raise ValueError(f"{key}={value!r}: does not apply to an export of {row}: must be {' or '.join(used)}")


@torch.no_grad()
def drawn_images(phi, base: Split, seed: int, draws: int) -> torch.Tensor:
    """`draws` samples of phi(x) for all images of its base set, `[draws * n, C, H, W]`."""
    index = torch.arange(len(base))
    found = [augmented(phi, base.images, base.labels, index, seeded(seed, "export", k)) for k in range(draws)]
    return torch.cat(found).cpu()


def of_row(row: Path, changes: dict) -> tuple[Applied, Dataset, torch.Tensor, dict]:
    """The phi of a run's row, its data, the positions of its base images, and what a card says of how it was made."""
    refuse_others(f"a row ({row.name})", changes, ("phis", "data"))
    found = stored_row(row, changes)
    job, store = found.job, found.store
    result = job.stored_phi(store)
    made = {
        "row": f"{row.parent.name}/{row.name}",
        "phi": job.phi,
        "distillation": job.config.to_dict(),
        "stopped": str(result.stopped or ""),
        "seconds": round(store.seconds(job.kind, job.spec()), 1),
        "protocol": found.settings.select(EvalConfig).to_dict(),
        "setup": job.setup.public(),
        "lr": max(result.alpha, 0.0),
    }
    return Applied(result.phi), job.data, job.index(store), made


def of_phi_file(path: Path, changes: dict) -> tuple[Applied, Dataset, torch.Tensor, dict]:
    """The same of a saved phi, which is found with its data set by name (a folder: `--set dataset=folder:PATH`)."""
    refuse_others(f"a saved phi ({path.name})", changes, ("phis", "data", "dataset"))
    Settings(**{k: v for k, v in changes.items() if k == "phis"}).load_phis()
    layer = load_phi(path)
    about = layer.about
    given = {k: v for k, v in changes.items() if k in ("dataset", "data")}
    where = {"dataset": about["data"]["name"], "size": about["setup"]["size"], "zca": about["setup"]["zca"]}
    data = Setup(**where | given).load()
    if data.fingerprint != about["data"]["fingerprint"]:
        raise ValueError(
            f"{path}: was trained on {about['data']['name']} ({about['data']['fingerprint']}), not these data"
        )
    made = {"row": path.name, "phi": about["phi"], "distillation": about["config"], "setup": about["setup"], "lr": 0.0}
    subset = Subset(**about["subset"])
    if subset.window is not None:
        raise ValueError(f"{path}: its subset was selected by experts, which the file does not hold: export the row")
    return layer.applied, data, subset.index(data), made


def export(row: str, form: str, out: str, draws: int = 1, changes: dict | None = None) -> str:
    """Write a row's images in a form of `FORMATS_OUT`; returns what was written, in one line.

    `row` is RUN/NOTEBOOK/ROW, or the file of a saved phi. A phi that changes real images is sampled `draws` times for
    each. A `ValueError` says what does not fit.
    """
    path, changes = Path(row).expanduser(), dict(changes or {})
    found = of_phi_file if path.is_file() or not row_file(path).parent.is_dir() else of_row
    phi, data, index, made = found(path, changes)
    if draws < 1 or (draws > 1 and not phi.stochastic):
        raise ValueError(f"draws={draws}: must be 1 for a phi that is not stochastic, else at least 1")
    base = data.train.take(index)
    images = drawn_images(phi.to(data.mean.device), base, 0, draws)
    if not images.isfinite().all():
        raise ValueError(f"{row}: phi returns values that are not finite, so they are not exported")
    labels = labels_under(phi, base.labels, torch.arange(len(base))).detach().cpu()
    labels = torch.cat([labels] * draws)
    normalisation = {"name": "zca-own"}
    if data.colour is None:
        constants = {"mean": data.mean.flatten().tolist(), "std": data.std.flatten().tolist()}
        normalisation = {"name": "own"} | constants
    note = ""
    if form == "folder":
        pixels = data.pixels(images.to(data.mean.device), clamp=False).cpu()
        outside = float(((pixels < 0) | (pixels > 1)).float().mean())
        note = f"; 8 bits a value, and {100 * outside:.1f} % of the values were outside [0, 1] and are clipped"
        images, normalisation = (pixels.clamp(0, 1) * 255).round().byte(), {"name": "pixels"}
        made |= {"clipped": round(outside, 4)}
    card = {
        "data": public_name(data.name),
        "fingerprint": data.fingerprint,
        "classes": list(data.classes),
        "shape": list(data.shape),
        "images": len(images),
        "draws": draws,
        "normalisation": normalisation,
        "bytes": {
            "images": images.numel() * images.element_size(),
            "labels": label_bytes(labels, len(data.classes)),
        },
        **made,
        "environment": environment("cpu"),
    }
    given = DistilledSet(images, labels, form, 0, classes=data.classes, lr=made["lr"], card=card)
    written = write_set(given, out, form)
    return f"{len(images)} images of {card['row']} in {written}{note}"
