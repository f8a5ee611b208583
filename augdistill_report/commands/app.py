"""`augdistill app`: serves notebook 06, the explorer, as a page without code, to the user of this machine.

Whoever opens the page gets a kernel that runs code here. So its address holds a token, and a request must name this
machine as its host: else a web page could reach the server through its own host name (DNS rebinding).
"""

import secrets
import sys
import tempfile
import threading
import webbrowser
from pathlib import Path

import nbformat
from jupyter_server.services.kernels.connection.channels import ZMQChannelsWebsocketConnection
from tornado import web
from voila.app import Voila

from augdistill_report.explorer import front
from augdistill_report.places import NOTEBOOKS
from augdistill_report.run import run_folder
from augdistill_report.settings import preset_path, resolve

TEMPLATE = Path(front.__file__).parent / "voila"  # the page around the notebook

PROTOCOL = "v1.kernel.websocket.jupyter.org"
PREHEAT = ["--preheat_kernel=True", "--pool_size=1"]  # a kernel waits with the page's cells run: starting takes seconds
CULL = {"idle_timeout": 120, "interval": 30}  # seconds until an idle kernel ends, and between checks


def app(preset: str, out: str = "", changes: dict | None = None, port: int = 8866, browser: bool = True) -> None:
    """Serve the explorer of a run until Ctrl-C, on `port` or, if it is in use, on one near it.

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
        keep_tagged(notebook)
        server = Server()
        cull = [f"--MappingKernelManager.cull_{key}={value}" for key, value in CULL.items()]
        server.initialize([str(notebook), f"--port={port}", *PREHEAT, *cull])
        # set here, so that no configuration file of Jupyter or voila can weaken them
        server.token = secrets.token_urlsafe(24)
        server.tornado_settings = {"allow_remote_access": False, "local_hostnames": ["localhost"]}
        server.kernel_websocket_connection_class = CheckedConnection
        server.ip, server.browser_wanted, server.folder = "127.0.0.1", browser, Path(folder)
        server.start()


def keep_tagged(notebook: Path) -> None:
    """Leave only the cells that the page needs, by their tags: the rest of the notebook can take minutes."""
    content = nbformat.read(notebook, as_version=4)
    tags = {"parameters", "injected-parameters", "app"}
    content.cells = [cell for cell in content.cells if tags & set(cell.metadata.get("tags", []))]
    nbformat.write(content, notebook)


def preset_for_kernel(preset: str) -> str:
    """A preset for the page's kernel, which runs in another folder: its name, or its file's absolute path."""
    return str(preset_path(preset).resolve()) if preset.endswith((".yaml", ".yml")) else preset


class Server(Voila):
    """voila, which prints one line: the address to open."""

    log_level = 30  # warnings
    open_browser = True  # makes voila call `launch_browser` as soon as the server listens

    def setup_template_dirs(self):
        super().setup_template_dirs()
        self.template_paths.insert(0, str(TEMPLATE))

    def launch_browser(self):
        address = f"{self.connection_url}?token={self.token}"
        print(f"explorer: {address}\n(Ctrl-C ends it)", file=sys.stderr, flush=True)
        if self.browser_wanted:
            # by a file that only this user can read: any user here can see the arguments of a browser's process
            page = self.folder / "open.html"
            page.write_text(f'<meta http-equiv="refresh" content="0; url={address}">')
            threading.Thread(target=webbrowser.open, args=(page.as_uri(),), daemon=True).start()


class CheckedConnection(ZMQChannelsWebsocketConnection):
    """A page's connection to its kernel. It refuses clients of the old protocol, and messages of wrong size.

    voila 0.5.13 reads every binary message to a page by the v1 protocol. With a client of the old protocol it takes two
    other numbers for a count of parts, and fills the memory. jupyter_server 2.21 trusts any count that a client sends.
    """

    async def prepare(self):
        asked = self.websocket_handler.request.headers.get("Sec-WebSocket-Protocol", "")
        if PROTOCOL not in [name.strip() for name in asked.split(",")]:
            raise web.HTTPError(400, f"must ask for the websocket protocol {PROTOCOL}")
        await super().prepare()

    def handle_incoming_message(self, incoming_msg):
        if not well_formed(incoming_msg):
            self.websocket_handler.close(1002, "not a kernel message")  # 1002: protocol error
            return
        super().handle_incoming_message(incoming_msg)


def well_formed(message: bytes | str) -> bool:
    """Whether a message's offsets are in order, lie inside the message, and are not more than it has room for.

    A message begins with the number of offsets and the offsets, 8 bytes each, little endian.
    """
    if not isinstance(message, bytes) or not 1 < (count := int.from_bytes(message[:8], "little")) < len(message) // 8:
        return False
    starts = [int.from_bytes(message[at : at + 8], "little") for at in range(8, 8 * count + 8, 8)]
    return starts == sorted(starts) and 8 * (count + 1) <= starts[0] and starts[-1] <= len(message)
