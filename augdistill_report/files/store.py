"""The store of results: each file is complete or absent, says how it was made, and contains no code.

A result is stored under a digest of everything that it depends on (settings, data, source code of the method, torch
version). So an equal configuration finds it, and no other configuration does. All tensors have one file format
(`write_sealed`): safetensors, never pickles, with digests that detect every later change.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import sys
import tempfile
import uuid
from collections.abc import Iterable
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

TOKEN = ".token"

FORMAT = "augdistill 1"  # the only key in the header of a sealed file

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors of a full disk or quota, or of a too large file


def write(path: Path, content: bytes | str) -> None:
    """Write a file atomically: a reader always sees either the complete old file or the complete new one.

    An `OSError` that names the file if there is no space for it.
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
            kept = "finished results are kept; free some space, and the same command continues from there"
            reason = f"{error.strerror} ({len(content)} bytes did not fit; {kept})"
            raise OSError(error.errno, reason, str(path)) from None
        raise


def as_json(value) -> str:
    """A value as JSON text, in its own order; numbers that are not finite become null."""
    return json.dumps(_finite(value), indent=1, allow_nan=False) + "\n"


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def digest(spec: dict) -> str:
    """12 hexadecimal digits that identify `spec` (plain JSON values)."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:12]


def check_form(value, form, name: str = "it") -> None:
    """A `ValueError` that names the first place where a JSON value does not have this form.

    A form is a type (`float` accepts integers, `int` does not accept `True`), `{key: form}` for a dictionary with at
    least these keys (`{str: form}` for any keys), `[form]` for a list, a tuple of alternative forms, or a predicate,
    whose name says what is right.
    """
    if isinstance(form, dict):
        check_form(value, dict, name)
        for key, inside in form.items():
            if key is not str and key not in value:
                raise ValueError(f"{name}: {key!r} is missing")
            for found in value if key is str else [key]:
                check_form(value[found], inside, f"{name}.{found}")
    elif isinstance(form, list):
        check_form(value, list, name)
        for place, item in enumerate(value):
            check_form(item, form[0], f"{name}[{place}]")
    else:
        forms = form if isinstance(form, tuple) else (form,)
        if not any(_fits(value, one) for one in forms):
            right = " or ".join(str(getattr(one, "__name__", one)) for one in forms).replace("_", " ")
            raise ValueError(f"{name}={repr(value)[:60]}: must be {right}")


def _fits(value, form) -> bool:
    if form is None:
        return value is None
    if not isinstance(form, type):
        return form(value)
    if isinstance(value, bool) or form is bool:
        return isinstance(value, bool) and form is bool
    return isinstance(value, int | float if form is float else form)


def a_count(value) -> bool:
    """A form: an integer in [0, 2^53)."""
    return _fits(value, int) and 0 <= value < 2**53


def a_finite_number(value) -> bool:
    """A form: a finite number."""
    return _fits(value, float) and abs(value) <= sys.float_info.max


def a_fraction(value) -> bool:
    """A form: a number in [0, 1]."""
    return _fits(value, float) and 0 <= value <= 1


# --- sealed tensor files ----------------------------------------------------------------------------------------------


def write_sealed(path: Path, kind: str, about: dict, tensors: dict[str, Tensor]) -> None:
    """Write tensors and plain JSON values as one safetensors file in which every later change is detected.

    Its header has one key, a JSON of {kind, about, digests, seal}: `digests` are the SHA-256 of every tensor, `seal` is
    that of the other three. The same content in the same order gives the same bytes.
    """
    tensors = separate(tensors)
    content = {
        "kind": kind,
        "about": about,
        "digests": {name: tensor_digest(tensors[name]) for name in sorted(tensors)},
    }
    write(Path(path), to_safetensors(tensors, {FORMAT: json.dumps(content | {"seal": _seal(content)})}))


def _seal(content: dict) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class SealedFile:
    """A file of `write_sealed`, to read. Opening verifies only the header; reading a tensor verifies that tensor.

    `about` is its JSON content, `shapes` the type and shape of every tensor by name, `digests` their SHA-256. A
    `ValueError` names a file that is damaged (`advice` says what to do then) or not of this kind.
    """

    def __init__(self, path: Path | str, kind: str, advice: str = ""):
        self.path, self.advice = Path(path), advice
        if not self.path.is_file():  # a folder, a broken link, or a pipe, on which reading would never end
            raise ValueError(f"{self.path}: no such file")
        with self._open() as file:
            header = file.metadata() or {}
            if FORMAT not in header:
                raise ValueError(f"{self.path} is not ours (it is another kind of safetensors file)")
            with self.checking():
                content = json.loads(header[FORMAT])
                check_form(content, {"kind": str, "about": dict, "digests": {str: str}, "seal": str}, "header")
                if content.pop("seal") != _seal(content):
                    raise ValueError("its header has changed since it was written")
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no dict)
                self.shapes = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
                self.about, self.digests = content["about"], content["digests"]
                if self.shapes.keys() != self.digests.keys():
                    raise ValueError("its tensors are not those that its header lists")
        if content["kind"] != kind:
            raise ValueError(f"{self.path} is not ours (its kind is {content['kind']!r}, must be {kind!r})")

    @contextlib.contextmanager
    def checking(self):
        """A context for checks of the content: an error in it becomes a `ValueError` that names the file."""
        try:
            yield
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
            raise ValueError(f"{self.path} is damaged ({error}){self.advice}") from None

    @contextlib.contextmanager
    def _open(self):
        try:
            with safe_open(self.path, framework="pt") as file:
                yield file
        except SafetensorError as error:
            with open(self.path, "rb") as file:
                start = file.read(2)
            # torch.save writes an archive or a bare pickle; an intact safetensors file may start so too
            pickled = start == b"PK" or start[:1] == b"\x80"
            reason = "it is a pickle, which may contain code and is never opened" if pickled else str(error)
            raise ValueError(f"{self.path} is damaged ({reason}){self.advice}") from None

    def check(self, form: dict) -> None:
        """A `ValueError` unless `about` has this form (see `check_form`)."""
        with self.checking():
            check_form(self.about, form, "about")

    def read(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Copies of the tensors with these names (default: all), each compared with its digest."""
        found = {}
        with self._open() as file, self.checking():
            for name in self.shapes if names is None else names:
                found[name] = file.get_tensor(name).clone()  # a copy: otherwise it is a view of the file
                if tensor_digest(found[name]) != self.digests[name]:
                    raise ValueError(f"{name}: its values have changed since they were written")
        return found

    def __getitem__(self, name: str) -> Tensor:
        return self.read([name])[name]


def tensor_digest(tensor: Tensor) -> str:
    """The SHA-256 of a tensor's type, shape and values."""
    tensor = tensor.detach().cpu().contiguous()
    sha = hashlib.sha256(repr((tensor.dtype, tuple(tensor.shape))).encode())
    sha.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors ready for a file: on the CPU, each with its own memory (a phi may hold one layer twice)."""
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}


def restore(module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """`module` with this state loaded; a `ValueError` unless names, shapes and types match."""
    own = {name: (tuple(t.shape), t.dtype) for name, t in module.state_dict().items()}
    found = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    for name in sorted(own.keys() | found.keys()):
        if own.get(name) != found.get(name):
            raise ValueError(f"{name} is {found.get(name, 'missing')}, must be {own.get(name, 'absent')}")
    module.load_state_dict(tensors)
    return module


class OutOfTime(Exception):
    """A job was stopped at its time limit. What it has finished is in the store; it goes on from its checkpoint."""


class Store:
    """The results of finished jobs in `folder`, by kind and specification.

    At `deadline` (seconds of `time.monotonic`) a job that has a checkpoint writes it and stops, by `OutOfTime`.
    """

    def __init__(self, folder: Path | str, deadline: float = math.inf):
        self.folder, self.deadline = Path(folder), deadline

    def path(self, kind: str, spec: dict) -> Path:
        return self.folder / f"{kind}-{digest({'format': FORMAT, 'spec': spec})}.safetensors"

    def token(self) -> str:
        """The identity of this folder, the same from every machine: the content of a file in it, written once."""
        if not self.known_by():
            write(self.folder / TOKEN, uuid.uuid4().hex)
        return (self.folder / TOKEN).read_text()

    def known_by(self, token: str = "") -> bool:
        """Whether this folder has this token (or, without an argument, any token)."""
        path = self.folder / TOKEN
        return path.is_file() and token in ("", path.read_text())

    def has(self, kind: str, spec: dict) -> bool:
        return self.path(kind, spec).is_file()

    @contextlib.contextmanager
    def making(self, kind: str, spec: dict):
        """A lock to hold while a result is made: other processes wait, then find it. It ends with its process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.sweep()
        with self.lock(self.path(kind, spec)):
            yield

    def lock(self, path: Path) -> FileLock:
        """The lock for making or writing a result; the process that holds it may acquire it again."""
        return FileLock(self.folder / f".{path.stem}.lock", is_singleton=True)

    def sweep(self) -> None:
        """Remove temporary files of killed processes: those whose lock nobody holds."""
        for left in self.folder.glob(".*.safetensors.*"):
            lock = self.lock(Path(left.name.removeprefix(".")).with_suffix(""))
            with contextlib.suppress(Timeout), lock.acquire(timeout=0):
                left.unlink(missing_ok=True)

    def save(self, kind: str, spec: dict, tensors: dict[str, Tensor], meta: dict, seconds: float = 0.0) -> None:
        """Store tensors and plain JSON values, with their specification and the CPU seconds that they took."""
        path = self.path(kind, spec)
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.lock(path):
            write_sealed(path, kind, {"spec": spec, "meta": meta, "seconds": seconds}, tensors)

    def open(self, kind: str, spec: dict, form: dict | None = None) -> SealedFile:
        """The file of a result, tensors not read yet; a `ValueError` names a file that is damaged, of another kind or
        specification, or without this `form` (see `check_form`).
        """
        file = open_stored(self.path(kind, spec), kind, form)
        if file.about["spec"] != json.loads(json.dumps(spec)):
            raise ValueError(f"{file.path} is not ours (it was made from another specification): move it away")
        return file

    def seconds(self, kind: str, spec: dict) -> float:
        """The CPU seconds that a stored result took, summed over all processes that worked on it."""
        return self.open(kind, spec).about["seconds"]

    def load(self, kind: str, spec: dict, form: dict | None = None) -> tuple[dict[str, Tensor], dict]:
        """The tensors and values that `save` stored; a `ValueError` as in `open`, or for a damaged tensor."""
        file = self.open(kind, spec, form)
        return file.read(), file.about["meta"]


def open_stored(path: Path, kind: str, form: dict | None = None) -> SealedFile:
    """Open a file of any `Store`, with any specification; a `ValueError` as in `Store.open`."""
    file = SealedFile(path, kind, advice=": delete it, and run again")
    file.check({"spec": dict, "meta": form or dict, "seconds": a_finite_number})
    return file
