"""Files that a person can trust: each is whole or not there, says what made it, and holds no code.

A result is stored under a digest of everything that it depends on (its settings, the data, the source of the method,
the version of torch), so an equal configuration finds it and no other configuration can. All tensors are kept in one
format (`write_sealed`): safetensors, never pickles, with digests that show a file that has changed since.
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

FORMAT = "augdistill 1"  # the one key in the header of a sealed file

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


def check_form(value, form, name: str = "it") -> None:
    """A `ValueError` that names the first part of a JSON value that does not have this form.

    A form is a type (`float` takes whole numbers too, `int` no `True`), `{key: form}` for a dictionary with at least
    these keys (`{str: form}` for one with any), `[form]` for a list, a tuple of forms of which one is enough, or a
    predicate, whose name says what is right.
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
    """A form: a whole number from 0 on."""
    return _fits(value, int) and 0 <= value < 2**53


def a_finite_number(value) -> bool:
    """A form."""
    return _fits(value, float) and abs(value) <= sys.float_info.max


def a_fraction(value) -> bool:
    """A form: a number in [0, 1]."""
    return _fits(value, float) and 0 <= value <= 1


# --- sealed tensor files ----------------------------------------------------------------------------------------------


def write_sealed(path: Path, kind: str, about: dict, tensors: dict[str, Tensor]) -> None:
    """Write tensors and plain JSON values as one safetensors file that shows every later change of it.

    Its header has one key, a JSON of {kind, about, digests, seal}: the SHA-256 of every tensor, and one of all this.
    The same content in the same order is the same bytes.
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
    """A file of `write_sealed`, to read. Opening verifies the header alone, reading a tensor verifies that tensor.

    `about` is what it says, `shapes` holds the type and shape of every tensor by name, `digests` their SHA-256. Every
    `ValueError` names the file: one that is damaged (`advice` says what to do then), or that is none of this kind.
    """

    def __init__(self, path: Path | str, kind: str, advice: str = ""):
        self.path, self.advice = Path(path), advice
        if not self.path.is_file():  # a folder, a link to nowhere, or a pipe, on which a reader would wait for ever
            raise ValueError(f"{self.path}: no such file")
        with self._open() as file:
            header = file.metadata() or {}
            if FORMAT not in header:
                raise ValueError(f"{self.path} is not ours (a safetensors file, but of something else)")
            with self.checking():
                content = json.loads(header[FORMAT])
                check_form(content, {"kind": str, "about": dict, "digests": {str: str}, "seal": str}, "header")
                if content.pop("seal") != _seal(content):
                    raise ValueError("its header is not what was written")
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no dict)
                self.shapes = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
                self.about, self.digests = content["about"], content["digests"]
                if self.shapes.keys() != self.digests.keys():
                    raise ValueError("its tensors are not those that its header names")
        if content["kind"] != kind:
            raise ValueError(f"{self.path} is not ours (of something else: {content['kind']!r}, not {kind!r})")

    @contextlib.contextmanager
    def checking(self):
        """While what the file holds is checked: what is wrong becomes a `ValueError` that names the file."""
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
            # what torch.save writes, an archive or a bare pickle; a whole safetensors file may start so too
            pickled = start == b"PK" or start[:1] == b"\x80"
            reason = "a pickle, which may hold code, is never opened" if pickled else str(error)
            raise ValueError(f"{self.path} is damaged ({reason}){self.advice}") from None

    def check(self, form: dict) -> None:
        """A `ValueError` unless `about` has this form."""
        with self.checking():
            check_form(self.about, form, "about")

    def read(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Copies of the tensors of these names (of all), each compared with its digest."""
        found = {}
        with self._open() as file, self.checking():
            for name in self.shapes if names is None else names:
                found[name] = file.get_tensor(name).clone()  # of the file itself it would be a view
                if tensor_digest(found[name]) != self.digests[name]:
                    raise ValueError(f"{name}: its contents are not those that were written")
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
    """Tensors as a file takes them: on the CPU, each with memory of its own (a phi may hold one layer twice)."""
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}


def restore(module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """`module` with this state; a `ValueError` unless names, shapes and types are those of its own."""
    own = {name: (tuple(t.shape), t.dtype) for name, t in module.state_dict().items()}
    found = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    for name in sorted(own.keys() | found.keys()):
        if own.get(name) != found.get(name):
            raise ValueError(f"{name} is {found.get(name, 'missing')}, must be {own.get(name, 'absent')}")
    module.load_state_dict(tensors)
    return module


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
        path = self.path(kind, spec)
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.lock(path):
            write_sealed(path, kind, {"spec": spec, "meta": meta, "seconds": seconds}, tensors)

    def open(self, kind: str, spec: dict, form: dict | None = None) -> SealedFile:
        """The file of a result, its tensors unread; a `ValueError` names one that is damaged, foreign, or whose values
        do not have this `form` (see `check_form`).
        """
        file = open_stored(self.path(kind, spec), kind, form)
        if file.about["spec"] != json.loads(json.dumps(spec)):
            raise ValueError(f"{file.path} is not ours (it was made from another specification): move it away")
        return file

    def seconds(self, kind: str, spec: dict) -> float:
        """How long a stored result took to make, all the processes that worked on it together."""
        return self.open(kind, spec).about["seconds"]

    def load(self, kind: str, spec: dict, form: dict | None = None) -> tuple[dict[str, Tensor], dict]:
        """The tensors and values that `save` stored; a `ValueError` as that of `open`, or if a tensor is damaged."""
        file = self.open(kind, spec, form)
        return file.read(), file.about["meta"]


def open_stored(path: Path, kind: str, form: dict | None = None) -> SealedFile:
    """A file that some `Store` holds, whatever its specification."""
    file = SealedFile(path, kind, advice=": delete it, and run again")
    file.check({"spec": dict, "meta": form or dict, "seconds": a_finite_number})
    return file
