"""Figures of notebooks 05 and 07: accuracy by subset, ranges of policies, and how far from the target students end.

The subset table has more methods than one picture can show, so they stand in panels by group.
"""

import textwrap
from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure

from augdistill_report.show.plots import chance_line, legend_above, log_scale, look, new_figure


def accuracy_dots(scores: dict, full, rows: dict | None = None, chance: float = 0.0) -> Figure:
    """Test accuracy by method, on an axis cut to their range: mean and standard deviation, one dot per student.

    Lines show `full`, the accuracy with all the data, and `chance` if the axis reaches it (0 = no line).
    """
    figure, (axis,) = new_figure(8.5, 1.1 + 0.36 * len(scores))
    looks = [look(name, rows) for name in scores]
    for y, (its, score) in enumerate(zip(looks, scores.values(), strict=True)):
        axis.errorbar(100 * score.mean, y, xerr=100 * score.std, fmt=its.marker, color=its.colour, capsize=3)
        axis.plot([100 * v for v in score.test], [y + 0.2] * len(score.test), ".", color=its.colour, alpha=0.5)
    references(axis.axvline, axis.axvspan, [*scores.values()], full, chance)
    legend_above(axis)
    axis.set_yticks(
        range(len(scores)), [f"{its.label}   {score}" for its, score in zip(looks, scores.values(), strict=True)]
    )
    axis.set(xlabel=f"test accuracy (%, n = {len(next(iter(scores.values())).test)} students)")
    axis.invert_yaxis()
    return figure


def references(line: Callable, span: Callable, scores: list, full, chance: float) -> None:
    """Draw by an axis' `line` and `span` what `scores` are compared with: all the data (mean ± one standard deviation),
    and chance, where it is near."""
    its = look("all the data")
    line(100 * full.mean, color=its.colour, linestyle="--", label=f"all the data: {full}")
    span(*(100 * (full.mean + side * full.std) for side in (-1, 1)), color=its.colour, alpha=0.1)
    values = [full.mean, *(value for score in scores for value in score.test)]
    chance_line(line, chance, min(values), max(values))


def by_fraction(
    panels: dict[str, dict[str, dict[float, object]]],
    full,
    sizes: dict[float, str],
    rows: dict | None = None,
    chance: float = 0.0,
) -> Figure:
    """Test accuracy against the size of the subset, one panel per title: mean ± one standard deviation per method.

    `panels` hold accuracies by method and fraction, and `sizes` the names of fractions. Lines show `full`, the accuracy
    with all the data, and `chance` if the axes reach it (0 = no line).
    """
    wide = min(2, len(panels))
    high = -(-len(panels) // wide)
    figure, axes = new_figure(4.2 * wide, 3.9 * high, wide, high, sharey=True)
    every = [score for series in panels.values() for scores in series.values() for score in scores.values()]
    for axis, (title, series) in zip(axes, panels.items(), strict=False):
        for name, scores in series.items():
            x, its = [100 * f for f in scores], look(name, rows)
            mean = np.array([100 * s.mean for s in scores.values()])
            std = np.array([100 * s.std for s in scores.values()])
            axis.plot(x, mean, marker=its.marker, linestyle=its.line, color=its.colour, label=its.label)
            axis.fill_between(x, mean - std, mean + std, color=its.colour, alpha=0.12, linewidth=0)
        references(axis.axhline, axis.axhspan, every, full, chance)
        fractions = sorted({f for scores in series.values() for f in scores})
        axis.set(xscale="log", xlabel="subset (share of the training data)")
        labels = [sizes[f].replace(" (", "\n(").replace(" a class", "\na class") for f in fractions]
        axis.set_xticks([100 * f for f in fractions], labels, fontsize=8.5)
        axis.minorticks_off()
        axis.tick_params(labelleft=True)
        legend_above(axis, title)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis in axes[::wide]:
        axis.set_ylabel(f"test accuracy (%, n = {max(len(score.test) for score in every)} students)")
    return figure


def changes_by_subset(found: dict[str, dict[float, object]], sizes: dict[float, str], rows: dict) -> Figure:
    """What one change adds: the accuracy of a method minus that of the method that it follows, with 95 % intervals.

    `found` holds differences by method and fraction, and `sizes` the names of fractions: groups of points from left to
    right, or, if there is one fraction, one line of text and one point for each method. A difference of too few values
    has no interval, so no error bar either.
    """
    names = {id: textwrap.fill(f"{rows[id].label}, over {rows[rows[id].follows].label}", 44) for id in found}
    fractions = sorted({f for by in found.values() for f in by})
    every = [change for by in found.values() for change in by.values()]
    over = next((change.over for change in every if change.half is not None), "")
    spread = f"95 % interval\nover {over}" if over else f"n = {every[0].over}:\nno interval"
    what = f"difference in test accuracy\n(points, {spread})"
    zero = dict(color="black", linewidth=0.7, linestyle=":")
    if len(fractions) == 1:
        (f,) = fractions
        figure, (axis,) = new_figure(8.5, 1.1 + 0.5 * len(found))
        for y, (id, by) in enumerate(found.items()):
            its = look(id, rows)
            axis.errorbar(100 * by[f].mean, y, xerr=half_in_points(by[f]), fmt=its.marker, color=its.colour, capsize=3)
        axis.axvline(0, **zero)
        axis.set_yticks(range(len(found)), [f"{name}   {found[id][f]}" for id, name in names.items()], fontsize=8.5)
        axis.set_ylim(len(found) - 0.5, -0.5)
        axis.set_xlabel(what.replace("\n", " "))
        axis.set_title(sizes[f], loc="left", fontsize=10.5, fontweight="bold")
        return figure
    figure, (axis,) = new_figure(9.0, max(3.4, 1.2 + 0.22 * sum(name.count("\n") + 1 for name in names.values())))
    for turn, (id, by) in enumerate(found.items()):
        its = look(id, rows)
        x = [fractions.index(f) + 0.09 * (turn - (len(found) - 1) / 2) for f in by]
        style = dict(marker=its.marker, linestyle=its.line, color=its.colour, capsize=2.5, linewidth=1)
        halves = [half_in_points(change) for change in by.values()]
        axis.errorbar(x, [100 * change.mean for change in by.values()], halves, label=names[id], **style)
    axis.axhline(0, **zero)
    axis.set_xticks(range(len(fractions)), [sizes[f].replace(" (", "\n(") for f in fractions], fontsize=8.5)
    axis.set_xlim(-0.5, len(fractions) - 0.5)
    axis.set(xlabel="subset", ylabel=what)
    axis.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def half_in_points(change) -> float:
    """The half-width of a difference's 95 % interval in points; nan, of which no bar is drawn, if it has none."""
    return np.nan if change.half is None else 100 * change.half


UNITS = {  # of a policy's ranges: standard deviations, but for a flip
    "rotation": "rad",
    "scale": "of its logarithm",
    "shear": "tangent",
    "shift_x": "of the side",
    "shift_y": "of the side",
    "brightness": "std of the data",
    "contrast": "of its logarithm",
    "saturation": "of its logarithm",
    "hue": "rad",
    "flip": "probability",
}


def kind_label(kind: str) -> str:
    """The name of a kind of change, with the unit of its range."""
    return kind.replace("_", " ") + (f" ({UNITS[kind]})" if kind in UNITS else "")


def ranges(panels: dict[str, list[list[dict]]], truth: dict[str, float]) -> Figure:
    """A policy's ranges against iterations: one panel per title, one line per repetition.

    `panels` hold histories by title, one per repetition. The ranges `truth` of the experts' augmentation are dashed;
    kinds that it does not have are grey (none, if `truth` is empty).
    """
    figure, axes = new_figure(3.2 * len(panels) + 2.2, 3.8, len(panels), sharey=True)
    for axis, (title, histories) in zip(axes, panels.items(), strict=True):
        for kind in sorted(histories[0][0]["phi"], key=lambda kind: kind not in truth):
            known = kind in truth or not truth
            style = dict(color=look(kind).colour if known else "#bbbbbb", linewidth=1.6 if known else 0.9)
            for k, history in enumerate(histories):
                name = kind_label(kind) if known else "not in the experts' augmentation"
                label = name if k == 0 and name not in axis.get_legend_handles_labels()[1] else None
                axis.plot([r["iteration"] for r in history], [r["phi"][kind] for r in history], label=label, **style)
            if kind in truth:
                axis.axhline(truth[kind], color=look(kind).colour, linestyle="--", linewidth=0.9)
        axis.set_xlabel("iteration")
        n = f"n = {len(histories)} repetition{'s' * (len(histories) > 1)}"
        axis.set_title("\n".join([*textwrap.wrap(title, 30), n]), fontsize=9.5)
        log_scale(axis)
    axes[0].set_ylabel("learned range (dashed: the experts')" if truth else "learned range")
    axes[-1].legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def range_losses(found: dict[str, dict[float, tuple[float, float]]]) -> Figure:
    """The increase of the loss when one range differs from its true value: line ± one standard error per kind."""
    figure, (axis,) = new_figure(6.8, 3.6)
    for kind, curve in found.items():
        x, (y, error) = list(curve), np.array(list(curve.values())).T
        axis.plot(x, y, ".-", color=look(kind).colour, label=kind.replace("_", " "))
        axis.fill_between(x, y - error, y + error, color=look(kind).colour, alpha=0.15, linewidth=0)
    axis.axhline(0, color="black", linewidth=0.7, linestyle=":")
    axis.set(
        xlabel="range / the experts' range",
        ylabel="increase of the matching loss over that\nat the experts' ranges (± standard error)",
    )
    axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def drift_panels(panels: dict[str, dict[str, dict]], noise: str, rows: dict | None = None) -> Figure:
    """The remaining distance of each method's students to the target, by start step: a row per group, a column per
    title.

    `panels` hold by title, group and start step: (value, standard error or None) by method. The entry named `noise` is
    the fraction of an expert's squared movement that is batch noise: grey bars.
    """
    groups = list(dict.fromkeys(group for by_group in panels.values() for group in by_group))
    wide, high = len(panels) + 1, len(groups)  # the last column holds the legends
    size = 3 * len(panels) + 2.6, 2.8 * high + 0.4
    ratios = [3] * len(panels) + [2.2]
    figure, axes = new_figure(*size, wide, high, sharey=True, squeeze=False, width_ratios=ratios)
    every = [one for by_group in panels.values() for found in by_group.values() for one in found.values()]
    lowest = min(value for one in every for value, _ in one.values())
    for place, axis in enumerate(axes):
        row, column = divmod(place, wide)
        found = dict(enumerate(panels.values())).get(column, {}).get(groups[row])
        if found is None:
            axis.set_axis_off()
            continue
        names = dict.fromkeys(name for by_name in found.values() for name in by_name if name != noise)
        for turn, name in enumerate(names):
            values, errors = zip(*(by_name[name] for by_name in found.values()), strict=True)
            x, its = np.arange(len(found)) + 0.05 * (turn - (len(names) - 1) / 2), look(name, rows)
            style = dict(marker=its.marker, linestyle=its.line, color=its.colour, markersize=4.5, linewidth=1)
            axis.errorbar(x, values, [error or 0 for error in errors], label=its.label, **style)
        shares = [by_name[noise][0] for by_name in found.values()]
        axis.bar(range(len(found)), shares, width=0.6, color="#e4e4e4", zorder=0, label=noise.replace(" (", "\n("))
        axis.axhline(1, color="black", linewidth=0.7, linestyle=":")
        axis.set_xticks(range(len(found)), [f"{step}" for step in found])
        axis.set_yscale("symlog", linthresh=0.2)
        axis.set_yticks([0, 0.1, 0.2, 0.5, 1, 2, 5, 10], ["0", ".1", ".2", ".5", "1", "2", "5", "10"], minor=False)
        axis.set_ylim(bottom=min(-0.02, lowest))
        axis.set(xlabel="start (step of the expert trajectory)", title=list(panels)[column].replace(" (", "\n("))
        axis.tick_params(labelleft=True)
        legend = axes[row * wide + len(panels)]
        handles, labels = axis.get_legend_handles_labels()
        style = dict(frameon=False, fontsize=8.5, loc="center left", title=groups[row] or None, alignment="left")
        legend.legend(handles, labels, **style).get_title().set(fontsize=10.5, fontweight="bold")
    label = "remaining squared distance to the target\n(0: like all the data, 1: no movement;\nlinear axis up to .2)"
    figure.supylabel(label, fontsize=9, multialignment="center")
    return figure
