"""The explorer's panel for students: where they go in the experts' plane, and what they learn from what is seen."""

import html

import ipywidgets as widgets
import torch

from augdistill_core import Trajectories
from augdistill_report.explorer.choices import Choice
from augdistill_report.explorer.controls import button, guarded, put, row, section
from augdistill_report.run import picture
from augdistill_report.work.experts import load_trajectories, missing_experts
from augdistill_report.work.pool import run_jobs
from augdistill_report.work.statistics import Accuracy, difference, shown, summary


class Students:
    """Draws the paths of students while sliders move (`follow`), and trains students to the end (`start_scoring`)."""

    def __init__(self, page):
        self.page = page
        self.where = widgets.Checkbox(description="show where students go", indent=False)
        self.where.tooltip = "their steps on phi(x), in the plane of an expert trajectory"
        self.evaluate = button("Evaluate", "train students on the phi(x) that you see, and on its controls")
        self.starters = (self.evaluate, self.where)
        self.box = section(self.where, row(self.evaluate))
        self.where.observe(self.switch, "value")
        self.evaluate.on_click(self.start_scoring)

    @guarded
    def switch(self) -> None:
        page = self.page
        if self.where.value and page.explorer.experts() is None:
            page.idle()
            choice = page.explorer.choice

            def done(error):
                page.ended(error, "stopped" if page.background.told.is_set() else "the experts are trained")
                page.draw()

            page.begin(lambda: self.trained_experts(choice), done)
        else:
            self.follow()

    def trained_experts(self, choice: Choice) -> Trajectories:
        """The expert trajectories of a phi's setup, trained first if they are missing; in the background thread."""
        page, store = self.page, self.page.run.store

        def show(done, total, note=""):
            page.background.check()
            page.tell("experts", done / total)

        run_jobs(missing_experts(choice.like.setup), store, page.run.settings.pool, show)
        return load_trajectories(choice.like.setup, store)

    def follow(self) -> None:
        """Draw the paths if they are asked for and the experts are there."""
        page = self.page
        experts = page.explorer.experts() if self.where.value else None
        if experts is None:
            put(page.paths, b"")
            return
        from augdistill_report.show import plots  # matplotlib's figures are slow to import

        config = page.explorer.choice.like.config
        reach = min(config.max_start_epoch + config.expert_epochs, experts.snapshots - 1)
        trajectory = torch.stack([experts.trajectories[0][t] for t in range(reach + 1)])
        figure, (axis,) = plots.new_figure(6.2, 4.0)
        plots.plane(axis, trajectory[None], page.explorer.paths(page.view, experts, *page.moments))
        put(page.paths, picture(figure))

    @guarded
    def start_scoring(self) -> None:
        page = self.page
        page.idle()
        work = page.explorer.scoring(page.view, *page.moments)
        names = [chosen.choice.name for chosen in page.explorer.both]

        def tick(done, total):
            page.background.check()
            if page.background.due():
                page.tell("students", done / total)

        def done(error):
            page.ended(error, f"{' and '.join(names)}: {'stopped' if page.background.told.is_set() else 'evaluated'}")

        page.begin(lambda: self.show_scores(work(tick), names), done)

    def show_scores(self, found: dict, names: list[str]) -> None:
        titles = {"phi": f"{names[0]}, as shown"}
        titles |= {row: f"{row}: {name}, as shown" for row, name in zip("AB", names, strict=False)}
        rows = [(titles.get(name, name), shown(summary(values))) for name, values in found.items()]
        if "B" in found:
            scores = {(name, 0): Accuracy(found[name], found[name]) for name in "AB"}
            gap = difference(scores, "B", "A")
            rows.append(("B - A (points, 95 % interval)", f"{gap}: {gap.verdict}"))
        cells = (f"<tr><td>{html.escape(row)}</td><td>{text}</td></tr>" for row, text in rows)
        head = "<tr><th>students trained on its images, augmentation</th><th>validation accuracy</th></tr>"
        self.page.scores.value = f"<table class='augdistill-scores'>{head}{''.join(cells)}</table>"
