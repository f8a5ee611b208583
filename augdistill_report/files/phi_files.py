"""A trained phi as one file: it says how phi was trained, contains no code, and is rejected for data that do not fit.

augment = load_phi("runs/digits/phis/unet.safetensors")  # pixels in [0, 1] go in, augmented pixels come out
"""

import dataclasses
import warnings
from pathlib import Path

import torch
from torch import Tensor

from augdistill_core import PHIS, Phi, augmented, builders, is_ours, labels_under, make_phi, seeded
from augdistill_report.data.augmentations import without_flips
from augdistill_report.files.store import (
    SealedFile,
    Store,
    a_count,
    a_finite_number,
    a_fraction,
    digest,
    restore,
    separate,
    write_sealed,
)
from augdistill_report.work.distillation import Distillation
from augdistill_report.work.jobs import Subset
from augdistill_report.work.own_code import own_source
from augdistill_report.work.phi_layer import Augment, Use
from augdistill_report.work.setup import public_name

KIND = "phi"

WHITENING = ("data/mean", "data/whiten", "data/colour")  # additional tensors in the file of a phi for whitened images


def a_deviation(value) -> bool:
    """A form: a standard deviation in (1e-12, 1e12)."""
    return a_finite_number(value) and 1e-12 < value < 1e12


def a_side(value) -> bool:
    """A form: an image's side in pixels, as in the settings."""
    return a_count(value) and 4 <= value <= 256


ABOUT = {
    "phi": str,
    "own_source": str,
    "shape": [a_count],
    "base_images": a_count,
    "classes": [str],
    "data": {"name": str, "fingerprint": str, "mean": [a_finite_number], "std": [a_deviation]},
    "subset": {
        "seed": a_count,
        "per_class": (None, a_count),
        "fraction": (None, a_fraction),
        "skip": a_fraction,
        "window": (None, a_fraction),
    },
    "setup": {"zca": bool, "size": a_side},
    "config": dict,
    "stopped": (str, dict),
    "source": str,
    "torch": str,
    "strength": a_finite_number,
    "probability": a_fraction,
}


def save_phi(
    path: Path | str, job: Distillation, store: Store, strength: float = 1.0, probability: float = 1.0
) -> Path:
    """Write the phi of `job` (trained now if needed), and how to use it; a `ValueError` if it cannot be restored."""
    use, data, index = Use(strength, probability), job.data, job.index(store)
    distilled = job.stored_phi(store)
    phi = distilled.phi.cpu()
    tensors = separate(phi.state_dict())
    own = job.phi_source or own_source(job.phi)
    about = {
        "phi": job.phi,
        "own_source": own and digest({"source": own}),  # only the digest: a user's code is not stored
        "shape": list(data.shape),
        "base_images": len(index),
        "classes": list(data.classes),
        "data": {
            "name": public_name(data.name),
            "fingerprint": data.fingerprint,
            # for whitened images they are among the tensors
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
    # the file keeps only phi's state, and a phi may hold more: compare the restored phi on some of its images
    few = data.train.take(index[:8]).to("cpu")
    given = few.images, few.labels, torch.arange(len(few))
    with torch.no_grad():
        both = phi, rebuilt(about, tensors)
        before, after = (augmented(p, *given, seeded(0)) for p in both)
        labels = [labels_under(p, *given[1:]) for p in both]
    if not before.isfinite().all():
        raise ValueError(f"phi {job.phi!r} returns images that are not finite, so it is not saved")
    if not (torch.equal(before, after) and torch.equal(*labels)):
        raise ValueError(
            f"phi {job.phi!r} differs after it is rebuilt from its shape, parameters and buffers: "
            "keep all that it needs in its parameters and buffers"
        )
    if data.colour is not None:
        tensors |= dict(zip(WHITENING, (t.cpu() for t in (data.mean, data.train.whiten, data.colour)), strict=True))
    write_sealed(Path(path), KIND, about, tensors)
    return Path(path)


def made_for(about: dict, base: Tensor) -> Phi:
    """A new phi with the name and classes in `about`, for base images like `base`."""
    return without_flips(make_phi(about["phi"], base, len(about["classes"]), 0), about["data"]["name"])


def rebuilt(about: dict, tensors: dict[str, Tensor]) -> Phi:
    """The phi with the name, shape and classes in `about`, and with `tensors` as its state."""
    phi = made_for(about, torch.zeros(1, 1, 1, 1).expand(about["base_images"], *about["shape"]))
    try:
        return restore(phi, tensors)
    except ValueError as error:
        raise ValueError(f"phi {about['phi']!r}, as registered here, has other tensors ({error})") from None


def open_phi(path: Path | str) -> SealedFile:
    """Open a saved phi: its header is checked, its tensors are not read yet; a `ValueError` says what is wrong."""
    file = SealedFile(path, KIND)
    file.check(ABOUT)
    about, shapes = file.about, file.shapes
    with file.checking():
        channels, *sides = about["shape"]
        if sides != 2 * [about["setup"]["size"]]:
            raise ValueError(f"shape={about['shape']}: must be [channels, size, size], size {about['setup']['size']}")
        if (
            not channels
            or not about["base_images"]
            or not about["classes"]
            or len(set(about["classes"])) < len(about["classes"])
        ):
            raise ValueError("it must have channels, base images, and classes with different names")
        Use(about["strength"], about["probability"])
        subset = Subset(**about["subset"])
        if (subset.per_class is None) == (subset.fraction is None):
            raise ValueError(f"subset={about['subset']}: must have per_class or fraction")
        pixels = channels * sides[0] ** 2
        whitening = dict(zip(WHITENING, (tuple(about["shape"]), (pixels, pixels), (pixels, pixels)), strict=True))
        whitened = about["setup"]["zca"]
        for name, shape in whitening.items():
            if (shapes.get(name) != ("F32", shape)) if whitened else (name in shapes):
                raise ValueError(f"zca={whitened}, but {name} is {shapes.get(name)}")
        lengths = [len(about["data"][key]) for key in ("mean", "std")]
        if lengths not in ([[0, 1], [0, channels]] if whitened else [[channels, channels]]):
            raise ValueError(f"{lengths} means and standard deviations for {channels} channels")
    return file


def check_sizes(file: SealedFile) -> None:
    """A `ValueError` unless the tensors have the sizes of this phi, which is built on the meta device (no memory).

    A user's own phi is not checked: it may need the values of its base images.
    """
    about = file.about
    if not all(map(is_ours, builders(about["phi"]))):
        return
    with file.checking(), torch.device("meta"):
        base = torch.empty(about["base_images"], *about["shape"])
        wanted = {name: tuple(t.shape) for name, t in made_for(about, base).state_dict().items()}
    found = {name: shape for name, (_, shape) in file.shapes.items() if name not in WHITENING}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            sizes = f"{name} is {found.get(name, 'missing')}, must be {wanted.get(name, 'absent')}"
            raise ValueError(f"{file.path}: phi {about['phi']!r}, as registered here, has other tensors ({sizes})")


def unregistered(phi: str) -> list[str]:
    """The names in a phi's (chain's) name that are not registered."""
    return [name for name in phi.split("+") if name not in PHIS]


def load_phi(path: Path | str, strength: float | None = None, probability: float | None = None) -> Augment:
    """A saved phi, ready for use, with the saved or with another strength (any float) or probability (in [0, 1]).

    A `ValueError` names a file that is damaged, is not a phi file, or needs a phi that is not registered here.
    """
    file = open_phi(path)
    about = file.about
    for name in unregistered(about["phi"]):
        own = "it is a user's own phi: register it first (import its file, or --set phis=FILE on the command line)"
        known = f"must be one of {', '.join(PHIS)}"
        raise ValueError(f"{path}: unknown phi {name!r}; {own if about['own_source'] else known}")
    own = own_source(about["phi"])
    if (own and digest({"source": own})) != about["own_source"]:
        warnings.warn(f"{path}: phi {about['phi']!r} was trained with other source code than it has here", stacklevel=2)
    given = {"strength": strength, "probability": probability}
    use = Use(**{key: about[key] if value is None else value for key, value in given.items()})
    check_sizes(file)
    tensors = file.read()
    with file.checking():
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{name} has values that are not finite")
    whitening = [tensors.pop(name) for name in WHITENING if name in tensors]
    try:
        return Augment(rebuilt(about, tensors), about, use, whitening)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
