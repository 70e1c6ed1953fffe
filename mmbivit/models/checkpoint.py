"""Checkpoints: safe loading, and the key names of mmdet, timm and the official Swin.

One pre-load hook (:func:`register_key_mapping`) renames keys, so that ``load_state_dict``, MMEngine's ``load_from``
and ``init_cfg`` all accept float Swin weights of any of the three, for float and binary networks.
"""

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.dist import barrier, master_only
from mmengine.logging import HistoryBuffer
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["checkpoint_path", "load_checkpoint_file", "load_pretrained", "register_key_mapping", "safe_globals"]

_RENAMES = (
    (r"^layers\.", "stages."),
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"\.attn\.w_msa\.", ".attn."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    (r"\.norm2\.", ".mlp.norm."),
)
_DROPPED = re.compile(r"(relative_position_index|attn_mask)$|^head\.")
_BINARY_ONLY = re.compile(r"_quantizer\.|\.act\.|\.si\.|\.running_(mean|var)$|\.num_batches_tracked$")
_FOREIGN = re.compile(r"^layers\.|^patch_embed\.projection\.|\.attn\.w_msa\.|\.ffn\.layers\.|\.blocks\.\d+\.norm2\.")


def _history_method(owner: type, name: str) -> Callable:
    """Stand in for ``getattr``, by which MMEngine's log history refers to its own statistics."""
    if owner is not HistoryBuffer or name not in ("min", "max", "current", "mean"):
        raise pickle.UnpicklingError(f"getattr({owner!r}, {name!r}) is not allowed")
    return getattr(owner, name)


def safe_globals() -> list[Any]:
    """Return what MMEngine's own checkpoints hold beside tensors; none of it runs code when it is loaded."""
    scalars = [type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")]
    reconstruct = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray
    return [
        (_history_method, "builtins.getattr"),
        HistoryBuffer,
        np.ndarray,
        np.dtype,
        reconstruct._reconstruct,
        reconstruct.scalar,
        *scalars,
    ]


def checkpoint_path(file: str) -> Path:
    """Return the local path of a checkpoint; a URL is downloaded once into torch's hub cache, by one rank.

    Raises:
        FileNotFoundError: if a local file does not exist, or a URL cannot be reached.
    """
    if not re.match(r"https?://", str(file)):
        if not Path(file).is_file():
            raise FileNotFoundError(f"checkpoint {file} does not exist")
        return Path(file)
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(str(file)).path).name
    if not path.is_file():
        reason = _download(str(file), path) or "another rank could not fetch it"
        barrier()
        if not path.is_file():
            raise FileNotFoundError(f"checkpoint {file} could not be downloaded to {path}: {reason}")
    return path


@master_only
def _download(url: str, path: Path) -> str | None:
    """Fetch a file and return why that failed, if it did."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path))
    except OSError as error:
        return str(error)
    return None


def load_checkpoint_file(file: str, map_location: str = "cpu") -> dict[str, Any]:
    """Load a checkpoint without running code from it.

    Args:
        file: path or URL.
        map_location: where tensors go.

    Returns:
        What the file holds: a state dict, or a dict with one under ``state_dict`` or ``model``.

    Raises:
        FileNotFoundError: if the file does not exist or cannot be downloaded.
        ValueError: if it is no checkpoint, or holds more than tensors, plain containers and MMEngine's log history.
    """
    path = checkpoint_path(file)
    try:
        with torch.serialization.safe_globals(safe_globals()):
            return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # of a file that may hold anything, unpickling may raise anything
        lines = str(error).splitlines() or [type(error).__name__]
        reason = next((line.strip() for line in lines if "WeightsUnpickler error" in line), lines[0])
        raise ValueError(f"{file} is no checkpoint that can be loaded safely: {reason}") from error


def load_pretrained(module: nn.Module, checkpoint: dict[str, Any], prefix: str | None = None) -> tuple[list, list]:
    """Load the weights of a checkpoint into a backbone.

    Args:
        module: the backbone.
        checkpoint: as :func:`load_checkpoint_file` returns it.
        prefix: what the backbone's keys start with in the checkpoint, such as ``'backbone.'``; by default
            ``'backbone.'`` is removed if any key has it.

    Returns:
        Keys of the backbone that the checkpoint lacks, and keys of the checkpoint that the backbone lacks.

    Raises:
        ValueError: if no key starts with ``prefix``, or the checkpoint is of another architecture.
    """
    state_dict = checkpoint.get("state_dict", checkpoint.get("model", checkpoint))
    state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}
    if prefix is None:
        prefix = "backbone." if any(key.startswith("backbone.") for key in state_dict) else ""
    prefix = prefix if not prefix or prefix.endswith(".") else prefix + "."
    state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    if not state_dict:
        raise ValueError(f"the checkpoint has no key that starts with prefix={prefix!r}")
    missing, unexpected = module.load_state_dict(state_dict, strict=False)
    return [key for key in missing if not key.endswith("num_batches_tracked")], unexpected


def register_key_mapping(module: nn.Module, convert_foreign: bool = True) -> None:
    """Make a Swin backbone accept the state dicts of other implementations, and refuse other architectures.

    Before each load the keys below the backbone's prefix are

    - renamed from mmdet's, timm's or the official Swin's names (patch merging is reordered to match);
    - fitted: position bias tables of another window size are interpolated; where a float network initialises a
      binary one, the MLP units of largest norm are kept, LayerNorm's affine goes into BatchNorm, and what only the
      binary network has stays as it is;
    - compared with the network's shapes.

    Args:
        module: a :class:`mmbivit.models.BinarySwinTransformer`.
        convert_foreign: rename foreign keys; otherwise they stay unexpected.

    Raises:
        ValueError: on load, if a block or a shape shows another architecture; it names the first such key.
    """

    def hook(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
        own = {key[len(prefix) :]: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
        current = module.state_dict()
        if convert_foreign and any(map(_FOREIGN.search, own)):
            own = _to_own_keys(own, len(module.stages))
            own["training_stage"] = current["training_stage"]
        if own:
            _fit(own, current)
        state_dict.update({prefix + key: value for key, value in own.items()})

    module.register_load_state_dict_pre_hook(hook)


def _to_own_keys(state_dict: dict[str, Tensor], num_stages: int) -> dict[str, Tensor]:
    """Rename the keys of mmdet, timm and the official Swin."""
    from_mmdet = not any(key.startswith("layers.") for key in state_dict)
    # timm puts patch merging at the start of the next stage, the others at the end of this one.
    late_downsample = f"layers.{num_stages - 1}.downsample.reduction.weight" in state_dict
    renamed = {}
    for key, value in state_dict.items():
        if _DROPPED.search(key):
            continue
        for pattern, name in _RENAMES:
            key = re.sub(pattern, name, key)
        key = re.sub(r"^norm\.", f"norm{num_stages - 1}.", key)
        if ".downsample." in key:
            if late_downsample:
                key = re.sub(r"^stages\.(\d+)", lambda match: f"stages.{int(match[1]) - 1}", key)
            if from_mmdet:
                value = _unfold_to_concat(value)
        renamed[key] = value
    return renamed


def _unfold_to_concat(value: Tensor) -> Tensor:
    """Reorder the ``4 * C`` inputs of patch merging: mmdet's (channel, row, column) to (column, row, channel)."""
    channels = value.shape[-1] // 4
    return value.unflatten(-1, (channels, 2, 2)).transpose(-1, -3).flatten(-3)


def _fit(state_dict: dict[str, Tensor], current: dict[str, Tensor]) -> None:
    """Fit a state dict with our own keys to the network's tensors, in place."""
    for key, value in state_dict.items():
        if key.endswith("relative_position_bias_table") and key in current:
            state_dict[key] = _resize_bias_table(value, len(current[key]))
    is_binary = any(key.endswith("input_quantizer.gamma") for key in current)
    from_float = is_binary and not any(key.endswith("input_quantizer.gamma") for key in state_dict)
    if from_float:
        _keep_largest_units(state_dict, current)
    for key, value in state_dict.items():
        expected = current[key].shape if key in current else None
        if expected is None and re.match(r"stages\.\d+\.(blocks\.\d+\.(attn|mlp\.fc)|downsample\.)", key):
            if "input_quantizer" not in key and "qkv_quantizer" not in key:
                raise ValueError(f"the checkpoint is of another arch: it has {key}, which this network has not")
        elif expected is not None and value.shape != expected:
            raise ValueError(
                f"the checkpoint is of another arch: {key} has shape {tuple(value.shape)}, "
                f"this network expects {tuple(expected)}; check arch, mlp_ratio, window_size and spatial_interaction"
            )
    if from_float:
        for key in filter(_BINARY_ONLY.search, current):
            state_dict.setdefault(key, current[key])


def _resize_bias_table(table: Tensor, length: int) -> Tensor:
    """Interpolate a position bias table ``(L, heads)`` to ``(length, heads)``."""
    if len(table) == length:
        return table
    old, new = (round(n**0.5) for n in (len(table), length))
    grid = table.T.reshape(1, -1, old, old)
    return F.interpolate(grid, size=(new, new), mode="bicubic").flatten(2)[0].T.contiguous()


def _keep_largest_units(state_dict: dict[str, Tensor], current: dict[str, Tensor]) -> None:
    """Cut the hidden layer of each MLP to the network's width, keeping the units of largest norm in their order."""
    for key in [key for key in state_dict if key.endswith(".mlp.fc1.weight") and key in current]:
        stem = key.removesuffix("fc1.weight")
        width = len(current[key])
        fc1, fc2 = state_dict[key], state_dict[stem + "fc2.weight"]
        if len(fc1) <= width:
            continue
        keep = (fc1.norm(dim=1) * fc2.norm(dim=0)).topk(width).indices.sort().values
        state_dict[key], state_dict[stem + "fc2.weight"] = fc1[keep], fc2[:, keep]
        state_dict[stem + "fc1.bias"] = state_dict[stem + "fc1.bias"][keep]
