"""Gradient conflict as bars, like SI-BiViT's Figure 4(b)."""

import math
from typing import TYPE_CHECKING

from mmbivit.analysis.gradient_conflict import GradientConflict

from .blocks import block_axes
from .style import ACCENT, DARK, LIGHT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["conflict_figure"]


def conflict_figure(conflict: GradientConflict) -> "Figure":
    """Draw the distillation gradient of each block: up what is against the task's, down what is along it (Eq. 10)."""
    blocks = conflict.by_block()
    largest = max(max(pair) for pair in blocks.values())
    exponent = 3 * math.floor(math.log10(largest) / 3)
    harmonious, conflicting = ([pair[i] / 10**exponent for pair in blocks.values()] for i in (0, 1))
    axes = block_axes(blocks)
    places = range(len(blocks))
    up = axes.bar(places, conflicting, 0.7, label="$g^-$: against the task", color=ACCENT, edgecolor=DARK, hatch="//")
    down = axes.bar(places, [-g for g in harmonious], 0.7, label="$g^+$: along the task", color=LIGHT, edgecolor=DARK)
    for bars, values in ((up, conflicting), (down, harmonious)):
        axes.bar_label(bars, [_short(value) for value in values], padding=2, fontsize=8)
    axes.axhline(0, color=DARK, linewidth=1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    unit = f" in $10^{{{exponent}}}$" if exponent else ""
    axes.set_ylabel(rf"$\sum\,|\partial\,$loss_distill$\,/\,\partial W|${unit}")
    axes.set_title(
        f"{conflict.share:.0%} of the gradient of distillation is against the task\n"
        f"$g^-$ = {conflict.conflicting:.3g}, $g^+$ = {conflict.harmonious:.3g}, batches averaged: {conflict.batches}"
    )
    axes.figure.legend(loc="outside lower center", ncols=2)
    return axes.figure


def _short(value: float) -> str:
    """Write a number so that it is not wider than its bar."""
    return f"{value:.3g}" if value >= 0.01 or not value else "<0.01"
