"""Finds out before a run whether annotation files fit the config, and says what mmdet will leave out of them.

mmdet's ``CocoDataset`` drops images and boxes without a word, and gives other labels than meant where classes are
missing. Classes, masks and images are compared here with what data sets, evaluators and the model take for granted.
"""

import os
import os.path as osp
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mmengine.config import Config

from mmbivit.checks import UserError

from .annotation_file import AnnotationFile, check_segmentation, read_annotation_file

__all__ = ["CocoUse", "check_annotations"]


OTHER_CLASSES = "annotations of other classes than metainfo.classes left out"


@dataclass(frozen=True, eq=False)
class CocoUse:
    """A data set or an evaluator that reads an annotation file.

    Args:
        key: the key of its mode in the config, such as ``train_dataloader`` or ``val_evaluator``.
        path: the annotation file.
        config: its config.
        image_folder: what the file names of a data set are relative to; ``None`` for an evaluator.
    """

    key: str
    path: str
    config: dict[str, Any]
    image_folder: str | None = None


def check_annotations(cfg: Config, uses: Sequence[CocoUse]) -> list[str]:
    """Check the annotation files of ``CocoDataset`` and ``CocoMetric``; each is read once.

    Args:
        cfg: Config of a runner.
        uses: The data sets and evaluators. Other types are left alone, they may read another format.

    Returns:
        One line per data set or evaluator that leaves something out: what, why, and how much of it.

    Raises:
        FileNotFoundError: Image files are missing.
        ValueError: A file is malformed, or does not fit its data set, evaluator or model. The message names the file.
    """
    uses = [use for use in uses if _type(use.config) in ("CocoDataset", "CocoMetric")]
    classes = {}
    for use in uses:
        if use.image_folder is not None:
            classes[use] = _classes(use)
            _check_num_classes(cfg, use.key, classes[use])
    notes: dict[CocoUse, str | None] = {}
    image_ids = {}
    for path in dict.fromkeys(use.path for use in uses):
        image_ids[path] = _check_file(path, [use for use in uses if use.path == path], classes, notes)
    _check_same_images(uses, image_ids)
    return [note for use in uses if (note := notes.get(use))]


def _check_file(path: str, uses: list[CocoUse], classes: dict, notes: dict) -> set:
    """Check a file for all who read it, add to the notes, and return the ids of its images; the rest is let go."""
    file = read_annotation_file(path, any(map(_needs_annotations, uses)))
    for use in uses:
        if use.image_folder is not None:
            notes[use] = _check_dataset(use, file, classes[use])
            continue
        # MMEngine gives an evaluator the classes of its mode's data set.
        datasets = sorted(_datasets_of(use, classes), key=lambda dataset: dataset.path != path)
        if datasets:
            notes[use] = _check_evaluator(use, file, classes[datasets[0]])
    return {image["id"] for image in file.images}


def _datasets_of(evaluator: CocoUse, uses: Iterable[CocoUse]) -> list[CocoUse]:
    key = evaluator.key.replace("evaluator", "dataloader")
    return [use for use in uses if use.key == key and use.image_folder is not None]


# Reading configs


def _type(config: dict) -> str:
    type_ = config.get("type")
    return str(getattr(type_, "__name__", type_)).rpartition(".")[2]


def _needs_annotations(use: CocoUse) -> bool:
    """Whether it is more than prediction, for which the files of COCO's test sets are enough."""
    return not use.config.get("test_mode" if use.image_folder is not None else "format_only", False)


def _classes(use: CocoUse) -> tuple[str, ...]:
    # mmdet may only be imported once mmbivit has put the stand-in for mmcv's operators in place.
    from mmdet.datasets import CocoDataset

    names = CocoDataset._load_metainfo(use.config.get("metainfo"))["classes"]
    if isinstance(names, str):
        raise UserError(
            f"{use.key}: metainfo.classes is the text {names!r}, which is no file of class names; allowed: a tuple of "
            f"names, here ({names!r},), or such a file"
        )
    return tuple(names)


def _find(node: Any, name: str) -> Iterator[dict]:
    """Configs of one type in a pipeline, inside other transforms too."""
    if isinstance(node, dict):
        if _type(node) == name:
            yield node
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for child in node:
            yield from _find(child, name)


def _check_num_classes(cfg: Config, key: str, classes: tuple[str, ...]) -> None:
    """Raise a ValueError if a head of the detector has another number of classes than the data."""
    model = cfg.get("model") or {}
    model = model.get("module", model)  # inside test-time augmentation
    if "language_model" in model:  # its classes are texts
        return
    for parent, name in (("", "bbox_head"), ("roi_head", "bbox_head"), ("roi_head", "mask_head")):
        heads = ((model.get(parent) or {}) if parent else model).get(name)
        for head in heads if isinstance(heads, (list, tuple)) else [heads or {}]:
            if head.get("num_classes", len(classes)) != len(classes):
                where = ".".join(filter(None, ("model", parent, name, "num_classes")))
                raise UserError(
                    f"{where}={head['num_classes']}, but the data of {key} has {len(classes)} classes, "
                    f"{_some(classes)}: set {where}={len(classes)}, or metainfo=dict(classes=...) of the data set to "
                    "the classes that the model is for"
                )


def _some(names: Sequence[str], shown: int = 5) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(map(repr, names[:shown])) + more


# Data sets and evaluators


def _check_classes(use: CocoUse, file: AnnotationFile, classes: tuple[str, ...]) -> np.ndarray:
    """Return which annotations are of the classes; raise a ValueError if the file's labels would be others."""
    if not file.names:
        raise UserError(f"{file.path} has no categories; {use.key} needs {_some(classes)}")
    in_file = [name for name in file.names.values() if name in classes]
    if missing := [name for name in classes if name not in in_file]:
        raise UserError(
            f"{file.path} has no categories {_some(missing)}, which are among the {len(classes)} classes of {use.key}; "
            f"it has {_some(list(file.names.values()))}: set metainfo=dict(classes=...) of the data set to these"
        )
    if tuple(in_file) != classes:
        raise UserError(
            f"{file.path} has the categories in another order than the classes of {use.key}, and mmdet labels them in "
            f"the order of the file: set metainfo=dict(classes=({_some(in_file, len(in_file))},)) of the data set"
        )
    if len(in_file) == len(file.names):
        return np.ones(len(file.annotations), dtype=bool)
    wanted = {category_id for category_id, name in file.names.items() if name in classes}
    return _flags(file, lambda annotation: annotation["category_id"] in wanted)


def _flags(file: AnnotationFile, condition: Callable[[dict], Any]) -> np.ndarray:
    return np.fromiter((bool(condition(a)) for a in file.annotations), dtype=bool, count=len(file.annotations))


def _check_dataset(use: CocoUse, file: AnnotationFile, classes: tuple[str, ...]) -> str | None:
    """Check a file as a ``CocoDataset`` reads it; return what that leaves out."""
    is_class = _check_classes(use, file, classes)
    used, reasons = _select_boxes(file, is_class)
    crowd = _flags(file, lambda annotation: annotation.get("iscrowd"))
    objects = used & ~crowd
    reasons["crowd regions (iscrowd) ignored by the losses"] = int((used & crowd).sum())
    loaders = [loader for loader in _find(use.config.get("pipeline"), "LoadAnnotations") if loader.get("with_mask")]
    if loaders:
        maskless, dropped = _check_masks(file, used, all(loader.get("poly2mask", True) for loader in loaders))
        reasons["polygons with less than three points or an odd number of coordinates left out"] = dropped
        reasons["objects without a usable mask left out"] = int((objects & maskless).sum())
        objects &= ~maskless
    if use.config.get("test_mode", False):
        # Nothing is left out: images are not filtered, and objects come from the evaluator's file.
        _check_images(use, file, np.ones(len(file.images), dtype=bool))
        return None
    kept = _select_images(use, file, is_class, reasons)
    _check_images(use, file, kept)
    objects &= kept[file.image_index]
    if not objects.any():
        raise UserError(
            f"{file.path}: no object is left to train on in {use.key}; {_list(reasons) or 'it has no annotations'}"
        )
    empty = kept.copy()
    empty[file.image_index[objects]] = False
    reasons["images without objects used as background"] = int(empty.sum())
    images = f"{kept.sum()} of {len(kept)} images"
    return _note(use, f"{images} and {objects.sum()} of {len(objects)} annotations", reasons)


def _select_boxes(file: AnnotationFile, is_class: np.ndarray) -> tuple[np.ndarray, Counter]:
    """Which annotations ``CocoDataset.parse_data_info`` keeps, and how many it drops for which reason."""
    x, y, width, height = file.boxes.T
    image_width, image_height = file.sizes[file.image_index].T
    inside = (np.minimum(x + width, image_width) > np.maximum(x, 0)) & (
        np.minimum(y + height, image_height) > np.maximum(y, 0)
    )
    rules = {
        OTHER_CLASSES: ~is_class,
        "annotations with 'ignore' left out": _flags(file, lambda annotation: annotation.get("ignore")),
        "boxes without area left out": (width == 0) | (height == 0),
        "boxes outside the image left out": ~inside,
        "boxes less than a pixel wide or high, or with an 'area' of 0, left out": (width < 1)
        | (height < 1)
        | _flags(file, lambda annotation: annotation["area"] <= 0),
    }
    used, reasons = np.ones(len(file.annotations), dtype=bool), Counter()
    for reason, matches in rules.items():
        reasons[reason] = int((used & matches).sum())
        used &= ~matches
    return used, reasons


def _check_masks(file: AnnotationFile, used: np.ndarray, poly2mask: bool = True) -> tuple[np.ndarray, int]:
    """Check the masks of some annotations; return which have none that mmdet can use, and how many polygons it drops.

    Args:
        file: the annotations.
        used: which of them to check.
        poly2mask: mmdet's option; without it run-length encodings cannot be used.
    """
    maskless, dropped = np.zeros(len(file.annotations), dtype=bool), 0
    for position in np.flatnonzero(used):
        parts, unusable = check_segmentation(file, position)
        dropped += unusable
        is_polygon = isinstance(file.annotations[position]["segmentation"], list)
        maskless[position] = parts == 0 or not (poly2mask or is_polygon)
    return maskless, dropped


def _select_images(use: CocoUse, file: AnnotationFile, is_class: np.ndarray, reasons: Counter) -> np.ndarray:
    """Which images ``CocoDataset.filter_data`` keeps."""
    options = use.config.get("filter_cfg") or {}
    kept = np.ones(len(file.images), dtype=bool)
    if options.get("filter_empty_gt", False):
        kept[:] = False
        kept[file.image_index[is_class]] = True
        reasons["images without annotations left out (filter_cfg.filter_empty_gt)"] = int((~kept).sum())
    min_size = options.get("min_size", 0)
    is_small = file.sizes.min(axis=1) < min_size
    reasons[f"images smaller than {min_size} pixels left out (filter_cfg.min_size)"] = int((kept & is_small).sum())
    kept &= ~is_small
    if not kept.any():
        raise UserError(f"{file.path}: no image is left to train on in {use.key}; {_list(reasons)}")
    return kept


def _check_images(use: CocoUse, file: AnnotationFile, kept: np.ndarray) -> None:
    """Raise an error for image files that are missing, or too long and thin for the pipeline."""
    _check_image_files(use, file, kept)
    pipeline = use.config.get("pipeline")
    for resize in [*_find(pipeline, "Resize"), *_find(pipeline, "RandomChoiceResize")]:
        scales = resize.get("scales") or [resize.get("scale")]
        for scale in (scale for scale in scales if isinstance(scale, (list, tuple)) and resize.get("keep_ratio")):
            shorter, longer = file.sizes.min(axis=1), file.sizes.max(axis=1)
            factor = np.minimum(max(scale) / longer, min(scale) / shorter)
            for position in np.flatnonzero(kept & (shorter * factor < 0.5)):
                image = file.images[position]
                raise UserError(
                    f"{osp.join(use.image_folder, image['file_name'])} has {image['width']} x {image['height']} "
                    f"pixels, of which nothing is left when {resize['type']} makes it fit into {tuple(scale)}: remove "
                    f"it from {file.path}, or from training by filter_cfg=dict(min_size=...)"
                )


def _check_image_files(use: CocoUse, file: AnnotationFile, kept: np.ndarray) -> None:
    """Raise a FileNotFoundError if there are images that are not in their folder, which is listed only once."""
    folders: dict[str, set[str]] = {}
    missing = []
    for position in np.flatnonzero(kept):
        path = osp.join(use.image_folder, file.images[position]["file_name"])
        folder, name = osp.split(path)
        if folder not in folders:
            folders[folder] = set(os.listdir(folder)) if osp.isdir(folder) else set()
        if name not in folders[folder] and not osp.isfile(path):
            missing.append(path)
    if missing:
        raise FileNotFoundError(
            f"{missing[0]} does not exist, and {len(missing)} of the {kept.sum()} images that {file.path} lists for "
            f"{use.key} are missing: complete them, or correct file_name there or data_prefix.img of the data set"
        )


def _check_evaluator(use: CocoUse, file: AnnotationFile, classes: tuple[str, ...]) -> str | None:
    """Check a file as a ``CocoMetric`` reads it; return what that leaves out."""
    is_class = _check_classes(use, file, classes)
    if not _needs_annotations(use):
        return None
    if not is_class.any():
        raise UserError(f"{file.path} has no annotations of the classes of {use.key}: there is nothing to evaluate")
    for annotation in file.annotations:
        if "iscrowd" not in annotation:
            raise UserError(f"{file.path}: annotation {annotation['id']!r} has no iscrowd, which evaluation needs: 0")
    metrics = use.config.get("metric", "bbox")
    if "segm" in ([metrics] if isinstance(metrics, str) else metrics):
        _check_masks_of_evaluator(file, is_class)
    reasons = Counter(
        {
            OTHER_CLASSES: int((~is_class).sum()),
            "annotation with the id 0 counted as missed by pycocotools (number them from 1)": sum(
                annotation["id"] == 0 for annotation in file.annotations
            ),
        }
    )
    return _note(use, f"{is_class.sum()} of {len(is_class)} annotations", reasons)


def _check_masks_of_evaluator(file: AnnotationFile, is_class: np.ndarray) -> None:
    for position in np.flatnonzero(is_class):
        if check_segmentation(file, position)[1]:
            raise UserError(
                f"{file.path}: annotation {file.annotations[position]['id']!r} has a polygon of less than three points "
                "or an odd number of coordinates, which pycocotools cannot evaluate: correct or remove the polygon"
            )


def _check_same_images(uses: Sequence[CocoUse], image_ids: dict[str, set]) -> None:
    """Raise a ValueError if an evaluator has other images than the data set: they would count as missed."""
    evaluators = [use for use in uses if use.image_folder is None and _needs_annotations(use)]
    for evaluator in evaluators:
        paths = list(dict.fromkeys(use.path for use in _datasets_of(evaluator, uses)))
        several = {other.path for other in evaluators if other.key == evaluator.key} != {evaluator.path}
        seen = set().union(*(image_ids[path] for path in paths))
        expected = image_ids[evaluator.path]
        if paths and not several and seen != expected:
            raise UserError(
                f"{evaluator.path} of {evaluator.key} has {len(expected - seen)} images that {', '.join(paths)} of the "
                f"data set has not, and lacks {len(seen - expected)} images: give both the same ann_file"
            )


def _note(use: CocoUse, used: str, reasons: Counter) -> str | None:
    """One line, or None if there is nothing to say."""
    return f"{use.path} ({use.key}): {used} are used; {_list(reasons)}" if reasons.total() else None


def _list(reasons: Counter) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
