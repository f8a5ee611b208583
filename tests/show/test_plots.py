"""Pictures can be read: nothing covers another thing, axes cover what there is, and a name has one look."""

import itertools

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from augdistill_core import seeded
from augdistill_report.show import plots, subset_plots
from augdistill_report.studies import unseen
from augdistill_report.work.statistics import Accuracy


def test_a_name_has_one_look_and_a_row_brings_its_own():
    rows = {"mine": plots.Style("my method", "#123456", "^", ":")}
    assert plots.look("mine", rows) == rows["mine"]
    assert plots.look(("mine", "10 %"), rows) == plots.Style("my method, 10 %", "#123456", "^", ":")
    assert plots.look(("pixels (MTT)", "step size .01")).colour == plots.look("pixels (MTT)").colour == "#d55e00"
    assert plots.look("a phi on 10 %").colour != plots.look("a phi").colour  # names are not parsed


REPORT = ["distnet2, SGD 1000", "distnet2, SGD .01", "distnet2, Adam"]


@pytest.mark.parametrize(
    "names",
    [
        ["real images", "identity", "pixels (MTT)", *REPORT, "unet_noise"],
        ["SGD .01", "SGD 10", "SGD 1000", "Adam for phi", "log alpha, Adam"],
        ["x", "distnet2", "distnet3", "distnet5"],
        ["two draws", "ordinary loss"],
        ["no augmentation", "experts' augmentation", *unseen.OF_EPISODES, *unseen.ALONE, "soft labels"],
        [*subset_plots.UNITS],
    ],
)
def test_names_of_one_picture_have_different_colours(names):
    assert set(names) <= set(plots.COLOURS) and len({plots.look(name).colour for name in names}) == len(names)


# --- whatever the data: nothing overlaps, and axes cover what there is ------------------------------------------------


def boxes(figure) -> list[tuple[str, Bbox]]:
    """The texts that a figure shows, and their boxes in pixels."""
    FigureCanvasAgg(figure).draw()
    outside = set()  # labels of ticks beyond the end of an axis, which are not drawn
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        outside |= {tick.label1 for tick in ticks if not axis.get_visible() or not low <= tick.get_loc() <= high}
    found = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and t not in outside]
    return [(text.get_text(), text.get_window_extent()) for text in found]


def histories(names, n=20):
    return {
        name: [{"iteration": i, "loss": 0.9 / (i + 1), "alpha": 0.02 + 0.01 * i} for i in range(n)] for name in names
    }


def accuracies(level, methods, n=3):
    return {name: Accuracy([level * (1 + 0.02 * k + 0.01 * j) for j in range(n)], []) for k, name in enumerate(methods)}


LEFT = {
    "pixels (MTT)": Accuracy([0.031, 0.033], [], "diverged"),
    "class-blind MLP, phi(x) - x alone": Accuracy([0.02], []),
}

ROWS = {name: plots.Style(f"a method with a long name, {name}", f"C{k}") for k, name in enumerate("abcd")}

SIZES = {0.01: "1 % (4 images a class)", 0.1: "10 % (44 to 45 images a class)", 0.5: "50 % (225 images a class)"}

KINDS = [*subset_plots.UNITS]


def by_fraction(level, groups):
    series = {name: dict(zip(SIZES, accuracies(level, "123").values(), strict=True)) for name in ROWS}
    return subset_plots.by_fraction(dict.fromkeys(groups, series), Accuracy([2 * level] * 2, []), SIZES, ROWS, 0.01)


def drifts(error, *groups):
    found = {step: {"noise": (0.4, error)} | dict.fromkeys(ROWS, (0.5, error)) for step in (0, 120, 2400)}
    return subset_plots.drift_panels(dict.fromkeys(SIZES.values(), dict.fromkeys(groups, found)), "noise", ROWS)


def policy(kinds, truth):
    history = [{"iteration": i, "phi": {kind: 0.03 + 0.01 * k * i for k, kind in enumerate(kinds)}} for i in range(9)]
    return subset_plots.ranges(dict.fromkeys(("two draws", "ordinary loss", "control"), [history] * 3), truth)


def theta(experts):
    return torch.randn(experts, 5, 40, generator=seeded(0)).cumsum(1)


def learning(experts, last=0.03):
    return plots.expert_curves([[0.01, 0.02, 0.025, 0.028, last]] * experts, theta(experts), 0.01)


PICTURES = {
    "bars": lambda: plots.bars(LEFT, 0.01),
    "bars near 100 %": lambda: plots.bars(accuracies(0.95, ROWS), 0.5),
    "one expert": lambda: learning(1),
    "many experts": lambda: learning(20),
    "planes": lambda: plots.trajectory_planes(theta(1), {"real images": [theta(1)[0]]}),
    "curves": lambda: plots.curves(histories(list(plots.COLOURS)[:6])),
    "rows of curves": lambda: plots.curve_rows(dict.fromkeys(SIZES.values(), histories(ROWS)), "matching loss", ROWS),
    "lines": lambda: plots.lines(
        {"a": {("x", "5 steps"): [(1, 2), (2, 3)]}} | {"b": {"two draws": [(1, 2)]}}, x="x", y="y"
    ),
    "subsets": lambda: by_fraction(0.03, ["control", "hand-designed (1 of 2)", "learned on the subset", "images"]),
    "one group": lambda: by_fraction(0.4, ["control"]),
    "dots": lambda: subset_plots.accuracy_dots(accuracies(0.03, ROWS), Accuracy([0.05, 0.06], []), ROWS, 0.01),
    "drifts": lambda: drifts(0.1, "hand-designed (1 of 2)", "distilled images"),
    "drifts of one expert": lambda: drifts(None, "control"),
    "ranges": lambda: policy(KINDS, {"rotation": 0.15, "shift_x": 0.1, "flip": 0.5}),
    "unknown ranges": lambda: policy(KINDS, {}),
    "losses of ranges": lambda: subset_plots.range_losses({k: {0.0: (0.1, 0.01), 1.0: (0.0, 0.0)} for k in KINDS}),
}


@pytest.mark.parametrize("name", PICTURES)
def test_no_text_covers_another_or_a_curve_or_is_cut(name, recwarn):
    figure = PICTURES[name]()
    shown = boxes(figure)
    assert len(shown) > 5
    whole = figure.bbox.padded(1)
    for text, box in shown:
        assert whole.containsx(box.x0) and whole.containsx(box.x1), f"{text!r} is cut at a side"
        assert whole.containsy(box.y0) and whole.containsy(box.y1), f"{text!r} is cut at the top or bottom"
    for (one, its), (other, box) in itertools.combinations(shown, 2):
        assert not its.padded(-1.5).overlaps(box.padded(-1.5)), f"{one!r} covers {other!r}"
    for axis in figure.axes:
        legend = axis.get_legend()
        if legend and axis.axison:
            assert not legend.get_window_extent().padded(-2).overlaps(axis.bbox), "the legend covers the curves"
    assert not recwarn.list


@pytest.mark.parametrize(
    "make, axis, top, chance",
    [
        (lambda: plots.bars(accuracies(0.03, "ab"), 0.01), "x", 3.2, True),
        (lambda: plots.bars(accuracies(0.9, "ab"), 0.5), "x", 94, True),
        (lambda: plots.bars(accuracies(0.9, "ab")), "x", 94, False),
        (lambda: learning(1), "y", 3, True),
        (lambda: learning(9, 0.9), "y", 90, True),
        (lambda: by_fraction(0.03, ["control"]), "y", 6, True),
        (lambda: by_fraction(0.4, ["control"]), "y", 80, True),
        (
            lambda: subset_plots.accuracy_dots(accuracies(0.03, "ab"), Accuracy([0.04], []), {}, 0.01),
            "x",
            4,
            False,
        ),
        (lambda: subset_plots.accuracy_dots(accuracies(0.03, "ab"), Accuracy([0.06], []), {}, 0.01), "x", 6, True),
    ],
)
def test_an_axis_covers_the_accuracies_and_shows_chance_where_it_is_near(make, axis, top, chance):
    axes = make().axes[0]
    low, high = axes.get_xlim() if axis == "x" else axes.get_ylim()
    drawn = [line for line in axes.lines if str(line.get_label()).startswith("chance (")]
    assert bool(drawn) == chance and top <= high <= min(100, 1.12 * top)
    if chance:
        assert low <= np.ravel(drawn[0].get_data()[axis == "y"])[0] < high
