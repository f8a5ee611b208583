"""The explorer's server serves only requests with its token and this machine's host name, in real requests."""

import http.cookiejar
import re
import signal
import socket
import struct
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from helpers import augdistill

pytest.importorskip("voila", reason="the explorer's server is an extra: pip install 'augdistill[app]'")
V1 = "v1.kernel.websocket.jupyter.org"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The server's process, and the address that it prints."""
    folder = tmp_path_factory.mktemp("app")
    own = {f"JUPYTER_{key}_DIR": str(folder / "jupyter") for key in ("DATA", "CONFIG")}
    # what a user's own configuration must not undo
    (folder / "jupyter").mkdir()
    (folder / "jupyter" / "voila.py").write_text("c.Voila.token = ''\nc.Voila.ip = '0.0.0.0'\n")
    command = ["app", "--preset", "smoke", "--out", folder / "smoke", "--port", 18866, "--no-browser"]
    process = augdistill(folder, *command, JUPYTER_TOKEN="", **own)
    try:
        address = process.stderr.readline().split()[1]
        yield process, address
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.fixture(scope="module")
def page(server):
    """A browser's cookie, and the address of its kernel's websocket."""
    jar = http.cookiejar.CookieJar()
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(jar))
    with opener.open(server[1], timeout=120) as answer:
        assert answer.status == 200
        kernel = re.search(r'"kernelId": ?"([^"]+)"', answer.read().decode()).group(1)
    cookie = "; ".join(f"{c.name}={c.value}" for c in jar)
    return cookie, f"{server[1].partition('?')[0]}api/kernels/{kernel}/channels?session_id=a".replace("http", "ws", 1)


def asked(address: str, **headers: str) -> tuple[int, str]:
    """The status of an answer, and its final address."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=120) as answer:
            return answer.status, answer.url
    except urllib.error.HTTPError as error:
        error.close()
        return error.code, address


def test_only_the_token_opens_the_page(server, page):
    address, _, token = server[1].partition("?token=")
    assert address.startswith("http://127.0.0.1:") and len(token) >= 32
    for wrong in ("", "?token=", "?token=a", "voila/render/explorer.ipynb"):
        status, where = asked(address + wrong)
        assert status in (403, 404) or "/login?" in where, wrong
    status, _ = asked(re.sub(r"/channels.*", "", page[1].replace("ws", "http", 1)))
    assert status == 403


@pytest.mark.parametrize("host", ["evil.example", "evil.example:18866", "192.0.2.1", "localhost.evil.example", ""])
def test_a_request_by_another_name_gets_nothing(server, host):
    assert asked(server[1], Host=host)[0] in (400, 403)


def tried(page, message: bytes | str | None = None, **headers: str) -> int:
    """Open a kernel's websocket; gives the answer's status (101: open), or the code with which a message closed it."""
    _, _, host, path = page[1].split("/", 3)
    usual = {"Host": host, "Cookie": page[0], "Upgrade": "websocket", "Connection": "Upgrade"}
    usual |= {"Sec-WebSocket-Key": "A" * 22 + "==", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Protocol": V1}
    lines = [f"GET /{path} HTTP/1.1", *(f"{key}: {value}" for key, value in (usual | headers).items() if value)]
    name, port = host.split(":")
    with socket.create_connection((name, int(port)), timeout=60) as connection, connection.makefile("rb") as answer:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        status = int(answer.readline().split()[1])
        if status != 101 or message is None:
            return status
        while answer.readline().strip():
            pass
        content = message.encode() if isinstance(message, str) else message
        kind, mask = (0x81 if isinstance(message, str) else 0x82), bytes(4)  # whole; masked by zeros
        connection.sendall(struct.pack("!BBH", kind, 0x80 | 126, len(content)) + mask + content)
        while True:  # what the kernel says meanwhile
            kind, size = answer.read(2)
            size = size if size < 126 else int.from_bytes(answer.read(2 if size == 126 else 8))
            content = answer.read(size)
            if kind == 0x88:
                return int.from_bytes(content[:2])


def test_a_kernel_answers_its_own_page_alone(page):
    assert tried(page) == 101
    assert tried(page, Cookie="") == 403
    assert tried(page, Origin="http://evil.example") == 403
    assert tried(page, Host="evil.example") == 403


def parts(*offsets: int, count: int = 0, rest: bytes = b"x" * 100) -> bytes:
    return b"".join(n.to_bytes(8, "little") for n in (count or len(offsets), *offsets)) + rest


HOSTILE = {
    "more parts than bytes": parts(count=2**63),
    "parts beyond the end": parts(24, 10**15),
    "parts over each other": parts(*[8 * 1002, 8 * 1002 + 100] * 500),
    "none": parts(count=0, rest=b"\0" * 8),
    "empty": b"",
    "text": "{}",
}


@pytest.mark.parametrize("protocol", ["", "v0.kernel.websocket.jupyter.org"])
def test_a_client_of_the_old_protocol_is_refused(page, protocol):
    assert tried(page, **{"Sec-WebSocket-Protocol": protocol}) == 400


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_message_ends_its_connection_and_takes_no_memory(server, page, case):
    def memory() -> int:
        """Its peak, in kilobytes."""
        return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{server[0].pid}/status").read_text()).group(1))

    assert tried(page) == 101
    before = memory()
    assert tried(page, message=HOSTILE[case]) == 1002
    assert tried(page) == 101 and memory() - before < 50_000  # it still answers
