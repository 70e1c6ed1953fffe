"""Spatial interaction capability as bars."""

from typing import TYPE_CHECKING

from mmbivit.analysis.spatial_interaction import SpatialInteractionCapability

from .blocks import block_axes
from .style import ACCENT, DARK, LIGHT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["interaction_figure"]


def interaction_figure(capability: SpatialInteractionCapability) -> "Figure":
    """Draw the spatial interaction capability of each block, attention below, token mixing on top (Eq. 6)."""
    from matplotlib.ticker import EngFormatter

    blocks = capability.by_block()
    attention, mixing = zip(*blocks.values(), strict=True)
    axes = block_axes(blocks)
    places = range(len(blocks))
    axes.bar(places, attention, 0.7, label="attention", color=LIGHT, edgecolor=DARK)
    top = axes.bar(places, mixing, 0.7, attention, label="token mixing", color=ACCENT, edgecolor=DARK, hatch="//")
    short = EngFormatter(places=1, sep="")
    axes.bar_label(top, [short(sum(pair)) for pair in blocks.values()], padding=2, fontsize=8)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_ylabel("spatial interaction capability\n(token pairs x range)")
    _, height, width = capability.input_shape
    axes.set_title(
        f"SIC {capability.total:,} at {width} x {height} pixels, {capability.times:.3g} times attention alone"
    )
    axes.figure.legend(loc="outside lower center", ncols=2)
    return axes.figure
