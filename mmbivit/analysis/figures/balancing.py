"""Balancing factors of the spatial interaction, as in SI-BiViT's Figure 5."""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from .blocks import block_label
from .style import DARK, GREY, LIGHT, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["balancing_figure"]

COLUMNS, ROWS = 10, 3


def balancing_figure(factors: Mapping[str, np.ndarray]) -> "Figure":
    """Draw the balancing factors of all blocks as boxes, and those of some channels of two blocks as numbers.

    Boxes go from the first to the third quartile, with a line at the median; whiskers reach to the smallest and the
    largest factor. The grids show the first block and one at three quarters of the network, 30 channels of each, evenly
    spaced, with the block's smallest and largest factor among them and marked.

    Args:
        factors: ``alpha`` of each channel ``(C,)``, by name of the block, such as ``stages.0.blocks.1``.
    """
    names = list(factors)
    of_grids = list(dict.fromkeys([names[0], names[round(0.75 * (len(names) - 1))]]))
    shown = {name: _spread_channels(factors[name]) for name in of_grids}
    heights = [2.8, *(0.25 + 0.4 * -(-len(channels) // COLUMNS) for channels in shown.values())]
    figure = new_figure(max(7.0, 0.4 * len(names) + 1), sum(heights) + 1)
    axes = figure.subplots(len(heights), height_ratios=heights)
    _draw_boxes(axes[0], factors)
    values = np.concatenate([factors[name][channels] for name, channels in shown.items()])
    for ax, (name, channels) in zip(axes[1:], shown.items(), strict=True):
        _draw_grid(ax, name, factors[name], channels, values.min(), values.max())
    return figure


def _draw_boxes(ax: "Axes", factors: Mapping[str, np.ndarray]) -> None:
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.boxplot(
        list(factors.values()),
        whis=(0, 100),
        widths=0.6,
        patch_artist=True,
        boxprops=dict(facecolor=LIGHT, edgecolor=DARK),
        whiskerprops=dict(color=DARK),
        capprops=dict(color=DARK),
        medianprops=dict(color="black", linewidth=2),
        tick_labels=[block_label(name) for name in factors],
    )
    ax.set_title("Balancing factors of all channels: smallest, quartiles, largest")
    ax.set_xlabel("block (stage.block, counted from 0)")
    ax.set_ylabel(r"balancing factor $\alpha$")


def _spread_channels(factors: np.ndarray) -> np.ndarray:
    """Choose channels evenly, but with the smallest and the largest factor, in ascending order."""
    extremes = {int(factors.argmin()), int(factors.argmax())}
    others = np.array([channel for channel in range(len(factors)) if channel not in extremes], dtype=int)
    count = min(len(others), COLUMNS * ROWS - len(extremes))
    spread = np.linspace(0, len(others) - 1, count).round().astype(int)
    return np.sort([*extremes, *others[spread]])


def _draw_grid(ax: "Axes", name: str, factors: np.ndarray, channels: np.ndarray, low: float, high: float) -> None:
    rows = -(-len(channels) // COLUMNS)
    grid = np.full(rows * COLUMNS, np.nan)
    grid[: len(channels)] = factors[channels]
    ax.imshow(grid.reshape(rows, COLUMNS), cmap="Greys", vmin=low, vmax=high, aspect="auto")
    show = _number_format(np.abs(grid[: len(channels)]).max())
    marks = {int(factors.argmin()): "▼", int(factors.argmax()): "▲"}
    for i, channel in enumerate(channels):
        row, column = divmod(i, COLUMNS)
        dark = factors[channel] > 0.4 * low + 0.6 * high
        mark = marks.get(int(channel), "")
        text = f"{mark} {show(factors[channel])}".strip()
        style = dict(ha="center", color="white" if dark else "black")
        ax.text(column, row - 0.02, text, va="center", weight="bold" if mark else "normal", fontsize=8.5, **style)
        ax.text(column, row + 0.42, f"channel {channel}", va="bottom", fontsize=5.5, **style)
    ax.set_title(
        f"block {block_label(name)}: {len(channels)} of {len(factors)} channels, ▲ the block's largest, ▼ its smallest",
        fontsize=10,
    )
    ax.set_xticks([])
    ax.set_yticks([])


def _number_format(largest: float) -> Callable[[float], str]:
    """Choose how numbers are written: two digits of the largest, as many places for all."""
    places = max(2, 1 - math.floor(math.log10(largest))) if largest else 2
    if places > 4:
        return "{:.0e}".format
    return lambda value: f"{round(float(value), places) + 0.0:.{places}f}"  # + 0.0 makes 0.00 of -0.00
