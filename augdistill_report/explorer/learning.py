"""The explorer's panel that trains a phi in the background, continues its training, and saves it."""

import dataclasses
from pathlib import Path

import ipywidgets as widgets

from augdistill_core import PHIS, DistillConfig
from augdistill_report.explorer.choices import Choice
from augdistill_report.explorer.controls import (
    BOX,
    button,
    dropdown,
    guarded,
    on_clicks,
    put,
    row,
    section,
    set_options,
    slider,
    within,
)
from augdistill_report.explorer.training import Asked, Training, found_by
from augdistill_report.files.phi_files import save_phi
from augdistill_report.run import Run, file_name, picture, start_folder
from augdistill_report.settings import MENDED, REPORT_NETWORK, STUDENT_REPORT

OPTIMIZERS = ["Adam", "AdamW", "RMSprop", "SGD"]


class Learning:
    """Controls of a training's settings, and the trainings that were started on this page."""

    def __init__(self, page):
        self.page = page
        self.trainings: dict[tuple[Path, str, DistillConfig], Training] = {}
        whole, power = widgets.IntSlider, widgets.FloatLogSlider
        self.report = button("The student report's setting", f"{REPORT_NETWORK} by SGD, step size 1000")
        self.mended = button("The mended setting", f"{REPORT_NETWORK} by Adam, step size .01")
        self.network = dropdown("phi to train", "any name in PHIS", list(PHIS), REPORT_NETWORK)
        self.optimizer = dropdown("optimiser", "phi's optimiser", OPTIMIZERS, OPTIMIZERS[0])
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
        self.name = widgets.Text("mine", description="name", tooltip="the file's name", **BOX)
        self.save = button("Save", "in the store for the other notebooks, and as a file for image pipelines")
        self.starters = (self.train, self.save)
        settings = [self.network, self.optimizer, self.step, self.alpha, self.mode, self.steps, self.target]
        self.box = section(
            row(self.report, self.mended),
            self.iterations,
            row(self.train),
            *settings,
            self.others,
            self.name,
            row(self.save),
        )
        on_clicks(
            {
                self.report: self.take_report,
                self.mended: self.take_mended,
                self.train: self.start_training,
                self.save: self.keep,
            }
        )

    @property
    def run(self) -> Run:
        return self.page.run

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

        return Choice(f"trained here: {self.name_of(training)}", training.job, training.moments, alpha, job)

    def set_training(self, changes: dict = MENDED) -> None:
        """Set the controls to the run's own settings with these changes."""
        self.setting = config = self.run.settings.select(DistillConfig, **changes, minutes=0.0, iterations=1)
        self.network.value = REPORT_NETWORK
        set_options(self.page, self.optimizer, dict.fromkeys([*OPTIMIZERS, config.phi_optimizer]), config.phi_optimizer)
        self.step.value, self.alpha.value, self.mode.value = config.phi_lr, config.alpha, config.alpha_mode
        self.steps.value, self.target.value = config.syn_steps, config.expert_epochs
        rest = ("phi_momentum", "alpha_optimizer", "alpha_lr", "noise", "max_start_epoch")
        self.others.value = f"<small>{', '.join(f'{key} {getattr(config, key)}' for key in rest)}</small>"

    @guarded
    def take_report(self) -> None:
        self.set_training(STUDENT_REPORT)

    @guarded
    def take_mended(self) -> None:
        self.set_training()

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

    @guarded
    def start_training(self) -> None:
        page = self.page
        page.idle()
        key = (self.run.folder, self.network.value, self.config())
        if key not in self.trainings:
            self.trainings[key] = Training(self.run, *key[1:])
        training, iterations = self.trainings[key], self.asked().iterations
        name = self.name_of(training)
        page.explorer.choose(self.choice_of(training))
        page.refill()
        page.draw()

        def look(what, part):
            page.tell(f"{name}: {what}", part)
            if what == "iterations":
                self.follow(training)

        def done(error):
            self.follow(training)
            went = training.stopped or f"was trained for {len(training.history)} iterations"
            page.ended(error, f"{name} {went}", wrong=bool(training.stopped))

        if not (self.run.folder / "config.json").exists():
            start_folder(self.run.folder, page.data.value, self.run.settings)
        page.begin(lambda: training.more(iterations, page.background.check, look), done)

    def follow(self, training: Training) -> None:
        """Update the curves, and the pictures if they show this training; called by the background thread."""
        from augdistill_report.show import plots  # matplotlib's figures are slow to import

        page = self.page
        try:
            with page.lock:
                if page.explorer.choice.name == self.choice_of(training).name:
                    moment = page.moment.value
                    at_end = moment == list(page.explorer.moments)[-1]
                    page.explorer.choose(self.choice_of(training))
                    page.fill_moments("" if at_end else moment)
                    page.ranges.fill()
                    page.paint()
            histories = {self.name_of(t): t.history for t in self.here() if t.history}
            put(page.curves, picture(plots.curves(histories)) if histories else b"")
        except Exception as error:
            page.fail(error)

    @guarded
    def keep(self) -> None:
        page = self.page
        page.idle()
        choice, name = page.explorer.choice, self.name.value.strip()
        if choice.job is None:
            raise ValueError(f"{choice.name}: was not trained here or in a run's store; there is nothing to save")
        if page.explorer.first.values or page.explorer.first.off:
            raise ValueError("the ranges are turned by hand: a file holds learned ones; press Back to learned first")
        moment, last = page.moment.value, page.explorer.first.last()
        if moment != last:
            raise ValueError(f"iteration {moment} is shown: a file holds phi after its training; choose {last} first")
        if not name:
            raise ValueError("name: is empty; give the file a name")
        path = self.run.folder / "phis" / f"{file_name(name)}.safetensors"
        if path.exists():
            raise ValueError(f"name {name!r}: {path} exists already; choose another")
        strength = page.view.strength  # checked: a client can send a slider any value
        job, store = choice.job()
        save_phi(path, job, store, strength)
        page.explorer.refresh()
        page.fill_choices()
        # a file has no place for another noise
        noise = page.view.noise if page.explorer.moments[last].stochastic else 1
        own = f" and noise 1 ({noise:g} is shown)" if noise != 1 else ""
        page.say(f"saved, for strength {strength:g}{own}: {path}. {found_by(job, self.run)}")
