"""The explorer's page: controls and pictures around an `Explorer`. Each panel in its own module has one idea.

Pictures are PNG images in fixed widgets: nothing flickers, and no memory leaks. An error in a callback becomes one line
on the page (and an entry of `Page.errors`, for tests). Long work runs in the background and can be stopped.
"""

import html
import threading
from collections.abc import Callable

import ipywidgets as widgets

from augdistill_report.explorer.choices import HAND_DESIGNED, Choice, by_hand, presets, run_beside
from augdistill_report.explorer.controls import (
    button,
    dropdown,
    guarded,
    image,
    on_clicks,
    one_line,
    put,
    row,
    section,
    set_options,
    slider,
    styled,
    within,
)
from augdistill_report.explorer.front import Front, Upload
from augdistill_report.explorer.learning import Learning
from augdistill_report.explorer.range_panel import RangePanel
from augdistill_report.explorer.share import Share
from augdistill_report.explorer.state import Explorer, View
from augdistill_report.explorer.students import Students
from augdistill_report.explorer.training import Background
from augdistill_report.explorer.uploads import read_own
from augdistill_report.run import Run
from augdistill_report.show.image_grids import png

STATIC_NOTE = (
    "The explorer's page, with its sliders and buttons, appears here when a kernel runs: <code>make app</code> serves "
    "it, <code>make lab</code> opens this notebook. The pictures above and below this line show it as it was saved."
)

HINT = "Move a slider: the pictures follow. Train teaches a phi here. Share copies a link to what you see."

NOTHING = "nothing"  # to compare with

QUICK = 1  # PNG compression level: a slider must not wait for it


class Page:
    """The page of a run. The last line of a notebook cell shows it; `close` stops its background work.

    `state`, from the page's "Copy as code", brings back what was seen there; a `ValueError` names what does not fit.
    """

    def __init__(self, run: Run, state: dict | None = None):
        self.page, self.home, self.errors = self, run, []
        self.explorer, self.background, self.lock = Explorer(run), Background(), threading.RLock()
        self.added: dict[str, Choice] = {}  # kornia's augmentations that the user named
        self.filling = False
        self.make_controls()
        self.make_pictures()
        self.learning, self.ranges, self.students = Learning(self), RangePanel(self), Students(self)
        self.share = Share(self)
        self.arrange()
        self.open_visibly()
        self.fill_choices()
        self.fill_moments()
        self.learning.set_training()
        self.connect()
        self.ranges.fill()
        self.paint()
        self.say(self.opening())
        if state:
            self.share.restore(state)

    def open_visibly(self) -> None:
        """Where nothing is trained and phi changes nothing yet, begin with an augmentation whose effect is seen."""
        if self.explorer.nothing_trained and not self.explorer.look(self.view).change:
            self.explorer.choose(by_hand(self.run, "affine"))

    def opening(self) -> str:
        problems = self.explorer.problems
        text = f"{self.run.data.name}: {sum(c.trained for c in self.explorer.choices.values())} trained phis found."
        if self.explorer.nothing_trained:
            text = "No phi has been trained on this data yet. Train one here: press Train."
        return text + (f" Left out: {'; '.join(problems)}." if problems else "")

    # --- controls and pictures ------------------------------------------------------------------------------------

    @property
    def run(self) -> Run:
        return self.explorer.run

    def make_controls(self) -> None:
        here = self.home.folder.name
        names = list(dict.fromkeys([here, *presets()]))
        self.data = dropdown("data (preset)", "the preset, which names the data set", names, here)
        self.phi = dropdown("phi", "trained phis, untrained ones, hand-designed augmentations", [""], "")
        whole, real, list_ = widgets.IntSlider, widgets.FloatSlider, widgets.SelectionSlider
        self.moment = slider(list_, "iteration", "phi before this training iteration", options=["0"], value="0")
        self.strength = slider(real, "strength λ", "x + λ (phi(x) - x)", step=0.05, **within(View, "strength"))
        noise = "0: the mean of several draws; 1: one draw of phi; 2: twice as far from the mean"
        self.noise = slider(real, "noise (times)", noise, step=0.1, **within(View, "noise"))
        self.seed = slider(whole, "seed", "seed of phi's noise", value=0, min=0, max=50)
        self.label = slider(list_, "class", "images of this class", options=[("all", -1)], value=-1)
        self.count = slider(whole, "images", "number of images", **within(View, "count"))
        self.image = slider(whole, "one image", "its several draws are shown below", **within(View, "image"))
        self.again = button("Look for phis again", "in the folders of all runs: phis trained since the page opened")
        self.other = dropdown("compare with (B)", "a second phi on the same images and seeds", [NOTHING], NOTHING)
        self.other_moment = slider(list_, "B's iteration", "B before this iteration", options=["0"], value="0")
        self.kornia = widgets.Text(description="of kornia", placeholder="kornia:RandomAffine(degrees=15)")
        self.kornia.style.description_width, self.kornia.tooltip = "115px", "any of kornia's augmentations, by name"
        self.add = button("Compare with it", "with the augmentation that is named there")
        self.upload = Upload()
        self.remove = button("Back to the data set's images", "your images leave the page", disabled=True)
        self.turned = [self.moment, self.strength, self.noise, self.seed, self.label, self.count, self.image]
        self.turned += [self.other_moment]

    def make_pictures(self) -> None:
        self.front = styled(Front(), "augdistill-front")
        self.grid, self.drawn, self.curves = image("images through phi"), image("draws of one image"), image("training")
        self.valley, self.paths = image("the loss along one range"), image("where students go")
        self.caption, self.scores = widgets.HTML(), widgets.HTML()
        self.status = styled(widgets.HTML(), "augdistill-line")
        self.hint = widgets.HTML(f"<i>{HINT}</i>")
        self.progress = widgets.FloatProgress(value=0, max=1, layout={"width": "260px"})
        self.stop = button("Stop", "what was done so far is kept", disabled=True)
        self.working = row(self.progress, self.stop)
        self.working.layout.display = "none"

    def arrange(self) -> None:
        """The page's layout. The browser shows the section whose button is pressed, so that it need not wait for us."""
        sections = {
            "Look": section(*self.turned[:-1], row(self.again)),
            "Ranges": self.ranges.box,
            "Images": section(self.upload, row(self.remove)),
            "Compare": section(self.other, self.other_moment, self.kornia, row(self.add)),
            "Students": self.students.box,
            "Train": self.learning.box,
            "Share": self.share.box,
        }
        self.sections = styled(widgets.ToggleButtons(options=list(sections)), "augdistill-sections")
        left = widgets.VBox([self.data, self.phi, self.sections, *sections.values()])
        pictures = widgets.Box([self.grid, self.drawn, self.valley, self.paths, self.curves, self.scores])
        seen = [self.status, self.working, self.hint, self.caption, styled(pictures, "augdistill-pictures")]
        main = widgets.Box([styled(left, "augdistill-controls"), styled(widgets.VBox(seen), "augdistill-seen")])
        self.box = styled(widgets.VBox([self.front, styled(main, "augdistill-main")]), "augdistill-explorer")

    def connect(self) -> None:
        for control in self.turned:
            control.observe(self.draw, "value")
        self.data.observe(self.change_data, "value")
        self.phi.observe(self.change_phi, "value")
        self.other.observe(self.change_other, "value")
        self.upload.on_msg(self.take_file)
        on_clicks(
            {self.again: self.look_again, self.add: self.add_kornia, self.remove: self.remove_own, self.stop: self.end}
        )

    def _repr_mimebundle_(self, **options) -> dict:
        """What a notebook cell shows: the widgets, or a line of text where no kernel runs."""
        return self.box._repr_mimebundle_(**options) | {"text/html": f"<p class='note'>{STATIC_NOTE}</p>"}

    def close(self) -> None:
        self.background.stop()

    # --- the status line ------------------------------------------------------------------------------------------

    def say(self, text: str, error: bool = False) -> None:
        role, kind = ("alert", "augdistill-error") if error else ("status", "augdistill-status")
        mark = "<b>Error:</b> " if error else ""
        self.status.value = f'<div role="{role}" class="{kind}">{mark}{one_line(text)}</div>' if text else ""

    def fail(self, error: Exception) -> None:
        """Show an error as a line on the page; with its type, if it is neither a wrong input nor a file error."""
        self.errors.append(error)
        expected = isinstance(error, ValueError | OSError)
        self.say(str(error) if expected else f"unexpected {type(error).__name__}: {error}", error=True)

    # --- viewing --------------------------------------------------------------------------------------------------

    @property
    def view(self) -> View:
        values = dict(strength=self.strength.value, noise=self.noise.value, seed=self.seed.value)
        return View(label=self.label.value, count=self.count.value, image=self.image.value, **values)

    @property
    def moments(self) -> tuple[str, str]:
        """The moments at which the phi and the one beside it are shown."""
        return self.moment.value, self.other_moment.value

    @guarded
    def draw(self) -> None:
        """Paint the pictures, then compute what the next ones will need."""
        self.hint.value = ""
        self.ranges.fill()
        self.paint()
        self.students.follow()
        self.explorer.prepare(self.view, *self.moments)

    def paint(self) -> None:
        look = self.explorer.look(self.view, *self.moments)
        put(self.grid, png(look.sheet(), QUICK))
        put(self.drawn, png(look.drawn(), QUICK))
        lines = []
        for chosen, moment, change, name in zip(
            self.explorer.both, self.moments, look.changes, ("A: " if self.explorer.second else "", "B: "), strict=False
        ):
            at = "" if len(chosen.moments) == 1 else f", iteration {moment}"
            by_hand = ", ranges turned by hand" if chosen.values or chosen.off else ""
            title, saved_for = html.escape(chosen.choice.name), chosen.choice.strength
            other = "" if saved_for in (None, self.view.strength) else f", saved for strength {saved_for:g}"
            lines.append(f"<b>{name}{title}</b>{at}{by_hand}{other}: relative change of x {change:.2f}")
        if any("●" in column for column in look.columns):
            lines[0] += ". ● phi was trained on it"
        self.caption.value = "<br>".join(lines)
        if "augdistill-error" in self.status.value:
            self.say("")

    def fill_choices(self) -> None:
        classes = [("all", -1), *((name, label) for label, name in enumerate(self.explorer.data.classes))]
        set_options(self, self.label, classes, self.label.value if self.label.value < len(classes) - 1 else -1)
        names, second = list(self.all_choices()), self.explorer.second
        set_options(self, self.phi, names, self.explorer.choice.name)
        set_options(self, self.other, [NOTHING, *names], second.choice.name if second else NOTHING)

    def fill_moments(self, moment: str = "") -> None:
        for control, chosen, wanted in (
            (self.moment, self.explorer.first, moment),
            (self.other_moment, self.explorer.second, self.other_moment.value),
        ):
            moments = list(chosen.moments) if chosen else ["0"]
            set_options(self, control, moments, wanted if wanted in moments else moments[-1])
            control.layout.display = "none" if len(moments) == 1 else ""

    def all_choices(self) -> dict[str, Choice]:
        mine = (self.learning.choice_of(training) for training in self.learning.here())
        by_name = {choice.name: choice for choice in [*mine, *self.explorer.choices.values()]}
        hand = (by_hand(self.run, name) for name in HAND_DESIGNED)
        return by_name | {choice.name: choice for choice in hand} | self.added

    def choice_named(self, name: str) -> Choice:
        if name not in (found := self.all_choices()):
            raise ValueError(f"phi {name!r}: was not found here; must be one of those in the list")
        return found[name]

    def refill(self) -> None:
        self.fill_choices()
        self.fill_moments()

    @guarded
    def change_phi(self) -> None:
        try:
            self.explorer.choose(self.choice_named(self.phi.value))
        finally:  # if the new one cannot be read, the old one stays
            self.refill()
        self.draw()

    @guarded
    def change_other(self) -> None:
        name = self.other.value
        try:
            self.explorer.compare(None if name == NOTHING else self.choice_named(name))
            self.refill()
            self.draw()
        except Exception:
            self.explorer.compare(None)
            self.refill()
            raise

    @guarded
    def add_kornia(self) -> None:
        text = self.kornia.value.strip() or self.kornia.placeholder
        choice = by_hand(self.run, text if text.startswith("kornia:") else f"kornia:{text}")
        self.added[choice.name] = choice
        self.fill_choices()
        self.other.value = choice.name

    @guarded
    def change_data(self) -> None:
        self.show_data(self.data.value)
        self.draw()
        self.say(self.opening())

    def show_data(self, name: str) -> None:
        self.idle()
        self.say(f"loading {name} ...")
        try:
            run = self.home if name == self.home.folder.name else run_beside(self.home, name)
            self.explorer, self.added = Explorer(run), {}
            self.open_visibly()
        except Exception:
            set_options(self, self.data, self.data.options, self.run.folder.name)
            raise
        set_options(self, self.data, self.data.options, name)
        self.remove.disabled = True
        self.refill()
        self.learning.set_training()

    @guarded
    def look_again(self) -> None:
        self.explorer.refresh()
        self.fill_choices()
        self.draw()
        self.say(self.opening())

    # --- the user's own images ------------------------------------------------------------------------------------

    @guarded
    def take_file(self, _, content: dict, buffers: list) -> None:
        """A message of `Upload`; more images are added to those that are there."""
        name, size = str(content.get("name", ""))[:100], content.get("size")
        before = self.explorer.upload
        try:
            own = read_own(name, bytes(buffers[0]) if buffers else b"", self.explorer.data.shape, size)
            self.explorer.upload = before + own if before else own
        finally:  # one bad file does not keep the others away
            if content.get("last") and self.explorer.upload:
                self.show_own(content.get("left_out"))

    def show_own(self, left_out=0) -> None:
        try:
            self.paint()
        except ValueError:
            self.explorer.upload = None
            raise
        self.remove.disabled, channels, size = False, *self.explorer.data.shape[:2]
        set_options(self, self.count, (), max(self.count.value, len(self.explorer.upload.names)))
        self.draw()
        kind = "grey" if channels == 1 else "RGB"
        text = f"{len(self.explorer.upload.names)} of your images, each as {size} x {size} pixels, {kind}."
        first = next(iter(self.explorer.moments.values()))
        if first.conditional:
            text += f" phi takes them for class {self.explorer.data.classes[max(self.label.value, 0)]}: choose another."
        if left_out:
            text += f" {left_out} more were left out."
        self.say(text)

    @guarded
    def remove_own(self) -> None:
        self.explorer.upload, self.remove.disabled = None, True
        self.draw()
        self.say(f"The images of {self.run.data.name} again.")

    # --- work in the background -----------------------------------------------------------------------------------

    def idle(self) -> None:
        if self.background.busy:
            raise ValueError("a training or an evaluation is running: stop it first, or wait")

    def begin(self, work: Callable[[], None], done: Callable[[Exception | None], None]) -> None:
        """Start work in the background; `done(error)` says what became of it, by `ended`."""
        self.allow(False)
        self.background.start(work, done)

    def allow(self, on: bool) -> None:
        """Switch the controls that start work, or must not be touched during it."""
        for control in (*self.learning.starters, *self.students.starters, *self.ranges.starters, self.data):
            control.disabled = not on
        self.stop.disabled, self.progress.value = on, 0
        self.working.layout.display = "none" if on else ""

    # called by the background thread: each holds the page's lock only briefly, and no error is lost

    def tell(self, text: str, part: float) -> None:
        with self.lock:
            if not self.background.told.is_set():
                self.progress.value = part
                self.say(f"{text} {100 * part:.0f} %")

    def ended(self, error: Exception | None, text: str, wrong: bool = False) -> None:
        with self.lock:
            self.allow(True)
            self.fail(error) if error else self.say(text, error=wrong)

    @guarded
    def end(self) -> None:
        self.background.told.set()
        self.say("stopping ...")
