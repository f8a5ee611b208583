"""Figures: each function takes plain results and returns a matplotlib Figure, without showing it.

A name has one `look` in every figure. Legends stand outside the axes, so that they cover nothing. An axis of accuracies
covers what it shows, and chance is a line in it. Figures of subsets and ranges are in `subset_plots`.
"""

import dataclasses
import textwrap
import zlib
from collections.abc import Callable

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from torch import Tensor

from augdistill_core import diverged
from augdistill_report.work.statistics import level, mean_and_std, over_seeds, row_label

PALETTE = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#6a3d9a"]  # Okabe & Ito, + 2

COLOURS = {  # of names in notebooks 01 to 04 and 07; methods of 05 define their own in studies/subset_methods
    "real images": "#777777",
    "x": "#777777",
    "no augmentation": "#777777",
    "all the data": "#222222",
    "chance": "#a0522d",
    "experts' augmentation": "#e69f00",
    "soft labels": "#8c6d31",
    "identity": "#aaaaaa",
    "pixels (MTT)": "#d55e00",
    "pixels (2018 loss)": "#f4a582",
    "unet": "#0072b2",
    "unet_noise": "#009e73",
    "distnet2, SGD 1000": "#000000",
    "distnet2, SGD .01": "#8c6d31",
    "distnet2, Adam": "#cc79a7",
    # rows of notebook 04: the same three in its own words, and others
    "SGD 1000": "#000000",
    "SGD .01": "#8c6d31",
    "Adam for phi": "#cc79a7",
    "SGD 10": "#d55e00",
    "log alpha, Adam": "#6a3d9a",
    "distnet2": "#cc79a7",
    "distnet3": "#56b4e9",
    "distnet5": "#6a3d9a",
    "with instance norm": "#0072b2",
    "without": "#d55e00",
    "two draws": "#0072b2",
    "ordinary loss": "#d55e00",
    # phis of notebook 07
    "class-blind U-Net": "#6a3d9a",
    "class-blind MLP": "#56b4e9",
    "conditioned U-Net": "#0072b2",
    "conditioned U-Net of a blank image": "#cc79a7",
    "class-blind MLP, phi(x) - x alone": "#009e73",
    # ranges of a policy
    "rotation": "#0072b2",
    "scale": "#d55e00",
    "shift_x": "#009e73",
    "shift_y": "#cc79a7",
    "shear": "#8c6d31",
    "flip": "#e69f00",
    "brightness": "#56b4e9",
    "contrast": "#6a3d9a",
    "saturation": "#000000",
    "hue": "#777777",
}


@dataclasses.dataclass(frozen=True)
class Style:
    """How a figure shows a name: its label, and matplotlib's colour, marker and line style."""

    label: str
    colour: str
    marker: str = "o"
    line: str = "-"


def look(name: str | tuple, rows: dict | None = None):
    """The `Style` of a name: from its row in `rows` (objects like a `Style`), if there is one, else from `COLOURS`.

    A name with a variant, `(name, variant, ...)`, has the colour of the name. An unknown name has a colour computed
    from its letters.
    """
    first, *variant = (name,) if isinstance(name, str) else name
    found = (rows or {}).get(first)
    if found is None:
        found = Style(first, COLOURS.get(first) or PALETTE[zlib.crc32(first.encode()) % len(PALETTE)])
    return Style(", ".join([found.label, *map(str, variant)]), found.colour, found.marker, found.line)


def log_scale(axis) -> None:
    """Make the y axis logarithmic, with ticks like 0.02 instead of 2 x 10^-2."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def new_figure(width: float, height: float, columns: int = 1, rows: int = 1, **options) -> tuple[Figure, np.ndarray]:
    """A figure of that size in inches, and its axes `[rows * columns]`, row by row."""
    with matplotlib.rc_context({"font.size": 10}):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = np.atleast_1d(figure.subplots(rows, columns, **options)).flatten()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, alpha=0.25, linewidth=0.6)
    return figure, axes


def legend_above(axis, title: str = "", columns: int = 1) -> None:
    """The title of an axis and its legend, both above it."""
    style = dict(frameon=False, fontsize=8.5, ncols=columns, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    legend = axis.legend(title=title or None, alignment="left", **style)
    legend.get_title().set(fontsize=10.5, fontweight="bold")


def chance_line(line: Callable, chance: float, lowest: float, highest: float) -> None:
    """Draw the accuracy of guessing by an axis' `line`, if values from `lowest` to `highest` are not far above it.

    All are accuracies in [0, 1]. Far is more than their own range away: such a line would only press the others
    together.
    """
    if chance > 0 and lowest - chance <= highest - lowest:
        line(
            100 * chance,
            color=look("chance").colour,
            linestyle=":",
            linewidth=1.5,
            label=f"chance ({100 * chance:.3g} %)",
        )


def smooth(values: list[float], window: int) -> np.ndarray:
    """Means over the last `window` values (over fewer at the beginning)."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (total[ends] - total[starts]) / (ends - starts)


def curves(histories: dict, loss: str = "matching loss", rows: dict | None = None) -> Figure:
    """`curve_rows` of one row."""
    return curve_rows({"": histories}, loss, rows)


def curve_rows(panels: dict[str, dict], loss: str = "matching loss", rows: dict | None = None) -> Figure:
    """The loss and alpha against iterations, one row of axes per title: thin = each iteration, bold = a running mean.

    `panels` hold histories by name (shown as `look` says, with `rows`); the mean is over a tenth of a run. A cross
    marks the end of a run that stopped early.
    """
    figure, axes = new_figure(10.5, 3.6 * len(panels), 2, len(panels))
    for title, histories, left, right in zip(panels, panels.values(), axes[::2], axes[1::2], strict=True):
        drawn: list[str] = []
        for turn, (name, history) in enumerate(histories.items()):
            x, y, its = [r["iteration"] for r in history], [r["loss"] for r in history], look(name, rows)
            line = ("-", "--", ":", "-.")[drawn.count(its.colour) % 4]
            drawn.append(its.colour)
            width = 3.2 - 2 * turn / max(1, len(histories) - 1)  # so that no line hides another
            left.plot(x, y, color=its.colour, linewidth=0.5, alpha=0.25)
            for axis, values in ((left, smooth(y, max(1, len(y) // 10))), (right, [r["alpha"] for r in history])):
                axis.plot(x, values, color=its.colour, linestyle=line, linewidth=width, label=its.label)
            if not np.isfinite(y[-1]) or len(y) < max(map(len, histories.values())):
                finite = [v for v in y if np.isfinite(v)]
                left.plot(x[len(finite) - 1], finite[-1], "x", color=its.colour, markersize=9, markeredgewidth=2)
        matching = "matching" in loss
        if matching:
            left.axhline(1, color="black", linewidth=0.7, linestyle=":")
        unit = "\n(dotted: a student that does not move)" if matching else ""
        left.set(xlabel="iteration", ylabel=loss + unit)
        right.set(xlabel="iteration", ylabel="alpha (the student's step size)")
        left.set_title(title, loc="left", fontsize=10.5, fontweight="bold")
        log_scale(left)
        log_scale(right)
        right.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def bars(scores: dict, chance: float = 0.0) -> Figure:
    """Test accuracy by name: mean and standard deviation, one dot per student, and the numbers at the right.

    A line shows `chance`, the accuracy of guessing in [0, 1] (0 = no line).
    """
    figure, (axis,) = new_figure(8.5, 1.1 + 0.42 * len(scores))
    looks, highest = [look(name) for name in scores], 0.0
    for y, (its, score) in enumerate(zip(looks, scores.values(), strict=True)):
        axis.barh(y, 100 * score.mean, xerr=100 * score.std, color=its.colour, alpha=0.75, capsize=3)
        axis.plot([100 * v for v in score.test], [y] * len(score.test), "o", color="black", markersize=2.5, alpha=0.6)
        axis.text(1.01, y, str(score), va="center", fontsize=9, transform=axis.get_yaxis_transform())
        highest = max(highest, *score.test, score.mean + score.std)
    chance_line(axis.axvline, chance, 0, highest)
    axis.set_yticks(range(len(scores)), [its.label for its in looks])
    n = len(next(iter(scores.values())).test)
    axis.set(xlabel=f"test accuracy (%, n = {n} students)", xlim=(0, min(100, 108 * max(highest, chance))))
    axis.invert_yaxis()
    if chance:
        legend_above(axis)
    return figure


def expert_curves(validation: list[list[float]], theta: Tensor, chance: float = 0.0) -> Figure:
    """By snapshot: each expert's validation accuracy, and the distance of its weights to the previous snapshot.

    A line shows `chance`, the accuracy of guessing in [0, 1] (0 = no line).
    """
    figure, (left, right) = new_figure(10.5, 3.6, 2)
    colour, n = look("all the data").colour, len(validation)
    steps = (theta[:, 1:] - theta[:, :-1]).norm(dim=2).cpu()
    of_each = (100 * np.array(validation), range(len(validation[0]))), (steps.numpy(), range(1, steps.shape[1] + 1))
    for axis, (values, x) in zip((left, right), of_each, strict=True):
        for k, several in enumerate(values):
            axis.plot(x, several, color=colour, alpha=0.3, linewidth=1, label="one expert" if k == 0 else None)
        axis.plot(x, values.mean(0), color=colour, linewidth=2.5, label=f"mean (n = {n} expert{'s' * (n > 1)})")
    highest = max(map(max, validation))
    chance_line(left.axhline, chance, 0, highest)
    left.set(xlabel="snapshot (0: initialisation)", ylabel="validation accuracy (%)")
    left.set_ylim(0, min(100, 108 * max(highest, chance)))
    right.set(xlabel="snapshot (0: initialisation)", ylabel="distance to the previous snapshot\n(norm of weights)")
    right.set_ylim(0, 1.08 * steps.max().item())
    for axis in (left, right):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_above(left, columns=3)
    legend_above(right, columns=2)
    return figure


def principal_plane(theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean `[P]`, the first two principal directions `[2, P]` of all snapshots, and their shares of the variance.

    Signs are fixed (a direction's largest entry is positive), so that the same weights give the same picture.
    """
    flat = theta.flatten(0, 1).double()
    mean = flat.mean(0)
    _, values, directions = torch.linalg.svd(flat - mean, full_matrices=False)
    directions = directions[:2]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    share = values.square() / values.square().sum()
    return mean, directions * largest.sign(), share[:2]


def plane(axis, theta: Tensor, paths: dict[str, list[Tensor]]) -> None:
    """Draw expert trajectories `[experts, snapshots, P]` in their principal plane, with paths (lists of `[n, P]`)."""
    mean, directions, share = principal_plane(theta)

    def project(points: Tensor) -> np.ndarray:
        return ((points.double() - mean) @ directions.T).cpu().numpy()

    for k, trajectory in enumerate(theta):
        x, y = project(trajectory).T
        label = "expert (one dot per snapshot)" if k == 0 else None
        axis.plot(x, y, ".-", color=look("all the data").colour, alpha=0.4, linewidth=0.8, label=label)
        axis.plot(x[0], y[0], "o", color="black", markersize=5)
    for name, several in paths.items():
        for k, path in enumerate(several):
            x, y = project(path).T
            axis.plot(x, y, color=look(name).colour, linewidth=2, label=look(name).label if k == 0 else None)
            axis.plot(x[-1], y[-1], "s", color=look(name).colour, markersize=4)
    legend_above(axis, columns=2)
    axis.set(
        xlabel=f"first principal component ({100 * share[0]:.0f} % of the variance)",
        ylabel=f"second principal component ({100 * share[1]:.0f} %)",
    )


def trajectory_planes(theta: Tensor, paths: dict[str, list[Tensor]]) -> Figure:
    """Left: all experts in one plane. Right: only the first expert, in its own plane, with other paths."""
    figure, (left, right) = new_figure(11, 4.8, 2)
    plane(left, theta, {})
    plane(right, theta[:1], paths)
    return figure


def student_paths(trajectory: list[Tensor], paths: dict[str, list[Tensor]]) -> Figure:
    """One expert trajectory, snapshots `[P]`, in its own plane, with students' paths on top."""
    figure, (axis,) = new_figure(8, 5)
    plane(axis, torch.stack(trajectory)[None], paths)
    return figure


def heat_map(cells: list[dict], number: str = "", columns: int = 2) -> Figure:
    """The results of a sweep: one row per choice, one square per seed (or point on other axes), coloured by a number.

    `cells` are the results of a grid. `number` names the number to show (empty = the first); accuracies and their
    differences are in points. A cross marks a run that diverged. A grey row failed; the text beside it says why.
    """
    numbers = [cell["numbers"] for cell in cells if "numbers" in cell]
    number = number or next((k for n in numbers for k, v in n.items() if level(v) is not None), "")
    unit = 100 if any(isinstance(n.get(number), dict) for n in numbers) else 1
    values = [unit * v for n in numbers if (v := level(n.get(number))) is not None and np.isfinite(v)]
    lowest, highest = (min(values), max(values)) if values else (0, 1)
    most = max(abs(lowest), abs(highest)) or 1
    look = dict(cmap="RdBu", vmin=-most, vmax=most) if lowest < 0 < highest else dict(cmap="Blues", vmin=lowest)
    panels: dict[str, dict[str, list[dict]]] = {}
    for (panel, *row), group in over_seeds(cells).items():
        panels.setdefault(panel, {})[row_label(("", *row))] = group
    sides: list[list[str]] = [[] for _ in range(min(columns, len(panels)))]
    for panel in panels:  # each panel goes to the side with the most free space
        min(sides, key=lambda side: sum(len(panels[p]) + 2 for p in side)).append(panel)
    heights = [sum(len(panels[p]) + 2 for p in side) for side in sides]
    figure = Figure(figsize=(5.4 * len(sides), 0.6 + 0.25 * max(heights)), layout="constrained")
    for half, side, height in zip(figure.subfigures(1, len(sides), squeeze=False)[0], sides, heights, strict=True):
        # the last axes are empty: they keep the rows of both sides equally high
        ratios = [len(panels[p]) + 1 for p in side] + [max(heights) - height or 1e-3]
        axes = half.subplots(len(ratios), 1, squeeze=False, height_ratios=ratios)[:, 0]
        axes[-1].set_axis_off()
        for axis, panel in zip(axes, side, strict=False):
            _heat_panel(axis, panels[panel], number, unit, look)
            axis.set_title(panel, loc="left", fontsize=11, fontweight="bold")
    unit_name = " (points of accuracy)" if unit == 100 else ""
    figure.suptitle(f"{number}{unit_name}: one square per seed, a cross where the run diverged", fontsize=10)
    return figure


def _heat_panel(axis, rows: dict[str, list[dict]], number: str, unit: float, look: dict) -> None:
    width = max(map(len, rows.values()))
    field = np.full((len(rows), width), np.nan)
    for y, group in enumerate(rows.values()):
        found = [level(cell.get("numbers", {}).get(number)) for cell in group]
        field[y, : len(group)] = [np.nan if v is None else unit * v for v in found]
        for x, cell in enumerate(group):
            if diverged(cell.get("numbers", {}).get("stopped", "")):
                axis.plot(x, y, "x", color="black", markersize=5)
        known = field[y][np.isfinite(field[y])]
        text = mean_and_std(known.tolist(), "+z.1f") if len(known) else ""
        errors = dict.fromkeys(c["error"] for c in group if "error" in c)
        why = "\n".join(textwrap.wrap("; ".join(errors), 34)[:2])
        axis.text(width - 0.35, y, text or why, va="center", fontsize=8.5 if text else 6.5)
    axis.imshow(np.ma.masked_invalid(field), aspect="auto", **look)
    axis.set_facecolor("#dddddd")
    axis.set_yticks(range(len(rows)), list(rows), fontsize=8.5)
    axis.set_xticks([])
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    axis.set_xlim(-0.5, width + 2.6)
    axis.axvspan(width - 0.5, width + 2.6, color="white", zorder=1)


def lines(panels: dict[str, dict], *, x: str, y: str, log: str = "") -> Figure:
    """One panel per title, with curves by name (`[(x, y), ...]`); `log` lists the logarithmic axes ("x", "y", "xy")."""
    figure, axes = new_figure(5.2 * len(panels) + 0.5, 4, len(panels))
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        drawn: list[str] = []
        for name, points in curves.items():
            its = look(name)
            line = ("-", "--", ":", "-.")[drawn.count(its.colour) % 4]
            drawn.append(its.colour)
            axis.plot(*zip(*points, strict=True), marker=".", linestyle=line, color=its.colour, label=its.label)
        axis.set(xlabel=x, **({"xscale": "log"} if "x" in log else {}))
        values = [abs(v) for points in curves.values() for _, v in points if v]
        if "y" in log and max(values) < 1000 * min(values):
            log_scale(axis)
        elif "y" in log:
            axis.set_yscale("log")
        legend_above(axis, title, 2)
    axes[0].set_ylabel(y)
    return figure


def steps_by_layer(found: dict[str, dict[str, dict]]) -> Figure:
    """The norm ratio of the first update and each parameter tensor of phi, by optimiser, on a logarithmic axis."""
    layers = list(next(iter(found.values())))
    figure, (axis,) = new_figure(8.5, 1.2 + 0.33 * len(layers))
    for place, (name, steps) in enumerate(found.items()):
        ratios = [max(s["update"] / (s["weights"] or 1), 1e-9) for s in steps.values()]
        y = np.arange(len(layers)) + 0.25 * (place - (len(found) - 1) / 2)
        axis.plot(ratios, y, "o", color=look(name).colour, label=name)
    axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set(xscale="log", xlabel="norm of the first update / norm of the weights (dotted: equal)")
    axis.set_yticks(range(len(layers)), layers)
    axis.invert_yaxis()
    axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
