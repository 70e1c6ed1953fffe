"""What is where in a checkpoint, what kind of network it is of, and texts in it that must not be run."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mmbivit.binary import BinaryLayer, HeadNorm, HeadShortcut, Quantizer, RPReLU
from mmbivit.checks import UserError

__all__ = [
    "BINARY_ONLY",
    "COMPUTED",
    "OF_RECIPE",
    "STAGE_KEY",
    "binary_keys",
    "check_tensor",
    "drop_configs",
    "find_prefix",
    "find_state_dict",
    "is_float_for",
    "value_at",
]

STAGE_KEY = "training_stage"  # buffer of a backbone of ours, float ones too: 2 in the last stage, less before
# Keys of a backbone of ours that no float one has: those of quantizers, whatever these call their tensors, and others.
# Of files without a network to ask; where there is one, see binary_keys.
BINARY_ONLY = re.compile(
    r"_quantizer\.|attn\.attention\.|\.act\.|\.si\.|\.(qkv(\.\w+)?|proj|fc1|fc2|reduction)\.norm\.|\.head_shortcut\.|\.(query|key)_norm\.|"
    r"\.running_(mean|var)$|\.num_batches_tracked$"
)
# Those of the backbone's own layers and attention that depend on its recipe.
OF_RECIPE = re.compile(
    r"\.(attn|mlp)\.(\w+_quantizer|(qkv(\.\w+)?|proj|fc1|fc2)\.(\w+_quantizer|norm|act)|attention|head_shortcut|(query|key)_norm|act)\."
)
COMPUTED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # types that torch interpolates and compares


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
        raise UserError(
            f"the checkpoint has no key that starts with prefix={prefix!r}; "
            f"its keys are such as {', '.join(keys[:2]) or '(none)'}"
        )
    return prefix


def binary_keys(network: nn.Module) -> list[str]:
    """Return the keys of a network's state dict that no float network has.

    They are those of its quantizers, of branches that idle in a training stage (spatial interaction), of RPReLU and of
    shortcuts of layers, norms and shortcuts of heads, and BatchNorm's statistics; none where the network is float.
    """
    parts = dict(network.named_modules())
    if not any(isinstance(part, Quantizer) for part in parts.values()):
        return []
    kinds = (Quantizer, RPReLU, HeadNorm, HeadShortcut)
    names = [name for name, part in parts.items() if isinstance(part, kinds) or hasattr(part, "active")]
    names += [f"{name}.norm" for name, part in parts.items() if hasattr(part, "norm") and isinstance(part, BinaryLayer)]
    whole = _prefixes(names)
    norms = {name: part for name, part in parts.items() if isinstance(part, nn.modules.batchnorm._BatchNorm)}
    statistics = {f"{name}.{key}" for name, norm in norms.items() for key, _ in norm.named_buffers(recurse=False)}
    return [key for key in network.state_dict() if key.startswith(whole) or key in statistics]


def is_float_for(network: nn.Module, keys: Iterable[str]) -> bool:
    """Whether a network is binary, and a checkpoint for it is of a float one: only a start for training.

    A checkpoint is of a binary network if it has anything below the names of this network's quantizers. Where those
    have no tensors themselves, other keys that only binary networks have tell; where there are none either, the
    checkpoint of a float network of ours looks the same and counts as binary, that of others has no training stage.

    Args:
        network: the backbone that takes the checkpoint.
        keys: the keys of the checkpoint, under this network's names and without prefix.
    """
    keys = set(keys)
    quantizers = _prefixes(name for name, part in network.named_modules() if isinstance(part, Quantizer))
    if not quantizers or any(key.startswith(quantizers) for key in keys):
        return False
    expected = binary_keys(network)
    if any(key.startswith(quantizers) for key in expected):
        return True
    return keys.isdisjoint(expected or [STAGE_KEY])


def _prefixes(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{name}." for name in names)


def check_tensor(key: str, value: Any) -> None:
    """Raise a ValueError if what a checkpoint holds under a key is no plain tensor, with which one can compute."""
    if not isinstance(value, Tensor):
        raise UserError(f"the checkpoint is damaged: {key} is a {type(value).__name__}, expected a tensor")
    if value.layout != torch.strided or value.is_quantized:
        raise UserError(f"the checkpoint is damaged: {key} is a sparse or quantized tensor, expected a plain one")


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
