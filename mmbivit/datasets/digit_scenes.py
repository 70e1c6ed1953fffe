"""Digit scenes: small COCO-format instance segmentation data made from real pixels, without a download.

Handwritten digits (scikit-learn) are pasted with their true masks on crops of photographs that ship inside the
scikit-learn and scikit-image packages. The digit samples and the photographs of ``val`` are never used in ``train``.
Samples are disjoint; whether the *writers* are is not known, because the digits carry no writer identity.

The ``coco`` layout is the folder tree of COCO 2017 with all of its 80 categories, so that a COCO config runs on it
unchanged. In both layouts digit ``d`` has category id ``d + 1``; in COCO those ten ids are person (0), bicycle (1),
car (2), motorcycle (3), airplane (4), bus (5), train (6), truck (7), boat (8) and traffic light (9).

A mirrored 2 is not a 2: leave ``RandomFlip`` out of the training pipeline if the classes are to be learned.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as mask_utils

from mmbivit.checks import UserError, check_integer

from .made_folders import (
    ADVICE,
    check_complete,
    check_not_foreign,
    check_same_options,
    new_folder,
    package_versions,
    read_marker,
)
from .scene_rendering import make_scene

DIGIT_CLASSES = tuple("0123456789")
"""Class names of the ``digit_scenes`` layout; use them as ``metainfo=dict(classes=DIGIT_CLASSES)``."""

SPLITS = ("train", "val")
LAYOUTS = {
    "digit_scenes": {
        "train": ("train", "annotations/train.json"),
        "val": ("val", "annotations/val.json"),
    },
    "coco": {
        "train": ("train2017", "annotations/instances_train2017.json"),
        "val": ("val2017", "annotations/instances_val2017.json"),
    },
}
"""Image folder and annotation file of each split, for each layout."""

MARKER = "digit_scenes.json"
GENERATOR_VERSION = 1  # raise it when the same options would give other scenes

CREDITS = (
    "Digits: Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI (CC BY 4.0), from scikit-learn. "
    "Photos: china.jpg by danielbuechele and flower.jpg by vultilion (both Flickr, CC BY 2.0), from scikit-learn; "
    "the others are CC0 or without known copyright restrictions, from scikit-image."
)

# COCO's 80 names in the order of their official ids, and the ids between 1 and 90 that COCO does not use.
COCO_NAMES = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
    "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, "
    "mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, "
    "teddy bear, hair drier, toothbrush"
).split(", ")
COCO_UNUSED_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}


@dataclass(frozen=True)
class DigitScenes:
    """A digit scenes data set on disk.

    Args:
        root: Its folder.
        options: What it was made with: layout, size ``[height, width]``, train, val, max_digits, seed, generator.
        versions: Versions of the packages it was made with. Other versions may give other pixels.
        instances: Number of instances per split and digit.
        reused: True if :func:`make_digit_scenes` found it ready.
    """

    root: Path
    options: dict[str, Any]
    versions: dict[str, str]
    instances: dict[str, dict[str, int]]
    reused: bool = field(default=False, compare=False)

    @classmethod
    def load(cls, root: str | os.PathLike, reused: bool = False) -> DigitScenes:
        """Read the description of the data set in ``root``.

        Raises:
            FileNotFoundError: ``root`` is not a digit scenes folder.
        """
        root = Path(root)
        keys = ("options", "versions", "instances")
        return cls(
            root, *read_marker(root, MARKER, keys, "digit scenes folder", "python tools/make_digit_scenes.py"), reused
        )

    def image_dir(self, split: str) -> Path:
        """Folder of the images of ``split`` ('train' or 'val')."""
        return self.root / LAYOUTS[self.options["layout"]][split][0]

    def ann_file(self, split: str) -> Path:
        """COCO annotation file of ``split`` ('train' or 'val')."""
        return self.root / LAYOUTS[self.options["layout"]][split][1]


def make_digit_scenes(
    out_dir: str | os.PathLike,
    *,
    train: int = 400,
    val: int = 80,
    size: int | tuple[int, int] = 112,
    max_digits: int = 6,
    seed: int = 0,
    layout: str = "digit_scenes",
    overwrite: bool = False,
    progress: Callable[[], None] | None = None,
) -> DigitScenes:
    """Make the data set in ``out_dir``, or reuse the one that is there if it was made with the same options.

    The same options and package versions give the same bytes. Scene ``i`` of a split depends on ``seed`` and ``i``
    only, so a smaller data set is the beginning of a larger one. The folder appears when it is complete and checked,
    never before.

    Args:
        out_dir: Folder to make. A link to a folder is followed.
        train: Number of training scenes.
        val: Number of validation scenes.
        size: Height and width of a scene in pixels; one number for a square. At least 32. Digits are 16 to 43 % of
            the shorter side high.
        max_digits: A scene has 1 to ``max_digits`` digits (fewer where no place is left).
        seed: Of all random choices.
        layout: ``'digit_scenes'`` (PNG, ten classes) or ``'coco'`` (COCO's tree, names and 80 categories, JPEG).
        overwrite: Replace a digit scenes folder; move anything else that is in the way to ``<out_dir>.old``.
        progress: Called after each scene.

    Raises:
        ValueError: An option makes no sense.
        FileExistsError: ``out_dir`` holds something else, and ``overwrite`` is off.
        ModuleNotFoundError: scikit-learn or scikit-image is not installed.
    """
    options = _check_options(train, val, size, max_digits, seed, layout)
    out = Path(out_dir).expanduser().resolve()
    ready = None if overwrite else _find_ready(out, options)
    if ready is not None:
        return ready
    with new_folder(out, MARKER, overwrite) as work:
        instances = {split: _write_split(work, split, options, progress) for split in SPLITS}
        content = {"options": options, "versions": package_versions(), "instances": instances}
        (work / MARKER).write_text(json.dumps(content, indent=2) + "\n")
        for split in SPLITS:
            _validate_split(DigitScenes.load(work), split)
    return DigitScenes.load(out)


def _check_options(train: int, val: int, size: Any, max_digits: int, seed: int, layout: str) -> dict[str, Any]:
    """The options as they are stored, or a ValueError that names the wrong one."""
    for name, value, minimum in (
        ("train", train, 1),
        ("val", val, 1),
        ("max_digits", max_digits, 1),
        ("seed", seed, 0),
    ):
        check_integer(name, value, minimum)
    sides = [size, size] if isinstance(size, int) else list(size) if isinstance(size, (tuple, list)) else []
    if len(sides) != 2:
        raise UserError(f"size must be one number or a (height, width) pair, got {size!r}")
    for i, side in enumerate(sides):
        check_integer(f"size[{i}]", side, 32)
    if layout not in LAYOUTS:
        raise UserError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    return {
        "layout": layout,
        "size": [int(side) for side in sides],  # JSON knows no NumPy integers
        "train": int(train),
        "val": int(val),
        "max_digits": int(max_digits),
        "seed": int(seed),
        "generator": GENERATOR_VERSION,
    }


def _find_ready(out: Path, options: dict[str, Any]) -> DigitScenes | None:
    """The complete data set in ``out`` if it has the same options, None if ``out`` is free."""
    check_not_foreign(out, MARKER, "make_digit_scenes")
    if not (out / MARKER).is_file():
        return None
    try:
        scenes = DigitScenes.load(out, reused=True)
    except FileNotFoundError:
        raise FileExistsError(f"{out / MARKER} cannot be read. {ADVICE}") from None
    check_same_options(out, "digit scenes", scenes.options, options)
    check_complete(out, _missing_files(scenes))
    return scenes


def _missing_files(scenes: DigitScenes) -> list[Path]:
    missing = []
    for split in SPLITS:
        if not scenes.ann_file(split).is_file():
            missing.append(scenes.ann_file(split))
            continue
        images = json.loads(scenes.ann_file(split).read_text())["images"]
        paths = [scenes.image_dir(split) / image["file_name"] for image in images]
        missing += [path for path in paths if not path.is_file()]
    return missing


# Files


def _categories(layout: str) -> list[dict[str, Any]]:
    if layout == "coco":
        ids = [index for index in range(1, 91) if index not in COCO_UNUSED_IDS]
        return [{"id": index, "name": name} for index, name in zip(ids, COCO_NAMES, strict=True)]
    return [{"id": digit + 1, "name": name, "supercategory": "digit"} for digit, name in enumerate(DIGIT_CLASSES)]


def _annotation(item: dict[str, Any], annotation_id: int, image_id: int) -> dict[str, Any]:
    """One COCO annotation. RLE, because polygons cannot hold the hole of a 0 exactly."""
    mask = item["mask"]
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    segmentation = mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))
    segmentation = {"size": [int(side) for side in mask.shape], "counts": segmentation["counts"].decode("ascii")}
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": item["digit"] + 1,
        "bbox": [int(columns[0]), int(rows[0]), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1],
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": segmentation,
        "digit_index": item["index"],
    }


def _write_split(
    root: Path, split: str, options: dict[str, Any], progress: Callable[[], None] | None
) -> dict[str, int]:
    """Write the images and the annotation file of one split; returns the number of instances per digit."""
    layout = options["layout"]
    image_dir, ann_file = (root / name for name in LAYOUTS[layout][split])
    image_dir.mkdir()
    ann_file.parent.mkdir(exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(options[split]):
        rng = np.random.default_rng([options["seed"], SPLITS.index(split), index])
        scene, provenance, digits = make_scene(rng, split, options)
        image_id = index + 1
        height, width = options["size"]
        file_name = f"{image_id:012d}.jpg" if layout == "coco" else f"{image_id:06d}.png"
        Image.fromarray(scene).save(image_dir / file_name, **({"quality": 95} if layout == "coco" else {}))
        images.append({"id": image_id, "file_name": file_name, "height": height, "width": width, **provenance})
        annotations += [_annotation(item, len(annotations) + 1 + n, image_id) for n, item in enumerate(digits)]
        if progress is not None:
            progress()
    info = {"description": f"Digit scenes, {split}. {CREDITS}"}
    content = {"info": info, "images": images, "annotations": annotations, "categories": _categories(layout)}
    ann_file.write_text(json.dumps(content))
    counts = np.bincount([annotation["category_id"] - 1 for annotation in annotations], minlength=10)
    return {name: int(count) for name, count in zip(DIGIT_CLASSES, counts, strict=True)}


def _validate_split(scenes: DigitScenes, split: str) -> None:
    """Read a split back from the disk and check it with pycocotools; a RuntimeError means a bug in this module."""
    content = json.loads(scenes.ann_file(split).read_text())
    images = {image["id"]: image for image in content["images"]}
    problems = []
    for kind in ("images", "annotations", "categories"):
        if len({item["id"] for item in content[kind]}) != len(content[kind]):
            problems.append(f"the ids of the {kind} are not unique")
    for image in images.values():
        with Image.open(scenes.image_dir(split) / image["file_name"]) as pixels:
            if pixels.size != (image["width"], image["height"]):
                problems.append(f"{image['file_name']} has size {pixels.size}")
    for annotation in content["annotations"]:
        rle, image = annotation["segmentation"], images[annotation["image_id"]]
        mask = mask_utils.decode(rle)
        if (
            mask.shape != (image["height"], image["width"])
            or annotation["area"] != mask_utils.area(rle)
            or annotation["area"] != mask.sum()
            or annotation["bbox"] != mask_utils.toBbox(rle).tolist()
        ):
            problems.append(f"annotation {annotation['id']}: mask, box and area do not agree")
    if problems:
        raise RuntimeError(f"the {split} split that was made is not valid: {'; '.join(problems[:5])}")
