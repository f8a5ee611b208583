"""`augdistill app`: notebook 06, the explorer, as a page without code, for the person at this machine.

Who can open the page has a process here that runs code. So its address holds a token, and a request must name this
machine as its host: else a web page could reach the server under a name of its own (DNS rebinding).
"""

import secrets
import sys
import tempfile
import threading
import webbrowser
from pathlib import Path

from jupyter_server.services.kernels.connection.channels import ZMQChannelsWebsocketConnection
from tornado import web
from voila.app import Voila

from augdistill_report.places import NOTEBOOKS
from augdistill_report.run import run_folder
from augdistill_report.settings import preset_path, resolve

PROTOCOL = "v1.kernel.websocket.jupyter.org"
CULL = {"idle_timeout": 120, "interval": 30}  # seconds that a kernel lives after its page was closed, between looks


def app(preset: str, out: str = "", changes: dict | None = None, port: int = 8866, browser: bool = True) -> None:
    """Serve the explorer of a run until Ctrl-C, on `port` or, if it is taken, on one near it.

    Raises `ValueError` for wrong settings, before anything is served.
    """
    import papermill

    settings = resolve(preset, changes)
    parameters = {key: getattr(settings, key) for key in changes or {}}
    parameters |= {"preset": preset_for_kernel(preset), "out": str(run_folder(preset, out))}
    with tempfile.TemporaryDirectory() as folder:
        notebook = Path(folder) / "explorer.ipynb"
        papermill.execute_notebook(
            NOTEBOOKS / "06_phi_explorer.ipynb", notebook, parameters, prepare_only=True, progress_bar=False
        )
        server = Server()
        cull = [f"--MappingKernelManager.cull_{key}={value}" for key, value in CULL.items()]
        server.initialize([str(notebook), f"--port={port}", *cull])
        # set here, so that no file of Jupyter's or voila's configuration can set them to less
        server.token = secrets.token_urlsafe(24)
        server.tornado_settings = {"allow_remote_access": False, "local_hostnames": ["localhost"]}
        server.kernel_websocket_connection_class = CheckedConnection
        server.ip, server.browser_wanted, server.folder = "127.0.0.1", browser, Path(folder)
        server.start()


def preset_for_kernel(preset: str) -> str:
    """A preset as the page's kernel finds it, which runs in another folder: the name, or the file's whole path."""
    return str(preset_path(preset).resolve()) if preset.endswith((".yaml", ".yml")) else preset


class Server(Voila):
    """voila, which says one line: the address to open."""

    log_level = 30  # warnings
    open_browser = True  # voila's word for: call `launch_browser` as soon as the server listens

    def launch_browser(self):
        address = f"{self.connection_url}?token={self.token}"
        print(f"explorer: {address}\n(Ctrl-C ends it)", file=sys.stderr, flush=True)
        if self.browser_wanted:
            # by a file that only this user can read: anybody here can see the arguments of a browser's process
            page = self.folder / "open.html"
            page.write_text(f'<meta http-equiv="refresh" content="0; url={address}">')
            threading.Thread(target=webbrowser.open, args=(page.as_uri(),), daemon=True).start()


class CheckedConnection(ZMQChannelsWebsocketConnection):
    """Between a page and its kernel, by the present protocol only, and only messages as large as they say.

    voila 0.5.13 reads every binary message to a page by the present protocol, and for a client of the old one takes
    two numbers for a count of parts: it fills the memory. jupyter_server 2.21 believes any count in a client's message.
    """

    async def prepare(self):
        asked = self.websocket_handler.request.headers.get("Sec-WebSocket-Protocol", "")
        if PROTOCOL not in [part.strip() for part in asked.split(",")]:
            raise web.HTTPError(400, f"must ask for the websocket protocol {PROTOCOL}")
        await super().prepare()

    def handle_incoming_message(self, incoming_msg):
        if not well_formed(incoming_msg):
            self.websocket_handler.close(1002, "not a kernel message")  # 1002: protocol error
            return
        super().handle_incoming_message(incoming_msg)


def well_formed(message: bytes | str) -> bool:
    """Whether a message is parts that follow each other within it, and not more than there is room for.

    It begins with how many offsets there are and the offsets, each 8 bytes, little endian.
    """
    if not isinstance(message, bytes) or not 1 < (count := int.from_bytes(message[:8], "little")) < len(message) // 8:
        return False
    starts = [int.from_bytes(message[at : at + 8], "little") for at in range(8, 8 * count + 8, 8)]
    return starts == sorted(starts) and 8 * (count + 1) <= starts[0] and starts[-1] <= len(message)
