"""What one token attends to, over the image: a binary network beside its float teacher."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mmbivit.analysis.attention import AttentionMap

from .style import ACCENT, DARK, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["attention_figure"]

COLUMNS = 8


def attention_figure(pixels: np.ndarray, maps: Sequence[tuple[str, AttentionMap]]) -> "Figure":
    """Draw the image with the asking token and what it sees, then a close-up with the attention of each head.

    The darker a token, the larger its weight; the darkest is the head's largest, which the panel's title names. A
    binary head gives all its selected keys the same weight, so the title counts them. Where a window reaches over the
    border of the image, the title has the share of the weights that lies on padding; so it has that of a class token.

    Args:
        pixels: the image as the network gets it, RGB ``(H, W, 3)`` of uint8.
        maps: a name, such as ``student``, and an attention map, for each network; all of the same token.
    """
    heads = max(len(attention.weights) for _, attention in maps)
    columns = min(heads, COLUMNS)
    lines = -(-heads // columns)
    figure = new_figure(3.6 + 1.55 * columns, max(3.8, 0.6 + 1.85 * len(maps) * lines))
    attention = maps[0][1]
    stride = attention.stride
    top, left = (index * stride for index in attention.query)
    pixels_of_token = f"x {left} to {left + stride - 1}, y {top} to {top + stride - 1}"
    figure.suptitle(f"{attention.block}: attention of the token\nat pixels {pixels_of_token}", fontsize=11)
    whole, close_ups = figure.subfigures(1, 2, width_ratios=[3.6, 1.55 * columns])
    _draw_image(whole.subplots(), pixels, attention)
    axes = close_ups.subplots(lines * len(maps), columns, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[], frame_on=False)
    grey = 0.75 + 0.25 * (pixels @ np.array([0.299, 0.587, 0.114]) / 255)  # pale, so that it is not taken for weights
    for i, (name, attention) in enumerate(maps):
        for head in range(len(attention.weights)):
            line, column = divmod(head, columns)
            ax = axes[line * len(maps) + i, column]
            _draw_head(ax, grey, attention, head)
            if column == 0:
                ax.set_ylabel(name)
    figure.supxlabel("close-ups: the darker, the larger the weight; darkest is each head's largest", fontsize=8)
    return figure


def _draw_image(ax: "Axes", pixels: np.ndarray, attention: AttentionMap) -> None:
    ax.imshow(pixels, extent=(0, pixels.shape[1], pixels.shape[0], 0))
    _mark(ax, attention)
    ax.set_anchor("N")
    ax.set_title("square: the token, dashed: what it sees", fontsize=8)
    ax.set_xlabel("x in pixels")
    ax.set_ylabel("y in pixels")


def _draw_head(ax: "Axes", grey: np.ndarray, attention: AttentionMap, head: int) -> None:
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    height, width = grey.shape
    ax.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0))
    weights = attention.weights[head]
    largest = np.nanmax(weights)
    shade = LinearSegmentedColormap.from_list("shade", [(*to_rgb(DARK), 0.0), (*to_rgb(DARK), 0.85)])
    rows, columns = (size * attention.stride for size in weights.shape)
    ax.imshow(weights, cmap=shade, vmin=0, vmax=largest, extent=(0, columns, rows, 0), interpolation="nearest")
    _mark(ax, attention)
    left, top, right, bottom = _seen_box(attention)
    margin = 1.5 * attention.stride
    ax.set_xlim(left - margin, right + margin)
    ax.set_ylim(bottom + margin, top - margin)
    visible = int(attention.visible.sum())
    what = f"{int(np.nansum(weights > 0))} of {visible} keys" if attention.binary else f"up to {largest:.2f}"
    on_padding = f"\n{attention.padding[head]:.0%} on padding" if attention.padding[head] >= 0.005 else ""
    on_class_token = "" if attention.beside is None else f"\n{attention.beside[head]:.0%} on class token"
    ax.set_title(f"head {head + 1}: {what}{on_padding}{on_class_token}", fontsize=8)


def _mark(ax: "Axes", attention: AttentionMap) -> None:
    """Outline what the asking token sees, dashed, and the token itself."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=2.4, foreground="white")]
    left, top, right, bottom = _seen_box(attention)
    style = dict(fill=False, linewidth=1.2, path_effects=halo)
    ax.add_patch(Rectangle((left, top), right - left, bottom - top, edgecolor="black", linestyle="--", **style))
    corner = (attention.query[1] * attention.stride, attention.query[0] * attention.stride)
    ax.add_patch(Rectangle(corner, attention.stride, attention.stride, edgecolor=ACCENT, **style))


def _seen_box(attention: AttentionMap) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom, in pixels, of what the asking token sees, which is a rectangle of tokens."""
    rows, columns = attention.visible.nonzero()
    stride = attention.stride
    return columns.min() * stride, rows.min() * stride, (columns.max() + 1) * stride, (rows.max() + 1) * stride
