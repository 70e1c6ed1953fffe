"""An axis of the blocks of a network, for 2 of them as for 24."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .style import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["block_axes", "block_label"]


def block_label(name: str) -> str:
    """Shorten the name of a block: ``stages.0.blocks.1`` -> ``0.1``."""
    return ".".join(re.findall(r"\d+", name))


def block_axes(names: Iterable[str]) -> "Axes":
    """Make a figure with one axes, whose x axis has a place (0, 1, ...) for each block.

    Args:
        names: of the blocks, such as ``stages.0.blocks.1``.
    """
    labels = [block_label(name) for name in names]
    axes = new_figure(max(6.0, 2 + 0.45 * len(labels)), 4.2).add_subplot()
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlim(-0.6, len(labels) - 0.4)
    axes.set_xlabel("block (stage.block, counted from 0)")
    axes.margins(y=0.15)  # numbers stand above the bars
    return axes
