"""MMEngine's loaders of checkpoints, replaced by ours."""

from typing import Any

from mmengine.runner import checkpoint as published
from mmengine.runner.checkpoint import CheckpointLoader

from mmbivit.checks import UserError, did_you_mean

from .content import drop_configs, find_state_dict
from .fetch import FETCHED_SCHEMES, load_checkpoint_file

__all__ = ["load_from_checkpoint_file", "load_from_published_model", "load_from_remote_storage", "use_safe_loading"]

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
    """Make MMEngine load whatever it loads through :func:`mmbivit.checkpoints.load_checkpoint_file`.

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
        raise UserError(f"checkpoint {filename}: MMEngine knows no model of this name{did_you_mean(name, urls)}")
    checkpoint = load_from_checkpoint_file(urls[name], map_location)
    if scheme == "mmcls":  # whole classifiers, wanted as backbones
        weights = {key: value for key, value in checkpoint["state_dict"].items() if key.startswith("backbone.")}
        return dict(state_dict={key.removeprefix("backbone."): value for key, value in weights.items()})
    return checkpoint


def load_from_remote_storage(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Refuse storage that only MMEngine's loaders reach, since they unpickle anything."""
    raise UserError(f"checkpoint {filename} is on storage that cannot be read safely: copy it, and give a local file")
