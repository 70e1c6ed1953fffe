"""Reads an annotation file in COCO's format and refuses what is malformed in it.

pycocotools and mmdet take what they find: the last of two images with one id, half of a mask with too few runs, a box
with NaN. A polygon with NaN keeps pycocotools busy for ever.
"""

import gc
import json
import math
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmbivit.checks import UserError

__all__ = ["AnnotationFile", "check_segmentation", "read_annotation_file"]

MAX_COORDINATE = 100_000  # pixels; OpenCV and pycocotools do not get to the end of much more
NUMBERS = {int, float}  # neither bool nor None
_BOX = f"[x, y, width, height], finite numbers of {MAX_COORDINATE} or less in size, width and height 0 or more"


@dataclass(frozen=True)
class AnnotationFile:
    """The content of an annotation file that is well-formed; segmentations have not been looked at.

    Args:
        path: the file.
        images: its images as they are in the file.
        annotations: its annotations.
        names: names of its categories by id, in the order of the file.
        sizes: width and height of the images in pixels, ``(images, 2)``.
        image_index: position in ``images`` of each annotation's image, ``(annotations,)``.
        boxes: x, y, width, height in pixels, ``(annotations, 4)``.
    """

    path: str
    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]
    names: dict[Any, str]
    sizes: np.ndarray
    image_index: np.ndarray
    boxes: np.ndarray


def read_annotation_file(path: str, need_annotations: bool = True) -> AnnotationFile:
    """Read a file and check it.

    Args:
        path: JSON file in COCO's format.
        need_annotations: whether there must be annotations; the ``image_info`` files of COCO's test sets have none.

    Raises:
        ValueError: if something is malformed; the message names the file, the first offending id and what is allowed.
    """
    content = _read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a JSON {type(content).__name__}; expected COCO's format: {_EXPECTED}")
    if not need_annotations:
        content.setdefault("annotations", [])
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            found = f"its '{key}' is a {type(content[key]).__name__}" if key in content else f"it has no '{key}'"
            raise UserError(f"{path} is not in COCO's format, {found}; expected {_EXPECTED}")
    images, annotations, categories = content["images"], content["annotations"], content["categories"]
    if not images:
        raise UserError(f"{path} has no images: there is nothing to train on or to evaluate")
    image_ids = _ids(path, "image", images)
    _ids(path, "annotation", annotations)
    names = dict(
        zip(_ids(path, "category", categories), _column(path, "category", categories, "name", _is_text), strict=True)
    )
    _check_unique(path, "category", "name", list(names.values()))
    _column(path, "image", images, "file_name", _is_text)
    sizes = [_column(path, "image", images, key, _is_size) for key in ("width", "height")]
    where = {image_id: position for position, image_id in enumerate(image_ids)}
    known_image = ("an id of one of its images", lambda value: _is_id[1](value) and value in where)
    image_index = [where[value] for value in _column(path, "annotation", annotations, "image_id", known_image)]
    known_category = ("an id of one of its categories", lambda value: _is_id[1](value) and value in names)
    _column(path, "annotation", annotations, "category_id", known_category)
    boxes = _column(path, "annotation", annotations, "bbox", _is_box)
    _column(path, "annotation", annotations, "area", _is_area)
    for key in ("iscrowd", "ignore"):
        _column(path, "annotation", annotations, key, _is_flag, default=0)
    return AnnotationFile(
        path,
        images,
        annotations,
        names,
        np.array(sizes, dtype=float).T,
        np.array(image_index, dtype=int),
        np.array(boxes, dtype=float).reshape(-1, 4),
    )


def _read_json(path: str) -> Any:
    collects = gc.isenabled()
    gc.disable()  # it would look for garbage again and again among the millions of objects that are made here
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not JSON ({reason}): copy or download the annotation file again") from error
    finally:
        if collects:
            gc.enable()


_EXPECTED = "an object with the lists 'images', 'annotations' and 'categories'"

# What is allowed for a value, in words and as a function.
_Rule = tuple[str, Callable[[Any], bool]]
_is_id: _Rule = ("a number or a text", lambda value: type(value) in (int, str))
_is_text: _Rule = ("a text", lambda value: type(value) is str and value != "")
_is_size: _Rule = (
    f"a number of pixels from 1 to {MAX_COORDINATE}",
    lambda value: type(value) in NUMBERS and 1 <= value <= MAX_COORDINATE,
)
_is_box: _Rule = (_BOX, lambda value: _is_bounded(value) and len(value) == 4 and value[2] >= 0 and value[3] >= 0)
_is_area: _Rule = ("a finite number", lambda value: type(value) in NUMBERS and abs(value) < math.inf)
_is_flag: _Rule = ("0 or 1", lambda value: type(value) in (int, bool) and value in (0, 1))


def _column(path: str, kind: str, items: list, key: str, rule: _Rule, default: Any = None) -> list:
    """The values of one key of all items; raises a ValueError for the first one that is missing or not allowed."""
    allowed, is_allowed = rule
    values = []
    for position, item in enumerate(items):
        if type(item) is not dict:
            raise UserError(f"{path}: {kind} number {position + 1} is {reprlib.repr(item)}; expected an object")
        value = item.get(key, default)
        if not is_allowed(value):
            found = f"{key} = {reprlib.repr(value)}" if key in item else f"no {key}"
            raise UserError(f"{path}: {_name(kind, item, position)} has {found}; allowed: {allowed}")
        values.append(value)
    return values


def _ids(path: str, kind: str, items: list) -> list:
    ids = _column(path, kind, items, "id", _is_id)
    _check_unique(path, kind, "id", ids)
    return ids


def _check_unique(path: str, kind: str, key: str, values: list) -> None:
    if len(set(values)) == len(values):
        return
    seen = set()
    for value in values:
        if value in seen:
            raise UserError(f"{path} has more than one {kind} with the {key} {value!r}; give each its own")
        seen.add(value)


def _name(kind: str, item: dict, position: int) -> str:
    return f"{kind} {item['id']!r}" if "id" in item else f"{kind} number {position + 1}"


def _is_bounded(values: Any) -> bool:
    """Whether it is a list of finite numbers that are not too large."""
    if type(values) is not list or not values:
        return False
    try:
        # The sum is NaN if one of them is; minimum and maximum may not be.
        return min(values) >= -MAX_COORDINATE and max(values) <= MAX_COORDINATE and abs(sum(values)) < math.inf
    except TypeError:
        return False


def check_segmentation(file: AnnotationFile, position: int) -> tuple[int, int]:
    """Check the mask of one annotation.

    Args:
        file: where it is.
        position: which of ``file.annotations`` it is.

    Returns:
        How many parts it has that give a mask, and how many polygons that give none, with an odd number of coordinates
        or fewer than three points. A run-length encoding is one part.

    Raises:
        ValueError: if there is no mask, or one that pycocotools cannot read or takes for something else.
    """
    annotation = file.annotations[position]
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        problem, parts, unusable = _run_length_problem(segmentation, file.sizes[file.image_index[position]]), 1, 0
    elif not segmentation:
        problem = "no segmentation, but masks are used (with_mask of the pipeline, or metric 'segm'); allowed"
    elif not (isinstance(segmentation, list) and all(map(_is_bounded, segmentation))):
        problem = f"segmentation = {reprlib.repr(segmentation)}; allowed"
    else:
        unusable = sum(len(polygon) % 2 == 1 or len(polygon) < 6 for polygon in segmentation)
        problem, parts = None, len(segmentation) - unusable
    if problem is None:
        return parts, unusable
    raise UserError(
        f"{file.path}: {_name('annotation', annotation, position)} has {problem}: a list of polygons [x1, y1, x2, y2, "
        f"...] of finite numbers of {MAX_COORDINATE} or less in size, or a run-length encoding of the whole image"
    )


def _run_length_problem(segmentation: dict, image_size: np.ndarray) -> str | None:
    """What is wrong with a run-length encoding, or None."""
    width, height = image_size
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if size != [height, width]:
        return f"a run-length encoding of size {reprlib.repr(size)} in an image of [{height:g}, {width:g}]; allowed"
    if isinstance(counts, str):
        counts = _decode_runs(counts)
    elif not isinstance(counts, list) or any(type(count) is not int or count < 0 for count in counts):
        counts = None
    if counts is None:
        return f"a run-length encoding with counts = {reprlib.repr(segmentation.get('counts'))}; allowed"
    total = sum(counts)
    # pycocotools leaves pixels without a run as they are in memory.
    return f"runs of {total} pixels in an image of {height * width:g}; allowed" if total != height * width else None


def _decode_runs(text: str) -> list[int] | None:
    """The runs of COCO's compressed format, or None if it is not in that format.

    Characters from '0' on hold 5 bits each, the lowest first; a sixth bit says that the number goes on. The last bit
    of a number is its sign. From the fourth on, numbers are differences to the last but one.
    """
    codes = np.array([ord(character) for character in text], dtype=np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    ends = np.flatnonzero(codes & 32 == 0)
    starts = np.r_[0, ends[:-1] + 1]
    lengths = ends - starts + 1
    if lengths.max() > 7:  # 35 bits: more pixels than any image has
        return None
    digits = np.arange(len(codes)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((codes & 31) << (5 * digits), starts) - ((codes[ends] & 16) << 1 << (5 * (lengths - 1)))
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return None if runs.min() < 0 else runs.tolist()
