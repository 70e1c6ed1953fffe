"""The names of Swin weights: ours, and those of mmdet, timm and the official repository.

Everything here is about names and the layout of tensors; :mod:`mmbivit.checkpoints.fitting` uses them on every load.
"""

import re
from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.nn import functional as F

from mmbivit.checkpoints.content import BINARY_ONLY, COMPUTED, STAGE_KEY, check_tensor
from mmbivit.checks import UserError

from . import head_name

__all__ = [
    "BINARY_ONLY",
    "count_stages",
    "find_family",
    "fit_tensor",
    "head_name",
    "is_foreign",
    "own_names",
    "own_value",
    "timm_name",
    "to_own_keys",
]

_RENAMES = (
    (r"^layers\.", "stages."),
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"\.attn\.w_msa\.", ".attn."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    (r"\.norm2\.", ".mlp.norm."),
)
_TO_TIMM = ((r"^stages\.", "layers."), (r"\.mlp\.norm\.", ".norm2."), (r"^head\.", "head.fc."))
_DROPPED = re.compile(r"(relative_position_index|attn_mask)$|^head\.")
_FOREIGN = re.compile(r"^layers\.|^patch_embed\.projection\.|\.attn\.w_msa\.|\.ffn\.layers\.|\.blocks\.\d+\.norm2\.")
_OPENMMLAB = re.compile(r"^patch_embed\.projection\.|\.attn\.w_msa\.|\.ffn\.layers\.")


def is_foreign(keys: Iterable[str]) -> bool:
    """Whether keys of a backbone are those of another implementation."""
    return any(map(_FOREIGN.search, keys))


def find_family(keys: Iterable[str]) -> str:
    """Return whose names the keys of a Swin backbone are: ``mmbivit``, ``mmdet``, ``official`` or ``timm``."""
    keys = list(keys)
    if not is_foreign(keys):
        return "mmbivit"
    if any(map(_OPENMMLAB.search, keys)):
        return "mmdet"
    # Patch merging ends a stage in the official Swin, and begins the next one in timm.
    return "official" if any(key.startswith("layers.0.downsample.") for key in keys) else "timm"


def count_stages(keys: Iterable[str]) -> int:
    """Return how many stages the keys of a Swin backbone have; 0 if they are of another architecture."""
    weights = (key for key in keys if not _DROPPED.search(key))
    matches = (re.match(r"(?:layers|stages)\.(\d{1,9})\.blocks\.\d+\.", key) for key in weights)
    return max((int(match[1]) + 1 for match in matches if match), default=0)


def own_names(keys: Iterable[str], num_stages: int) -> dict[str, str]:
    """Return our names of the keys of mmdet, timm and the official Swin; what we compute or have not is left out."""
    keys = list(keys)
    # timm puts patch merging at the start of the next stage, the others at the end of this one.
    late_downsample = f"layers.{num_stages - 1}.downsample.reduction.weight" in keys
    names = {}
    for key in keys:
        if _DROPPED.search(key):
            continue
        name = key
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"^norm\.", f"norm{num_stages - 1}.", name)
        if late_downsample and ".downsample." in name:
            name = _shift_stage(name, -1)
        names[key] = name
    return names


def to_own_keys(state_dict: dict[str, Tensor], num_heads: Sequence[int]) -> dict[str, Tensor]:
    """Bring the weights of mmdet, timm and the official Swin under our names and into our layout."""
    family = find_family(state_dict)
    return {
        name: own_value(name, state_dict[key], family) for key, name in own_names(state_dict, len(num_heads)).items()
    }


def own_value(name: str, value: Tensor, family: str) -> Tensor:
    """Bring a tensor with our name into our layout: mmdet orders the ``4 * C`` inputs of patch merging otherwise.

    Raises:
        ValueError: if it has no such axis.
    """
    if family != "mmdet" or ".downsample." not in name:
        return value
    check_tensor(name, value)
    if not value.ndim or value.shape[-1] % 4:
        raise UserError(
            f"the checkpoint is damaged: {name} has shape {tuple(value.shape)}, whose last axis is not 4 * C"
        )
    # mmdet's order is (channel, row, column), ours and the official one (column, row, channel).
    channels = value.shape[-1] // 4
    return value.unflatten(-1, (channels, 2, 2)).transpose(-1, -3).flatten(-3)


def fit_tensor(name: str, value: Tensor, expected: Tensor) -> Tensor:
    """Interpolate a position bias table ``(L, heads)`` of another window size to the length that is expected.

    Other tensors, and tables that are none of such a network, are returned as they are.
    """
    if not name.endswith("relative_position_bias_table"):
        return value
    if value.ndim != 2 or value.shape[1] != expected.shape[1] or value.dtype not in COMPUTED:
        return value
    old, new = (round(len(of_window) ** 0.5) for of_window in (value, expected))
    if old in (0, new) or old**2 != len(value):
        return value
    grid = value.T.reshape(1, -1, old, old)
    return F.interpolate(grid, size=(new, new), mode="bicubic").flatten(2)[0].T.contiguous()


def timm_name(key: str, num_stages: int) -> str | None:
    """Return timm's name of one of our keys, of a float classifier without prefix; ``None`` if timm has none."""
    key = re.sub(rf"^norm{num_stages - 1}\.", "norm.", key)
    if key == STAGE_KEY or re.match(r"norm\d+\.|absolute_pos_embed$", key):
        return None
    if ".downsample." in key:
        key = _shift_stage(key, 1)
    for pattern, replacement in _TO_TIMM:
        key = re.sub(pattern, replacement, key)
    return key


def _shift_stage(key: str, step: int) -> str:
    return re.sub(r"^stages\.(\d{1,9})(?=\.)", lambda match: f"stages.{int(match[1]) + step}", key)
