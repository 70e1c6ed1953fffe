"""Checkpoints of whole models: found before a run is built, and loaded with all of their weights."""

import copy
import re
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, DefaultScope
from torch import nn

from mmbivit.checkpoints import FETCHED_SCHEMES, checkpoint_path, load_checkpoint_file, load_pretrained
from mmbivit.checkpoints.content import find_state_dict, is_float_for
from mmbivit.checks import UserError
from mmbivit.datasets.wrappers import inner_dataset
from mmbivit.models import ImageClassifier
from mmbivit.models.stage import staged_modules

from .config import is_classifier

__all__ = ["fetch_checkpoints", "load_classifier", "load_detector", "load_trained_model"]


def load_classifier(model: ImageClassifier, checkpoint: str | Path) -> None:
    """Load a checkpoint into a classifier, all of it, and the names of the classes that it was trained on.

    Args:
        model: the classifier; its ``dataset_meta`` is set, where the checkpoint has names for all classes.
        checkpoint: file, URL or name of a timm model.

    Raises:
        FileNotFoundError: if the file does not exist or cannot be downloaded.
        ValueError: if a weight is missing, left over or of another shape; the message names the first.
    """
    content = _load_all_weights(model, checkpoint, "classifier")
    dataset_meta = _saved_dataset_meta(checkpoint, content)
    model.dataset_meta = dataset_meta if len(dataset_meta.get("classes", ())) == model.head.out_features else None


def load_detector(model: nn.Module, checkpoint: str | Path, left_over: str | None = None) -> dict[str, Any]:
    """Load a checkpoint into a detector, all of it.

    Args:
        model: the detector.
        checkpoint: file or URL.
        left_over: what the keys begin with that the checkpoint may have and the detector has not.

    Returns:
        What the checkpoint says of the classes.

    Raises:
        FileNotFoundError: if the file does not exist or cannot be downloaded.
        ValueError: if a weight is missing, left over or of another shape; the message names the first.
    """
    return _saved_dataset_meta(checkpoint, _load_all_weights(model, checkpoint, "detector", left_over))


def _load_all_weights(
    model: nn.Module, checkpoint: str | Path, kind: str, left_over: str | None = None
) -> dict[str, Any]:
    """Load a checkpoint into a whole model, where MMEngine would only warn of weights that it lacks.

    Args:
        model: the model.
        checkpoint: file, URL or name of a timm model.
        kind: what the model is, ``classifier`` or ``detector``, for messages.
        left_over: what the keys begin with that the checkpoint may have and the model has not.

    Returns:
        The content of the checkpoint.

    Raises:
        FileNotFoundError: if the file does not exist or cannot be downloaded.
        ValueError: if a weight is missing, left over or of another shape; the message names the first.
    """
    content = load_checkpoint_file(str(checkpoint))
    keys = (key.removeprefix("module.").removeprefix("backbone.") for key in find_state_dict(content))
    if is_float_for(getattr(model, "backbone", model), keys):
        # On load it would pass, since training starts so.
        raise UserError(f"{checkpoint} is of a float network, the config's is binary: train that first")
    for name, part in staged_modules(model).items():
        start = f"{name}."
        own = [key.removeprefix(start) for key in find_state_dict(content) if key.startswith(start)]
        if part.is_part and own and is_float_for(part, own):
            raise UserError(f"{checkpoint} has a float {name}, the config's is binary: train that first")
    try:
        missing, unexpected = load_pretrained(model, content, prefix="")
    except ValueError as error:
        raise UserError(f"{checkpoint} does not fit the config's model: {error}") from error
    if kind == "detector":
        _check_output_norms(model, checkpoint, content)
    if left_over:
        unexpected = [key for key in unexpected if not key.startswith(left_over)]
    problems = [
        f"{len(keys)} tensors {what}, first {keys[0]}"
        for what, keys in (("are missing in it", missing), ("of it have no place", unexpected))
        if keys
    ]
    if problems:
        others = " or a ".join(other for other in ("backbone", "detector", "classifier") if other != kind)
        raise UserError(
            f"{checkpoint} is no checkpoint of the config's {kind}: {'; '.join(problems)}. "
            f"Give one that tools/train.py wrote with this config, not a {others}"
        )
    return content


def _check_output_norms(model: nn.Module, checkpoint: str | Path, content: dict[str, Any]) -> None:
    """Raise where norms of the backbone's outputs would start fresh, as from a classifier, which has the last one."""
    keys = {key.removeprefix("module.") for key in find_state_dict(content)}
    fresh = [key for key in model.state_dict() if re.fullmatch(r"backbone\.norm\d+\.weight", key) and key not in keys]
    if fresh:
        raise UserError(f"{checkpoint} is no checkpoint of the config's detector: it has no {fresh[0]}")


def load_trained_model(cfg: Config, checkpoint: str | Path) -> nn.Module:
    """Build the model of a config with the weights of a checkpoint, all of them, in evaluation mode.

    Args:
        cfg: the config of a classifier or a detector.
        checkpoint: file or URL of the weights.

    Raises:
        FileNotFoundError: if the checkpoint does not exist or cannot be downloaded.
        ValueError: if a weight is missing, left over or of another shape; the message names the first.
    """
    classifier = is_classifier(cfg)
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or ("mmengine" if classifier else "mmdet")):
        model = MODELS.build(copy.deepcopy(cfg.model))  # detectors change the configs of their heads
        if classifier:
            load_classifier(model, checkpoint)
        else:
            model.dataset_meta = _dataset_meta(cfg, load_detector(model, checkpoint))
    return model.eval()


def _saved_dataset_meta(checkpoint: str | Path, content: dict[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint says of its classes."""
    meta = content.get("meta") or {}
    meta = meta.get("dataset_meta") or {} if isinstance(meta, dict) else None
    if not isinstance(meta, dict) or not all(isinstance(key, str) for key in meta):
        raise UserError(f"{checkpoint} is damaged: its meta.dataset_meta is no dict with the classes")
    if not isinstance(meta.get("classes", ()), (list, tuple)):
        raise UserError(f"{checkpoint} is damaged: its meta.dataset_meta.classes is no list of names")
    return meta


def _dataset_meta(cfg: Config, meta: dict[str, Any]) -> dict[str, Any]:
    """Return the names and colours of the classes: those of the checkpoint, else of the config's test data."""
    loader = cfg.get("test_dataloader") or cfg.get("val_dataloader")
    known = {}
    if loader:
        known = DATASETS.build(dict(inner_dataset(loader["dataset"]), pipeline=[], lazy_init=True)).metainfo
    return {**known, **{key.lower(): value for key, value in meta.items()}}


def fetch_checkpoints(cfg: Config) -> None:
    """Replace the checkpoints that a training config starts from by local paths; see ``checkpoint_path``.

    Call it when the processes of a distributed run are connected, since only the first one downloads.

    Raises:
        FileNotFoundError: if a file does not exist or cannot be downloaded; it names the option that gives another.
        ValueError: if timm has no weights of a name.
    """
    for holder, key in _checkpoint_places(cfg):
        file = holder[key]
        if "://" in file and not file.startswith(FETCHED_SCHEMES):
            continue  # MMEngine's own schemes, such as torchvision://resnet50
        try:
            holder[key] = str(checkpoint_path(file))
        except FileNotFoundError as error:
            raise FileNotFoundError(_explain(cfg, file, error)) from error


def _checkpoint_places(cfg: Config) -> list[tuple[dict[str, Any], str]]:
    """Return dict and key of everything that training loads."""
    teachers = [hook.get("teacher") for hook in cfg.get("custom_hooks") or []]
    with_init_cfg = [*teachers, cfg.model, cfg.model.get("backbone")]
    init_cfgs = [(module or {}).get("init_cfg") for module in with_init_cfg]
    places = [(cfg, "load_from"), *((init_cfg, "checkpoint") for init_cfg in init_cfgs if isinstance(init_cfg, dict))]
    return [(holder, key) for holder, key in places if holder.get(key)]


def _explain(cfg: Config, file: str, error: FileNotFoundError) -> str:
    if file == cfg.get("backbone_checkpoint"):
        problem = "no pretrained backbone is given" if file == "none" else str(error)
        return f"{problem}; this config fine-tunes one: give it with --backbone-checkpoint FILE"
    if file == cfg.get("float_checkpoint"):
        return f"{error}; give the float model with --float-checkpoint FILE, or 'none' to train without a teacher"
    return str(error)
