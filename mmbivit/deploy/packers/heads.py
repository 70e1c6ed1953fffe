"""What packed attention of every kind needs of the heads."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmbivit.binary import ActivationQuantizer, KeySelection
from mmbivit.checks import UserError
from mmbivit.models import Attention
from mmbivit.packed.modules import PackedAttention

__all__ = ["head_tensors", "selection_options"]


def selection_options(attentions: Mapping[str, Attention]) -> dict[str, Any]:
    """Return the fields of a packed configuration that say how the attention of all blocks selects keys.

    Args:
        attentions: by name.

    Raises:
        ValueError: if one is not made of bits, or they select in different ways.
    """
    ways = {}
    for name, attn in attentions.items():
        _check_heads(attn, name)
        ratio = attn.attention.fold() if attn.attention.selection == "ratio" else 0.25
        ways[name] = (attn.attention.selection, ratio, attn.attention.divide)
    first, *others = ways.items()
    for name, way in others:
        if way != first[1]:
            raise UserError(f"{name}.attention selects keys by {way}, but {first[0]} by {first[1]}; expected one way")
    scaled = any((attn.qkv_quantizer.levels()[1] != 1).any() for attn in attentions.values())
    return dict(zip(("selection", "select_ratio", "divide"), first[1], strict=True), scaled_heads=scaled)


def _check_heads(attn: Attention, name: str) -> None:
    """Raise a ValueError for attention ``name`` whose keys, or heads, are not made of bits."""
    if not isinstance(attn.attention, KeySelection):
        raise UserError(f"{name}.attention is {type(attn.attention).__name__}; only a KeySelection can be packed here")
    if not isinstance(attn.qkv_quantizer, ActivationQuantizer):
        what = type(attn.qkv_quantizer).__name__
        raise UserError(f"{name}.qkv_quantizer is {what}; only a quantizer of activations can be packed here")
    low, high = attn.qkv_quantizer.levels()
    if not torch.equal(low, -high):
        what = type(attn.qkv_quantizer).__name__
        raise UserError(f"{name}.qkv_quantizer is {what}; only signs, scaled or not, can be packed here")


def head_tensors(attn: Attention, packed: PackedAttention) -> tuple[dict[str, Tensor], Tensor]:
    """Return tensors of :class:`PackedAttention`, and what a selected value counts for each head ``(heads,)``."""
    scales = attn.qkv_quantizer.levels()[1]
    scales = scales.view(-1, 1) if len(scales) <= 3 else scales.view(3, -1)
    query, key, value = scales.expand(3, attn.num_heads)
    tensors = {}
    if packed.relative_position_bias_table is not None:
        tensors["relative_position_bias_table"] = attn.relative_position_bias_table
    if packed.score_scale is not None:
        tensors["score_scale"] = query * key
    if packed.share is not None:
        alpha = attn.attention.fold()
        tensors["share"] = (alpha / 2).log().expand(attn.num_heads)
        value = value * alpha
    return tensors, value
