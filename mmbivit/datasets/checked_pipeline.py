"""Makes the errors of detection pipelines name the image, and compares images with their annotations.

mmdet fails on a broken image in a worker process with an error of OpenCV that does not say which image it was. It takes
annotations for those of the picture that OpenCV shows, whose size and orientation may be others.
"""

import io
import logging
import os.path as osp
from pathlib import Path
from typing import Any

import cv2
import torch
from mmcv.transforms import LoadImageFromFile, Resize
from mmengine.dataset import Compose
from mmengine.logging import print_log
from PIL import Image
from torch.utils.data import Dataset

from mmbivit.checks import UserError

__all__ = ["CheckedPipeline", "check_pipelines"]

EXIF_ORIENTATION = 0x0112
UPRIGHT, TURNED_ON_ITS_SIDE = 1, (5, 6, 7, 8)  # values of EXIF's orientation
IGNORE_ORIENTATION = "color_type='color_ignore_orientation' in every LoadImageFromFile"


def check_pipelines(dataset: Dataset) -> None:
    """Put a :class:`CheckedPipeline` in the place of the pipelines that load images, in place, inside wrappers too."""
    pipeline = getattr(dataset, "pipeline", None)
    if isinstance(pipeline, Compose) and any(isinstance(step, LoadImageFromFile) for step in pipeline.transforms):
        dataset.pipeline = CheckedPipeline(pipeline.transforms)
    inner = [getattr(dataset, name, None) for name in ("dataset", "_dataset")]
    for child in [*inner, *getattr(dataset, "datasets", [])]:
        if child is not None:
            check_pipelines(child)


class CheckedPipeline(Compose):
    """The same transforms, with errors for the user.

    Args:
        transforms: transforms of a pipeline, of which one is a ``LoadImageFromFile``.
        annotated: whether images have annotations, which the messages then mention.

    Raises:
        ValueError: from a call, if an image cannot be decoded, is truncated, has another size than in its annotations,
            or cannot be transformed. It names the file.
        RuntimeError: from a call, if a transform fails otherwise. It names file and transform.
    """

    def __init__(self, transforms: list, annotated: bool = True):
        super().__init__(transforms)
        self._annotated = annotated
        # Shared, so that it is said once and not by every worker process.
        self._has_warned = torch.zeros(1, dtype=torch.bool).share_memory_()

    def __call__(self, data: dict[str, Any]) -> dict[str, Any] | None:
        """Return what the transforms make of ``data``."""
        path = data.get("img_path")
        for step in self.transforms:
            try:
                data = step(data)
            except Exception as error:  # OpenCV's and Pillow's decoders raise almost anything
                if isinstance(error, OSError) and error.filename is not None:
                    raise  # missing or not readable, and named
                raise self._named(error, step, path, data) from error
            if isinstance(step, LoadImageFromFile):
                if data is not None:
                    self._check(path, data, step.color_type)
                elif self._annotated:
                    reason = "another image is taken for it (ignore_empty=True)"
                    print_log(f"{path} cannot be read: {reason}", "current", logging.WARNING)
                else:
                    raise UserError(f"{path} cannot be read{self._remedy()}")
            if data is None:
                return None
        return data

    def _check(self, path: str, data: dict[str, Any], color_type: str) -> None:
        height, width = data["ori_shape"]
        expected = data.get("width", width), data.get("height", height)
        orientation = UPRIGHT
        if osp.isfile(path):
            content = Path(path).read_bytes()
            if _is_cut_off(content):
                raise UserError(f"{path} is a truncated JPEG file{self._remedy()}")
            orientation = _orientation(content) if self._annotated else UPRIGHT
        if expected != (width, height):
            raise UserError(
                f"{path} has {width} x {height} pixels, but {expected[0]} x {expected[1]} in the annotation file: "
                + _explain(orientation, expected == (height, width), color_type)
            )
        # A picture that was turned on its side has the size of its annotations, so they are of the turned one.
        is_known = orientation in TURNED_ON_ITS_SIDE and width != height
        if orientation == UPRIGHT or is_known or "ignore_orientation" in color_type or self._has_warned:
            return
        self._has_warned[:] = True
        print_log(
            f"{path} is turned or mirrored by its EXIF orientation {orientation} (and others may be): OpenCV shows it "
            f"so, and the annotations have to be of that. If they are of the picture as it is stored, set "
            f"{IGNORE_ORIENTATION}",
            "current",
            logging.WARNING,
        )

    def _named(self, error: Exception, step: Any, path: str | None, data: dict[str, Any]) -> Exception:
        """The error to raise instead."""
        if isinstance(step, LoadImageFromFile):
            is_empty = path is not None and osp.isfile(path) and osp.getsize(path) == 0
            found = "is empty" if is_empty else "is truncated, damaged or no image: it cannot be decoded"
            return UserError(f"{path} {found}{self._remedy()}")
        if isinstance(step, Resize) and step.keep_ratio and isinstance(error, cv2.error):  # a side of 0 pixels
            height, width = data["img_shape"]
            return UserError(f"{path} has {width} x {height} pixels, too thin to be resized{self._remedy()}")
        kind = UserError if isinstance(error, (cv2.error, ValueError)) else RuntimeError
        culprit = "this image or its annotations" if self._annotated else "this image"
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return kind(f"{path}: {type(step).__name__} fails with {culprit} ({reason})")

    def _remedy(self) -> str:
        return "; replace it, or remove it from the annotation file" if self._annotated else ""


def _is_cut_off(content: bytes) -> bool:
    """Whether it is a JPEG file without an end, of which OpenCV before 4.12 makes up the rest.

    Segments before the picture are skipped by their length: a preview in them has an end of its own.
    """
    if not content.startswith(b"\xff\xd8"):
        return False
    position = 2
    while content[position : position + 2] != b"\xff\xda":  # start of scan, the picture itself
        if position + 4 > len(content):
            return True
        length = int.from_bytes(content[position + 2 : position + 4], "big")
        if length < 2:
            return False  # not for us to judge
        position += 2 + length
    return content.find(b"\xff\xd9", position) < 0


def _orientation(content: bytes) -> int:
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.getexif().get(EXIF_ORIENTATION, UPRIGHT)
    except Exception:  # a format that OpenCV reads and Pillow does not, or a broken EXIF part
        return UPRIGHT


def _explain(orientation: int, is_swapped: bool, color_type: str) -> str:
    if orientation not in TURNED_ON_ITS_SIDE or not is_swapped:
        return "correct width and height there, or put the image there that was annotated"
    if "ignore_orientation" in color_type:
        return f"they are of the picture as its EXIF orientation {orientation} turns it; remove {color_type!r}"
    return (
        f"its EXIF orientation {orientation} turns it, and the annotations are of the picture as it is stored: set "
        f"{IGNORE_ORIENTATION}, or remove the EXIF orientation"
    )
