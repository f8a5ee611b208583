"""What a number depends on besides its settings: the source code, the versions, the machine, the commit.

A stored result depends on the source of the modules that its job imports, directly or not (`Sources.imported`).
Comments, docstrings and layout do not count, so editing them repeats no work.
"""

import ast
import contextlib
import functools
import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import numpy as np
import torch

from augdistill_core import builders, is_ours, origin
from augdistill_report.files.store import digest
from augdistill_report.places import ROOT

NUMERIC = ("torchvision", "kornia")  # besides torch: packages whose version can change a number

PACKAGES = ("augdistill_core.py", "augdistill_method", "augdistill_report")
CODE = [*PACKAGES, "notebooks", "pyproject.toml"]


def read_sources(root: Path) -> dict[str, str]:
    """The source of every module of this project below `root`, by its dotted name."""
    files = [file for package in PACKAGES for file in [root / package, *sorted((root / package).rglob("*.py"))]]
    names = {file: file.relative_to(root).with_suffix("").parts for file in files if file.suffix == ".py"}
    return {".".join(p for p in parts if p != "__init__"): file.read_text("utf-8") for file, parts in names.items()}


class Sources:
    """The project's modules, read when this is created: what each imports, and digests of their source."""

    def __init__(self, root: Path):
        self.text = read_sources(root)
        self.digest = functools.cache(self._digest)
        self.tree = functools.cache(self._tree)
        self.imported = functools.cache(self._imported)

    def _tree(self, module: str) -> ast.Module:
        """A module's syntax tree without what does not run: docstrings, and imports for type checkers."""
        tree = ast.parse(self.text[module])
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if not isinstance(body, list):
                continue
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                body[0].value.value = ""
            body[:] = [n for n in body if not (isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test))]
        return tree

    def defined_in(self, module: str, name: str) -> str:
        """The module that defines `name`, if `module` only re-exports it (as `augdistill_core` does)."""
        for node in self.tree(module).body:
            if isinstance(node, ast.ImportFrom) and node.module in self.text:
                for alias in node.names:
                    if name == (alias.asname or alias.name):
                        inside = f"{node.module}.{alias.name}"
                        return inside if inside in self.text else self.defined_in(node.module, alias.name)
        return module

    def imports(self, module: str) -> set[str]:
        """The project's modules that a module imports directly, at its top or in a function."""
        found = set()
        for node in ast.walk(self.tree(module)):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names if alias.name in self.text}
            elif isinstance(node, ast.ImportFrom) and node.module in self.text:
                for alias in node.names:
                    inside = f"{node.module}.{alias.name}"
                    found.add(inside if inside in self.text else self.defined_in(node.module, alias.name))
        return found - {module}

    def _imported(self, module: str) -> frozenset[str]:
        """The module itself, and all of the project's modules that it imports, directly or not."""
        found, left = set(), [module]
        while left:
            if (name := left.pop()) not in found:
                found.add(name)
                left += self.imports(name)
        return frozenset(found)

    def _digest(self, *modules: str) -> str:
        """A digest of the source of these modules and all that they import (no modules: of all), and of the versions of
        the installed packages among these that compute numbers."""
        names = sorted(frozenset().union(*map(self.imported, modules)) if modules else self.text)
        content = {name: hashlib.sha256(ast.dump(self.tree(name)).encode()).hexdigest() for name in names}
        used = {name for module in names for name in self.packages(module)}
        known = {name: importlib.metadata.version(name) for name in NUMERIC if name in used}
        return digest({"torch": torch.__version__, "packages": known, "modules": content})

    def packages(self, module: str) -> set[str]:
        """The first names of all that a module imports."""
        found = set()
        for node in ast.walk(self.tree(module)):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
        return found


SOURCES = Sources(ROOT)  # read at import, so that it is the code that this process runs


# --- phis -------------------------------------------------------------------------------------------------------------


def phi_modules(phi: str) -> list[str]:
    """The project's modules that define a phi (or each phi of a chain)."""
    return sorted({origin(build)[0] for build in builders(phi) if is_ours(build)})


# --- versions and the commit ------------------------------------------------------------------------------------------


def versions(device: str) -> dict:
    cuda = device == "cuda"
    on = torch.cuda.get_device_name() if cuda else f"CPU, {torch.backends.cpu.get_cpu_capability()}"
    return {"python": platform.python_version(), "torch": torch.__version__, "device": on}


def git(*arguments: str) -> str:
    """The output of a git command on this clone; "" without git or outside a clone."""
    try:
        out = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return out.stdout.strip()


def archived_commit() -> str:
    """The commit that `git archive` wrote into this copy of the code; "" in a clone."""
    with contextlib.suppress(OSError):
        text = (ROOT / "augdistill_report" / "COMMIT").read_text(encoding="utf-8").strip()
        return "" if text.startswith("$") else text
    return ""


@functools.cache
def code_state() -> dict:
    """The last commit that changed code, and whether there are uncommitted changes: as they were when this process
    first asked. Whatever takes long asks before it starts, since somebody may commit until it ends."""
    return {
        "commit": git("log", "-1", "--format=%H", "--", *CODE) or archived_commit(),
        "uncommitted": bool(git("status", "--porcelain", "--", *CODE)),
    }


def environment(device: str) -> dict:
    """What a number depends on besides its settings: versions, the machine, and the last commit that changed code."""
    return {
        **versions(device),
        "numpy": np.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
        **code_state(),
    }
