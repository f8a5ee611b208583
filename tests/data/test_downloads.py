"""Downloads, from servers of the test's own: right ones, and every kind of wrong one, which leaves nothing behind."""

import contextlib
import gzip
import http.server
import io
import os
import ssl
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import tracemalloc

import pytest
from published import cifar_files, make_mnist, md5, mnist_files
from torchvision import datasets

from augdistill_report.commands.cli import main
from augdistill_report.data import downloads, sources
from augdistill_report.data.datasets import load

pytestmark = pytest.mark.usefixtures("nowhere")


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["digits"], "'digits': is not a data set to download"),
        (["folder:x"], "is not a data set to download"),
        (["mnist", "--mirror", "http://example.com/"], "must be https"),
        (["mnist", "--mirror", "file:///etc/"], "must be https"),
        (["mnist", "--mirror", "http://127.0.0.1.example.com/"], "must be https"),
        (["mnist", "--mirror", "http://127.0.0.1:9/"], "Connection refused"),
        (["mnist", "--mirror", "https://host.invalid/"], "host.invalid"),
    ],
)
def test_what_cannot_be_done_is_exit_code_2(arguments, says, capsys, tmp_path):
    assert main(["data", "fetch", *arguments]) == 2
    error = capsys.readouterr().err
    assert pytest.raises(ValueError, match=says).matches(ValueError(error)), error
    assert not (tmp_path / "cache" / "augdistill").exists()


@pytest.fixture
def server():
    """(URL, what it serves by path): bytes, a tuple (status, headers, body), or a function of the handler."""
    served, ended = {}, threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers, body = 404, {}, b""
            if callable(found := served.get(self.path)):
                with contextlib.suppress(OSError):  # the other side hangs up
                    found(self, ended)
                return
            if found is not None:
                status, headers, body = found if isinstance(found, tuple) else (200, {}, found)
            self.send_response(status)
            for key, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.05))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", served
        ended.set()
        server.shutdown()
        thread.join()


def endless(handler, ended):
    handler.send_response(200)
    handler.end_headers()
    while not ended.is_set():
        handler.wfile.write(bytes(1 << 16))


def endless_in_chunks(handler, ended):
    handler.protocol_version = "HTTP/1.1"
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    while not ended.is_set():
        handler.wfile.write(b"10000\r\n" + bytes(1 << 16) + b"\r\n")


def dripping(handler, ended):
    handler.send_response(200)
    handler.send_header("Content-Length", "900000")
    handler.end_headers()
    while not ended.wait(0.05):
        handler.wfile.write(b"x")


def dripping_in_its_header(handler, ended):
    handler.wfile.write(b"HTTP/1.0 200 OK\r\nX-Long: ")
    while not ended.wait(0.05):
        handler.wfile.write(b"x")


def silent(handler, ended):
    ended.wait()


@pytest.fixture
def mnist_server(server, monkeypatch):
    url, served = server
    archives = {f"{name}.gz": gzip.compress(content) for name, content in mnist_files().items()}
    monkeypatch.setattr(datasets.MNIST, "resources", [(name, md5(content)) for name, content in archives.items()])
    served.update({f"/m/{name}": content for name, content in archives.items()})
    return url, served


def test_fetch_then_check(mnist_server, tmp_path, capsys):
    url, served = mnist_server
    fetch = ["data", "fetch", "mnist", "--mirror", f"{url}/m/", "--data", str(tmp_path / "new" / "root")]
    assert main(fetch) == 0
    out, progress = capsys.readouterr()
    assert "180 train" in out and progress.count(" MB") == 4
    make_mnist(tmp_path / "reference")
    assert load("mnist", 0, str(tmp_path / "new/root")).fingerprint in out
    assert f"fingerprint: {load('mnist', 0, str(tmp_path / 'reference')).fingerprint}" in out
    names = sorted(p.name for p in (tmp_path / "new/root").rglob("*") if p.is_file())
    assert names == sorted(mnist_files())  # the archives are not kept, nor anything else
    served.clear()
    assert main(fetch) == 0 and " MB" not in capsys.readouterr().err  # it is there: nothing is downloaded


def test_fetch_goes_to_the_cache_or_where_the_environment_says(mnist_server, tmp_path, monkeypatch):
    fetch = ["data", "fetch", "mnist", "--mirror", f"{mnist_server[0]}/m"]
    assert main(fetch) == 0
    assert (tmp_path / "cache/augdistill/MNIST/raw/t10k-labels-idx1-ubyte").is_file()
    monkeypatch.setenv("AUGDISTILL_DATA", str(tmp_path / "mine"))
    assert main(fetch) == 0
    assert (tmp_path / "mine/MNIST/raw/t10k-labels-idx1-ubyte").is_file()


def test_fetch_unpacks_cifar_s_archive(server, monkeypatch, tmp_path):
    (url, served), kind, archive = server, datasets.CIFAR10, io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, content in [
            *cifar_files(kind, monkeypatch).items(),
            ("readme.html", b"more"),
            ("../../out", b"evil"),
        ]:
            info = tarfile.TarInfo(f"{kind.base_folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    served[f"/{kind.filename}"] = archive.getvalue()
    monkeypatch.setattr(kind, "tgz_md5", md5(archive.getvalue()))
    assert main(["data", "fetch", "cifar10", "--mirror", url, "--data", str(tmp_path / "root")]) == 0
    assert load("cifar10", 0, str(tmp_path / "root")).shape == (3, 32, 32)
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {str(p.name) for p in sources.files("cifar10")}
    (tmp_path / "root" / kind.base_folder / "data_batch_2").write_bytes(b"half")
    assert main(["data", "fetch", "cifar10", "--mirror", url, "--data", str(tmp_path / "root")]) == 0  # mends it


@pytest.mark.parametrize("how", ["changed", "cut", "absent", "error", "leaves TLS", "hangs up"])
def test_a_download_that_goes_wrong_leaves_nothing(mnist_server, tmp_path, capsys, how):
    url, served = mnist_server
    path = "/m/t10k-images-idx3-ubyte.gz"
    good = served[path]
    served[path], says = {
        "changed": (good[:-1] + b"x", "MD5 hash .* does not match"),
        "cut": ((200, {}, good[:50]), "MD5 hash .* does not match"),
        "absent": (None, "Not Found"),
        "error": ((500, {}, b""), "Internal Server Error"),
        "leaves TLS": ((302, {"Location": "http://example.com/x"}, b""), "example.com.*must be https"),
        "hangs up": ((200, {"Content-Length": str(len(good))}, good[:50]), "IncompleteRead"),
    }[how]
    root = tmp_path / "root"
    fetch = ["data", "fetch", "mnist", "--mirror", f"{url}/m", "--data", str(root)]
    assert main(fetch) == 2
    error = capsys.readouterr().err
    assert pytest.raises(ValueError, match=says).matches(ValueError(error)), error
    assert "t10k-images" in error and "--mirror" in error and not root.exists()
    served[path] = good
    assert main(fetch) == 0  # a clean restart


def test_an_interruption_leaves_no_half_file(mnist_server, tmp_path, monkeypatch, capsys):
    url, _ = mnist_server
    fetch = ["data", "fetch", "mnist", "--mirror", f"{url}/m", "--data", str(tmp_path / "root")]
    replace, calls = os.replace, []

    def stopped(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        replace(*arguments)

    monkeypatch.setattr(os, "replace", stopped)
    assert main(fetch) == 130
    left = [p for p in (tmp_path / "root").rglob("*") if p.is_file()]
    assert len(left) == 2 and all(p.read_bytes() == mnist_files()[p.name] for p in left)
    assert main(["data", "check", "mnist", "--data", str(tmp_path / "root")]) == 2
    assert "is missing" in capsys.readouterr().err
    monkeypatch.setattr(os, "replace", replace)
    assert main(fetch) == 0


def test_a_place_that_cannot_be_written_is_said(mnist_server, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["data", "fetch", "mnist", "--mirror", f"{mnist_server[0]}/m", "--data", str(tmp_path / "file")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_the_sources_known_here_speak_tls():
    for name in sources.PUBLISHED:
        archives, folders = downloads.sources(name)
        assert all(len(sum) == 32 for _, sum in archives)
        assert folders and all(folder.startswith("https://") and folder.endswith("/") for folder in folders)


# --- servers that never end -------------------------------------------------------------------------------------------


@pytest.fixture
def short_bounds(monkeypatch, tmp_path):
    """A megabyte at most, and a second of patience; the folder of what is temporary."""
    monkeypatch.setattr(downloads, "LARGEST", 1_000_000)
    monkeypatch.setattr(downloads, "WINDOW", 1.0)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


@pytest.mark.parametrize(
    "answer, says",
    [
        (endless, "more than 1 MB"),
        (endless_in_chunks, "more than 1 MB"),
        ((200, {"Content-Length": "1000001"}, b""), "more than 1 MB"),
        (dripping, "less than 10 kB per second in 1 s"),
        (dripping_in_its_header, "less than 10 kB per second in 1 s"),
        (silent, "less than 10 kB per second in 1 s"),
        ((302, {"Location": "/m/t10k-images-idx3-ubyte.gz"}, b""), "redirects"),
        ((302, {"Location": "file:///etc/passwd"}, b""), "redirects to file:///etc/passwd: must be https"),
    ],
    ids=["endless", "chunks", "length", "dripping", "header", "silent", "circle", "file"],
)
def test_an_answer_that_never_ends_is_given_up(mnist_server, short_bounds, tmp_path, capsys, answer, says):
    url, served = mnist_server
    path, start = "/m/t10k-images-idx3-ubyte.gz", time.monotonic()
    good, served[path] = served[path], answer
    fetch = ["data", "fetch", "mnist", "--mirror", f"{url}/m", "--data", str(tmp_path / "root")]
    assert main(fetch) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{url}{path}: " in error and says in error, error
    assert time.monotonic() - start < 10 and not (tmp_path / "root").exists() and not list(short_bounds.iterdir())
    served[path] = good
    assert main(fetch) == 0 and not list(short_bounds.iterdir())


def test_an_endless_answer_takes_neither_memory_nor_disk(server, monkeypatch, tmp_path):
    url, served = server
    served["/x"] = endless
    monkeypatch.setattr(downloads, "LARGEST", 20_000_000)
    largest = []
    watched = downloads.Transfer.check_size

    def check_size(transfer, size):
        largest.append(sum(path.stat().st_size for path in tmp_path.iterdir()))
        watched(transfer, size)

    monkeypatch.setattr(downloads.Transfer, "check_size", check_size)
    downloads_once(url, tmp_path)  # what is imported once does not count
    largest.clear()
    tracemalloc.start()
    try:
        downloads_once(url, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
    assert 19_000_000 < max(largest) < 21_000_000 and not list(tmp_path.iterdir())


def downloads_once(url, folder):
    with pytest.raises(ValueError, match="more than 20 MB"):
        downloads.download(f"{url}/x", "0" * 32, folder / "x")


def test_mirrors_are_tried_in_order_and_all_that_failed_are_named(mnist_server, short_bounds, monkeypatch, tmp_path):
    url, served = mnist_server
    for name in [path for path in served if path.startswith("/m/")]:
        served[name.replace("/m/", "/slow/")] = dripping
    folders = [f"{url}/nothing", f"{url}/slow", f"{url}/m"]
    monkeypatch.setattr(downloads, "sources", lambda *_: (datasets.MNIST.resources, folders[:2]))
    with pytest.raises(ValueError, match=r"nothing/train-images.*Not Found.*; .*slow/train-images.*10 kB per second"):
        downloads.fetch("mnist", data=str(tmp_path / "root"))
    monkeypatch.setattr(downloads, "sources", lambda *_: (datasets.MNIST.resources, folders))
    assert downloads.fetch("mnist", data=str(tmp_path / "root")) == tmp_path / "root"


def test_a_file_s_compression_is_no_encoding(mnist_server, tmp_path):
    url, served = mnist_server
    for path, content in list(served.items()):
        served[path] = (200, {"Content-Encoding": "gzip"}, content)
    assert downloads.fetch("mnist", f"{url}/m", str(tmp_path)) == tmp_path


def test_redirections_on_this_machine_are_followed(mnist_server, tmp_path):
    url, served = mnist_server
    for path in list(served):
        served[path.replace("/m/", "/old/")] = (302, {"Location": path}, b"")
    assert downloads.fetch("mnist", f"{url}/old", str(tmp_path)) == tmp_path


def test_a_certificate_that_nobody_signed_is_refused(tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    try:
        subprocess.run([*make.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no openssl to make a certificate with")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as tls:
        tls.socket = context.wrap_socket(tls.socket, server_side=True)
        tls.handle_error = lambda *_: None
        thread = threading.Thread(target=tls.serve_forever, kwargs=dict(poll_interval=0.05))
        thread.start()
        try:
            with pytest.raises(ValueError, match=r"localhost.*CERTIFICATE_VERIFY_FAILED"):
                downloads.download(f"https://localhost:{tls.server_port}/x", "0" * 32, tmp_path / "x")
        finally:
            tls.shutdown()
            thread.join()


def test_nothing_is_downloaded_and_pooch_is_not_imported_unless_it_is_asked_for():
    check = "import sys, augdistill_report.data.downloads; assert not {'pooch', 'requests'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
