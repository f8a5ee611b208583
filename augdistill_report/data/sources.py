"""Where the files of published data sets lie, whether they are whole, and how they come there.

The files are torchvision's, in torchvision's layout, so a folder that it has filled will do. Nothing is downloaded
unless `fetch` is called: over verified TLS, against torchvision's md5 sums, and a file is written whole or not at all.
"""

import gzip
import hashlib
import http.client
import io
import math
import os
import ssl
import struct
import sys
import tarfile
import time
import urllib.request
from pathlib import Path

from augdistill_report.files.store import write

PUBLISHED = {"mnist": "MNIST", "fashion": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}

# torchvision's own host of FashionMNIST speaks no TLS; the authors' repository holds the same files
MORE_MIRRORS = {"fashion": ["https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"]}

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def published(name: str):
    """torchvision's class of that data set."""
    from torchvision import datasets  # a second to import: only for those who read such a set

    return getattr(datasets, PUBLISHED[name])


def cache() -> Path:
    """The user's folder for what can be made or fetched again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "augdistill"


def roots(data: str = "") -> dict[str, Path]:
    """The folders that may hold data sets, by what names them, in the order in which they are looked into."""
    named = {"the setting data": data, "AUGDISTILL_DATA": os.environ.get("AUGDISTILL_DATA", "")}
    return {what: Path(path).expanduser() for what, path in named.items() if path} | {"the cache": cache()}


def files(name: str) -> dict[Path, str]:
    """The files that make up a set, relative to a root, and their md5 sums ("" where torchvision has none)."""
    kind = published(name)
    if hasattr(kind, "base_folder"):
        table = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
        return {Path(kind.base_folder) / file: md5 for file, md5 in table}
    return {Path(kind.__name__) / "raw" / file.removesuffix(".gz"): "" for file, _ in kind.resources}


def damage(path: Path, md5: str) -> str:
    """What is wrong with a file; "" if it is whole. Without an md5 sum, it is held to the size in its idx header."""
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
    """A `ValueError` that names the first file of a set under `root` that is missing or damaged."""
    for path, md5 in files(name).items():
        if wrong := damage(root / path, md5):
            help = f"`augdistill data fetch {name} --data {root}` gets it anew"
            raise ValueError(f"dataset={name!r}: {root / path} {wrong}; {help}")


def find(name: str, data: str = "") -> Path:
    """The first root that holds the set, its files checked; a `ValueError` that says where it was looked for."""
    if data and not Path(data).expanduser().is_dir():
        raise ValueError(f"data={data!r}: there is no such folder")
    folder = next(iter(files(name))).parts[0]
    for root in roots(data).values():
        if (root / folder).is_dir():
            check_files(name, root)
            return root
    places = ", ".join(f"{root / folder} ({what})" for what, root in roots(data).items())
    raise ValueError(
        f"dataset={name!r}: not found; looked for {places}. `augdistill data fetch {name}` downloads it; "
        "the setting data, or the variable AUGDISTILL_DATA, names a folder of yours that has it"
    )


# --- downloading ------------------------------------------------------------------------------------------------------


def check_url(url: str) -> None:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in LOOPBACK):
        raise ValueError(f"{url}: must be https:// (http:// only on this machine)")


class Redirects(urllib.request.HTTPRedirectHandler):
    """A redirection is held to the same rule."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        try:
            check_url(newurl)
        except ValueError as error:
            raise ValueError(f"{req.full_url} leads to {error}") from None
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(url: str, md5: str) -> bytes:
    """What `url` holds, with progress on stderr; a `ValueError` if it cannot be had, or has another md5 sum."""
    check_url(url)
    opener = urllib.request.build_opener(Redirects, urllib.request.HTTPSHandler(context=ssl.create_default_context()))
    content, shown = bytearray(), time.monotonic()
    try:
        with opener.open(url, timeout=30) as answer:
            total = int(answer.headers.get("Content-Length") or 0)
            of = f" of {total / 1e6:.1f}" if total else ""
            while block := answer.read(1 << 18):
                content += block
                if time.monotonic() - shown > (0.5 if sys.stderr.isatty() else 10):
                    shown = time.monotonic()
                    end = "\r" if sys.stderr.isatty() else "\n"
                    print(f"{url}: {len(content) / 1e6:.1f}{of} MB", end=end, file=sys.stderr, flush=True)
    except (OSError, http.client.HTTPException) as error:  # a URLError is an OSError
        raise ValueError(f"{url}: {getattr(error, 'reason', '') or error or type(error).__name__}") from None
    print(f"{url}: {len(content) / 1e6:.1f} MB", file=sys.stderr)
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise ValueError(f"{url}: {len(content)} bytes with md5 {found}; torchvision's table says {md5}")
    return bytes(content)


def sources(name: str, mirror: str = "") -> tuple[list[tuple[str, str]], list[str]]:
    """What there is to download: (file, md5) pairs, and the folders on the web that have them."""
    kind = published(name)
    if hasattr(kind, "base_folder"):
        archives, folders = [(kind.filename, kind.tgz_md5)], [kind.url.removesuffix(kind.filename)]
    else:
        archives, folders = kind.resources, [m for m in kind.mirrors if m.startswith("https:")]
    return archives, [mirror] if mirror else folders + MORE_MIRRORS.get(name, [])


def extracted(name: str, archives: dict[str, bytes]) -> dict[Path, bytes]:
    """The files of a set out of the archives that it is published in."""
    if len(archives) == 1:
        (content,) = archives.values()
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            return {path: tar.extractfile(path.as_posix()).read() for path in files(name)}
    return {path: gzip.decompress(archives[f"{path.name}.gz"]) for path in files(name)}


def fetch(name: str, mirror: str = "", data: str = "") -> Path:
    """Download a set into the first of `roots(data)`, unless it is there and whole; returns that root.

    Files are written when all have come and their md5 sums are right, so an interruption leaves nothing half done.
    """
    if name not in PUBLISHED:
        raise ValueError(f"{name!r}: nothing to download; must be one of {', '.join(PUBLISHED)}")
    root = next(iter(roots(data).values()))
    if not any(damage(root / path, md5) for path, md5 in files(name).items()):
        return root
    archives, folders = sources(name, mirror)
    got = {}
    for file, md5 in archives:
        failures = []
        for folder in folders:
            try:
                got[file] = download(f"{folder.rstrip('/')}/{file}", md5)
                break
            except ValueError as error:
                failures.append(str(error))
        else:
            raise ValueError("cannot download " + "; ".join(failures) + " (--mirror URL names another place)")
    try:
        for path, content in extracted(name, got).items():
            write(root / path, content)
    except (OSError, EOFError, KeyError, tarfile.TarError) as error:
        raise ValueError(f"{root}: {name} cannot be unpacked there ({error})") from None
    return root
