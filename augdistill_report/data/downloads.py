"""Downloads published data sets: by pooch, over verified TLS, checked by torchvision's md5 sums.

Nothing is downloaded unless `fetch` is called. Archives go to a temporary folder that is removed, and the files of a
data set are written when all archives are complete. A size limit and a minimum speed protect against bad servers.
"""

import gzip
import sys
import tarfile
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from augdistill_report.data.sources import PUBLISHED, damage, files, published, roots
from augdistill_report.files.store import write
from augdistill_report.work.progress import Line

# torchvision's host of FashionMNIST has no TLS; the authors' repository has the same files
MORE_MIRRORS = {"fashion": ["https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"]}

LOOPBACK = ("localhost", "127.0.0.1", "::1")

LARGEST = 400_000_000  # bytes of an archive; the largest, CIFAR-10's, has 170 million

SLOWEST, WINDOW = 10_000, 60.0  # minimum bytes per second, on average over a window of seconds

BLOCK = 1 << 16  # bytes


def check_url(url: str) -> None:
    """A `ValueError` unless the URL uses TLS, or names this machine."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in LOOPBACK):
        raise ValueError(f"{url}: must be https:// (http:// only on this machine)")


class Transfer:
    """Monitors one download: rejects a redirection without TLS and too many bytes, and ends once it is `stopped`.

    requests calls `answered` with every response. pooch uses this object as its progress bar.
    """

    def __init__(self):
        self.total, self.received, self.complete, self.stopped, self.answer = 0, 0, False, False, None

    def answered(self, response, **_) -> None:
        self.answer = response
        if response.is_redirect:
            try:
                check_url(urllib.parse.urljoin(response.url, response.headers["location"]))
            except ValueError as error:
                raise ValueError(f"redirects to {error}") from None
        # keep a .gz file as it is: some servers declare its compression as encoding, and requests would decompress it
        response.raw.headers.pop("Content-Encoding", None)
        self.check_size(int(response.headers.get("Content-Length") or 0))

    def check_size(self, size: int) -> None:
        if size > LARGEST:
            raise ValueError(f"more than {LARGEST / 1e6:g} MB, the limit for a download")

    def update(self, count: int) -> None:
        self.received += count
        if not self.complete:
            self.check_size(self.received - BLOCK)  # pooch counts the last block as a full one
        if self.stopped:
            raise ValueError("stopped")

    def reset(self) -> None:
        self.complete, self.received = True, 0

    def close(self) -> None:
        """Does nothing; pooch requires it."""


def root_cause(error: BaseException) -> str:
    """The text of the innermost cause of an error: requests and urllib3 wrap "Connection refused" three times."""
    while inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = inner
    return getattr(error, "strerror", None) or str(error).partition(" for url: ")[0] or type(error).__name__


def download(url: str, md5: str, path: Path) -> None:
    """Download `url` to the file `path`, with progress on stderr.

    A `ValueError` names the URL and what is wrong: no response, another md5 sum, too large (`LARGEST` bytes) or too
    slow (`SLOWEST` bytes per second).
    """
    import pooch  # it imports requests, half a second: only when needed

    check_url(url)
    pooch.get_logger().setLevel("ERROR")  # the progress line shows the same
    transfer, errors = Transfer(), []
    downloader = pooch.HTTPDownloader(transfer, BLOCK, timeout=30, hooks={"response": transfer.answered})

    def retrieve():
        try:
            pooch.retrieve(url, f"md5:{md5}", path.name, path.parent, downloader=downloader)
        except Exception as error:  # raised in the main thread
            errors.append(error)
        finally:
            if transfer.answer is not None:
                transfer.answer.close()

    # in a thread, so that any step that takes too long can be left: a name lookup, or a header that never ends
    thread = threading.Thread(target=retrieve, daemon=True)
    thread.start()
    since, before = time.monotonic(), 0
    try:
        with Line() as line:
            while thread.is_alive():
                thread.join(0.2)
                if time.monotonic() - since > WINDOW and not transfer.complete:
                    if transfer.received - before < SLOWEST * WINDOW:
                        raise ValueError(f"{url}: less than {SLOWEST / 1000:g} kB per second in {WINDOW:g} s")
                    since, before = time.monotonic(), transfer.received
                if thread.is_alive():
                    of = f" of {transfer.total / 1e6:.1f}" if transfer.total else ""
                    line.show(f"{url}: {transfer.received / 1e6:.1f}{of} MB")
    finally:
        transfer.stopped = True
        thread.join(1)
    for error in errors:
        raise ValueError(f"{url}: {root_cause(error)}") from None
    print(f"{url}: {path.stat().st_size / 1e6:.1f} MB", file=sys.stderr)


def sources(name: str, mirror: str = "") -> tuple[list[tuple[str, str]], list[str]]:
    """The archives of a data set as (file, md5) pairs, and the URLs of folders to try, in order."""
    kind = published(name)
    if hasattr(kind, "base_folder"):
        archives, folders = [(kind.filename, kind.tgz_md5)], [kind.url.removesuffix(kind.filename)]
    else:
        archives, folders = kind.resources, [m for m in kind.mirrors if m.startswith("https:")]
    return archives, [mirror] if mirror else folders + MORE_MIRRORS.get(name, [])


def extracted(name: str, archives: list[Path]) -> Iterator[tuple[Path, bytes]]:
    """Yields the files of a data set (paths relative to its root) with their content, from its archives."""
    if len(archives) == 1:
        with tarfile.open(archives[0]) as tar:
            yield from ((path, tar.extractfile(path.as_posix()).read()) for path in files(name))
    else:
        for path, archive in zip(files(name), archives, strict=True):
            yield path, gzip.decompress(archive.read_bytes())


def fetch(name: str, mirror: str = "", data: str = "") -> Path:
    """Download a data set into the first of `roots(data)`, unless it is complete there; returns that root.

    A `ValueError` names every place that failed. Files are written when all archives are complete with correct md5
    sums, and each file atomically, so an interruption leaves no partial file.
    """
    if name not in PUBLISHED:
        raise ValueError(f"{name!r}: is not a data set to download; must be one of {', '.join(PUBLISHED)}")
    root = next(iter(roots(data).values()))
    if not any(damage(root / path, md5) for path, md5 in files(name).items()):
        return root
    archives, folders = sources(name, mirror)
    with tempfile.TemporaryDirectory(prefix="augdistill-", ignore_cleanup_errors=True) as temporary:
        for file, md5 in archives:
            failures = []
            for folder in folders:
                try:
                    download(f"{folder.rstrip('/')}/{file}", md5, Path(temporary) / file)
                    break
                except ValueError as error:
                    failures.append(str(error))
            else:
                raise ValueError("cannot download " + "; ".join(failures) + " (--mirror URL tries another server)")
        try:
            for path, content in extracted(name, [Path(temporary) / file for file, _ in archives]):
                write(root / path, content)
        except (OSError, EOFError, KeyError, tarfile.TarError) as error:
            raise ValueError(f"{root}: {name} cannot be unpacked there ({error})") from None
    return root
