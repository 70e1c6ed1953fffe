"""Objects in images, of annotations and of detectors side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mmbivit.datasets.scene_drawing import draw_instance

from .style import new_figure, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Instance", "detections_figure"]


@dataclass(frozen=True)
class Instance:
    """One object in an image.

    Args:
        label: name of its class.
        box: x, y, width and height in pixels.
        mask: as pycocotools encodes it, of the image's size; ``None`` for a box alone.
        score: of a detection, from 0 to 1.
    """

    label: str
    box: tuple[float, float, float, float]
    mask: dict[str, Any] | None = None
    score: float | None = None


def detections_figure(
    images: Sequence[np.ndarray],
    rows: Mapping[str, Sequence[Sequence[Instance]]],
    classes: Sequence[str],
    height: float = 1.9,
) -> "Figure":
    """Draw images in columns, once for each row, with the row's objects: masks, boxes, classes and scores.

    Args:
        images: RGB, ``(H, W, 3)`` of uint8.
        rows: the objects of each image, by the title of the row.
        classes: all labels; their order gives the colours.
        height: of an image in inches.
    """
    aspects = [image.shape[1] / image.shape[0] for image in images]
    figure = new_figure(height * sum(aspects), (height + 0.1) * len(rows))
    axes = figure.subplots(len(rows), len(images), squeeze=False, width_ratios=aspects)
    for (title, objects), row in zip(rows.items(), axes, strict=True):
        row[0].set_ylabel(plain(title), fontsize=11)
        for image, instances, axis in zip(images, objects, row, strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            for instance in instances:
                annotation = dict(category_id=classes.index(instance.label) + 1, bbox=instance.box)
                if instance.mask is not None:
                    annotation["segmentation"] = instance.mask
                draw_instance(axis, annotation, plain(_name(instance)))
    return figure


def _name(instance: Instance) -> str:
    return instance.label if instance.score is None else f"{instance.label} {instance.score:.1f}".replace("0.", ".")
