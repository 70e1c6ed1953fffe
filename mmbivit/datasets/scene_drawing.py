"""Pictures of scenes with masks, boxes and labels."""

from __future__ import annotations

import json
import math
import os
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from pycocotools import mask as mask_utils

from mmbivit.checks import UserError, check_integer

from .digit_scenes import SPLITS, DigitScenes
from .scene_rendering import LUMINANCE

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = "#e6194b #3cb44b #ffe119 #4363d8 #f58231 #911eb4 #42d4f4 #f032e6 #bfef45 #9a6324".split()


def draw_scenes(root: str | os.PathLike, split: str = "val", count: int = 12, columns: int = 4) -> Figure:
    """Draw the first ``count`` scenes of a split with their masks, boxes and labels.

    Args:
        root: A folder made by :func:`make_digit_scenes`, in either layout.
        split: ``'train'`` or ``'val'``.
        count: Number of scenes; fewer are drawn if there are not that many.
        columns: Scenes per row.

    Returns:
        The figure; ``figure.savefig(path)`` writes it.

    Raises:
        ValueError: ``split`` is unknown, or ``count`` or ``columns`` is below 1.
        FileNotFoundError: ``root`` is not a digit scenes folder.
    """
    from matplotlib.figure import Figure

    if split not in SPLITS:
        raise UserError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    for name, value in (("count", count), ("columns", columns)):
        check_integer(name, value, 1)
    scenes = DigitScenes.load(root)
    content = json.loads(scenes.ann_file(split).read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    images = content["images"][:count]
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    # In inches. At matplotlib's 100 dots per inch a scene of 112 pixels is drawn at exactly twice its size.
    width, gap = 2.24, 0.05
    height = width * scenes.options["size"][0] / scenes.options["size"][1]
    full_width, full_height = columns * (width + gap) + gap, rows * (height + gap) + gap
    figure = Figure(figsize=(full_width, full_height), dpi=100)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        left, bottom = gap + column * (width + gap), full_height - (row + 1) * (height + gap)
        box = (left / full_width, bottom / full_height, width / full_width, height / full_height)
        axes = figure.add_axes(box)
        axes.axis("off")
        with Image.open(scenes.image_dir(split) / image["file_name"]) as pixels:
            axes.imshow(np.asarray(pixels), interpolation="nearest")
        for annotation in content["annotations"]:
            if annotation["image_id"] == image["id"]:
                draw_instance(axes, annotation, names[annotation["category_id"]])
    return figure


def draw_instance(axes: Axes, annotation: dict, name: str) -> None:
    """Outline and tint one mask, draw its box and write its class on the box.

    Args:
        axes: shows the image, a pixel a unit.
        annotation: as in COCO: ``category_id`` (its colour), ``bbox`` (x, y, w, h) and, if it has a mask,
            ``segmentation`` (RLE).
        name: what stands on the box.
    """
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    color = to_rgb(PALETTE[(annotation["category_id"] - 1) % len(PALETTE)])
    contrast = "black" if LUMINANCE @ color > 0.5 else "white"
    outline = [withStroke(linewidth=2.2, foreground=contrast, alpha=0.6)]  # the line is seen on any background
    image_height, image_width = axes.images[0].get_size()
    if "segmentation" in annotation:
        mask = mask_utils.decode(annotation["segmentation"]).astype(bool)
        _draw_mask(axes, mask, color).set_path_effects(outline)
    x, y, width, height = annotation["bbox"]
    x, y = x - 0.5, y - 0.5
    axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=color, linewidth=1.2, path_effects=outline))
    tag = {"facecolor": color, "edgecolor": "none", "boxstyle": "square,pad=0.12"}
    # Inside the box where there is no room above it, and from its right end where there is none beside it: the tag
    # must not leave the scene. A letter takes about 0.034 of one of two inches.
    above = y > 0.1 * image_height
    tag_width = 0.034 * len(name) * image_width
    from_right = x + tag_width > image_width and x + width >= tag_width
    axes.annotate(
        name,
        (x + width if from_right else x, y),
        xytext=(-1.2 if from_right else 1.2, 1.8 if above else -1.8),
        textcoords="offset points",
        ha="right" if from_right else "left",
        va="bottom" if above else "top",
        color=contrast,
        fontsize=9 if len(name) == 1 else 6,
        fontweight="bold",
        bbox=tag,
    )
    axes.set(xlim=(-0.5, image_width - 0.5), ylim=(image_height - 0.5, -0.5))


def _draw_mask(axes: Axes, mask: np.ndarray, color: tuple[float, float, float]) -> Artist:
    """Tint a mask and return its outline."""
    tint = np.zeros((*mask.shape, 4), np.uint8)
    tint[mask] = (*(round(255 * part) for part in color), 51)  # a fifth
    axes.imshow(tint, interpolation="nearest")
    padded = np.pad(mask, 1)  # closes the outline of a mask at the border of the scene
    grid_x, grid_y = np.arange(padded.shape[1]) - 1, np.arange(padded.shape[0]) - 1
    return axes.contour(grid_x, grid_y, padded, levels=[0.5], colors=[color], linewidths=1.2)


# Options and folders
