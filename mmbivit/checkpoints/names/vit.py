"""The names of ViT weights: ours, and those of timm and the official DeiT, which are the same."""

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mmbivit.checkpoints.content import check_tensor

from . import fit_positions

__all__ = ["fit_tensor", "is_foreign", "to_own_keys"]

_RENAMES = ((r"^blocks\.", "stages.0.blocks."), (r"\.norm2\.", ".mlp.norm."), (r"^norm\.", "norm0."))
_FOREIGN = re.compile(r"^blocks\.\d+\.|^pos_embed$|^cls_token$")
_EXTRA = ("cls_token", "dist_token")


def is_foreign(keys: Iterable[str]) -> bool:
    """Whether keys of a backbone are those of another implementation."""
    return any(map(_FOREIGN.search, keys))


def to_own_keys(state_dict: dict[str, Tensor], num_heads: Sequence[int]) -> dict[str, Tensor]:
    """Bring the weights of timm and DeiT under our names and into our layout.

    Their tokens beside the grid get their positions here: ours have one tensor for both.
    """
    own = {}
    for key, value in state_dict.items():
        if key in _EXTRA or key == "pos_embed" or re.match(r"head(_dist)?\.|pre_logits\.", key):
            continue
        for pattern, replacement in _RENAMES:
            key = re.sub(pattern, replacement, key)
        own[key] = value
    extra = [state_dict[name] for name in _EXTRA if name in state_dict]
    if (positions := state_dict.get("pos_embed")) is not None:
        check_tensor("pos_embed", positions)
        own["absolute_pos_embed"] = positions[:, len(extra) :]
        if extra:
            own["extra_embed"] = torch.cat(extra, dim=1) + positions[:, : len(extra)]
    return own


def fit_tensor(name: str, value: Tensor, expected: Tensor) -> Tensor:
    """Fit a position embedding of another grid, and token mixing that had tokens beside the grid.

    The embedding ``(1, N, C)`` is interpolated; of token mixing over all tokens, those beside the grid, which come
    first, are cut, so that a classifier's backbone starts a detector's. Other tensors are returned as they are.
    """
    if name == "absolute_pos_embed":
        return fit_positions(value, expected)
    if ".mlp.si." in name and value.ndim == expected.ndim:
        surplus = {old - new for old, new in zip(value.shape, expected.shape, strict=True)}
        if surplus <= {1, 2}:
            return value[tuple(slice(old - new, None) for old, new in zip(value.shape, expected.shape, strict=True))]
    return value
