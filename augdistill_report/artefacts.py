"""Files that a person can trust: each is whole or not there, says what made it, and holds no code.

A result is stored under a digest of everything that it depends on (its settings, the data, the source of the method,
the version of torch), so an equal configuration finds it and no other configuration can. Tensors are safetensors,
never pickles.
"""

import contextlib
import hashlib
import json
import math
import os
import tempfile
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor


def write(path: Path, content: bytes | str) -> None:
    """Write a file whole or not at all: a reader sees the old one or the new one, whatever happens in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, OSError):
            error.filename = str(path)  # a full disk does not say where
        raise


def as_json(value) -> str:
    """For people and other programs: in the order in which it was put together; what is not finite becomes null."""
    return json.dumps(_finite(value), indent=1, allow_nan=False) + "\n"


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def digest(spec: dict) -> str:
    """12 hexadecimal digits that stand for `spec` (plain JSON values)."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:12]


@contextlib.contextmanager
def opened(path: Path):
    """A safetensors file, open for reading by the tensor; a `ValueError` that says what is wrong with it."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        with open(path, "rb") as file:
            start = file.read(2)
        # what torch.save writes, an archive or a bare pickle; a whole safetensors file may start so too
        pickled = start == b"PK" or start[:1] == b"\x80"
        raise ValueError("a pickle, which may hold code, is never opened" if pickled else str(error)) from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header of a safetensors file; a `ValueError` that says what is wrong with it."""
    with opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (no dict)


def checksum(about: dict, tensors: dict[str, Tensor]) -> str:
    """The SHA-256 of all that a file means."""
    sha = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


class Store:
    """Results of finished pieces of work, in `folder`, by kind and specification."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)

    def path(self, kind: str, spec: dict) -> Path:
        return self.folder / f"{kind}-{digest(spec)}.safetensors"

    def has(self, kind: str, spec: dict) -> bool:
        return self.path(kind, spec).is_file()

    @contextlib.contextmanager
    def making(self, kind: str, spec: dict):
        """Held while a result is made: another process that wants it waits, and finds it. Ends with its process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(kind, spec)
        with FileLock(self.folder / f".{path.stem}.lock"):
            for rubbish in self.folder.glob(f".{path.name}.*"):  # of a process that was killed while it wrote
                rubbish.unlink()
            yield

    def save(self, kind: str, spec: dict, tensors: dict[str, Tensor], meta: dict) -> None:
        """Store tensors and plain JSON values; the specification goes with them."""
        tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        header = {"kind": kind, "spec": json.dumps(spec, sort_keys=True), "meta": json.dumps(meta)}
        write(self.path(kind, spec), to_safetensors(tensors, header))

    def load(self, kind: str, spec: dict) -> tuple[dict[str, Tensor], dict]:
        """The tensors and values that `save` stored; a `ValueError` that names a damaged or foreign file."""
        path = self.path(kind, spec)
        try:
            tensors, header = read_tensors(path)
            if header["kind"] != kind or json.loads(header["spec"]) != json.loads(json.dumps(spec)):
                raise ValueError("it was made from another specification")
            return tensors, json.loads(header["meta"])
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} is damaged or not ours ({error}): delete it, and run again") from None


REPORT = ("augmentations", "data", "evaluation", "expert_files", "jobs", "settings", "whitening")


def source_digest(root: Path) -> str:
    """A digest of the source that results depend on, and of torch's version: other code, other results."""
    of_report = (f"augdistill_report/{n}.py" for n in REPORT)
    files = [*sorted(path.name for path in root.glob("augdistill_*.py")), *of_report]
    return digest({"torch": torch.__version__} | {name: (root / name).read_text() for name in files})
