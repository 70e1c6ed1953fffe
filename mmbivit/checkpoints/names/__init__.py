"""Names of weights in other implementations, one module for each family of networks.

A backbone gives the module of its family as ``weight_names``. It has three functions, as :mod:`.swin` has them:
``is_foreign(keys)``, ``to_own_keys(state_dict, num_heads)`` (of each stage), and ``fit_tensor(name, value, expected)``.
"""

import re

import torch
from torch import Tensor
from torch.nn import functional as F

from mmbivit.checkpoints.content import COMPUTED

__all__ = ["fit_positions", "head_name", "join_heads"]


def head_name(key: str) -> str:
    """Return our name of a key of a classifier's head; timm and mmpretrain may have ``head.fc``."""
    return re.sub(r"^head\.fc\.", "head.", key)


def join_heads(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make the heads of a distilled DeiT, whose logits are averaged, one of the concatenated tokens."""
    parts = [[state_dict.get(f"{name}.{part}") for name in ("head", "head_dist")] for part in ("weight", "bias")]
    if not all(isinstance(tensor, Tensor) for pair in parts for tensor in pair):
        return state_dict
    (weight, other_weight), (bias, other_bias) = parts
    own = {key: value for key, value in state_dict.items() if not key.startswith("head_dist.")}
    return own | {"head.weight": torch.cat([weight, other_weight], dim=-1) / 2, "head.bias": (bias + other_bias) / 2}  # type: ignore[list-item, operator]  # all are Tensors


def fit_positions(value: Tensor, expected: Tensor) -> Tensor:
    """Interpolate the position embedding ``(1, N, C)`` of a square grid to another one; others are returned as is."""
    if value.ndim != 3 or value.shape[::2] != expected.shape[::2] or value.dtype not in COMPUTED:
        return value
    old, new = (round(tokens.shape[1] ** 0.5) for tokens in (value, expected))
    if old in (0, new) or old**2 != value.shape[1] or new**2 != expected.shape[1]:
        return value
    grid = value.transpose(1, 2).unflatten(2, (old, old))
    return F.interpolate(grid, size=(new, new), mode="bicubic").flatten(2).transpose(1, 2)
