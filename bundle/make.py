"""Packs code, CIFAR-10 and packages for a machine with a GPU and no network, in pieces: `make gpu-bundle`.

    python bundle/make.py [--python 3.12] [--megabytes 60] [--out runs/augdistill-bundle]

That machine needs Python, torch, torchvision, numpy, Pillow and safetensors. The bundle brings the code (git archive of
HEAD, so commit first), the other packages that the benchmark and a campaign import, in the versions installed here, and
CIFAR-10 without a loss in 55 % of its size. Copy the folder there, the pieces also one at a time, and run its join.py.
This needs a network for the packages; there nothing does.
"""

import argparse
import hashlib
import importlib.metadata
import io
import json
import lzma
import platform
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from join import sheets_of

from augdistill_report.data.sources import files, find
from augdistill_report.files.store import write
from augdistill_report.places import ROOT

THERE = ("torch", "torchvision", "numpy", "pillow", "safetensors")  # and all that these need

IMPORTED = ("kornia", "scipy", "matplotlib", "pyyaml", "loky", "cloudpickle", "filelock")  # by campaign and benchmark

GLIBC = (39, 38, 37, 36, 35, 34, 31, 28, 27, 24, 17, 12, 5)  # pip matches the numbers of manylinux tags exactly

IMAGES = 10_000 * 3072  # bytes of images in one file of CIFAR-10


def needed(names: tuple[str, ...]) -> set[str]:
    """These packages and all that they need here, extras left out; by normalised name."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name in found:
            continue
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform or version of Python
        found.add(name)
        left += [re.match(r"[\w.-]+", text)[0] for text in requires if "extra ==" not in text]
    return found


def download_wheels(python: str, folder: Path) -> None:
    """The wheels that a machine with `THERE` lacks, in the versions installed here, for that version of Python."""
    pins = [f"{name}=={importlib.metadata.version(name)}" for name in sorted(needed(IMPORTED) - needed(THERE))]
    platforms = [f"--platform=manylinux_2_{n}_{platform.machine()}" for n in GLIBC]
    platforms += [f"--platform=manylinux{year}_{platform.machine()}" for year in (2014, 2010, 1)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", folder]
    subprocess.run([*command, f"--python-version={python}", *platforms, *pins], check=True)


def pack_cifar(folder: Path) -> dict[str, dict]:
    """Write the files of CIFAR-10, their images as pictures; returns what `join.py` needs to restore their bytes."""
    about = {}
    root = find("cifar10")
    for path in files("cifar10"):
        content = (root / path).read_bytes()
        mark = content.find(b"T" + struct.pack("<I", IMAGES))  # a pickle's sign for so many bytes
        start = mark + 5 if mark >= 0 else len(content)
        target = folder / path.name
        for number, sheet in enumerate(sheets_of(content[start : start + IMAGES])):
            write(target / f"{number:02}.webp", sheet)
        rest = content[:start] + content[start + IMAGES :]
        write(target / "rest.xz", lzma.compress(rest))
        about[path.name] = {
            "folder": path.parent.name,
            "start": start,
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    return about


def git_archive(folder: Path) -> str:
    """Write the code of HEAD (without pictures of results) into `folder`; returns its commit."""
    if subprocess.run(["git", "-C", ROOT, "status", "--porcelain"], check=True, capture_output=True).stdout:
        raise SystemExit("there are changes that are not committed: commit them first, since the bundle holds HEAD")
    packed = subprocess.run(["git", "-C", ROOT, "archive", "HEAD", ".", ":!figures"], check=True, capture_output=True)
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as tar:
        tar.extractall(folder, filter="data")
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    return head.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    parser.add_argument("--python", default=here, help="that machine's version of Python (this one's)")
    parser.add_argument("--megabytes", default=60, type=int, help="of a piece, at most (60)")
    parser.add_argument("--out", default=ROOT / "runs" / "augdistill-bundle", type=Path, help="the folder")
    options = parser.parse_args()
    if options.out.exists() and any(options.out.iterdir()) and not (options.out / "manifest.json").is_file():
        parser.error(f"--out {options.out}: holds other files; choose an empty folder")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        commit = git_archive(folder / "code")
        (folder / "wheels").mkdir()
        download_wheels(options.python or here, folder / "wheels")
        cifar = pack_cifar(folder / "cifar")
        with tarfile.open(folder / "bundle.tar", "w") as tar:
            for part in ("code", "wheels", "cifar"):
                tar.add(folder / part, part)
        shutil.rmtree(options.out, ignore_errors=True)
        total, pieces = (folder / "bundle.tar").stat().st_size, {}
        size = -(-total // -(-total // (options.megabytes * 10**6)))  # all of them alike
        with open(folder / "bundle.tar", "rb") as whole:
            while piece := whole.read(size):
                name = f"piece-{len(pieces) + 1:02}"
                write(options.out / name, piece)
                pieces[name] = hashlib.sha256(piece).hexdigest()
        manifest = {"python": options.python or here, "commit": commit, "pieces": pieces, "cifar": cifar}
        write(options.out / "manifest.json", json.dumps(manifest, indent=1) + "\n")
        write(options.out / "join.py", (Path(__file__).parent / "join.py").read_bytes())
    print(f"{options.out}: {len(pieces)} pieces, {total / 1e6:.0f} MB")
    print("Copy join.py, manifest.json and the pieces into one folder there, the pieces also one at a time, and run")
    print("python3 join.py: it says which pieces are missing, and at last which commands to run.")


if __name__ == "__main__":
    main()
