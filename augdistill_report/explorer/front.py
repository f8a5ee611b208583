"""What the browser adds to the explorer, by anywidget: names for sliders, the address, copies, downloads, and files.

A client can send any value and any message, so the page checks all that comes from here.
"""

from pathlib import Path

import anywidget
import traitlets

from augdistill_report.explorer.uploads import MOST_IMAGES, UPLOAD_BYTES

STATIC = Path(__file__).parent / "static"


class Front(anywidget.AnyWidget):
    """Names the controls for screen readers. `query` is the address's; `send` copies a text or a link, or downloads."""

    _esm = STATIC / "front.js"
    _css = STATIC / "front.css"
    query = traitlets.Unicode().tag(sync=True)
    copied = traitlets.Dict().tag(sync=True)  # the last `text`, and whether it is on the clipboard (`done`)


class DialBoard(anywidget.AnyWidget):
    """Sliders for the ranges `rows` (`Dial` as dictionaries), and switches for the `links` of a chain."""

    _esm = STATIC / "dials.js"
    rows = traitlets.List().tag(sync=True)
    links = traitlets.List().tag(sync=True)
    values = traitlets.Dict().tag(sync=True)  # the turned ranges, by name
    off = traitlets.List().tag(sync=True)  # the positions of links that are switched off


class Upload(anywidget.AnyWidget):
    """Files that a person chooses or drops: a message each, with `name`, `size`, `last`, `left_out` and the bytes."""

    _esm = STATIC / "upload.js"
    most_images = traitlets.Int(MOST_IMAGES).tag(sync=True)
    most_bytes = traitlets.Int(UPLOAD_BYTES).tag(sync=True)
