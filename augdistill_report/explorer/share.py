"""The explorer's panel that hands on what is seen: a link, a notebook cell, the picture, and a film of the training.

A state is a dictionary of what differs from the page as it opens. It comes back from anywhere, so it is checked.
"""

import json
import pprint
from urllib.parse import parse_qs

import ipywidgets as widgets

from augdistill_report.explorer.controls import BOX, button, guarded, on_clicks, row, section
from augdistill_report.explorer.state import View
from augdistill_report.run import folder_config
from augdistill_report.settings import resolve
from augdistill_report.show.image_grids import film, png

LARGE = 96  # about the pixels of an image in a downloaded picture


class Share:
    """Copies and brings back a page's state, and downloads its pictures."""

    def __init__(self, page):
        self.page = page
        self.link = button("Copy link", "an address that opens the page as you see it, in this browser")
        self.code = button("Copy as code", "a notebook cell that shows the page as you see it")
        self.picture = button("Download picture", "the images that you see, as PNG")
        self.film = button("Download film", "the images during phi's training, as GIF; without a training, other seeds")
        self.text = widgets.Textarea(description="copied", tooltip="the link or the code, to copy by hand", **BOX)
        self.text.layout.display = "none"
        self.box = section(row(self.link, self.code), row(self.picture, self.film), self.text)
        page.front.observe(self.opened_by_link, "query")
        page.front.observe(self.was_copied, "copied")
        on_clicks(
            {
                self.link: self.copy_link,
                self.code: self.copy_code,
                self.picture: self.download_picture,
                self.film: self.download_film,
            }
        )

    def sliders(self) -> dict:
        page = self.page
        return {
            "strength": page.strength,
            "noise": page.noise,
            "seed": page.seed,
            "label": page.label,
            "count": page.count,
            "image": page.image,
        }

    def state(self) -> dict:
        """What is seen, as far as it differs from the page as it opens; a `ValueError` if it cannot be shared."""
        page, explorer = self.page, self.page.explorer
        if explorer.upload:
            raise ValueError("your own images are not part of a link: go back to the data set's images first")
        first, second = explorer.first, explorer.second
        for chosen in explorer.both:
            if chosen.choice.name.startswith("trained here:"):
                raise ValueError(f"{chosen.choice.name}: lives on this page only; save it, and choose its file")
        found = {"data": page.data.value, "phi": first.choice.name}
        if len(first.moments) > 1:
            found["iteration"] = page.moment.value
        if second:
            found["other"] = second.choice.name
            found |= {"other_iteration": page.other_moment.value} if len(second.moments) > 1 else {}
        found |= {"ranges": first.values} if first.values else {}
        found |= {"off": sorted(first.off)} if first.off else {}
        for key, control in self.sliders().items():
            if control.value != View.__dataclass_fields__[key].default:
                found[key] = control.value
        return found | ({"paths": True} if page.students.where.value else {})

    def restore(self, state: dict) -> None:
        """Show what a state says; a `ValueError` names an entry that does not fit (what fits until then is shown)."""
        page, state = self.page, dict(state)
        known = {"data", "phi", "iteration", "other", "other_iteration", "ranges", "off", "paths", *self.sliders()}
        if unknown := sorted(set(state) - known):
            raise ValueError(f"{unknown[0]}: is not part of the explorer's state; {', '.join(sorted(known))} are")
        View(**{key: state[key] for key in self.sliders() if key in state})
        filling, page.filling = page.filling, True
        try:
            if (data := state.get("data", page.data.value)) != page.data.value:
                self.choose("data", data, page.data.options)
                page.show_data(data)
            for key in ("phi", "other"):
                if (name := state.get(key)) is not None:
                    choice = self.choice_named(str(name))
                    page.explorer.choose(choice) if key == "phi" else page.explorer.compare(choice)
            page.refill()
            for key, control in (("iteration", page.moment), ("other_iteration", page.other_moment)):
                if key in state:
                    control.value = self.choose(key, state[key], control.options)
            ranges, off = state.get("ranges", {}), state.get("off", [])
            if not isinstance(ranges, dict) or not isinstance(off, list) or not all(type(k) is int for k in off):
                raise ValueError(f"ranges={ranges}, off={off}: must be a range by name, and a list of whole numbers")
            page.explorer.first.turn(ranges, frozenset(off))
            if "label" in state:
                self.choose("label", state["label"], [label for _, label in page.label.options])
            for key, control in self.sliders().items():
                control.value = state.get(key, control.value)
        finally:
            page.filling = filling
        page.students.where.value = state.get("paths") is True
        page.draw()

    def choice_named(self, name: str):
        """A choice of the page; one of kornia's is added to it."""
        page, (_, by_hand_, text) = self.page, name.partition("hand-designed kornia:")
        if by_hand_ and name not in page.all_choices():
            from augdistill_report.explorer.choices import by_hand

            page.added[name] = by_hand(page.run, f"kornia:{text}")
        return page.choice_named(name)

    def choose(self, key: str, value, options) -> object:
        if value not in options:
            raise ValueError(f"{key}={value!r}: must be one of {', '.join(map(str, options))}")
        return value

    @guarded
    def opened_by_link(self) -> None:
        text = parse_qs(self.page.front.query.removeprefix("?")).get("explorer", [""])[0]
        if not text:
            return
        try:
            state = json.loads(text)
        except (ValueError, RecursionError):
            state = None
        if not isinstance(state, dict):
            raise ValueError("the link's explorer=... is not a state: copy the whole link")
        self.restore(state)

    @guarded
    def copy_link(self) -> None:
        self.page.front.send({"do": "link", "state": json.dumps(self.state())})

    @guarded
    def copy_code(self) -> None:
        self.page.front.send({"do": "copy", "text": self.as_code()})

    def as_code(self) -> str:
        """A cell that shows the page as it is seen."""
        home = self.page.home
        preset = folder_config(home.folder)["preset"]
        usual = resolve(preset).to_dict()
        changes = {k: v for k, v in home.settings.to_dict().items() if v != usual[k]}
        given = {"preset": preset, "out": str(home.folder)} | changes
        return (
            "from augdistill_report import open_run\n"
            "from augdistill_report.explorer.page import Page\n\n"
            f'run = open_run("{home.notebook}", {given!r})\n'
            f"Page(run, {pprint.pformat(self.state(), sort_dicts=False, width=100)})\n"
        )

    @guarded
    def was_copied(self) -> None:
        copied = self.page.front.copied
        text, done = str(copied.get("text", "")), copied.get("done") is True
        self.text.value, self.text.layout.display = text, "none" if done else ""
        self.page.say(
            "Copied. Paste it where you want it." if done else "This browser does not copy: take it from the box."
        )

    @guarded
    def download_picture(self) -> None:
        page = self.page
        look = page.explorer.look(page.view, *page.moments)
        self.page.front.send({"do": "download", "name": "explorer.png", "type": "image/png"}, [png(look.sheet(LARGE))])

    @guarded
    def download_film(self) -> None:
        gif = film(self.frames())
        self.page.front.send({"do": "download", "name": "explorer.gif", "type": "image/gif"}, [gif])

    def frames(self) -> list:
        """A picture for each moment of the training; of a phi with one moment, for ten seeds."""
        page, moments = self.page, list(self.page.explorer.moments)
        if len(moments) > 1:
            looks = {f"iteration {m}": page.explorer.look(page.view, m, page.other_moment.value) for m in moments}
        else:
            values = page.view.to_dict()
            views = {f"seed {seed}": View.from_dict(values | {"seed": seed}) for seed in range(10)}
            looks = {name: page.explorer.look(view, *page.moments) for name, view in views.items()}
        return [look.sheet(title=name) for name, look in looks.items()]
