"""The parts that the explorer's panels are made of: sliders, buttons, lines of text, and callbacks that cannot fail."""

import functools
import html
from collections.abc import Iterable

import ipywidgets as widgets

from augdistill_core import Config

BOX = dict(style={"description_width": "115px"})

LINE_LENGTH = 150  # characters of a line; what is longer is behind its "more"


def slider(kind, description: str, tooltip: str, **options):
    return kind(description=description, tooltip=tooltip, continuous_update=False, **options, **BOX)


def within(config: type[Config], key: str) -> dict:
    """A slider's value and bounds: the default and the range of a setting."""
    setting = config.__dataclass_fields__[key]
    return dict(value=setting.default, min=setting.metadata["low"], max=setting.metadata["high"])


def dropdown(description: str, tooltip: str, options, value):
    return widgets.Dropdown(description=description, tooltip=tooltip, options=options, value=value, **BOX)


def button(description: str, tooltip: str, **options) -> widgets.Button:
    return widgets.Button(description=description, tooltip=tooltip, layout={"width": "auto"}, **options)


def on_clicks(actions: dict) -> None:
    """What each button does."""
    for control, action in actions.items():
        control.on_click(action)


def row(*items) -> widgets.HBox:
    return widgets.HBox(items, layout={"flex_flow": "row wrap"})


def section(*items) -> widgets.VBox:
    """The controls of one idea; `front.js` shows them when their button is pressed."""
    return styled(widgets.VBox(items), "augdistill-section")


def styled(widget, *classes: str):
    for name in classes:
        widget.add_class(name)
    return widget


def image(title: str) -> widgets.Image:
    """A place for a picture; hidden until it has one (`put`). `title` is its accessible name, which `front.js` sets."""
    return styled(widgets.Image(format="png", layout={"display": "none"}), f"alt-{title.replace(' ', '-')}")


def put(place: widgets.Image, content: bytes) -> None:
    """Show a PNG there; b"" hides the place."""
    if content:
        place.value = content
    place.layout.display = "" if content else "none"


def one_line(text: str) -> str:
    """A text as HTML on one line: its first sentence, or `LINE_LENGTH` characters of it. The rest is behind "more"."""
    first, stop, rest = text.partition(". ")
    first += stop.rstrip()
    if len(text) <= LINE_LENGTH:
        first, rest = text, ""
    elif len(first) > LINE_LENGTH:
        cut = text.rfind(" ", 0, LINE_LENGTH)
        cut = cut if cut > 0 else LINE_LENGTH
        first, rest = f"{text[:cut]} …", text[cut:].strip()
    more = f" <details><summary>more</summary> {html.escape(rest)}</details>" if rest else ""
    return html.escape(first) + more


def set_options(page, control, options: Iterable, value) -> None:
    """Set a control's options (if any are given) and value, without a new picture for each change."""
    filling, page.filling, options = page.filling, True, list(options)
    try:
        if options and list(control.options) != options:
            control.options = options
        control.value = value
    finally:
        page.filling = filling


def guarded(method):
    """A callback of a panel (or of the page), whose error becomes a line on the page.

    It gets as many of the event's values as it takes.
    """
    takes = method.__code__.co_argcount - 1

    @functools.wraps(method)
    def call(self, *event):
        page = self.page
        try:
            with page.lock:
                return None if page.filling else method(self, *event[:takes])
        except Exception as error:
            page.fail(error)

    return call
