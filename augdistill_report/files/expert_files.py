"""Expert trajectories on disk: one file per expert, read and checked one snapshot at a time.

The file is the expert's result in the store, `expert-<digest>.safetensors`: a sealed file with one tensor `[P]` per
snapshot (float32 or float16, named "0", "1", ...). Its header says how it was trained, and its accuracies. Only the
header is used here; the .json file next to it has the same content for people and other programs, and the SHA-256 of
the whole file.
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

NAMES = {"F32": "float32", "F16": "float16"}  # their names in safetensors

SETUP_KEYS = ("dataset", "size", "zca", "width", "depth")  # of a setup: they define an expert's student and data

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
    """A trajectory `[snapshots, P]` as tensors for an expert file; a `ValueError` if a value is not finite."""
    if not theta.isfinite().all():
        raise ValueError(f"expert {expert} has parameters that are not finite (as {theta.dtype})")
    return {str(t): snapshot for t, snapshot in enumerate(theta)}


def content_of(digests: dict[str, str]) -> str:
    """A digest of the whole trajectory, from the digests of a file's tensors."""
    return digest({"sha256": [digests[str(t)] for t in range(len(digests))]})


class ExpertFile(Sequence):
    """An expert trajectory on disk: item t is snapshot t, `[P]` in float32 on `device`.

    `spec` and `about` come from the header. Opening reads only the header, and each snapshot is read alone. A
    `ValueError` names a file that is damaged or not an expert file, or a snapshot that has changed since writing.
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
                raise ValueError("its tensors are not snapshots of one size")
            if len(self.about["validation"]) != len(shapes):
                raise ValueError(f"{len(self.about['validation'])} accuracies for {len(shapes)} snapshots")
            self.parameters, self.float = shape[0], NAMES[kind]

    def __len__(self):
        return len(self.file.shapes)

    def __getitem__(self, snapshot: int) -> Tensor:
        snapshot = range(len(self))[snapshot]
        return kept_snapshot(self, snapshot) if self.device == "cuda" else self.read(snapshot)

    def read(self, snapshot: int) -> Tensor:
        """Snapshot `snapshot` from the file, checked."""
        stored = self.file[str(snapshot)]
        with self.file.checking():
            if not torch.stack(stored.aminmax()).isfinite().all():  # without a copy
                raise ValueError(f"snapshot {snapshot} has values that are not finite")
        return stored.to(self.device, torch.float32)

    @functools.cached_property
    def content(self) -> str:
        """A digest of the whole trajectory."""
        return content_of(self.file.digests)

    @property
    def json(self) -> Path:
        return self.path.with_suffix(".json")

    def describe(self) -> str:
        """The content of the .json file next to it."""
        shape = {"snapshots": len(self), "parameters": self.parameters, "float": self.float}
        setup = {key: value for key, value in self.spec["setup"].items() if value is not None}
        fingerprint = {"fingerprint": setup.pop("dataset")}
        with open(self.path, "rb") as file:
            whole = hashlib.file_digest(file, "sha256").hexdigest()
        about = {"file": self.path.name, "sha256": whole} | shape | self.about | fingerprint | self.spec
        return as_json(about | {"setup": setup})

    def write_json(self) -> None:
        """Write the .json file, unless it exists."""
        if not self.json.is_file():
            write(self.json, self.describe())

    def check(self) -> None:
        """Read and check the whole file; a `ValueError` says what is wrong."""
        for _ in self:
            pass
        # compared as bytes: parsed values can be equal where the text differs (true and 1)
        if self.json.is_file() and self.json.read_bytes() != self.describe().encode():
            raise ValueError(f"{self.json} does not describe {self.path.name} in the same folder: delete one of them")


@functools.lru_cache(maxsize=2000)  # 2.6 GB for CIFAR-10's student
def kept_snapshot(file: ExpertFile, snapshot: int) -> Tensor:
    """`file.read(snapshot)`, kept and not to be changed: two reads take 3.5 ms, a GPU's iteration some 20."""
    return file.read(snapshot)


def in_folder(folder: Path | str) -> list[Path]:
    """The files in a folder that are named like expert files, sorted."""
    return sorted(Path(folder).glob(f"{EXPERT}-*.safetensors"))


def experts_of_setup(folder: str, count: int, key: dict, training: dict, device: str) -> list[ExpertFile]:
    """The first `count` experts of a folder by number.

    A `ValueError` names a file whose setup differs from `key`, or from `training` where the file says how it was
    trained (imported ones do not), and two files of one expert.
    """
    files = sorted((ExpertFile(path, device) for path in in_folder(folder)), key=lambda f: (f.about["expert"], f.path))
    known: dict[tuple, Path] = {}
    for file in files:
        its = file.spec["setup"]
        for name, right in (key | training).items():
            own = its.get(name)
            if own != right and (name in key or own is not None):
                what = "the data's fingerprint" if name == "dataset" else name
                raise ValueError(f"expert_files: {file.path} was made with {what} {own}, this run has {right}")
        number = file.about["expert"], its.get("seed")
        if None not in number and number in known:
            both = f"{known[number].name} and {file.path.name} are both expert {number[0]} of seed {number[1]}"
            raise ValueError(f"expert_files={folder!r}: {both}; keep one")
        known[number] = file.path
    if len(files) < count:
        raise ValueError(f"expert_files={folder!r}: has {len(files)} files expert-*.safetensors, but experts={count}")
    return files[:count]
