"""Images with what a classifier takes them for."""

import math
from collections.abc import Sequence
from textwrap import shorten
from typing import TYPE_CHECKING

import numpy as np

from .style import new_figure, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["classifications_figure"]


def classifications_figure(images: Sequence[np.ndarray], captions: Sequence[str], columns: int = 4) -> "Figure":
    """Draw images in a grid, each with its caption below.

    Args:
        images: RGB, ``(H, W, 3)`` of uint8.
        captions: one or two lines for each, which are cut where they are longer than the image is wide.
        columns: images in a row.
    """
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    figure = new_figure(1.9 * columns, 2.3 * rows)
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.set_axis_off()
    for axes, image, caption in zip(figure.axes, images, captions, strict=False):
        axes.imshow(image, interpolation="nearest")
        axes.set_axis_on()
        axes.set(xticks=[], yticks=[])
        lines = [plain(shorten(line, 27, placeholder="…")) for line in caption.splitlines()]
        axes.set_xlabel("\n".join(lines), fontsize=9)
    return figure
