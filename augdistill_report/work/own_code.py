"""The code of a user's own phi: a stored result is reused only while that code is the same.

A phi from a file counts with the text of the file and of the user's own modules that it imports, directly or not. A phi
from a notebook or a script counts by value: its compiled code, and the value of every name that this uses. Installed
packages count by name (`provenance` adds the versions of those that can change a number).
"""

import ast
import dis
import functools
import hashlib
import importlib.util
import sys
import sysconfig
import types
import uuid
from pathlib import Path

import numpy as np
import torch

from augdistill_core import builders, is_ours
from augdistill_report.places import ROOT

INSTALLED = [Path(sysconfig.get_path(key)).resolve() for key in ("stdlib", "platstdlib", "purelib", "platlib")]

OURS = [ROOT / name for name in ("augdistill_core.py", "augdistill_method", "augdistill_report")]

ADDED_BY_PYTHON = ["__dict__", "__weakref__", "__doc__", "__module__", "_abc_impl"]  # to a class
ADDED_BY_PYTHON += ["__firstlineno__", "__static_attributes__", "__annotations_cache__"]  # newer versions of Python

PLAIN = type(None) | type(...) | bool | int | float | complex | str | bytes | range | torch.dtype | torch.device

CALLED = type | types.FunctionType | types.BuiltinFunctionType


def own_source(phi: str) -> str:
    """The code of a user's own phi, or of all in a chain; "" for a phi of this project."""
    return "".join(code_of(build) for build in builders(phi) if not is_ours(build))


# --- code in files ----------------------------------------------------------------------------------------------------


def is_own(file: Path) -> bool:
    """Whether a file is a user's own Python code, neither installed nor of this project."""
    return file.suffix == ".py" and not any(file.is_relative_to(place) for place in [*INSTALLED, *OURS])


def file_source(file: Path, seen: set[Path] | None = None) -> str:
    """The text of a Python file, and of the user's own modules that it imports, directly or not."""
    seen = set() if seen is None else seen
    if file in seen:
        return ""
    seen.add(file)
    text = file.read_text(encoding="utf-8")
    return text + "".join(file_source(other, seen) for other in sorted(imported_files(file, text)))


def imported_files(file: Path, text: str) -> set[Path]:
    """The user's own files that a file imports directly, at its top or in a function."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [(None, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            folder = file.parents[node.level - 1] if node.level else None
            start = node.module or ""
            names = [(folder, start), *((folder, f"{start}.{alias.name}".lstrip(".")) for alias in node.names)]
        else:
            continue
        for folder, name in names:
            found |= {path for path in module_files(name, folder) if is_own(path)}
    return found


def module_files(module: str, folder: Path | None) -> list[Path]:
    """The files of a module and of the packages around it; relative to a `folder`, else found as Python does."""
    first, *rest = module.split(".")
    if folder is None:
        spec = importlib.util.find_spec(first) if first else None
        if spec is None or not spec.origin or not spec.has_location:
            return []
        origin = Path(spec.origin).resolve()
        found, folder = [origin], origin.parent
    else:
        found, rest = [folder / "__init__.py"], module.split(".")
    for part in rest:
        found += [folder / f"{part}.py", folder / part / "__init__.py"]
        folder = folder / part
    return [path for path in found if path.is_file()]


# --- values -----------------------------------------------------------------------------------------------------------


def code_of(value, seen: dict | None = None) -> str:
    """A value as text that is the same in another process, and another if its content or its code is edited.

    A value that cannot be described has a new text in each process, so that nothing is reused.
    """
    seen = {} if seen is None else seen
    if isinstance(value, PLAIN):
        return repr(value)
    if id(value) in seen:
        return f"<{seen[id(value)][0]}>"
    seen[id(value)] = len(seen), value  # kept, so that no other value gets its id

    def listed(values) -> str:
        return ", ".join(code_of(one, seen) for one in values)

    def of_names(names: dict) -> str:
        return ", ".join(f"{name}: {code_of(one, seen)}" for name, one in names.items())

    if isinstance(value, types.ModuleType):
        return in_file(value.__name__) or value.__name__
    if isinstance(value, CALLED) and is_imported(value.__module__):
        return f"{value.__qualname__} {in_file(value.__module__) or value.__module__}"
    if isinstance(value, type):
        own = {name: one for name, one in vars(value).items() if name not in ADDED_BY_PYTHON}
        return f"class {value.__qualname__}({listed(value.__bases__)}) {{{of_names(own)}}}"
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        used = {name: value.__globals__[name] for name in globals_of(value.__code__) if name in value.__globals__}
        given = listed([value.__code__, value.__defaults__, value.__kwdefaults__, *cells])
        return f"function {value.__qualname__} {given} {{{of_names(used)}}}"
    if isinstance(value, types.CodeType):
        parts = (value.co_names, value.co_varnames, value.co_freevars, value.co_consts)
        return f"code {value.co_code.hex()} {listed(parts)}"
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufc":
        value = torch.tensor(value)
    if isinstance(value, torch.Tensor):
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return f"tensor {value.dtype} {tuple(value.shape)} {hashlib.sha256(content).hexdigest()}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}[{listed(value)}]"
    if isinstance(value, set | frozenset):
        return f"set[{', '.join(sorted(code_of(one, seen) for one in value))}]"
    if isinstance(value, dict | types.MappingProxyType):
        return f"dict{{{', '.join(f'{code_of(k, seen)}: {code_of(one, seen)}' for k, one in value.items())}}}"
    if isinstance(value, staticmethod | classmethod):
        return f"{type(value).__name__} {code_of(value.__func__, seen)}"
    if isinstance(value, property):
        return f"property {listed((value.fget, value.fset, value.fdel))}"
    if isinstance(value, types.MethodType):
        return f"method {listed((value.__func__, value.__self__))}"
    if isinstance(value, functools.partial):
        return f"partial {listed((value.func, value.args, value.keywords))}"
    if isinstance(value, types.BuiltinFunctionType):
        return f"{value.__qualname__} {value.__module__}"
    if hasattr(value, "__dict__"):
        return f"object {code_of(type(value), seen)} {{{of_names(vars(value))}}}"
    return f"{type(value).__qualname__} {uuid.uuid4()}"


def is_imported(module: str | None) -> bool:
    """Whether a module is not the notebook or script itself, and lies where a new process would find it again."""
    if module in sys.builtin_module_names:
        return True
    return module != "__main__" and bool(getattr(sys.modules.get(module), "__file__", None))


def in_file(module: str) -> str:
    """The code of a user's own module, or ""."""
    file = getattr(sys.modules.get(module), "__file__", None)
    return file_source(Path(file).resolve()) if file and is_own(Path(file).resolve()) else ""


def globals_of(code: types.CodeType) -> list[str]:
    """The names that code looks up outside of its functions, those inside it included, in order."""
    names = {i.argval: None for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            names |= dict.fromkeys(globals_of(inner))
    return list(names)
