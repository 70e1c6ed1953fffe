"""What a packed file may say of a model and its transforms, which come from anybody: the lists and their checks.

MMEngine imports whatever a ``type`` names, looks up some other strings in the same way, and mmcv even evaluates one
(``nms.type``). So a file gets only what is on these lists: classes of MMDetection and ours that take neither files nor
URLs, options of a few transforms, numbers, and words that name no module.
"""

import importlib.util
import re
import sys
from collections.abc import Iterator
from typing import Any

from mmengine.registry import Registry

from mmbivit.checks import UserError
from mmbivit.registry import MODELS

from .header import MAX_NUMBER

__all__ = ["check_detector", "check_options", "check_pipeline", "checked_meta", "find_class"]

# Modules whose registered classes a file may name. They were searched for eval(), getattr() by a configured name,
# imports, file access and downloads; those that do any of it are refused below.
_MODEL_MODULES = (
    "mmdet.models.data_preprocessors.data_preprocessor",
    "mmdet.models.dense_heads",
    "mmdet.models.detectors",
    "mmdet.models.layers",
    "mmdet.models.losses",
    "mmdet.models.necks",
    "mmdet.models.roi_heads",
    "mmdet.models.seg_heads",
    "mmcv.cnn.bricks",
    "mmcv.ops.multi_scale_deform_attn",
    "mmbivit.models.detection",
    "mmbivit.models.feature_pyramid",
    "mmengine.utils.dl_utils.parrots_wrapper",  # SyncBN
    "torch.nn.modules",
)
_TASK_MODULES = ("mmdet.models.task_modules.coders", "mmdet.models.task_modules.prior_generators")
_REFUSED_MODULES = (
    "mmdet.models.dense_heads.atss_vlfusion_head",  # downloads a language model
    "mmdet.models.dense_heads.grounding_dino_head",
    "mmdet.models.detectors.d2_wrapper",  # builds by Detectron2's configs
    "mmdet.models.detectors.glip",
    "mmdet.models.detectors.grounding_dino",
    "mmdet.models.detectors.kd_one_stage",  # reads the config and checkpoint of a teacher
    "mmdet.models.detectors.lad",
    "mmdet.models.detectors.semi_base",
    "mmdet.models.detectors.soft_teacher",
)
# Keys whose ``type`` is not looked up in a registry, with what we know to be harmless there.
_FUNCTIONS = {"nms": ("nms", "soft_nms"), "roi_layer": ("RoIAlign", "RoIPool")}
_TASK_KEY = re.compile(r"(_generator|bbox_coder|iou_calculator)$")

_DETECTION_TRANSFORMS = "LoadImageFromFile Resize FixScaleResize FixShapeResize Pad CenterCrop Normalize PackDetInputs"
_TRANSFORMS = {
    "detector": tuple(scope + name for name in _DETECTION_TRANSFORMS.split() for scope in ("", "mmdet.")),
    "classifier": ("mmbivit.TimmTransform",),
}
_MAX_PIXELS = 2**13  # along a side; no number of a transform is larger
# What multiplies time and memory, and which no tensor of the file has to fit.
_RANGES = {
    "crop_pct": (0.1, 1),
    "featmap_strides": (1, 1024),
    "num_outs": (1, 16),
    "output_size": (1, 64),
    "pad_size_divisor": (1, 256),
    "sampling_ratio": (-1, 16),
    "scale_factor": (0, 16),
    "size_divisor": (1, 256),
}

_KEY = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_WORD = re.compile(r"[A-Za-z0-9_ -]{0,64}")
_TYPE = re.compile(r"((?P<scope>mmdet|mmengine|mmbivit)\.)?(?P<name>[A-Za-z]\w{0,63})", re.ASCII)
# Words of keys that lead to files, downloads or other code; ``init_cfg`` and the rest of training are left out as well.
_REFUSED_WORDS = frozenset(
    "backend checkpoint ckpt client config file filename files import imports init_cfg lang language path pretrained "
    "scope teacher url".split()
)


def check_detector(described: dict[str, Any]) -> None:
    """Raise a ValueError for anything in a detector's config that is not known to be harmless."""
    if not isinstance(described, dict):
        raise UserError("model is a tuple, expected keys and values")
    if "backbone" in described:
        raise UserError("model.backbone is described by the architecture alone")
    _check(described, "model", "model")
    module = find_class(described.get("type"), "model").__module__
    if not _is_in(module, ("mmdet.models.detectors",)):
        raise UserError(f"model.type={described['type']!r} is no detector")


def _check(value: Any, key: str, place: str) -> None:
    """Check one value of a model's config, and all in it; ``key`` is its own, also for the items of a list."""
    if isinstance(value, dict):
        for name, child in value.items():
            _check_key(name, place)
            if name == "type":
                find_class(child, key)
            else:
                _check(child, name, f"{place}.{name}")
    elif isinstance(value, (list, tuple)):
        for child in value:
            _check(child, key, place)
    elif isinstance(value, str):
        _check_word(value, place)
    elif isinstance(value, (int, float)):
        least, most = _RANGES.get(key, (-MAX_NUMBER, MAX_NUMBER))
        if not least <= value <= most:
            raise UserError(f"{place}={value!r} is out of range; a packed file holds {least} to {most} there")
    elif value is not None:
        raise UserError(f"{place} is a {type(value).__name__}; a packed file holds plain values only")


def _check_key(key: Any, place: str) -> None:
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise UserError(f"{place} has the key {str(key)[:64]!r}, which is no plain name")
    words = _REFUSED_WORDS & {key, *key.lower().split("_")}
    if words:
        raise UserError(f"{place} has the key {key!r}; a packed file holds nothing of files, downloads or imports")


def check_options(options: Any, place: str) -> None:
    """Raise a ValueError for options of a backbone of ours that are not numbers, plain words, lists or dicts of them.

    None of ours ends as a ``type``, which they may not have, so that words may be the names of modules here.
    """
    if isinstance(options, dict):
        for name, child in options.items():
            if name != "drop_path_rate":  # the only one whose path is none of files
                _check_key(name, place)
            if name == "type":
                raise UserError(f"{place} has a 'type' in its options")
            check_options(child, f"{place}.{name}")
    elif isinstance(options, list):
        for child in options:
            check_options(child, place)
    elif isinstance(options, str):
        if not _WORD.fullmatch(options):
            raise UserError(f"{place}={options[:64]!r}; a file holds plain words here, no paths and URLs")
    elif not (options is None or isinstance(options, (int, float))):
        raise UserError(f"{place} is a {type(options).__name__}; a file holds plain values only")


def _check_word(value: str, place: str) -> None:
    """Refuse paths, URLs, dotted names, and the name of any module: several options end as a ``type``."""
    if not _WORD.fullmatch(value) or value in sys.modules or _is_importable(value):
        raise UserError(f"{place}={value[:64]!r}; a packed file holds plain words here, no paths, URLs or modules")


def _is_importable(name: str) -> bool:
    return bool(name) and importlib.util.find_spec(name) is not None


def find_class(name: Any, key: str) -> type | None:
    """Return the class that a ``type`` names; ``None`` for one of the functions that are looked up elsewhere.

    Raises:
        ValueError: if it is not one that a file may name.
    """
    if key in _FUNCTIONS:
        if name not in _FUNCTIONS[key]:
            raise UserError(f"{key}.type={str(name)[:64]!r}; allowed: {', '.join(_FUNCTIONS[key])}")
        return None
    # mmdet may only be imported once mmbivit has put the stand-in for mmcv's operators in place.
    from mmdet import registry

    from mmbivit.models import detection  # noqa: F401  it registers ours

    of_task = _TASK_KEY.search(key)
    found = _registered(name, registry.TASK_UTILS if of_task else registry.MODELS)
    if found is None or not _is_allowed(found, _TASK_MODULES if of_task else _MODEL_MODULES):
        raise UserError(
            f"{key}.type={str(name)[:64]!r} is none of the classes of MMDetection, or ours, that a packed file may name"
        )
    return found


def _registered(name: Any, registry: Registry) -> type | None:
    """Look a class up as MMEngine does in mmdet's scope, but without its imports of what is not registered."""
    match = _TYPE.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        return None
    registry.import_from_location()
    own, root = registry.module_dict, registry.parent.module_dict
    ours = MODELS.module_dict
    places = {"mmdet": (own,), "mmengine": (root,), "mmbivit": (ours,), None: (own, root)}[match["scope"]]
    return next((place[match["name"]] for place in places if match["name"] in place), None)


def _is_allowed(found: Any, modules: tuple[str, ...]) -> bool:
    return (
        isinstance(found, type) and _is_in(found.__module__, modules) and not _is_in(found.__module__, _REFUSED_MODULES)
    )


def _is_in(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def check_pipeline(pipeline: Any, kind: str) -> None:
    """Raise a ValueError for a transform, or an option of one, that is not known to be harmless."""
    allowed = _TRANSFORMS[kind]
    for transform in pipeline:
        if not isinstance(transform, dict) or transform.get("type") not in allowed:
            name = transform.get("type") if isinstance(transform, dict) else transform
            raise UserError(
                f"a transform of test images is {str(name)[:64]!r}; a packed {kind} may have {', '.join(allowed)}"
            )
        options = {key: value for key, value in transform.items() if key != "type"}
        _check(options, transform["type"], transform["type"])
        _check_options(options, transform["type"])


def _check_options(value: Any, place: str) -> None:
    """Check what the options of a transform are beside harmless values: no other transform, no huge image."""
    if isinstance(value, dict) and "type" in value:
        raise UserError(f"{place} has a 'type' in its options")
    if isinstance(value, (int, float)) and not abs(value) <= _MAX_PIXELS:
        raise UserError(f"{place} has the number {value}; allowed: up to {_MAX_PIXELS}")
    children = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    for child in children:
        _check_options(child, place)


def checked_meta(meta: dict[str, Any] | None, model_config: dict[str, Any]) -> dict[str, Any] | None:
    """Return names and colours as mmdet has them, in tuples.

    Raises:
        ValueError: for anything else, and for fewer names than classes.
    """
    if not meta:
        return None
    classes, palette = meta.get("classes"), meta.get("palette", [])
    if meta.keys() - {"classes", "palette"} or not isinstance(classes, list) or not isinstance(palette, list):
        raise UserError("'dataset_meta' has to be lists of classes and palette")
    if not all(isinstance(name, str) and name.isprintable() and len(name) <= 200 for name in classes):
        raise UserError("'dataset_meta' has a class whose name is not printable, or longer than 200 characters")
    for colour in palette:
        levels = colour if isinstance(colour, list) else ()
        if len(levels) != 3 or not all(type(level) is int and 0 <= level <= 255 for level in levels):
            raise UserError("'dataset_meta' has a colour that is not three integers in 0..255")
    most = max(_numbers_of_classes(model_config), default=0)
    if len(classes) < most or len(palette) not in (0, len(classes)):
        counts = f"{len(classes)} names and {len(palette)} colours"
        raise UserError(f"'dataset_meta' has {counts}; expected as many as num_classes={most}")
    known = dict(classes=tuple(classes))
    return known | dict(palette=[tuple(colour) for colour in palette]) if palette else known


def _numbers_of_classes(value: Any) -> Iterator[int]:
    """Yield each ``num_classes`` in a model's config."""
    if isinstance(value, dict):
        if isinstance(value.get("num_classes"), int):
            yield value["num_classes"]
        # Hybrid Task Cascade also segments, into classes of its own.
        value = [child for key, child in value.items() if key != "semantic_head"]
    for child in value if isinstance(value, (list, tuple)) else ():
        yield from _numbers_of_classes(child)
