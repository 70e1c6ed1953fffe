"""What is where in a checkpoint, and texts in it that must not be run."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

__all__ = ["drop_configs", "find_prefix", "find_state_dict", "value_at"]


def find_state_dict(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Return the state dict of a checkpoint: under ``state_dict``, under ``model`` (official Swin), or all of it."""
    return checkpoint.get("state_dict", checkpoint.get("model", checkpoint))


def find_prefix(keys: Iterable[str], prefix: str | None = None) -> str:
    """Return what the backbone's keys start with, ending in a dot, or ``''``.

    Args:
        keys: all keys of a state dict.
        prefix: the prefix if it is known; by default ``'backbone.'`` if any key has it.

    Raises:
        ValueError: if no key starts with ``prefix``.
    """
    keys = list(keys)
    if prefix is None:
        prefix = "backbone." if any(key.startswith("backbone.") for key in keys) else ""
    prefix = prefix if not prefix or prefix.endswith(".") else prefix + "."
    if not any(key.startswith(prefix) for key in keys):
        raise ValueError(
            f"the checkpoint has no key that starts with prefix={prefix!r}; "
            f"its keys are such as {', '.join(keys[:2]) or '(none)'}"
        )
    return prefix


def drop_configs(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Remove the texts that MMEngine would run as Python configs, in place, and return the checkpoint.

    ``Runner.resume`` runs ``meta.config``; an inferencer that is given weights without a config runs ``meta.cfg`` or
    ``message_hub.runtime_info.cfg``.
    """
    for place in ("meta.config", "meta.cfg", "message_hub.runtime_info.cfg"):
        holder = value_at(checkpoint, place.rpartition(".")[0])
        if isinstance(holder, dict):
            holder.pop(place.rpartition(".")[2], None)
    return checkpoint


def value_at(checkpoint: dict[str, Any], place: str) -> Any:
    """Return what is at a place such as ``meta.epoch``, or None."""
    value: Any = checkpoint
    for key in place.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value
