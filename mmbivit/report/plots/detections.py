"""Detections of several detectors side by side."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from pycocotools import mask as mask_utils

from mmbivit.analysis.figures.detections import Instance, detections_figure
from mmbivit.apis.checkpoints import load_trained_model
from mmbivit.apis.config import is_classifier, load_config
from mmbivit.apis.images import find_images
from mmbivit.apis.predict import predict
from mmbivit.apis.route import refuse_packed_file
from mmbivit.checks import UserError, check_number
from mmbivit.datasets.annotation_file import AnnotationFile, check_segmentation, read_annotation_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_detections", "read_annotations", "read_detections", "read_images"]

MAX_IMAGES = 8


def plot_detections(
    images: Sequence[str | Path],
    models: Sequence[tuple[str, str | Path, str | Path]],
    annotations: str | Path | None = None,
    score_thr: float = 0.5,
) -> "Figure":
    """Draw what detectors find in images, a row for each detector, below the annotations if there are any.

    Args:
        images: files, folders and glob patterns, at most 8 images.
        models: title, config and checkpoint of each detector, with or without masks.
        annotations: file in COCO's format that has all these images.
        score_thr: lowest score that is drawn, from 0 to 1.

    Returns:
        The figure, see :func:`mmbivit.analysis.figures.detections.detections_figure`.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: for too many images, two of the same name, one that is not in the annotations, two rows of the same
            title, a config of a classifier, or a checkpoint that does not fit its config.
    """
    check_number("score_thr", score_thr, 0, 1)
    files = find_images(images)
    if len(files) > MAX_IMAGES:
        raise UserError(f"{len(files)} images are given; allowed: {MAX_IMAGES} or fewer side by side")
    titles = ["annotation"] * (annotations is not None) + [title for title, _, _ in models]
    for title in titles:
        if titles.count(title) > 1:
            raise UserError(f"two rows have the title {title!r}: give each detector its own, other than 'annotation'")
    pixels = read_images(files)
    classes, rows = [], {}
    if annotations is not None:
        classes, rows["annotation"] = read_annotations(annotations, pixels)
    names = [_class_names(config, checkpoint) for _, config, checkpoint in models]
    for (title, config, checkpoint), own in zip(models, names, strict=True):
        with TemporaryDirectory() as folder:
            found = predict(config, checkpoint, files, folder, score_thr=score_thr)
            rows[title] = [read_detections(result["json_file"], own, score_thr) for result in found]
    labels = [instance.label for row in rows.values() for instances in row for instance in instances]
    classes = list(dict.fromkeys([*classes, *(name for own in names for name in own), *labels]))
    shape = sum(image.shape[1] / image.shape[0] for image in pixels.values())
    figure = detections_figure(list(pixels.values()), rows, classes, height=float(np.clip(12 / shape, 1.9, 4.5)))
    figure.supxlabel(f"detections with a score of {score_thr:g} or more", fontsize=9)
    return figure


def read_images(files: Sequence[Path]) -> dict[Path, np.ndarray]:
    """Read images as detectors do: RGB ``(H, W, 3)`` of uint8 by file; raises a ValueError for one that is damaged."""
    images = {}
    for file in files:
        bgr = cv2.imread(str(file))
        if bgr is None:
            raise UserError(f"image {file} cannot be decoded")
        images[file] = bgr[..., ::-1]
    return images


def _class_names(config: str | Path, checkpoint: str | Path) -> list[str]:
    """Return the names of a detector's classes, perhaps none, having checked that the checkpoint fits the config."""
    refuse_packed_file(checkpoint)
    cfg = load_config(config)
    if is_classifier(cfg):
        raise UserError(f"{config} is the config of a classifier; this picture needs one of a detector")
    return list(load_trained_model(cfg, checkpoint).dataset_meta.get("classes", ()))


def read_detections(file: str | Path, classes: Sequence[str], score_thr: float) -> list[Instance]:
    """Read detections of one image.

    Args:
        file: JSON file of :func:`mmbivit.apis.predict`.
        classes: names of the detector's classes; one without is called by its number.
        score_thr: lowest score.
    """
    found = json.loads(Path(file).read_text())
    masks = found.get("masks") or [None] * len(found["labels"])
    instances = []
    for label, score, (x1, y1, x2, y2), mask in zip(
        found["labels"], found["scores"], found["bboxes"], masks, strict=True
    ):
        if score >= score_thr:
            name = classes[label] if label < len(classes) else str(label)
            mask = mask if mask and mask_utils.area(mask) else None
            instances.append(Instance(name, (x1, y1, x2 - x1, y2 - y1), mask, score))
    return instances


def read_annotations(path: str | Path, images: Mapping[Path, np.ndarray]) -> tuple[list[str], list[list[Instance]]]:
    """Read the annotations of images, without crowds.

    Args:
        path: file in COCO's format; images are found by their names, and by their folders where that is not enough.
        images: the images, by file.

    Returns:
        Names of all categories in the order of the file, and the objects of each image.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is malformed, or has not exactly one image of such a name and size.
    """
    content = read_annotation_file(str(path))
    rows = []
    for file, pixels in images.items():
        index = _find_image(content, file)
        image = content.images[index]
        if (image["height"], image["width"]) != pixels.shape[:2]:
            size = f"{image['width']:g} x {image['height']:g}"
            raise UserError(f"{path}: {image['file_name']} has {size} pixels, {file} {pixels.shape[1]} x {len(pixels)}")
        rows.append([_instance(content, position) for position in _annotations_of(content, index)])
    return list(content.names.values()), rows


def _find_image(content: AnnotationFile, file: Path) -> int:
    names = [Path(image["file_name"]) for image in content.images]
    found = [index for index, name in enumerate(names) if name.name == file.name]
    if len(found) > 1:
        found = [index for index in found if file.parts[-len(names[index].parts) :] == names[index].parts]
    if len(found) != 1:
        raise UserError(f"{content.path} has {len(found)} images with the name of {file}; expected exactly one")
    return found[0]


def _annotations_of(content: AnnotationFile, index: int) -> list[int]:
    positions = np.flatnonzero(content.image_index == index)
    return [position for position in positions if not content.annotations[position].get("iscrowd")]


def _instance(content: AnnotationFile, position: int) -> Instance:
    annotation: dict[str, Any] = content.annotations[position]
    mask = None
    if (segmentation := annotation.get("segmentation")) and check_segmentation(content, position)[0]:
        width, height = content.sizes[content.image_index[position]].astype(int)
        if isinstance(segmentation, list):
            polygons = [polygon for polygon in segmentation if len(polygon) >= 6 and len(polygon) % 2 == 0]
            mask = mask_utils.merge(mask_utils.frPyObjects(polygons, height, width))
        elif isinstance(segmentation["counts"], list):
            mask = mask_utils.frPyObjects(segmentation, height, width)
        else:
            mask = segmentation
    return Instance(content.names[annotation["category_id"]], tuple(annotation["bbox"]), mask)
