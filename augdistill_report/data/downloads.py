"""Published data sets brought here from the web: by pooch, over verified TLS, against torchvision's md5 sums.

Nothing is downloaded unless `fetch` is called. An archive goes to a temporary folder that is removed, and a data set's
files are written when all archives have come. Bounded in size and in speed: no server can fill the disk or never end.
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

# torchvision's own host of FashionMNIST speaks no TLS; the authors' repository holds the same files
MORE_MIRRORS = {"fashion": ["https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"]}

LOOPBACK = ("localhost", "127.0.0.1", "::1")

LARGEST = 400_000_000  # bytes of an archive; CIFAR-10's, the largest, has 170 million

SLOWEST, WINDOW = 10_000, 60.0  # so many bytes a second at least, on average over so many seconds

BLOCK = 1 << 16  # bytes


def check_url(url: str) -> None:
    """A `ValueError` unless what the URL names comes over TLS, or from this machine."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in LOOPBACK):
        raise ValueError(f"{url}: must be https:// (http:// only on this machine)")


class Transfer:
    """Watches one download: refuses a redirection off TLS and too many bytes, and ends once it is `stopped`.

    requests calls `answered` with every answer; to pooch it is a progress bar.
    """

    def __init__(self):
        self.total, self.received, self.complete, self.stopped, self.answer = 0, 0, False, False, None

    def answered(self, response, **_) -> None:
        self.answer = response
        if response.is_redirect:
            try:
                check_url(urllib.parse.urljoin(response.url, response.headers["location"]))
            except ValueError as error:
                raise ValueError(f"leads to {error}") from None
        # the file's own bytes: some servers call the compression of a .gz an encoding, which requests would undo
        response.raw.headers.pop("Content-Encoding", None)
        self.check_size(int(response.headers.get("Content-Length") or 0))

    def check_size(self, size: int) -> None:
        if size > LARGEST:
            raise ValueError(f"more than {LARGEST / 1e6:g} MB, the most that is downloaded")

    def update(self, count: int) -> None:
        self.received += count
        if not self.complete:
            self.check_size(self.received - BLOCK)  # pooch counts the last block as a whole one
        if self.stopped:
            raise ValueError("stopped")

    def reset(self) -> None:
        self.complete, self.received = True, 0

    def close(self) -> None:
        """Nothing to close, but pooch asks."""


def root_cause(error: BaseException) -> str:
    """What lies at the bottom of an error: requests and urllib3 wrap "Connection refused" three times."""
    while inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = inner
    return getattr(error, "strerror", None) or str(error).partition(" for url: ")[0] or type(error).__name__


def download(url: str, md5: str, path: Path) -> None:
    """Write the file that `url` names to `path`, with progress on stderr.

    A `ValueError` names the URL, and what is wrong: no answer, another md5 sum, too large (`LARGEST` bytes) or too slow
    (`SLOWEST` bytes a second).
    """
    import pooch  # with requests, half a second: only for those who download

    check_url(url)
    pooch.get_logger().setLevel("ERROR")  # the line of progress says what it would
    transfer, errors = Transfer(), []
    downloader = pooch.HTTPDownloader(transfer, BLOCK, timeout=30, hooks={"response": transfer.answered})

    def retrieve():
        try:
            pooch.retrieve(url, f"md5:{md5}", path.name, path.parent, downloader=downloader)
        except Exception as error:  # for the thread that waits
            errors.append(error)
        finally:
            if transfer.answer is not None:
                transfer.answer.close()

    # a thread, so that whatever takes too long is left behind: the look-up of a name and half a header as well
    thread = threading.Thread(target=retrieve, daemon=True)
    thread.start()
    since, before = time.monotonic(), 0
    try:
        with Line() as line:
            while thread.is_alive():
                thread.join(0.2)
                if time.monotonic() - since > WINDOW and not transfer.complete:
                    if transfer.received - before < SLOWEST * WINDOW:
                        raise ValueError(f"{url}: less than {SLOWEST / 1000:g} kB a second in {WINDOW:g} s")
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
    """What there is to download: (file, md5) pairs, and the URLs of the folders that have them, in order."""
    kind = published(name)
    if hasattr(kind, "base_folder"):
        archives, folders = [(kind.filename, kind.tgz_md5)], [kind.url.removesuffix(kind.filename)]
    else:
        archives, folders = kind.resources, [m for m in kind.mirrors if m.startswith("https:")]
    return archives, [mirror] if mirror else folders + MORE_MIRRORS.get(name, [])


def extracted(name: str, archives: list[Path]) -> Iterator[tuple[Path, bytes]]:
    """The files of a set, relative to its root, and their content, out of the archives that it is published in."""
    if len(archives) == 1:
        with tarfile.open(archives[0]) as tar:
            yield from ((path, tar.extractfile(path.as_posix()).read()) for path in files(name))
    else:
        for path, archive in zip(files(name), archives, strict=True):
            yield path, gzip.decompress(archive.read_bytes())


def fetch(name: str, mirror: str = "", data: str = "") -> Path:
    """Download a set into the first of `roots(data)`, unless it is there and complete; returns that root.

    A `ValueError` names every place that failed. Files are written when all archives have come and their md5 sums are
    right, each whole or not at all, so an interruption leaves nothing half done.
    """
    if name not in PUBLISHED:
        raise ValueError(f"{name!r}: nothing to download; must be one of {', '.join(PUBLISHED)}")
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
                raise ValueError("cannot download " + "; ".join(failures) + " (--mirror URL names another place)")
        try:
            for path, content in extracted(name, [Path(temporary) / file for file, _ in archives]):
                write(root / path, content)
        except (OSError, EOFError, KeyError, tarfile.TarError) as error:
            raise ValueError(f"{root}: {name} cannot be unpacked there ({error})") from None
    return root
