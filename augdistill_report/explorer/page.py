"""The explorer's page: sliders, buttons and pictures around an `Explorer` and its `Training`s.

Pictures are PNG images in fixed widgets: nothing flickers, and no memory leaks. An error in a callback becomes one line
on the page (and an entry of `Page.errors`, for tests). Long work runs in the background and can be stopped.
"""

import dataclasses
import functools
import html
import threading
from pathlib import Path

import ipywidgets as widgets

from augdistill_core import PHIS, Config, DistillConfig
from augdistill_report.explorer.state import Choice, Explorer, View, presets, run_beside
from augdistill_report.explorer.training import Asked, Background, Training, found_by
from augdistill_report.files.phi_files import save_phi
from augdistill_report.run import Run, file_name, picture, start_folder
from augdistill_report.settings import MENDED, REPORT_NETWORK, STUDENT_REPORT
from augdistill_report.show import plots
from augdistill_report.show.image_grids import png
from augdistill_report.work.statistics import shown, summary

OPTIMIZERS = ["Adam", "AdamW", "RMSprop", "SGD"]

STATIC_NOTE = (
    "The explorer's page, with its sliders and buttons, appears here when a kernel runs: <code>make app</code> serves "
    "it, <code>make lab</code> opens this notebook. The pictures above and below this line show it as it was saved."
)

BOX = dict(style={"description_width": "115px"}, layout={"width": "370px"})

QUICK = 1  # PNG compression level: a slider must not wait for it


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


def heading(text: str) -> widgets.HTML:
    return widgets.HTML(f"<h3 style='margin:.2em 0'>{text}</h3>")


def guarded(method):
    """A callback whose error becomes a line on the page."""

    @functools.wraps(method)
    def call(self, *_):
        try:
            with self.lock:
                return None if self.filling else method(self)
        except Exception as error:
            self.fail(error)

    return call


class Page:
    """The page of a run. The last line of a notebook cell shows it; `close` stops its background work."""

    def __init__(self, run: Run):
        self.home, self.errors = run, []
        self.explorer, self.background, self.lock = Explorer(run), Background(), threading.RLock()
        self.trainings: dict[tuple[Path, str, DistillConfig], Training] = {}
        self.filling = False
        self.make_controls()
        self.make_pictures()
        self.fill_choices()
        self.fill_moments()
        self.set_training(MENDED)
        self.connect()
        self.paint()
        self.say(self.opening())

    def opening(self) -> str:
        problems = self.explorer.problems
        text = f"{self.run.data.name}: {sum(c.trained for c in self.explorer.choices.values())} trained phis found."
        if self.explorer.nothing_trained:
            text = "No phi has been trained on this data yet: you see an untrained one. Train it here (below)."
        return text + (f" Left out: {'; '.join(problems)}." if problems else "")

    # --- controls and pictures ------------------------------------------------------------------------------------

    @property
    def run(self) -> Run:
        return self.explorer.run

    def make_controls(self) -> None:
        here = self.home.folder.name
        names = list(dict.fromkeys([here, *presets()]))
        self.data = dropdown("data (preset)", "the preset, which names the data set", names, here)
        self.phi = dropdown("phi", "trained phis first, then untrained ones", [""], "")
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
        self.turned = [self.strength, self.noise, self.seed, self.label, self.count, self.image, self.moment]

        self.report = button("The student report's setting", f"{REPORT_NETWORK} by SGD, step size 1000")
        self.mended = button("The mended setting", f"{REPORT_NETWORK} by Adam, step size .01")
        self.network = dropdown("phi to train", "any name in PHIS", list(PHIS), REPORT_NETWORK)
        self.optimizer = dropdown("optimiser", "phi's optimiser", OPTIMIZERS, OPTIMIZERS[0])
        power = widgets.FloatLogSlider
        size = dict(value=0.01, min=-5, max=3, step=0.1, readout_format=".3g")
        self.step = slider(power, "step size", "step size of phi's optimiser", **size)
        self.alpha = slider(power, "initial alpha", "the student's initial step size", **size | dict(min=-4, max=0))
        modes = [("learned as log alpha", "log"), ("as log alpha, held until loss < 1", "held")]
        modes += [("learned directly (raw)", "raw"), ("fixed", "fixed")]
        self.mode = dropdown("alpha is", "how the student's step size is learned", modes, "log")
        self.steps = slider(whole, "N (steps)", "student steps in one unroll", **within(Asked, "syn_steps"))
        self.target = slider(whole, "M (snapshots)", "from start to target", **within(Asked, "expert_epochs"))
        self.iterations = slider(whole, "k (iterations)", "iterations of one click", **within(Asked, "iterations"))
        self.others = widgets.HTML()
        self.train = button("Train k more", "continue, or start if these settings are new", button_style="primary")
        self.stop = button("Stop", "phi keeps what it has learned so far", disabled=True)
        self.evaluate = button("Evaluate", "train students on the phi(x) that you see, and on its controls")
        self.name = widgets.Text("mine", description="name", tooltip="the file's name", **BOX)
        self.save = button("Save", "in the store for the other notebooks, and as a file for image pipelines")

    def make_pictures(self) -> None:
        fits = dict(max_width="100%", height="auto", align_self="flex-start")
        self.grid, self.drawn, self.curves = (widgets.Image(format="png", layout=fits) for _ in range(3))
        self.caption, self.status, self.scores = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.progress = widgets.FloatProgress(value=0, max=1, description="", layout={"width": "370px"})
        self.progress.style.bar_color = plots.PALETTE[0]
        self.curves.layout.display = "none"

        def row(*items):
            return widgets.HBox(items, layout={"flex_flow": "row wrap"})

        look = [heading("Explore phi"), self.data, self.phi, *self.turned[-1:], *self.turned[:-1], row(self.again)]
        learn = [heading("Train phi"), row(self.report, self.mended), self.network, self.optimizer, self.step]
        learn += [self.alpha, self.mode, self.steps, self.target, self.others, self.iterations]
        learn += [row(self.train, self.stop, self.evaluate), self.progress, self.name, row(self.save)]
        left = widgets.VBox([*look, *learn], layout={"width": "390px", "flex": "0 0 auto"})
        seen = [self.status, self.caption, self.grid, self.drawn, self.scores, self.curves]
        right = widgets.VBox(seen, layout={"flex": "1 1 600px", "min_width": "0"})
        self.box = widgets.HBox([left, right], layout={"flex_flow": "row wrap"})
        self.box.add_class("augdistill-explorer")

    def connect(self) -> None:
        for control in self.turned:
            control.observe(self.draw, "value")
        self.data.observe(self.change_data, "value")
        self.phi.observe(self.change_phi, "value")
        for control, action in (
            (self.again, self.look_again),
            (self.report, self.take_report),
            (self.mended, self.take_mended),
            (self.train, self.start_training),
            (self.stop, self.end),
            (self.evaluate, self.start_scoring),
            (self.save, self.keep),
        ):
            control.on_click(action)

    def _repr_mimebundle_(self, **options) -> dict:
        """What a notebook cell shows: the widgets, or a line of text where no kernel runs."""
        return self.box._repr_mimebundle_(**options) | {"text/html": f"<p class='note'>{STATIC_NOTE}</p>"}

    def close(self) -> None:
        self.background.stop()

    # --- the status line ------------------------------------------------------------------------------------------

    def say(self, text: str, error: bool = False) -> None:
        role, colour = ("alert", plots.PALETTE[1]) if error else ("status", plots.PALETTE[0])
        kind = "augdistill-error" if error else "augdistill-status"
        style = f"border-left:4px solid {colour};padding-left:8px;line-height:1.4"
        mark = "<b>Error:</b> " if error else ""
        self.status.value = f'<div role="{role}" class="{kind}" style="{style}">{mark}{html.escape(text)}</div>'

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

    @guarded
    def draw(self) -> None:
        """Paint the pictures, then compute what the next one will need."""
        self.paint()
        self.explorer.prepare(self.view, self.moment.value)

    def paint(self) -> None:
        look = self.explorer.look(self.view, self.moment.value)
        self.grid.value, self.drawn.value = png(look.sheet(), QUICK), png(look.drawn(), QUICK)
        name = html.escape(self.explorer.choice.name)
        mark = ". ● phi was trained on it" if any("●" in column for column in look.columns) else ""
        at = "" if len(self.moment.options) == 1 else f", iteration {self.moment.value}"
        self.caption.value = f"<b>{name}</b>{at}: relative change of x {look.change:.2f}{mark}"
        if "augdistill-error" in self.status.value:
            self.say("")

    def fill(self, control, options: list, value) -> None:
        """Set a control's options and value, without a new picture for each change."""
        filling, self.filling = self.filling, True
        try:
            if list(control.options) != options:
                control.options = options
            control.value = value
        finally:
            self.filling = filling

    def fill_choices(self) -> None:
        classes = [("all", -1), *((name, label) for label, name in enumerate(self.explorer.data.classes))]
        self.fill(self.label, classes, self.label.value if self.label.value < len(classes) - 1 else -1)
        self.fill(self.phi, list(self.all_choices()), self.explorer.choice.name)

    def fill_moments(self, moment: str = "") -> None:
        moments = list(self.explorer.moments)
        self.fill(self.moment, moments, moment if moment in moments else moments[-1])

    def all_choices(self) -> dict[str, Choice]:
        mine = (self.choice_of(training) for training in self.here())
        return {choice.name: choice for choice in [*mine, *self.explorer.choices.values()]}

    def here(self) -> list[Training]:
        """The trainings on this data set."""
        return [training for (folder, *_), training in self.trainings.items() if folder == self.run.folder]

    def name_of(self, training: Training) -> str:
        """A training's title, with the settings that differ if an earlier training has the same title."""
        first = next(other for other in self.here() if other.title == training.title)
        ours, others = training.job.config.to_dict(), first.job.config.to_dict()
        return ", ".join([training.title, *(f"{key} {value}" for key, value in ours.items() if value != others[key])])

    def choice_of(self, training: Training) -> Choice:
        def job():
            return training.store(), training.run.store

        def alpha():
            return training.alpha

        return Choice(f"trained here: {self.name_of(training)}", training.run.base, training.moments, alpha, job)

    @guarded
    def change_phi(self) -> None:
        try:
            self.explorer.choose(self.all_choices()[self.phi.value])
        finally:  # if the new one cannot be read, the old one stays
            self.fill(self.phi, list(self.all_choices()), self.explorer.choice.name)
            self.fill_moments()
        self.draw()

    @guarded
    def change_data(self) -> None:
        self.idle()
        name = self.data.value
        self.say(f"loading {name} ...")
        try:
            run = self.home if name == self.home.folder.name else run_beside(self.home, name)
            self.explorer = Explorer(run)
        except Exception:
            self.fill(self.data, list(self.data.options), self.run.folder.name)
            raise
        self.fill_choices()
        self.fill_moments()
        self.set_training(MENDED)
        self.draw()
        self.say(self.opening())

    @guarded
    def look_again(self) -> None:
        self.explorer.refresh()
        self.fill_choices()
        self.draw()
        self.say(self.opening())

    # --- training -------------------------------------------------------------------------------------------------

    def set_training(self, changes: dict) -> None:
        """Set the controls to the run's own settings with these changes."""
        self.setting = config = self.run.settings.select(DistillConfig, **changes, minutes=0.0, iterations=1)
        self.network.value = REPORT_NETWORK
        self.fill(self.optimizer, list(dict.fromkeys([*OPTIMIZERS, config.phi_optimizer])), config.phi_optimizer)
        self.step.value, self.alpha.value, self.mode.value = config.phi_lr, config.alpha, config.alpha_mode
        self.steps.value, self.target.value = config.syn_steps, config.expert_epochs
        rest = ("phi_momentum", "alpha_optimizer", "alpha_lr", "noise", "max_start_epoch")
        self.others.value = f"<small>{', '.join(f'{key} {getattr(config, key)}' for key in rest)}</small>"

    @guarded
    def take_report(self) -> None:
        self.set_training(STUDENT_REPORT)

    @guarded
    def take_mended(self) -> None:
        self.set_training(MENDED)

    def asked(self) -> Asked:
        return Asked(*(s.value for s in (self.iterations, self.steps, self.target, self.step, self.alpha)))

    def config(self) -> DistillConfig:
        """The settings that the controls ask for; a `ValueError` if they are impossible."""
        asked, snapshots = self.asked().to_dict(), self.run.settings.snapshots()
        del asked["iterations"]
        if (target := asked["expert_epochs"]) > snapshots:
            raise ValueError(f"M = {target}: the experts have {snapshots} snapshots after the first; use fewer")
        return dataclasses.replace(
            self.setting,
            phi_optimizer=self.optimizer.value,
            phi_momentum=self.setting.phi_momentum if self.optimizer.value == self.setting.phi_optimizer else 0.0,
            alpha_mode=self.mode.value,
            **asked,
            max_start_epoch=min(self.setting.max_start_epoch, snapshots - target),
        )

    def idle(self) -> None:
        if self.background.busy:
            raise ValueError("a training or an evaluation is running: stop it first, or wait")

    @guarded
    def start_training(self) -> None:
        self.idle()
        key = (self.run.folder, self.network.value, self.config())
        if key not in self.trainings:
            self.trainings[key] = Training(self.run, *key[1:])
        training, iterations = self.trainings[key], self.asked().iterations
        name = self.name_of(training)
        self.explorer.choose(self.choice_of(training))
        self.fill_choices()
        self.fill_moments()
        self.draw()

        def look(what, part):
            self.tell(f"{name}: {what}", part)
            if what == "iterations":
                self.follow(training)

        def done(error):
            self.follow(training)
            went = training.stopped or f"was trained for {len(training.history)} iterations"
            self.ended(error, f"{name} {went}", wrong=bool(training.stopped))

        if not (self.run.folder / "config.json").exists():
            start_folder(self.run.folder, self.data.value, self.run.settings)
        self.begin(lambda: training.more(iterations, self.background.check, look), done)

    def begin(self, work, done) -> None:
        for control in (self.train, self.evaluate, self.save, self.data):
            control.disabled = True
        self.stop.disabled = False
        self.background.start(work, done)

    # called by the background thread: each holds the page's lock only briefly, and no error is lost

    def tell(self, text: str, part: float) -> None:
        with self.lock:
            if not self.background.told.is_set():
                self.progress.value = part
                self.say(f"{text} {100 * part:.0f} %")

    def follow(self, training: Training) -> None:
        """Update the curves, and the pictures if they show this training."""
        try:
            with self.lock:
                if self.explorer.choice.name == self.choice_of(training).name:
                    moment = self.moment.value
                    at_end = moment == list(self.explorer.moments)[-1]
                    self.explorer.choose(self.choice_of(training))
                    self.fill_moments("" if at_end else moment)
                    self.paint()
            histories = {self.name_of(t): t.history for t in self.here() if t.history}
            if histories:
                self.curves.value = picture(plots.curves(histories))
            self.curves.layout.display = "" if histories else "none"
        except Exception as error:
            self.fail(error)

    def ended(self, error: Exception | None, text: str, wrong: bool = False) -> None:
        with self.lock:
            for control in (self.train, self.evaluate, self.save, self.data):
                control.disabled = False
            self.stop.disabled, self.progress.value = True, 0
            self.fail(error) if error else self.say(text, error=wrong)

    @guarded
    def end(self) -> None:
        self.background.told.set()
        self.say("stopping ...")

    # --- scoring and saving ---------------------------------------------------------------------------------------

    @guarded
    def start_scoring(self) -> None:
        self.idle()
        work, name = self.explorer.scoring(self.view, self.moment.value), self.explorer.choice.name

        def tick(done, total):
            self.background.check()
            if self.background.due():
                self.tell("students", done / total)

        def done(error):
            self.ended(error, f"{name}: {'stopped' if self.background.told.is_set() else 'evaluated'}")

        self.begin(lambda: self.show_scores(work(tick), name), done)

    def show_scores(self, found: dict, name: str) -> None:
        rows = {f"{name}, as shown" if row == "phi" else row: summary(values) for row, values in found.items()}
        cells = (f"<tr><td>{html.escape(row)}</td><td>{shown(values)}</td></tr>" for row, values in rows.items())
        head = "<tr><th>students trained on its images, augmentation</th><th>validation accuracy</th></tr>"
        self.scores.value = f"<table class='augdistill-scores'>{head}{''.join(cells)}</table>"

    @guarded
    def keep(self) -> None:
        self.idle()
        choice, name = self.explorer.choice, self.name.value.strip()
        if choice.job is None:
            raise ValueError(f"{choice.name}: was not trained here or in a run's store; there is nothing to save")
        if not name:
            raise ValueError("name: is empty; give the file a name")
        path = self.run.folder / "phis" / f"{file_name(name)}.safetensors"
        if path.exists():
            raise ValueError(f"name {name!r}: {path} exists already; choose another")
        strength = self.view.strength  # checked: a client can send a slider any value
        job, store = choice.job()
        save_phi(path, job, store, strength)
        self.explorer.refresh()
        self.fill_choices()
        self.say(f"saved, for strength {strength:g}: {path}. {found_by(job, self.run)}")
