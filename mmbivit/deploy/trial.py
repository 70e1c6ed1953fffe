"""One try of a whole model from a packed file, so that what loads also predicts.

Classes and numbers of a file may be harmless and still not go together, or lack what only post-processing asks for. So
the network runs on a tiny image, with its tests as they are and with thresholds that let everything pass; then the
transforms run, and the network takes what they make.
"""

import random
import re
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import cv2
import mmcv
import numpy as np
import torch
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config
from mmengine.registry import TRANSFORMS, DefaultScope
from PIL import Image
from torch import Tensor, nn

from mmbivit.checks import UserError
from mmbivit.models import Backbone

from .header import PackedFile

__all__ = ["TRIALS", "try_classifier", "try_detector"]

# Pixels along a side, from the cheapest on: some detectors halve an image often, or choose many of its positions.
_SIDES = (64, 256, 512)
_MOST_TOKENS, _MOST_PIXELS = 2**12, 2**10  # of an image of a size that the file asks for; the second along a side
_IMAGE_SHAPE = (16, 64)  # height and width before the transforms: many enlarge images
# What a detection has to exceed where an NMS follows, and the counts that go into it and come out.
_THRESHOLDS = ("score_thr", "conf_thr", "min_bbox_size")
_COUNTS, _FEW = ("nms_pre", "max_per_img"), 8


def try_classifier(model: nn.Module, header: PackedFile) -> None:
    """Run a classifier that was just loaded, and its transforms; neither changes, nor do random numbers.

    Raises:
        ValueError: if one of them fails; it names the file and the place in it.
    """

    def classify(image: Tensor) -> None:
        sizes = [(_SIDES[0],) * 2, *_own_size(model.backbone)]
        for size in sizes:
            try:
                model.test_step(dict(inputs=_enlarged(image, *size)[None], img_path=[""]))
                return
            except Exception:
                if size is sizes[-1]:
                    raise

    with _unnoticed(), DefaultScope.overwrite_default_scope("mmengine"):
        with _naming(header, "model", model):
            classify(_pixel(model))
        if header.pipeline:
            data = _transform(header, model.cfg, dict(img=Image.new("RGB", _IMAGE_SHAPE[::-1])))
            with _naming(header, "pipeline"):
                classify(data["inputs"])


def try_detector(model: nn.Module, header: PackedFile) -> None:
    """Run a detector that was just loaded, and its transforms; neither changes, nor do random numbers.

    Raises:
        ValueError: if one of them fails; it names the file and the place in it.
    """
    _check_names(model, header)
    with _unnoticed(), DefaultScope.overwrite_default_scope("mmdet"):
        if header.pipeline:
            data = _transform(header, model.cfg, dict(img_id=0))
            try:
                _detect(model, data["inputs"], data["data_samples"].metainfo.keys())
            except Exception as error:
                # The model is at fault if it also fails with all that an image can come with.
                with _naming(header, "model", model):
                    _detect(model, _pixel(model))
                with _naming(header, "pipeline"):
                    raise error
        else:
            with _naming(header, "model", model):
                _detect(model, _pixel(model))


def _detect(model: nn.Module, image: Tensor, keys: Collection[str] | None = None) -> None:
    """Detect objects in an image of a size that the detector takes, which comes with no more than ``keys``."""
    # mmdet may only be imported once mmbivit has put the stand-in for mmcv's operators in place.
    from mmdet.structures import DetDataSample

    for side in _SIDES:
        shape = side, side
        meta = dict(img_id=0, img_path="", ori_shape=shape, img_shape=shape, scale_factor=(1.0, 1.0))
        known = {key: value for key, value in meta.items() if keys is None or key in keys}
        try:
            for all_pass in (False, True):
                with _few_detections(model, all_pass):
                    sample = DetDataSample(metainfo=known)
                    model.test_step(dict(inputs=[_enlarged(image, side, side)], data_samples=[sample]))
            return
        except Exception:
            if side == _SIDES[-1]:
                raise


def _pixel(model: nn.Module) -> Tensor:
    backbone = model.backbone
    channels = backbone.in_channels if isinstance(backbone, Backbone) else backbone.config.in_channels
    return torch.zeros(channels, 1, 1, dtype=torch.uint8)


def _own_size(backbone: nn.Module) -> list[tuple[int, int]]:
    """Return the size of image that a backbone with a position embedding was made for, as some take no other.

    None where that is too large to try what may be hostile.
    """
    described: Any = backbone if isinstance(backbone, Backbone) else backbone.config
    patch = backbone.strides[0] if isinstance(backbone, Backbone) else getattr(described, "patch_size", 0)
    height, width = getattr(described, "pos_embed_shape", None) or (0, 0)
    size = height * patch, width * patch
    return [size] if min(size) > 0 and height * width <= _MOST_TOKENS and max(size) <= _MOST_PIXELS else []


def _enlarged(image: Tensor, height: int, width: int) -> Tensor:
    """Return an image of this size with the channels, the dtype and the first pixel of an image."""
    return image[:, :1, :1].expand(-1, height, width)


def _transform(header: PackedFile, config: Config, data: dict[str, Any]) -> dict[str, Any]:
    """Run the transforms of test images; an image is given to the one that would load it from a file."""
    for i, step in enumerate(config.test_dataloader.dataset.pipeline):
        with _naming(header, f"pipeline[{i}]"):
            transform = TRANSFORMS.build(step)
            if isinstance(transform, LoadImageFromFile):
                _, content = cv2.imencode(".png", np.zeros((*_IMAGE_SHAPE, 3), np.uint8))
                data["img"] = mmcv.imfrombytes(content.tobytes(), flag=transform.color_type)
                transform = TRANSFORMS.build(dict(step, type="mmdet.LoadImageFromNDArray"))
            data = transform(data)
    return data


def _check_names(model: nn.Module, header: PackedFile) -> None:
    """Compare the names of classes with heads, whose number of classes need not be in the file."""
    names = (model.dataset_meta or {}).get("classes")
    for place, module in model.named_modules():
        count = getattr(module, "num_classes", 0) if re.search(r"(^|\.)bbox_head(\.\d+)?$", place) else 0
        if names and count > len(names):
            raise UserError(
                f"{header.path} is not loaded: 'dataset_meta' has {len(names)} names, but model.{place} detects "
                f"{count} classes; export it again"
            )


@contextmanager
def _few_detections(model: nn.Module, all_pass: bool) -> Iterator[None]:
    """Bound the detections that a test keeps and, with ``all_pass``, let any pass its thresholds."""
    before = []
    for config in _test_configs(model):
        for key, value in list(config.items()) if "nms" in config else ():
            before.append((config, key, value))
            if key in _COUNTS and isinstance(value, int):
                config[key] = min(value, _FEW)
            elif key in _THRESHOLDS and isinstance(value, (int, float)) and all_pass:
                config[key] = -1
    try:
        yield
    finally:
        for config, key, value in before:
            config[key] = value


def _test_configs(model: nn.Module) -> list[dict[str, Any]]:
    """Return the configs of tests of a detector and its heads, and those in them, each once."""
    found, left = {}, [getattr(module, "test_cfg", None) for module in model.modules()]
    while left:
        config = left.pop()
        if isinstance(config, dict) and id(config) not in found:
            found[id(config)] = config
            left += config.values()
    return list(found.values())


@contextmanager
def _unnoticed() -> Iterator[None]:
    """Compute without gradients, and leave random numbers and threads as they were."""
    python, numpy, threads = random.getstate(), np.random.get_state(), torch.get_num_threads()
    torch.set_num_threads(1)  # more would mostly wait for each other, with so little to do
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _naming(header: PackedFile, field: str, model: nn.Module | None = None) -> Iterator[None]:
    """Make any error one line that names the file and the field, of a model also the part that raised it."""
    try:
        yield
    except Exception as error:  # MMDetection and its layers raise anything
        place = field if model is None else f"{field}{_part(model, error)}"
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{header.path} is not loaded: its {place!r} fails on a tiny image, as it is damaged or of another version "
            f"({header.mmbivit_version[:20]}): {type(error).__name__}: {reason[:300]}"
        ) from error


def _part(model: nn.Module, error: Exception) -> str:
    """Return the name of the innermost layer on the way to an error, after a dot.

    Not of the backbone, whose arguments were checked: what it refuses comes from the model around it.
    """
    names = {id(module): f".{name}" for name, module in model.named_modules() if name and "backbone" not in name}
    objects = [id(frame.f_locals.get("self")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((names[found] for found in reversed(objects) if found in names), "")


TRIALS = dict(classifier=try_classifier, detector=try_detector)
