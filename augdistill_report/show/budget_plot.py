"""The picture of the scoreboard: accuracy against bytes."""

import collections
import itertools

from matplotlib.figure import Figure

from augdistill_report.show.plots import COLOURS, PALETTE, new_figure


def accuracy_by_bytes(panels: dict[tuple[str, int], list]) -> Figure:
    """Test accuracy against the bytes that a method stores (logarithmic): one panel a data set, one marker a method.

    `panels` hold entries by (data set, image size): objects with `method`, `training`, `bytes`, `accuracy`, `spread`
    and `is_measured`. A filled marker was measured (with its standard deviation); a hollow one is published, not
    measured. A line joins the markers of one method whose students were trained in one way; where a panel has several
    ways of one method, the legend says which is which.
    """
    figure, axes = new_figure(6.4 * len(panels), 5.4, len(panels))
    colours = colours_of([list(dict.fromkeys(entry.method for entry in entries)) for entries in panels.values()])
    for axis, ((data, size), entries) in zip(axes, panels.items(), strict=True):
        lines: dict[tuple[str, str], list] = {}
        for entry in entries:
            lines.setdefault((entry.method, entry.training), []).append(entry)
        ways = collections.Counter(method for method, _ in lines)
        for place, ((method, training), own) in enumerate(lines.items()):
            label = f"{method} ({training})" if ways[method] > 1 else method
            style = dict(color=colours[method], marker="osD^vPX*hd"[place % 10], linestyle=":", linewidth=0.8)
            for measured in (True, False):
                these = sorted((e for e in own if e.is_measured == measured), key=lambda e: e.bytes)
                x, y = [e.bytes for e in these], [100 * e.accuracy for e in these]
                if these and measured:
                    axis.errorbar(x, y, [100 * (e.spread or 0) for e in these], capsize=2, label=label, **style)
                elif these:
                    hollow = dict(markerfacecolor="none", label=f"{label}: published, not measured")
                    axis.plot(x, y, **hollow, **style)
        axis.set(xscale="log", xlabel="bytes (images, labels, phi, decoder)", title=f"{data} at {size}x{size}")
        axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    axes[0].set_ylabel("test accuracy (%)")
    return figure


def colours_of(panels: list[list[str]]) -> dict[str, str]:
    """A colour for each method, the same in all panels; methods of one panel share none, if the colours suffice."""
    found = {method: COLOURS[method] for methods in panels for method in methods if method in COLOURS}
    for methods in panels:
        for method in methods:
            beside = [found.get(other) for other in itertools.chain(*(p for p in panels if method in p))]
            free = [colour for colour in PALETTE if colour not in beside]
            found.setdefault(method, (free or PALETTE)[0])
    return found
