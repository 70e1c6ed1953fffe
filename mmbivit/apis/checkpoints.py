"""Checkpoints of a run: found before anything is built, and loaded without running code from them."""

from typing import Any

from mmengine.config import Config
from mmengine.runner.checkpoint import CheckpointLoader

from mmbivit.models.checkpoint import FETCHED_SCHEMES, checkpoint_path, load_checkpoint_file
from mmbivit.models.keys import find_state_dict

__all__ = ["fetch_checkpoints", "use_safe_loading"]


def use_safe_loading() -> None:
    """Make MMEngine load files, URLs and timm models through :func:`mmbivit.models.checkpoint.load_checkpoint_file`.

    MMEngine's own loaders either fail on the log history in its checkpoints (0.10.7 with torch >= 2.6) or fall back
    to unpickling anything.
    """
    CheckpointLoader.register_scheme(("", *FETCHED_SCHEMES), load_from_checkpoint_file, force=True)


def load_from_checkpoint_file(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Load a checkpoint for MMEngine, whose loaders have this signature and this kind of name.

    Its hooks expect ``state_dict``, which timm's files and those of the official Swin lack.
    """
    checkpoint = load_checkpoint_file(filename, map_location=map_location)
    return checkpoint if "state_dict" in checkpoint else dict(state_dict=find_state_dict(checkpoint))


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
