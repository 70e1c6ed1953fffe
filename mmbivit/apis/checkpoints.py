"""Checkpoints of a run: found before anything is built, and loaded without running code from them."""

from typing import Any

from mmengine.config import Config
from mmengine.runner.checkpoint import CheckpointLoader

from mmbivit.models.checkpoint import checkpoint_path, load_checkpoint_file

__all__ = ["fetch_checkpoints", "use_safe_loading"]


def use_safe_loading() -> None:
    """Make MMEngine load local files and URLs through :func:`mmbivit.models.checkpoint.load_checkpoint_file`.

    MMEngine's own loaders either fail on the log history in its checkpoints (0.10.7 with torch >= 2.6) or fall back
    to unpickling anything.
    """
    CheckpointLoader.register_scheme(("", "http://", "https://"), load_from_checkpoint_file, force=True)


def load_from_checkpoint_file(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Load a checkpoint for MMEngine, whose loaders have this signature and this kind of name."""
    return load_checkpoint_file(filename, map_location=map_location)


def fetch_checkpoints(cfg: Config) -> None:
    """Replace the checkpoints that a training config starts from by local paths; URLs are downloaded once.

    Call it when the processes of a distributed run are connected, since only the first one downloads.

    Raises:
        FileNotFoundError: if a file does not exist or a URL cannot be reached; it names the option that gives another.
    """
    for holder, key in _checkpoint_places(cfg):
        file = holder[key]
        if "://" in file and not file.startswith(("http://", "https://")):
            continue  # MMEngine's own schemes, such as torchvision://resnet50
        try:
            holder[key] = str(checkpoint_path(file))
        except FileNotFoundError as error:
            raise FileNotFoundError(_explain(cfg, file, error)) from error


def _checkpoint_places(cfg: Config) -> list[tuple[dict[str, Any], str]]:
    """Return dict and key of everything that training loads."""
    with_init_cfg = [hook.get("teacher") for hook in cfg.get("custom_hooks") or []] + [cfg.model.get("backbone")]
    init_cfgs = [(module or {}).get("init_cfg") for module in with_init_cfg]
    places = [(cfg, "load_from"), *((init_cfg, "checkpoint") for init_cfg in init_cfgs if isinstance(init_cfg, dict))]
    return [(holder, key) for holder, key in places if holder.get(key)]


def _explain(cfg: Config, file: str, error: FileNotFoundError) -> str:
    if file == cfg.get("backbone_checkpoint"):
        problem = "no pretrained backbone is given" if file == "none" else str(error)
        return f"{problem}; this config fine-tunes one: give it with --backbone-checkpoint FILE"
    if file == cfg.get("float_checkpoint"):
        return f"{error}; give the float detector with --float-checkpoint FILE, or 'none' to train without a teacher"
    return str(error)
