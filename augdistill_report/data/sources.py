"""Finds the files of published data sets, and checks that they are complete.

The files and their layout are torchvision's, so a folder that torchvision has downloaded can be used.
"""

import hashlib
import math
import os
import struct
from pathlib import Path

PUBLISHED = {"mnist": "MNIST", "fashion": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}


def published(name: str):
    """torchvision's class for that data set."""
    from torchvision import datasets  # imports in a second: only when needed

    return getattr(datasets, PUBLISHED[name])


def cache() -> Path:
    """The user's cache folder, for files that can be computed or downloaded again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "augdistill"


def roots(data: str = "") -> dict[str, Path]:
    """The folders that may hold data sets, in search order; each key says which setting or variable names it."""
    named = {"the setting data": data, "AUGDISTILL_DATA": os.environ.get("AUGDISTILL_DATA", "")}
    return {what: Path(path).expanduser() for what, path in named.items() if path} | {"the cache": cache()}


def files(name: str) -> dict[Path, str]:
    """The files of a data set, relative to a root, with their md5 sums ("" where torchvision has none)."""
    kind = published(name)
    if hasattr(kind, "base_folder"):
        table = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
        return {Path(kind.base_folder) / file: md5 for file, md5 in table}
    return {Path(kind.__name__) / "raw" / file.removesuffix(".gz"): "" for file, _ in kind.resources}


def damage(path: Path, md5: str) -> str:
    """What is wrong with a file, or "". Without an md5 sum, its size must match its idx header."""
    if not path.is_file():
        return "is missing"
    if md5:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        return "" if found == md5 else f"is damaged (md5 {found}, must be {md5})"
    axes = 3 if "idx3" in path.name else 1
    with open(path, "rb") as file:
        header = file.read(4 + 4 * axes)
    if len(header) < 4 + 4 * axes or header[:4] != bytes((0, 0, 8, axes)):
        return f"is damaged (its header is not that of an idx file of bytes with {axes} axes)"
    size, found = len(header) + math.prod(struct.unpack_from(f">{axes}I", header, 4)), path.stat().st_size
    return "" if found == size > len(header) else f"is damaged ({found} bytes, must be {size})"


def check_files(name: str, root: Path) -> None:
    """A `ValueError` names the first file of a data set under `root` that is missing or damaged."""
    for path, md5 in files(name).items():
        if wrong := damage(root / path, md5):
            help = f"`augdistill data fetch {name} --data {root}` downloads it again"
            raise ValueError(f"dataset={name!r}: {root / path} {wrong}; {help}")


def find(name: str, data: str = "") -> Path:
    """The first root that holds the data set, its files checked; a `ValueError` lists the searched folders."""
    if data and not Path(data).expanduser().is_dir():
        raise ValueError(f"data={data!r}: there is no such folder")
    folder = next(iter(files(name))).parts[0]
    for root in roots(data).values():
        if (root / folder).is_dir():
            check_files(name, root)
            return root
    places = ", ".join(f"{root / folder} ({what})" for what, root in roots(data).items())
    raise ValueError(
        f"dataset={name!r}: not found in {places}. `augdistill data fetch {name}` downloads it; "
        "the setting data, or the environment variable AUGDISTILL_DATA, can name a folder that already holds it"
    )
