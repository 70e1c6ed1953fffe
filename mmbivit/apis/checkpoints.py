"""Checkpoints: found before a run is built, loaded without running code from them, and loaded whole."""

import copy
import re
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, DefaultScope
from mmengine.runner import checkpoint as published
from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn

from mmbivit.checks import did_you_mean
from mmbivit.datasets.wrappers import inner_dataset
from mmbivit.engine.checkpoint_fields import drop_configs
from mmbivit.models import ImageClassifier
from mmbivit.models.checkpoint import FETCHED_SCHEMES, checkpoint_path, load_checkpoint_file, load_pretrained
from mmbivit.models.keys import find_state_dict

from .config import is_classifier

__all__ = ["fetch_checkpoints", "load_classifier", "load_detector", "load_trained_model", "use_safe_loading"]


# Names of published models by scheme, and schemes of storage that needs packages of its own: MMEngine's loaders.
_PUBLISHED = {
    "torchvision": published.get_torchvision_models,
    "modelzoo": published.get_torchvision_models,
    "open-mmlab": published.get_external_models,
    "openmmlab": published.get_external_models,
    "mmcls": published.get_mmcls_models,
}
_REMOTE = ("pavi://", r"(\S+\:)?s3://", r"(\S+\:)?petrel://")


def use_safe_loading() -> None:
    """Make MMEngine load whatever it loads through :func:`mmbivit.models.checkpoint.load_checkpoint_file`.

    MMEngine's own loaders either fail on the log history in its checkpoints (0.10.7 with torch >= 2.6) or fall back
    to unpickling anything.
    """
    CheckpointLoader.register_scheme(("", *FETCHED_SCHEMES), load_from_checkpoint_file, force=True)
    CheckpointLoader.register_scheme([f"{name}://" for name in _PUBLISHED], load_from_published_model, force=True)
    CheckpointLoader.register_scheme(_REMOTE, load_from_remote_storage, force=True)


def load_from_checkpoint_file(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Load a checkpoint for MMEngine, whose loaders have this signature and this kind of name.

    Its hooks expect ``state_dict``, which timm's files and those of the official Swin lack. Texts that it would run as
    configs are removed.
    """
    checkpoint = drop_configs(load_checkpoint_file(filename, map_location=map_location))
    return checkpoint if "state_dict" in checkpoint else dict(state_dict=find_state_dict(checkpoint))


def load_from_published_model(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Load the weights of a model that MMEngine knows by name, such as ``torchvision://resnet50``.

    Raises:
        ValueError: if it does not know the name.
    """
    scheme, _, name = filename.partition("://")
    urls = _PUBLISHED[scheme]()
    name = published.get_deprecated_model_names().get(name, name)
    if name not in urls:
        raise ValueError(f"checkpoint {filename}: MMEngine knows no model of this name{did_you_mean(name, urls)}")
    checkpoint = load_from_checkpoint_file(urls[name], map_location)
    if scheme == "mmcls":  # whole classifiers, wanted as backbones
        weights = {key: value for key, value in checkpoint["state_dict"].items() if key.startswith("backbone.")}
        return dict(state_dict={key.removeprefix("backbone."): value for key, value in weights.items()})
    return checkpoint


def load_from_remote_storage(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Refuse storage that only MMEngine's loaders reach, since they unpickle anything."""
    raise ValueError(f"checkpoint {filename} is on storage that cannot be read safely: copy it, and give a local file")


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
    is_float = not any("input_quantizer." in key for key in find_state_dict(content))
    if is_float and any("input_quantizer." in key for key in model.state_dict()):
        # On load it would pass, since training starts so.
        raise ValueError(f"{checkpoint} is of a float network, the config's is binary: train that first")
    try:
        missing, unexpected = load_pretrained(model, content, prefix="")
    except (ValueError, RuntimeError) as error:  # of our checks, and of torch's on shapes
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"{checkpoint} does not fit the config's model: {reason}") from error
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
        raise ValueError(
            f"{checkpoint} is no checkpoint of the config's {kind}: {'; '.join(problems)}. "
            f"Give one that tools/train.py wrote with this config, not a {others}"
        )
    return content


def _check_output_norms(model: nn.Module, checkpoint: str | Path, content: dict[str, Any]) -> None:
    """Raise where norms of the backbone's outputs would start fresh, as from a classifier, which has the last one."""
    keys = {key.removeprefix("module.") for key in find_state_dict(content)}
    fresh = [key for key in model.state_dict() if re.fullmatch(r"backbone\.norm\d+\.weight", key) and key not in keys]
    if fresh:
        raise ValueError(f"{checkpoint} is no checkpoint of the config's detector: it has no {fresh[0]}")


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
        raise ValueError(f"{checkpoint} is damaged: its meta.dataset_meta is no dict with the classes")
    if not isinstance(meta.get("classes", ()), (list, tuple)):
        raise ValueError(f"{checkpoint} is damaged: its meta.dataset_meta.classes is no list of names")
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
