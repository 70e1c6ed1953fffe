"""Distributions of activations before they are binarized, with their thresholds."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mmbivit.analysis.activations import ActivationDistribution

from .style import DARK, GREY, LIGHT, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["activations_figure"]

COLUMNS = 3
BARS = 60


def activations_figure(title: str, distributions: Sequence[ActivationDistribution]) -> "Figure":
    """Draw a panel for each layer: the histogram of its inputs, its thresholds, and where gradients pass.

    The title of a panel has the share of values that become +1, and the share that lies in the straight-through window
    of its channel's threshold. The hatched area is the window of the median threshold. The 0.1 % of values at
    either end may lie outside the panel.

    Args:
        title: of the whole figure.
        distributions: of the layers, in their order.
    """
    rows = -(-len(distributions) // COLUMNS)
    figure = new_figure(10, 2.5 * rows + 1)
    figure.suptitle(title)
    axes = figure.subplots(rows, COLUMNS, squeeze=False)
    for ax in axes.flat[len(distributions) :]:
        ax.set_axis_off()
    for ax, distribution in zip(axes.flat, distributions, strict=False):
        _draw_panel(ax, distribution)
    for ax in axes[:, 0]:
        ax.set_ylabel("density")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def _draw_panel(ax: "Axes", distribution: ActivationDistribution) -> None:
    gamma, median = distribution.gamma, float(np.median(distribution.gamma))
    density, edges = _bars(distribution)
    ax.axvspan(
        median - 1,
        median + 1,
        facecolor="none",
        edgecolor=GREY,
        hatch="//",
        alpha=0.5,
        zorder=0,
        label=r"$|x - \gamma| \leq 1$ for the median $\gamma$",
    )
    ax.stairs(density, edges, fill=True, facecolor=LIGHT, edgecolor=DARK, linewidth=0.8, label="inputs $x$")
    # In a strip of their own below the bars; faint, so that many at a place are darker than one.
    ax.plot(
        gamma,
        np.full(len(gamma), 0.06),
        "|",
        color="black",
        alpha=0.4,
        markersize=9,
        transform=ax.get_xaxis_transform(),
        label=r"thresholds $\gamma$",
    )
    top = 1.05 * density.max()
    ax.set_ylim(-0.14 * top, top)
    ax.locator_params(axis="y", nbins=5)
    ax.axhline(0, color=DARK, linewidth=0.8)
    ax.set_xlim(*_limits(distribution))
    ax.set_xlabel("$x$")
    ax.set_title(
        f"{distribution.layer}\n+1: {distribution.positive:.1%},  $|x - \\gamma| \\leq 1$: {distribution.inside:.1%}",
        fontsize=9,
    )


def _limits(distribution: ActivationDistribution) -> tuple[float, float]:
    """Choose what the axis shows: all but the 0.1 % of values at either end, and all channels' windows."""
    edges, gamma = distribution.edges, distribution.gamma
    share = distribution.counts.cumsum() / distribution.counts.sum()
    low, high = edges[np.searchsorted(share, 0.001)], edges[np.searchsorted(share, 0.999) + 1]
    return min(low, gamma.min() - 1.2), max(high, gamma.max() + 1.2)


def _bars(distribution: ActivationDistribution) -> tuple[np.ndarray, np.ndarray]:
    """Join bins so that the axis holds about 60 bars; returns density and edges."""
    counts, edges = distribution.counts, distribution.edges
    low, high = _limits(distribution)
    step = max(1, round((high - low) / BARS / (edges[1] - edges[0])))
    starts = np.arange(0, len(counts), step)
    edges = np.append(edges[starts], edges[-1])
    return np.add.reduceat(counts, starts) / counts.sum() / np.diff(edges), edges
