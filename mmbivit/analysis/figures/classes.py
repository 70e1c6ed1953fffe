"""How well each class is recognised."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .style import DARK, GREY, LIGHT, new_figure, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["classes_figure"]

STYLES = (dict(color=DARK), dict(color=LIGHT, hatch="///", edgecolor=DARK))


def classes_figure(names: Sequence[str], values: Mapping[str, Sequence[float | None]], label: str) -> "Figure":
    """Draw bars for each class, and a line at the mean over classes.

    Args:
        names: the classes.
        values: for one or two metrics, by name, a value for each class; ``None`` where there is none.
        label: what the values are, with their unit.
    """
    height = 0.36 if len(values) > 1 else 0.7
    figure = new_figure(7.5, 1.1 + 0.24 * len(names) * (1.4 if len(values) > 1 else 1))
    axes = figure.subplots()
    for i, ((metric, bars), style) in enumerate(zip(values.items(), STYLES, strict=False)):
        known = [value for value in bars if value is not None]
        places = [row + (i - (len(values) - 1) / 2) * height for row in range(len(names))]
        axes.barh(places, [value or 0 for value in bars], height, label=metric, **style)
        if known:
            mean = sum(known) / len(known)
            line = ("-", "--")[i]
            axes.axvline(mean, color=GREY, linestyle=line, linewidth=1.2, label=f"{metric}, mean {mean:.3g}")
    axes.set(xlabel=label, ylabel="class", ylim=(len(names) - 0.4, -0.6))
    axes.set(yticks=range(len(names)), yticklabels=[plain(name) for name in names])
    axes.set_xlim(left=0)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, fontsize=8)
    return figure
