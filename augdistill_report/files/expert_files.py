"""Experts on disk: one file each, read a snapshot at a time and checked as it is read.

An expert's file is what the store keeps of it: `expert-<digest>.safetensors`, a sealed file with a tensor `[P]` a
snapshot (float32 or float16, named "0", "1", ...), which says what made it and how well it does. The header is the
truth; the .json beside it says the same to people and other programs, with the SHA-256 of the whole file.
"""

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from augdistill_report.files.store import a_count, a_fraction, as_json, digest, open_stored, write

EXPERT = "expert"

FLOATS = {"float32": torch.float32, "float16": torch.float16}

NAMES = {"F32": "float32", "F16": "float16"}  # what safetensors calls them

SETUP_KEYS = ("dataset", "size", "zca", "width", "depth")  # of a setup: what an expert's student and data are

SETUP_FORM = dict(zip(SETUP_KEYS, (str, a_count, bool, a_count, a_count), strict=True))

FORM = {
    "expert": a_count,
    "dataset": str,
    "classes": [str],
    "versions": dict,
    "loss": [float],
    "validation": [a_fraction],
}


def snapshot_tensors(theta: Tensor, expert: int) -> dict[str, Tensor]:
    """A trajectory `[snapshots, P]` as the tensors of an expert's file; a `ValueError` if it is not finite."""
    if not theta.isfinite().all():
        raise ValueError(f"expert {expert} has parameters that are not finite (as {theta.dtype})")
    return {str(t): snapshot for t, snapshot in enumerate(theta)}


def content_of(digests: dict[str, str]) -> str:
    """A digest of the parameters at every snapshot, from those of a file's tensors."""
    return digest({"sha256": [digests[str(t)] for t in range(len(digests))]})


class ExpertFile(Sequence):
    """An expert trajectory on disk: item t is snapshot t, `[P]` in float32 on `device`.

    `spec` and `about` are what the header says. Opening reads the header alone; reading a snapshot reads no other. A
    `ValueError` names a file that is damaged or no expert's, and a snapshot that is not what was written.
    """

    def __init__(self, path: Path | str, device: str = "cpu"):
        self.path, self.device = Path(path), device
        self.file = open_stored(self.path, EXPERT, FORM)
        self.spec, self.about = self.file.about["spec"], self.file.about["meta"]
        self.file.check({"spec": {"setup": SETUP_FORM}})
        shapes = self.file.shapes
        with self.file.checking():
            kind, shape = shapes["0"]
            if len(shape) != 1 or shapes != {str(t): (kind, shape) for t in range(len(shapes))}:
                raise ValueError("its tensors are no snapshots, all of one size")
            if len(self.about["validation"]) != len(shapes):
                raise ValueError(f"{len(self.about['validation'])} accuracies of {len(shapes)} snapshots")
            self.parameters, self.float = shape[0], NAMES[kind]

    def __len__(self):
        return len(self.file.shapes)

    def __getitem__(self, snapshot: int) -> Tensor:
        snapshot = range(len(self))[snapshot]
        stored = self.file[str(snapshot)]
        with self.file.checking():
            if not torch.stack(stored.aminmax()).isfinite().all():  # without a copy of it
                raise ValueError(f"snapshot {snapshot} has values that are not finite")
        return stored.to(self.device, torch.float32)

    @functools.cached_property
    def content(self) -> str:
        """A digest of the parameters at every snapshot."""
        return content_of(self.file.digests)

    @property
    def json(self) -> Path:
        return self.path.with_suffix(".json")

    def describe(self) -> str:
        """What the .json beside it says."""
        shape = {"snapshots": len(self), "parameters": self.parameters, "float": self.float}
        setup = {key: value for key, value in self.spec["setup"].items() if value is not None}
        fingerprint = {"fingerprint": setup.pop("dataset")}
        with open(self.path, "rb") as file:
            whole = hashlib.file_digest(file, "sha256").hexdigest()
        about = {"file": self.path.name, "sha256": whole} | shape | self.about | fingerprint | self.spec
        return as_json(about | {"setup": setup})

    def write_json(self) -> None:
        """Write it, unless it is there."""
        if not self.json.is_file():
            write(self.json, self.describe())

    def check(self) -> None:
        """Read it whole; a `ValueError` that says what is wrong."""
        for _ in self:
            pass
        # to the byte: what is parsed may be taken for the same where it is not (true for 1)
        if self.json.is_file() and self.json.read_bytes() != self.describe().encode():
            raise ValueError(f"{self.json} does not describe the {self.path.name} beside it: delete one of them")


def in_folder(folder: Path | str) -> list[Path]:
    """What is called an expert's file in a folder."""
    return sorted(Path(folder).glob(f"{EXPERT}-*.safetensors"))


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
