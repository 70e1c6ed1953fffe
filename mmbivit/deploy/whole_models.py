"""What a packed file says of a whole model: taken from the user's config, and built again.

A packed file may come from anybody, so that :mod:`mmbivit.deploy.harmless` checks all of it before anything is built.
What is not needed for inference is not stored: training settings, initialisation, file clients.
"""

import copy
import inspect
from collections.abc import Callable
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmbivit.checks import UserError
from mmbivit.datasets.wrappers import inner_dataset
from mmbivit.models import ClassificationPreprocessor, ImageClassifier

from .harmless import check_detector, check_pipeline, checked_meta, find_class
from .header import PackedFile

__all__ = [
    "BUILDERS",
    "DESCRIBERS",
    "classifier_builder",
    "describe_classifier",
    "describe_detector",
    "detector_builder",
]

_LEFT_OUT = frozenset(("init_cfg", "pretrained", "train_cfg", "batch_augments", "backend_args", "file_client_args"))
_TRAINING_TRANSFORMS = ("LoadAnnotations", "mmdet.LoadAnnotations")
_TUPLE = "__tuple__"  # the key under which JSON holds a tuple, as some of mmdet's code tells it from a list


def describe_classifier(model: ImageClassifier, config: Any = None) -> dict[str, Any]:
    """Return what a file needs of a classifier beside the backbone: ``model``, ``dataset_meta`` and ``pipeline``.

    Args:
        model: the classifier; its ``dataset_meta`` may have the names of the classes.
        config: the config that it was built from, for the transforms of its test images; may be ``None``.

    Raises:
        ValueError: if its data preprocessor or a transform cannot be stored.
    """
    preprocessor = model.data_preprocessor
    if not isinstance(preprocessor, ClassificationPreprocessor):
        raise UserError(
            f"data_preprocessor is a {type(preprocessor).__name__}; a packed file holds mmbivit's "
            "ClassificationPreprocessor only"
        )
    described = dict(
        num_classes=model.head.out_features,
        topk=model.topk,
        data_preprocessor={name: getattr(preprocessor, name).flatten().tolist() for name in ("mean", "std")},
    )
    pipeline = None if config is None else _describe_pipeline(config, "classifier")
    return dict(model=described, dataset_meta=_describe_meta(model, described), pipeline=pipeline)


def describe_detector(model: nn.Module, config: Any) -> dict[str, Any]:
    """Return what a file needs of a detector beside the backbone: ``model``, ``dataset_meta`` and ``pipeline``.

    Args:
        model: the detector; its ``dataset_meta`` may have the names of the classes and their colours.
        config: the config that it was built from, with ``model`` and ``test_dataloader``.

    Raises:
        ValueError: without a config, or if it has what cannot be stored; it names the key.
    """
    if config is None or not config.get("model"):
        raise UserError("a detector is saved with its config: save(packed, path, config)")
    described = _plain({key: value for key, value in config["model"].items() if key != "backbone"})
    check_detector(_decoded(described))
    meta = _describe_meta(model, described)
    return dict(model=described, dataset_meta=meta, pipeline=_describe_pipeline(config, "detector"))


def classifier_builder(header: PackedFile, backbone: dict[str, Any]) -> Callable[[], nn.Module]:
    """Check what a file says of a classifier and return what builds it around the config of a backbone.

    Raises:
        ValueError: if the file names anything but numbers and the known transform.
    """
    described, keys = header.model or {}, {"num_classes", "topk", "data_preprocessor"}
    normalisation = described.get("data_preprocessor")
    if described.keys() != keys or not isinstance(normalisation, dict) or normalisation.keys() != {"mean", "std"}:
        raise UserError(f"{header.path}: 'model' of a classifier has to have num_classes, topk, mean and std only")
    _check_numbers(header, described)
    attributes = _attributes(header)

    def build() -> nn.Module:
        with DefaultScope.overwrite_default_scope("mmengine"):
            model = ImageClassifier(backbone, **described)
        model.__dict__.update(attributes)
        return model

    return build


def detector_builder(header: PackedFile, backbone: dict[str, Any]) -> Callable[[], nn.Module]:
    """Check what a file says of a detector and return what builds it around the config of a backbone.

    Raises:
        ValueError: if the file names a class, a key or a value that is not known to be harmless; it names it.
    """
    described = _decoded(header.model)
    try:
        check_detector(described)
    except ValueError as error:
        raise UserError(f"{header.path} is not loaded: {error}") from error
    attributes = _attributes(header)
    detector = find_class(described["type"], "model")
    # Most of them cannot be built without.
    training = dict(train_cfg=None) if "train_cfg" in inspect.signature(detector).parameters else {}  # type: ignore[arg-type]  # a class

    def build() -> nn.Module:
        # A copy, as detectors add to the configs of their heads.
        cfg = ConfigDict(copy.deepcopy(described), backbone=backbone, **training)
        with DefaultScope.overwrite_default_scope("mmdet"):
            model = MODELS.build(cfg)
        model.__dict__.update(attributes)
        return model

    return build


def _check_numbers(header: PackedFile, described: dict[str, Any]) -> None:
    """Check that a classifier is described by positive integers and lists of numbers."""
    lists = described["data_preprocessor"].values()
    numbers = [number for values in lists if isinstance(values, list) for number in values]
    good = all(isinstance(values, list) and values for values in lists)
    good = good and all(type(number) in (int, float) for number in numbers)
    if not good or any(type(described[name]) is not int for name in ("num_classes", "topk")):
        raise UserError(f"{header.path}: 'model' of a classifier has to be numbers")


def _attributes(header: PackedFile) -> dict[str, Any]:
    """Check the class names and the transforms of a file, and return them as attributes of the model."""
    try:
        meta = checked_meta(header.dataset_meta, header.model or {})
        pipeline = _decoded(header.pipeline)
        check_pipeline(pipeline or (), header.kind)
    except ValueError as error:
        raise UserError(f"{header.path} is not loaded: {error}") from error
    loader = dict(dataset=dict(pipeline=pipeline)) if pipeline else None
    return dict(dataset_meta=meta, cfg=Config(dict(model=_decoded(header.model), test_dataloader=loader)))


def _describe_meta(model: nn.Module, model_config: dict[str, Any]) -> dict[str, Any] | None:
    known = getattr(model, "dataset_meta", None) or {}
    described: dict[str, Any] = {}
    if known.get("classes"):
        described["classes"] = [str(name) for name in known["classes"]]
    palette = known.get("palette")
    # Not the name of one elsewhere, such as 'random'; mmdet's has the colours of COCO's classes for any data set.
    if described and isinstance(palette, (list, tuple)) and len(palette) >= len(described["classes"]):
        described["palette"] = [[int(level) for level in colour] for colour in palette[: len(described["classes"])]]
    checked_meta(described, model_config)
    return described or None


def _describe_pipeline(config: Any, kind: str) -> list[dict[str, Any]] | None:
    """Return the transforms of test images (of validation images, if there are none), without those of annotations."""
    loader = config.get("test_dataloader") or config.get("val_dataloader")
    pipeline = inner_dataset(loader["dataset"]).get("pipeline") if loader else None
    if not pipeline:
        return None
    kept = [_plain(transform) for transform in pipeline if transform["type"] not in _TRAINING_TRANSFORMS]
    check_pipeline(_decoded(kept), kind)
    return kept


def _plain(value: Any) -> Any:
    """Return a config as JSON can hold it, without training and file access; classes become their names."""
    if isinstance(value, dict):
        # Configs that inherit from mmdet's have its scope in them, in which models are built here anyway.
        kept = {key: child for key, child in value.items() if (key, child) != ("_scope_", "mmdet")}
        return {key: _plain(child) for key, child in kept.items() if key not in _LEFT_OUT}
    if isinstance(value, tuple):
        return {_TUPLE: [_plain(child) for child in value]}
    if isinstance(value, list):
        return [_plain(child) for child in value]
    return value.__name__ if isinstance(value, type) else value


def _decoded(value: Any) -> Any:
    """Return what :func:`_plain` was given, tuples included."""
    if isinstance(value, dict):
        if value.keys() == {_TUPLE} and isinstance(value[_TUPLE], list):
            return tuple(map(_decoded, value[_TUPLE]))
        return {key: _decoded(child) for key, child in value.items()}
    return [_decoded(child) for child in value] if isinstance(value, list) else value


# By the kind of model that a file holds.
DESCRIBERS = dict(classifier=describe_classifier, detector=describe_detector)
BUILDERS = dict(classifier=classifier_builder, detector=detector_builder)
