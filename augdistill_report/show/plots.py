"""Figures: each function takes plain results and returns a matplotlib Figure, without showing it.

A name has one `look` in every figure. Figures of the subset table get its rows, which define their own look.
"""

import dataclasses
import zlib
from collections.abc import Callable

import matplotlib
import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from augdistill_core import diverged
from augdistill_report.work.statistics import level, mean_and_std, over_seeds, row_label

PALETTE = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#6a3d9a"]  # Okabe & Ito, + 2

COLOURS = {  # of names in notebooks 01 to 04 and 07; methods of 05 define their own in studies/subset_methods
    "real images": "#777777",
    "no augmentation": "#777777",
    "all the data": "#222222",
    "experts' augmentation": "#e69f00",
    "soft labels": "#8c6d31",
    "identity": "#aaaaaa",
    "pixels (MTT)": "#d55e00",
    "pixels (2018 loss)": "#e69f00",
    "unet": "#0072b2",
    "unet_noise": "#009e73",
    "distnet2, SGD 1000": "#000000",
    "distnet2, SGD .01": "#8c6d31",
    "distnet2, Adam": "#cc79a7",
    "class-blind U-Net": "#8c6d31",
    "class-blind MLP": "#56b4e9",
    "conditioned U-Net": "#0072b2",
    "conditioned U-Net of a blank image": "#cc79a7",
    "class-blind MLP, phi(x) - x alone": "#009e73",
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


def pale(colour: str) -> np.ndarray:
    """A paler colour for areas: RGB in [0, 1], mixed with 25 % white."""
    return 0.75 * np.array(to_rgb(colour)) + 0.25


def ink(fill) -> str:
    """Black or white text, whichever has more contrast to a fill (WCAG's relative luminance)."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in to_rgb(fill)]
    return "white" if np.dot((0.2126, 0.7152, 0.0722), linear) < 0.18 else "black"


def log_scale(axis) -> None:
    """Make the y axis logarithmic, with ticks like 0.02 instead of 2 x 10^-2."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def new_figure(width: float, height: float, columns: int = 1, **options) -> tuple[Figure, np.ndarray]:
    with matplotlib.rc_context({"font.size": 10}):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = np.atleast_1d(figure.subplots(1, columns, **options))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, alpha=0.25, linewidth=0.6)
    return figure, axes


def smooth(values: list[float], window: int) -> np.ndarray:
    """Means over the last `window` values (over fewer at the beginning)."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (total[ends] - total[starts]) / (ends - starts)


def curves(histories: dict, loss: str = "matching loss", rows: dict | None = None) -> Figure:
    """The loss and alpha against iterations: thin = each iteration, bold = the mean over a tenth of the run.

    `histories` by name (shown as `look` says, with `rows`). A cross marks the end of a run that stopped early.
    """
    figure, (left, right) = new_figure(10.5, 3.6, 2)
    drawn: list[str] = []
    for name, history in histories.items():
        x, y, its = [r["iteration"] for r in history], [r["loss"] for r in history], look(name, rows)
        line = ("-", "--", ":", "-.")[drawn.count(its.colour) % 4]
        drawn.append(its.colour)
        left.plot(x, y, color=its.colour, linewidth=0.5, alpha=0.25)
        for axis, values in ((left, smooth(y, max(1, len(y) // 10))), (right, [r["alpha"] for r in history])):
            axis.plot(x, values, color=its.colour, linestyle=line, label=its.label)
        if not np.isfinite(y[-1]) or len(y) < max(map(len, histories.values())):
            finite = [v for v in y if np.isfinite(v)]
            left.plot(x[len(finite) - 1], finite[-1], "x", color=its.colour, markersize=9, markeredgewidth=2)
    left.axhline(1, color="black", linewidth=0.7, linestyle=":")
    left.set(xlabel="iteration", ylabel=loss)
    right.set(xlabel="iteration", ylabel="alpha (the student's step size)")
    log_scale(left)
    log_scale(right)
    right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def bars(scores: dict) -> Figure:
    """Test accuracy by name: mean and standard deviation, one dot per student."""
    figure, (axis,) = new_figure(7.5, 0.9 + 0.42 * len(scores))
    looks = [look(name) for name in scores]
    for y, (its, score) in enumerate(zip(looks, scores.values(), strict=True)):
        fill = pale(its.colour)
        axis.barh(y, 100 * score.mean, xerr=100 * score.std, color=fill, capsize=3)
        axis.plot([100 * v for v in score.test], [y] * len(score.test), "o", color="black", markersize=2.5, alpha=0.6)
        inside = score.mean > (0.7 if score.stopped else 0.3)  # as long as the text
        place = 1 if inside else 100 * max(*score.test, score.mean + score.std) + 2
        axis.text(place, y, str(score), va="center", fontsize=9, color=ink(fill) if inside else "black")
    axis.set_yticks(range(len(scores)), [its.label for its in looks])
    axis.set(xlabel=f"test accuracy (%, n = {len(next(iter(scores.values())).test)} students)", xlim=(0, 100))
    axis.invert_yaxis()
    return figure


def accuracy_dots(scores: dict, full, rows: dict | None = None) -> Figure:
    """Test accuracy by method, on an axis cut to their range: mean and standard deviation, one dot per student.

    A line shows `full`, the accuracy with all the data.
    """
    figure, (axis,) = new_figure(8.5, 1.1 + 0.36 * len(scores))
    looks = [look(name, rows) for name in scores]
    for y, (its, score) in enumerate(zip(looks, scores.values(), strict=True)):
        axis.errorbar(100 * score.mean, y, xerr=100 * score.std, fmt=its.marker, color=its.colour, capsize=3)
        axis.plot([100 * v for v in score.test], [y + 0.2] * len(score.test), ".", color=its.colour, alpha=0.5)
    band(full, axis.axvline, axis.axvspan)
    axis.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axis.set_yticks(
        range(len(scores)), [f"{its.label}   {score}" for its, score in zip(looks, scores.values(), strict=True)]
    )
    axis.set(xlabel=f"test accuracy (%, n = {len(next(iter(scores.values())).test)} students)")
    axis.invert_yaxis()
    return figure


def band(full, line: Callable, span: Callable) -> None:
    """Draw the accuracy with all the data by an axis' `line` and `span`: mean (dashed) ± one standard deviation."""
    its = look("all the data")
    line(100 * full.mean, color=its.colour, linestyle="--", label=f"all the data, no augmentation: {full}")
    span(*(100 * (full.mean + side * full.std) for side in (-1, 1)), color=its.colour, alpha=0.1)


def expert_curves(validation: list[list[float]], theta: Tensor) -> Figure:
    """By snapshot: each expert's validation accuracy, and the distance of its weights to the previous snapshot."""
    figure, (left, right) = new_figure(10.5, 3.4, 2)
    expert = look("all the data")
    steps = (theta[:, 1:] - theta[:, :-1]).norm(dim=2).cpu()
    for scores, lengths in zip(validation, steps, strict=True):
        left.plot([100 * s for s in scores], color=expert.colour, alpha=0.35)
        right.plot(range(1, len(lengths) + 1), lengths, color=expert.colour, alpha=0.35)
    left.plot(
        100 * np.mean(validation, 0), color=PALETTE[0], linewidth=2.5, label=f"mean (n = {len(validation)} experts)"
    )
    right.plot(range(1, steps.shape[1] + 1), steps.mean(0), color=PALETTE[0], linewidth=2.5)
    left.legend(frameon=False, loc="lower right")
    left.set(xlabel="snapshot", ylabel="validation accuracy (%)", ylim=(0, 100))
    right.set(xlabel="snapshot", ylabel="distance to the previous snapshot\n(norm of weights)", ylim=(0, None))
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
    axis.legend(frameon=False, fontsize=9)
    axis.set(
        xlabel=f"first principal component ({100 * share[0]:.0f} % of the variance)",
        ylabel=f"second principal component ({100 * share[1]:.0f} %)",
    )


def trajectory_planes(theta: Tensor, paths: dict[str, list[Tensor]]) -> Figure:
    """Left: all experts in one plane. Right: only the first expert, in its own plane, with other paths."""
    figure, (left, right) = new_figure(11, 4.6, 2)
    plane(left, theta, {})
    plane(right, theta[:1], paths)
    return figure


def student_paths(trajectory: list[Tensor], paths: dict[str, list[Tensor]]) -> Figure:
    """One expert trajectory, snapshots `[P]`, in its own plane, with students' paths on top."""
    figure, (axis,) = new_figure(8, 5)
    plane(axis, torch.stack(trajectory)[None], paths)
    return figure


def by_fraction(panels: dict[str, dict[str, dict[float, object]]], full, rows: dict | None = None) -> Figure:
    """Test accuracy against the size of the subset, one panel per title: mean ± one standard deviation per method.

    `panels` hold accuracies by method and fraction. A line shows `full`, the accuracy with all the data.
    """
    figure, axes = new_figure(5.6 * len(panels), 6.4, len(panels), sharey=True)
    for axis, (title, series) in zip(axes, panels.items(), strict=True):
        for name, scores in series.items():
            x, its = [100 * f for f in scores], look(name, rows)
            mean = np.array([100 * s.mean for s in scores.values()])
            std = np.array([100 * s.std for s in scores.values()])
            axis.plot(x, mean, marker=its.marker, linestyle=its.line, color=its.colour, label=its.label)
            axis.fill_between(x, mean - std, mean + std, color=its.colour, alpha=0.12, linewidth=0)
        band(full, axis.axhline, axis.axhspan)
        axis.set(xscale="log", xlabel="size of the subset (% of the training data)", title=title)
        ticks = sorted({100 * f for scores in series.values() for f in scores})
        axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axis.minorticks_off()
        axis.legend(frameon=False, fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    n = max(len(s.test) for series in panels.values() for scores in series.values() for s in scores.values())
    axes[0].set_ylabel(f"test accuracy (%, n = {n} students)")
    return figure


def heat_map(cells: list[dict], number: str = "", columns: int = 2) -> Figure:
    """The results of a sweep: one row per choice, one square per seed (or point on other axes), coloured by a number.

    `cells` are the results of a grid. `number` names the number to show (empty = the first); accuracies and their
    differences are in points. A cross marks a run that diverged. A grey row failed; its text says why.
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
        text = mean_and_std(known.tolist(), "+.1f") if len(known) else ""
        errors = dict.fromkeys(c["error"] for c in group if "error" in c)
        axis.text(width - 0.35, y, text, va="center", fontsize=8.5)
        axis.text(-0.45, y, "; ".join(errors)[:70], va="center", fontsize=7.5, zorder=3)
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
    figure, axes = new_figure(5.2 * len(panels) + 0.5, 3.6, len(panels))
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        for place, (name, points) in enumerate(curves.items()):
            axis.plot(*zip(*points, strict=True), ".-", color=PALETTE[place % len(PALETTE)], label=name)
        axis.set(xlabel=x, title=title, **({"xscale": "log"} if "x" in log else {}))
        values = [abs(v) for points in curves.values() for _, v in points if v]
        if "y" in log and max(values) < 1000 * min(values):
            log_scale(axis)
        elif "y" in log:
            axis.set_yscale("log")
        axis.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel(y)
    return figure


def ranges(panels: dict[str, list[list[dict]]], truth: dict[str, float]) -> Figure:
    """A policy's ranges against iterations: one panel per title, one line per repetition.

    `panels` hold histories by title, one per repetition. The ranges `truth` of the experts' augmentation are dashed;
    kinds that it does not have are grey (none, if `truth` is empty).
    """
    figure, axes = new_figure(4.2 * len(panels) + 1.2, 3.6, len(panels), sharey=True)
    for axis, (title, histories) in zip(axes, panels.items(), strict=True):
        for kind in sorted(histories[0][0]["phi"], key=lambda kind: kind not in truth):
            known = list(truth) or list(histories[0][0]["phi"])
            turn, place = divmod(known.index(kind), len(PALETTE)) if kind in known else (0, None)
            look = dict(color="#bbbbbb" if place is None else PALETTE[place], linewidth=0.9 if place is None else 1.6)
            look["linestyle"] = ("-", ":")[turn]
            for k, history in enumerate(histories):
                name = kind.replace("_", " ") if place is not None else "not in the experts' augmentation"
                label = name if k == 0 and name not in axis.get_legend_handles_labels()[1] else None
                axis.plot([r["iteration"] for r in history], [r["phi"][kind] for r in history], label=label, **look)
            if kind in truth:
                axis.axhline(truth[kind], color=PALETTE[place], linestyle="--", linewidth=0.9)
        axis.set(xlabel="iteration", title=title)
        log_scale(axis)
    axes[0].set_ylabel("learned range (dashed: the experts')" if truth else "learned range")
    axes[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def range_losses(found: dict[str, dict[float, tuple[float, float]]]) -> Figure:
    """The increase of the loss when one range differs from its true value: line ± one standard error per kind."""
    figure, (axis,) = new_figure(6.4, 3.6)
    for place, (kind, curve) in enumerate(found.items()):
        x, (y, error) = list(curve), np.array(list(curve.values())).T
        axis.plot(x, y, ".-", color=PALETTE[place % len(PALETTE)], label=kind.replace("_", " "))
        axis.fill_between(x, y - error, y + error, color=PALETTE[place % len(PALETTE)], alpha=0.15, linewidth=0)
    axis.axhline(0, color="black", linewidth=0.7, linestyle=":")
    axis.set(
        xlabel="range / the experts' range", ylabel="increase of the matching loss\nover that at the experts' ranges"
    )
    axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def drift_panels(panels: dict[str, dict], noise: str, rows: dict | None = None) -> Figure:
    """The remaining distance of each method's students to the target, by start step: one panel per title.

    `panels` hold by title and start step: (value, standard error or None) by method. The entry named `noise` is the
    fraction of an expert's squared movement that is batch noise: grey bars.
    """
    figure, axes = new_figure(4.2 * len(panels) + 1.8, 3.8, len(panels), sharey=True)
    for axis, (title, found) in zip(axes, panels.items(), strict=True):
        names = dict.fromkeys(name for by_name in found.values() for name in by_name if name != noise)
        for place, name in enumerate(names):
            values, errors = zip(*(by_name[name] for by_name in found.values()), strict=True)
            x, its = np.arange(len(found)) + 0.05 * (place - (len(names) - 1) / 2), look(name, rows)
            style = dict(marker=its.marker, linestyle=its.line, color=its.colour, markersize=4.5, linewidth=1)
            axis.errorbar(x, values, [error or 0 for error in errors], label=its.label, **style)
        shares = [by_name[noise][0] for by_name in found.values()]
        axis.bar(range(len(found)), shares, width=0.6, color="#e4e4e4", zorder=0, label=noise)
        axis.axhline(1, color="black", linewidth=0.7, linestyle=":")
        axis.set_xticks(range(len(found)), [f"{step}" for step in found])
        axis.set(xlabel="start (step of the expert trajectory)", title=title)
        axis.set_yscale("symlog", linthresh=0.2)
        axis.set_yticks([0, 0.1, 0.2, 0.5, 1, 2, 5, 10], ["0", ".1", ".2", ".5", "1", "2", "5", "10"], minor=False)
        axis.set_ylim(bottom=min([-0.02, *(value for by_name in found.values() for value, _ in by_name.values())]))
    axes[0].set_ylabel("remaining squared distance to the target\n(0: like all the data, 1: no movement)")
    looks = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    beside_all = dict(loc="center left", bbox_to_anchor=(1, 0.5))
    axes[-1].legend(looks.values(), looks, frameon=False, fontsize=8, **beside_all)
    return figure


def steps_by_layer(found: dict[str, dict[str, dict]]) -> Figure:
    """The norm ratio of the first update and each parameter tensor of phi, by optimiser, on a logarithmic axis."""
    layers = list(next(iter(found.values())))
    figure, (axis,) = new_figure(8.5, 1.2 + 0.33 * len(layers))
    for place, (name, steps) in enumerate(found.items()):
        ratios = [max(s["update"] / (s["weights"] or 1), 1e-9) for s in steps.values()]
        y = np.arange(len(layers)) + 0.25 * (place - (len(found) - 1) / 2)
        axis.plot(ratios, y, "o", color=PALETTE[place % len(PALETTE)], label=name)
    axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set(xscale="log", xlabel="norm of the first update / norm of the weights (dotted: equal)")
    axis.set_yticks(range(len(layers)), layers)
    axis.invert_yaxis()
    axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
