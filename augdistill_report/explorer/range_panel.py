"""The explorer's panel for the ranges of a phi: a dial for each, and the matching loss along one of them."""

import dataclasses

from augdistill_report.explorer.controls import button, dropdown, guarded, put, row, section, set_options
from augdistill_report.explorer.front import DialBoard
from augdistill_report.explorer.ranges import loss_along
from augdistill_report.run import picture


class RangePanel:
    """The ranges of the chosen phi (A), turned by hand; "Back to learned" undoes it."""

    def __init__(self, page):
        import ipywidgets as widgets

        self.page, self.board, self.note = page, DialBoard(), widgets.HTML()
        self.back = button("Back to learned", "all ranges as they were learned, all links on")
        self.which = dropdown("loss along", "the range along which the matching loss is measured", [""], "")
        self.measure = button("Measure the loss", "what the experts say of this range: a minute in the background")
        self.starters = (self.measure,)
        self.measured = row(self.which, self.measure)
        self.box = section(self.note, self.board, row(self.back), self.measured)
        self.board.observe(self.turn, ["values", "off"])
        self.back.on_click(self.to_learned)
        self.measure.on_click(self.start_measuring)

    def fill(self) -> None:
        """Show the ranges of the chosen phi at the moment of its training that is seen."""
        first = self.page.explorer.first
        rows = first.dials(self.page.moment.value)
        filling, self.page.filling = self.page.filling, True
        try:
            names = [part.strip() for part in first.choice.like.phi.split("+")] if first.links > 1 else [""]
            with self.board.hold_sync():
                self.board.rows = [dataclasses.asdict(row) for row in rows]
                self.board.links, self.board.values, self.board.off = names, dict(first.values), sorted(first.off)
        finally:
            self.page.filling = filling
        options = [r.name for r in rows] or [""]
        set_options(self.page, self.which, options, self.which.value if self.which.value in options else options[0])
        self.measured.layout.display = "" if rows else "none"
        legend = "<span style='color:#0072b2'>▲</span> learned"
        if any(r.taught is not None for r in rows):
            legend += " &nbsp; <span style='color:#d55e00'>▲</span> the experts' augmentation"
        none = "This phi has no ranges. Choose a policy, or one of kornia's, above."
        self.note.value = legend if rows else "" if first.links > 1 else none

    @guarded
    def turn(self) -> None:
        page, first = self.page, self.page.explorer.first
        off = self.board.off
        if not all(type(k) is int for k in off):
            raise ValueError(f"links off {off}: must be whole numbers")
        before = first.values, first.off
        try:
            first.turn(self.board.values, frozenset(off))
            page.draw()
        except Exception:
            first.turn(*before)
            self.fill()
            raise

    @guarded
    def to_learned(self) -> None:
        self.page.explorer.first.turn({})
        self.page.draw()

    @guarded
    def start_measuring(self) -> None:
        page, first, moment, name = self.page, self.page.explorer.first, self.page.moment.value, self.which.value
        page.idle()
        (line,) = [r for r in first.dials(moment) if r.name == name] or [None]
        if line is None:
            raise ValueError("this phi has no ranges: choose a policy, or one of kornia's")
        data = page.explorer.data
        experts_of = page.students.trained_experts

        def tick(done, total):
            page.background.check()
            page.tell(f"loss along {name}", done / total)

        def work():
            experts = experts_of(first.choice)
            found = loss_along(line, lambda v: first.turned_at(name, v, moment), first.choice, data, experts, tick)
            put(page.valley, picture(valley(found, line)))

        def done(error):
            stopped = page.background.told.is_set()
            page.ended(error, f"loss along {name}: {'stopped' if stopped else 'measured'}")

        page.begin(work, done)


def valley(found: dict[float, tuple[float, float]], line):
    """A figure of the loss along one range (`loss_along`): line ± one standard error, and marks as on the dial."""
    import numpy as np

    from augdistill_report.show import plots  # matplotlib's figures are slow to import

    figure, (axis,) = plots.new_figure(5.6, 3.2)
    x, (y, error) = list(found), np.array(list(found.values())).T
    axis.plot(x, y, ".-", color=plots.PALETTE[0])
    axis.fill_between(x, y - error, y + error, color=plots.PALETTE[0], alpha=0.15, linewidth=0)
    axis.axhline(0, color="black", linewidth=0.7, linestyle=":")
    axis.axvline(line.learned, color=plots.PALETTE[0], linestyle="--", label="learned")
    if line.taught is not None:
        axis.axvline(line.taught, color=plots.PALETTE[1], linestyle="--", label="the experts'")
    axis.set(xlabel=f"{line.name} ({line.unit})", ylabel="increase of the matching loss")
    axis.legend(frameon=False, fontsize=9)
    return figure
