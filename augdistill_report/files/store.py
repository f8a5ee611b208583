"""Files that a person can trust: each is whole or not there, says what made it, and holds no code.

A result is stored under a digest of everything that it depends on (its settings, the data, the source of the method,
the version of torch), so an equal configuration finds it and no other configuration can. Tensors are safetensors,
never pickles, and a checksum tells a file that has changed since.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import tempfile
import uuid
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

TOKEN = ".token"

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # there is no room for a file, or not for one as large


def write(path: Path, content: bytes | str) -> None:
    """Write a file whole or not at all: a reader sees the old one or the new one, whatever happens in between.

    An `OSError` that names the file if there is no room for it.
    """
    content = content.encode() if isinstance(content, str) else content
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            kept = "what was finished is kept, and once there is room the same command goes on from there"
            reason = f"{error.strerror} ({len(content)} bytes did not fit; {kept})"
            raise OSError(error.errno, reason, str(path)) from None
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


def separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as a file takes them: on the CPU, each with memory of its own (a phi may hold one layer twice)."""
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}


class Store:
    """Results of finished pieces of work, in `folder`, by kind and specification."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)

    def path(self, kind: str, spec: dict) -> Path:
        return self.folder / f"{kind}-{digest(spec)}.safetensors"

    def token(self) -> str:
        """What this folder is known by, wherever it is seen from: a file in it, made once."""
        if not self.known_by():
            write(self.folder / TOKEN, uuid.uuid4().hex)
        return (self.folder / TOKEN).read_text()

    def known_by(self, token: str = "") -> bool:
        """Whether it is the folder of this token (or of any)."""
        path = self.folder / TOKEN
        return path.is_file() and token in ("", path.read_text())

    def has(self, kind: str, spec: dict) -> bool:
        return self.path(kind, spec).is_file()

    @contextlib.contextmanager
    def making(self, kind: str, spec: dict):
        """Held while a result is made: another process that wants it waits, and finds it. Ends with its process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.sweep()
        with self.lock(self.path(kind, spec)):
            yield

    def lock(self, path: Path) -> FileLock:
        """What a process holds while it makes or writes a result; one that holds it may take it again."""
        return FileLock(self.folder / f".{path.stem}.lock", is_singleton=True)

    def sweep(self) -> None:
        """Remove what was left half written by processes that were killed: the files that nobody holds the lock of."""
        for left in self.folder.glob(".*.safetensors.*"):
            lock = self.lock(Path(left.name.removeprefix(".")).with_suffix(""))
            with contextlib.suppress(Timeout), lock.acquire(timeout=0):
                left.unlink(missing_ok=True)

    def save(self, kind: str, spec: dict, tensors: dict[str, Tensor], meta: dict, seconds: float = 0.0) -> None:
        """Store tensors and plain JSON values; the specification goes with them, and how long it took."""
        tensors = separate(tensors)
        header = {"kind": kind, "spec": json.dumps(spec, sort_keys=True), "meta": json.dumps(meta)}
        header["seconds"] = json.dumps(seconds)
        content = to_safetensors(tensors, header | {"sha256": checksum(header, tensors)})
        path = self.path(kind, spec)
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.lock(path):
            write(path, content)

    def seconds(self, kind: str, spec: dict) -> float:
        """How long a stored result took to make."""
        with opened(self.path(kind, spec)) as file:
            return json.loads(file.metadata()["seconds"])

    def load(self, kind: str, spec: dict) -> tuple[dict[str, Tensor], dict]:
        """The tensors and values that `save` stored; a `ValueError` that names a damaged or foreign file."""
        path = self.path(kind, spec)
        try:
            tensors, header = read_tensors(path)
            if header.pop("sha256") != checksum(header, tensors):
                raise ValueError("its contents are not those that were written")
            if header["kind"] != kind or json.loads(header["spec"]) != json.loads(json.dumps(spec)):
                raise ValueError("it was made from another specification")
            return tensors, json.loads(header["meta"])
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} is damaged or not ours ({error}): delete it, and run again") from None
