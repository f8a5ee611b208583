"""A trained phi as one file that says what it was trained on, holds no code, and is refused where it does not fit.

augment = load_phi("runs/digits/phis/unet.safetensors")  # pixels in [0, 1] go in, augmented pixels come out
"""

import dataclasses
import json
import warnings
from pathlib import Path

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from augdistill_core import PHIS, Phi, augmented, make_phi, seeded
from augdistill_report.data.augmentations import without_flips
from augdistill_report.files.store import Store, checksum, digest, read_tensors, separate, write
from augdistill_report.work.distillation import Distillation
from augdistill_report.work.phi_layer import Augment, Use
from augdistill_report.work.provenance import own_source
from augdistill_report.work.setup import public_name

KIND, FORMAT = "augdistill phi", 1

WHITENING = ("data/mean", "data/whiten", "data/colour")  # tensors beside those of a phi that saw whitened images


def save_phi(
    path: Path | str, job: Distillation, store: Store, strength: float = 1.0, probability: float = 1.0
) -> Path:
    """Write the phi that `job` trained (or trains now), and how to use it; a `ValueError` if it would not come back."""
    use, data, index = Use(strength, probability), job.data, job.subset.index(job.data)
    distilled = job.stored_phi(store)
    phi = distilled.phi.cpu()
    tensors = separate(phi.state_dict())
    own = job.phi_source or own_source(job.phi)
    about = {
        "phi": job.phi,
        "own_source": own and digest({"source": own}),  # the digest alone: what a user wrote stays the user's
        "shape": list(data.shape),
        "base_images": len(index),
        "classes": list(data.classes),
        "data": {
            "name": public_name(data.name),
            "fingerprint": data.fingerprint,
            # of whitened images they stand with the tensors
            "mean": data.mean.flatten().tolist() if data.colour is None else [],
            "std": data.std.flatten().tolist(),
        },
        "subset": dataclasses.asdict(job.subset),
        "setup": job.setup.public(),
        "config": job.config.to_dict(),
        "stopped": dataclasses.asdict(distilled.stopped) if distilled.stopped else {},
        "source": job.spec()["source"],
        "torch": torch.__version__,
        **use.to_dict(),
    }
    # a phi may hold more than its state, which is all that the file keeps: try it on images of its own
    few = data.train.take(index[:8]).to("cpu")
    given = few.images, few.labels, torch.arange(len(few))
    with torch.no_grad():
        before, after = (augmented(p, *given, seeded(0)) for p in (phi, rebuilt(about, tensors)))
    if not before.isfinite().all():
        raise ValueError(f"phi {job.phi!r} makes images that are not finite: not worth a file")
    if not torch.equal(before, after):
        raise ValueError(
            f"phi {job.phi!r} does other things when it is made again from its shape, parameters and buffers: "
            "keep what it needs in those"
        )
    if data.colour is not None:
        tensors |= dict(zip(WHITENING, (t.cpu() for t in (data.mean, data.train.whiten, data.colour)), strict=True))
    # under one key, since safetensors writes several in any order: the same phi is the same bytes
    header = {KIND: json.dumps({"format": FORMAT, "sha256": checksum(about, tensors), "about": about})}
    write(Path(path), to_safetensors(tensors, header))
    return Path(path)


def rebuilt(about: dict, tensors: dict[str, Tensor]) -> Phi:
    """The phi of that name, shape and classes, with this state."""
    base = torch.zeros(1, *about["shape"]).expand(about["base_images"], -1, -1, -1)
    phi = without_flips(make_phi(about["phi"], base, len(about["classes"]), 0), about["data"]["name"])
    try:
        phi.load_state_dict(tensors)
    except RuntimeError:
        raise ValueError(f"phi {about['phi']!r}, as it is registered here, has other tensors than the file") from None
    return phi


def read_phi(path: Path | str) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a phi's file and what it says of itself; a `ValueError` that says what is wrong with it."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; must be a phi that `run.save` or `save_phi` wrote")
    try:
        tensors, header = read_tensors(path)
        if KIND not in header:
            raise ValueError("a safetensors file, but of something else")
        said = json.loads(header[KIND])
        if said["format"] != FORMAT:
            raise ValueError(f"of format {said['format']}; this version of augdistill reads {FORMAT}")
        if said["sha256"] != checksum(said["about"], tensors):
            raise ValueError("its contents are not those that were written")
        return tensors, said["about"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or no phi of ours ({error})") from None


def load_phi(path: Path | str, strength: float | None = None, probability: float | None = None) -> Augment:
    """A saved phi, ready for use as it was saved, or with another strength or probability."""
    tensors, about = read_phi(path)
    for part in about["phi"].split("+"):
        if part not in PHIS:
            own = "it is of its user's own: register it before (--set phis=FILE on the command line)"
            known = f"must be one of {', '.join(PHIS)}"
            raise ValueError(f"{path}: unknown phi {part!r}; {own if about['own_source'] else known}")
    own = own_source(about["phi"])
    if (own and digest({"source": own})) != about["own_source"]:
        warnings.warn(f"{path}: phi {about['phi']!r} was trained with other source than it has here", stacklevel=2)
    given = {"strength": strength, "probability": probability}
    use = Use(**{key: about[key] if value is None else value for key, value in given.items()})
    whitening = [tensors.pop(name) for name in WHITENING if name in tensors]
    try:
        return Augment(rebuilt(about, tensors), about, use, whitening)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
