"""The names of NesT weights: ours, and those of timm."""

import re
from collections.abc import Iterable, Sequence

from torch import Tensor

from mmbivit.checkpoints.content import check_tensor
from mmbivit.checks import UserError

from . import fit_positions

__all__ = ["fit_tensor", "is_foreign", "to_own_keys"]

_RENAMES = (
    (r"^levels\.", "stages."),
    (r"\.transformer_encoder\.", ".blocks."),
    (r"\.norm2\.", ".mlp.norm."),
)
_FOREIGN = re.compile(r"^levels\.\d+\.")


def is_foreign(keys: Iterable[str]) -> bool:
    """Whether keys of a backbone are those of another implementation."""
    return any(map(_FOREIGN.search, keys))


def to_own_keys(state_dict: dict[str, Tensor], num_heads: Sequence[int]) -> dict[str, Tensor]:
    """Bring the weights of timm under our names and into our layout.

    Its position embeddings lie in blocks, ours in rows of the grid. Its attention puts out all heads of a channel side
    by side, ours all channels of a head.
    """
    own = {}
    for key, value in state_dict.items():
        if key.startswith("head."):
            continue
        for pattern, replacement in _RENAMES:
            key = re.sub(pattern, replacement, key)
        key = re.sub(r"^norm\.", f"norm{len(num_heads) - 1}.", key)
        if key.endswith(".pos_embed"):
            value = _from_blocks(key, value)
        elif match := re.match(r"stages\.(\d)\..*\.attn\.proj\.weight$", key):
            value = _heads_apart(key, value, num_heads[int(match[1])] if int(match[1]) < len(num_heads) else 1)
        own[key] = value
    return own


def _from_blocks(name: str, value: Tensor) -> Tensor:
    """``(1, blocks, tokens of a block, C) -> (1, H * W, C)``, of square grids of square blocks."""
    check_tensor(name, value)
    if value.ndim != 4:
        return value
    across, side = (round(size**0.5) for size in value.shape[1:3])
    if (across**2, side**2) != tuple(value.shape[1:3]):
        raise UserError(
            f"the checkpoint is damaged: {name} has {tuple(value.shape[1:3])} blocks and tokens, no squares"
        )
    grid = value.unflatten(2, (side, side)).unflatten(1, (across, across))
    return grid.transpose(2, 3).flatten(1, 4)


def _heads_apart(name: str, value: Tensor, num_heads: int) -> Tensor:
    check_tensor(name, value)
    if value.ndim != 2 or value.shape[1] % num_heads:
        return value
    return value.unflatten(1, (-1, num_heads)).transpose(1, 2).flatten(1)


def fit_tensor(name: str, value: Tensor, expected: Tensor) -> Tensor:
    """Interpolate a position embedding ``(1, N, C)`` of another grid; other tensors are returned as they are."""
    return fit_positions(value, expected) if name.endswith(".pos_embed") else value
