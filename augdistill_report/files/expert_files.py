"""Experts on disk: one file each, read a snapshot at a time and checked as it is read; and trainings under way.

An expert's file is what the store keeps of it: `expert-<digest>.safetensors`, with `theta` `[snapshots, P]` (float32 or
float16) and a header that says what made it, how well it does, and the SHA-256 of every snapshot. The header is the
truth; the .json beside it says the same to people and other programs, with the SHA-256 of the whole file.
"""

import functools
import hashlib
import itertools
import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from augdistill_core import TrainingState
from augdistill_report.files.store import as_json, checksum, digest, opened, read_tensors, write

EXPERT = "expert"

FLOATS = {"float32": torch.float32, "float16": torch.float16}

NAMES = {"F32": "float32", "F16": "float16"}  # what safetensors calls them

SETUP_KEYS = ("dataset", "size", "zca", "width", "depth")  # of a set-up: what an expert's student and data are


def sha256(snapshot: Tensor) -> str:
    return hashlib.sha256(snapshot.contiguous().view(torch.uint8).numpy()).hexdigest()


def sealed(theta: Tensor, spec: dict, about: dict) -> dict:
    """What the header says of a way `[snapshots, P]` beside `spec`: `about` it, and digests of all of this."""
    theta = theta.cpu()
    if not theta.isfinite().all():
        raise ValueError(f"expert {about['expert']} has parameters that are not finite (as {theta.dtype})")
    about = about | {"sha256": [sha256(snapshot) for snapshot in theta]}
    return about | {"seal": digest({"spec": spec, "about": about})}


class ExpertFile(Sequence):
    """An expert's way on disk: item t is snapshot t, `[P]` in float32 on `device`.

    `spec` and `about` are what the header says. Opening reads the header alone; reading a snapshot reads no other. A
    `ValueError` names a file that is damaged or no expert's, and a snapshot that is not what was written.
    """

    def __init__(self, path: Path | str, device: str = "cpu"):
        self.path, self.device = Path(path), device
        try:
            with opened(self.path) as file:
                header = file.metadata() or {}
                if header.get("kind") != EXPERT:
                    raise ValueError("a safetensors file, but of something else")
                self.spec, self.about = json.loads(header["spec"]), json.loads(header["meta"])
                theta = file.get_slice("theta")
                self.shape, self.float = tuple(theta.get_shape()), NAMES[theta.get_dtype()]
            about = {key: value for key, value in self.about.items() if key != "seal"}
            if self.about["seal"] != digest({"spec": self.spec, "about": about}):
                raise ValueError("its header is not what was written")
            if len(self.shape) != 2 or len(self.about["sha256"]) != self.shape[0]:
                raise ValueError(f"theta of shape {self.shape}, with digests of {len(self.about['sha256'])} snapshots")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{self.path} is damaged or no expert of ours ({error}): delete it") from None

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, snapshot: int) -> Tensor:
        snapshot = range(len(self))[snapshot]
        try:
            with opened(self.path) as file:
                stored = file.get_slice("theta")[snapshot]  # a view of the file: copied before it is closed
                if sha256(stored) != self.about["sha256"][snapshot]:
                    raise ValueError("not what was written")
                if not torch.stack(stored.aminmax()).isfinite().all():  # without a copy of it
                    raise ValueError("values that are not finite")
                return stored.to(self.device, torch.float32, copy=True)
        except ValueError as error:
            raise ValueError(f"{self.path} is damaged (snapshot {snapshot}: {error}): delete it") from None

    @functools.cached_property
    def content(self) -> str:
        """A digest of the parameters at every snapshot."""
        return digest({"sha256": self.about["sha256"]})

    @property
    def json(self) -> Path:
        return self.path.with_suffix(".json")

    def describe(self) -> dict:
        """What the .json beside it says."""
        about = {key: value for key, value in self.about.items() if key not in ("sha256", "seal")}
        shape = {"snapshots": self.shape[0], "parameters": self.shape[1], "float": self.float}
        setup = {key: value for key, value in self.spec["setup"].items() if value is not None}
        about["fingerprint"] = setup.pop("dataset")
        with open(self.path, "rb") as file:
            whole = hashlib.file_digest(file, "sha256").hexdigest()
        return {"file": self.path.name, "sha256": whole} | shape | about | self.spec | {"setup": setup}

    def write_json(self) -> None:
        """Write it, unless it is there."""
        if not self.json.is_file():
            write(self.json, as_json(self.describe()))

    def check(self) -> None:
        """Read it whole; a `ValueError` that says what is wrong."""
        for _ in self:
            pass
        if self.json.is_file():
            try:
                same = json.loads(self.json.read_text()) == json.loads(as_json(self.describe()))
            except ValueError:
                same = False
            if not same:
                raise ValueError(f"{self.json} does not describe the {self.path.name} beside it: delete one of them")


def in_folder(folder: Path | str) -> list[Path]:
    """The experts' files in a folder."""
    return sorted(path for path in Path(folder).glob(f"{EXPERT}-*.safetensors") if path.is_file())


def experts_of_setup(folder: str, count: int, key: dict, device: str) -> list[ExpertFile]:
    """The first `count` experts of a folder, by their numbers; a `ValueError` names one of a setup other than `key`."""
    files = sorted((ExpertFile(path, device) for path in in_folder(folder)), key=lambda f: (f.about["expert"], f.path))
    for file in files:
        for name, right in key.items():
            if (own := file.spec["setup"][name]) != right:
                what = "the data's fingerprint" if name == "dataset" else name
                raise ValueError(f"expert_files: {file.path} was made with {what} {own}, this run has {right}")
    if len(files) < count:
        raise ValueError(
            f"expert_files={folder!r}: holds {len(files)} files expert-*.safetensors, experts={count} are asked for"
        )
    return files[:count]


class TrainingFiles:
    """A training under way, on disk: a folder with a file an epoch, which holds what that epoch added.

    So each snapshot is written once, and where the last file is damaged, training goes on from the one before. As it
    makes the same bits again, a warning is enough, and nobody has to be there to delete anything.
    """

    def __init__(self, folder: Path, spec: dict, experts: Sequence[int]):
        self.folder, self.of, self.experts = folder, digest(spec), list(experts)
        self.parts = self.snapshots = 0  # that are on disk

    def part(self, number: int) -> Path:
        return self.folder / f"{number:05}.safetensors"

    def save(self, at: TrainingState) -> None:
        """Write what came since the last time: the `on_epoch` of a training."""
        tensors = {"generators": torch.stack([own.get_state() for own in at.generators])}
        if at.rest:  # else theta is the last snapshot
            tensors["theta"] = at.theta
        tensors |= {f"snapshot {i}": at.snapshots[i] for i in range(self.snapshots, len(at.snapshots))}
        tensors |= {f"loss {i}": at.losses[i] for i in range(max(0, self.snapshots - 1), len(at.losses))}
        tensors |= {f"rest {i}": loss for i, loss in enumerate(at.rest)}
        if at.velocity.any():
            tensors["velocity"] = at.velocity
        tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
        about = {"of": self.of, "part": self.parts + 1, "experts": self.experts, "seconds": at.seconds}
        about |= {"snapshots": len(at.snapshots), "rest": len(at.rest)}
        header = {"training": json.dumps({"about": about, "sha256": checksum(about, tensors)})}
        write(self.part(self.parts + 1), to_safetensors(tensors, header))
        self.parts, self.snapshots = self.parts + 1, len(at.snapshots)

    def load(self, device: str) -> TrainingState | None:
        """Where the files end, for these experts (which may be some of those trained); None if there are none."""
        found: dict[str, Tensor] = {}
        for number in itertools.count(1):
            path = self.part(number)
            if not path.is_file():
                break
            try:
                tensors, about = self.read(path, number)
            except (ValueError, KeyError, TypeError) as error:
                warnings.warn(f"{path} is damaged or not ours ({error}): training goes on from before it", stacklevel=2)
                break
            self.parts, self.snapshots = number, about["snapshots"]
            last = tensors
            found |= tensors
        if not self.parts:
            return None
        generators = [torch.Generator() for _ in self.experts]
        for own, state in zip(generators, last["generators"], strict=True):
            own.set_state(state.clone())  # of a part of a tensor, torch 2 takes other memory
        lists = (("snapshot", self.snapshots), ("loss", self.snapshots - 1), ("rest", about["rest"]))
        way, losses, rest = ([found[f"{name} {i}"].to(device) for i in range(count)] for name, count in lists)
        theta = last["theta"].to(device) if rest else way[-1]
        velocity = last["velocity"].to(device) if "velocity" in last else torch.zeros_like(theta)
        return TrainingState(theta, velocity, generators, way, losses, rest, about["seconds"])

    def read(self, path: Path, number: int) -> tuple[dict[str, Tensor], dict]:
        """One file: its tensors, of these experts only, and what it says of itself."""
        tensors, header = read_tensors(path)
        if "training" not in header:
            raise ValueError("a safetensors file, but of something else")
        said = json.loads(header["training"])
        about = said["about"]
        if said["sha256"] != checksum(about, tensors):
            raise ValueError("its contents are not those that were written")
        if (about["of"], about["part"]) != (self.of, number) or not set(self.experts) <= set(about["experts"]):
            raise ValueError("it is of another training")
        rows = [about["experts"].index(k) for k in self.experts]
        return {name: t[rows] for name, t in tensors.items()}, about

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
