"""Packing of what backbones share: the patch embedding, and the transformer block."""

from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from mmbivit.binary import BinaryLinear, HeadShortcut, LearnedScale, ResidualBinaryLinear, RPReLU
from mmbivit.checks import UserError
from mmbivit.deploy.folding import fold_linear, hidden_thresholds, norm_affine, sign_affine
from mmbivit.models import (
    Backbone,
    DualBranchMLP,
    MultiHeadAttention,
    SpatialInteraction,
    TransformerBlock,
    WindowAttention,
)
from mmbivit.models.patch import PatchEmbed
from mmbivit.packed import PackedDualBranchMLP, PackedNetwork, PackedResidualAttention, PackedWindowAttention
from mmbivit.packed.block import PackedBlock
from mmbivit.packed.packing import pack_signs, pack_weight, pad_channels, padded

from .checks import expect, named
from .heads import head_tensors, selection_options
from .residual import pack_residual_attention, pack_residual_mlp

__all__ = ["BLOCK_PARTS", "block_options", "pack_block", "pack_patch_embed"]

# The classes of modules that are packed here, or may be left out in evaluation.
BLOCK_PARTS = (
    *(PatchEmbed, MultiHeadAttention, WindowAttention, DualBranchMLP, SpatialInteraction),
    *(BinaryLinear, ResidualBinaryLinear, HeadShortcut, LearnedScale, RPReLU),
    *(nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.SyncBatchNorm, nn.LayerNorm, nn.Softmax),
    *(nn.ModuleList, nn.Identity, nn.Dropout, DropPath, nn.GELU, nn.PReLU, nn.ReLU),
)


def block_options(backbone: Backbone) -> dict[str, Any]:
    """Return the fields of :class:`mmbivit.packed.block.PackedBlockConfig` that say what all blocks are made of."""
    blocks = {block.name: block.module for block in backbone.blocks()}
    first = next(iter(blocks.values()))
    residual = isinstance(first.attn.qkv, ResidualBinaryLinear)
    return dict(
        mask_padding=first.mask_padding,
        norm="ln" if isinstance(first.norm1, nn.LayerNorm) else "bn",
        residual=residual,
        head_shortcut=residual and first.attn.head_shortcut is not None,
        **selection_options({f"{name}.attn": block.attn for name, block in blocks.items()}),
    )


def pack_patch_embed(backbone: Backbone, packed: PackedNetwork) -> None:
    """Pack the patch embedding, its norm if there is one, and the position embedding."""
    embed = backbone.patch_embed
    with named("patch_embed.norm"):
        gain, shift = norm_affine(embed.norm, embed.proj.out_channels, packed.patch_embed.layer_norm)
    weight, bias = embed.proj.weight.double().flatten(1), embed.proj.bias.double()
    if packed.patch_embed.layer_norm:
        tensors = dict(weight=pad_channels(weight.T), bias=pad_channels(bias), norm=torch.stack([gain, shift]))
    else:
        tensors = dict(weight=pad_channels((gain[:, None] * weight).T), bias=pad_channels(gain * bias + shift))
    packed.patch_embed.fill(**tensors)
    if backbone.absolute_pos_embed is not None:
        packed.absolute_pos_embed.copy_(backbone.absolute_pos_embed)


def pack_block(block: TransformerBlock, packed: PackedBlock, name: str) -> None:
    """Pack a transformer block ``name``."""
    si = block.mlp.si
    if si is not None and not si.active:
        raise UserError(f"{name}.mlp.si is idle, as in an earlier training stage; train on to the last, then pack")
    if isinstance(packed.attn, PackedResidualAttention):
        pack_residual_attention(block, packed.attn, name)
        pack_residual_mlp(block.mlp, packed.mlp, f"{name}.mlp")
        return
    _pack_attention(block, packed.attn, name)
    _pack_mlp(block.mlp, packed.mlp, f"{name}.mlp")


def _pack_attention(block: nn.Module, packed: PackedWindowAttention, name: str) -> None:
    attn = block.attn
    expect(attn.qkv, f"{name}.attn.qkv", BinaryLinear)
    if attn.head_shortcut is not None:
        raise UserError(f"{name}.attn.head_shortcut can be packed with recipe.layer_shortcut=True alone")
    expect(attn.proj, f"{name}.attn.proj", BinaryLinear)
    gamma = attn.proj.input_quantizer.fold()
    tensors, value = head_tensors(attn, packed)
    gamma = gamma / value.repeat_interleave(packed.head_dim)
    head_dim = packed.head_dim
    extra = padded(head_dim) - head_dim

    def pad_heads(values: Tensor, value: float = 0) -> Tensor:
        """Pad the channels of each head on the last axis, ``(*, n * heads * head_dim)``."""
        split = values.unflatten(-1, (-1, head_dim))
        return nn.functional.pad(split, (0, extra), value=value).flatten(-2)

    with named(f"{name}.norm1"):
        in_affine = sign_affine(block.norm1, attn.qkv.input_quantizer, packed.layer_norm)
    with named(f"{name}.attn.qkv"):
        signs, _, _ = fold_linear(attn.qkv)
        thresholds = hidden_thresholds(attn.qkv, attn.qkv_quantizer)
    with named(f"{name}.attn.proj"):
        proj_signs, scale, bias = fold_linear(attn.proj)
    low, width = thresholds
    # (2 * set - selected) / selected >= gamma, or without the division
    if attn.attention.divide:
        tensors["value_ratio"] = pad_heads((1 + gamma) / 2, torch.inf)
    else:
        tensors["value_ratio"] = pad_heads(torch.full_like(gamma, 0.5), torch.inf)
        tensors["value_offset"] = pad_heads(gamma / 2)
    packed.fill(
        **tensors,
        in_affine=in_affine,
        padding=pack_signs(attn.qkv.input_quantizer.fold() <= 0),  # padding is 0 after the norm
        qkv_weight=pack_weight(pad_heads(signs.T).T),
        qkv_thresholds=torch.stack([pad_heads(low), pad_heads(width, -1)]),  # never set
        proj_weight=pack_weight(pad_heads(proj_signs)),
        proj_affine=pad_channels(torch.stack([scale, bias])),
    )


def _pack_mlp(mlp: nn.Module, packed: PackedDualBranchMLP, name: str) -> None:
    expect(mlp.fc1, f"{name}.fc1", BinaryLinear)
    expect(mlp.fc2, f"{name}.fc2", BinaryLinear)
    with named(f"{name}.norm"):
        in_affine = sign_affine(mlp.norm, mlp.fc1.input_quantizer, packed.layer_norm)
    with named(f"{name}.fc1"):
        signs, _, _ = fold_linear(mlp.fc1)
        low, width = hidden_thresholds(mlp.fc1, mlp.fc2.input_quantizer, mlp.act)
    with named(f"{name}.fc2"):
        signs2, scale, bias = fold_linear(mlp.fc2)
    tensors = dict(
        in_affine=in_affine,
        fc1_weight=pack_weight(signs),
        fc1_thresholds=torch.stack([pad_channels(low), pad_channels(width, -1)]),  # never set
        fc2_weight=pack_weight(signs2),
        fc2_affine=pad_channels(torch.stack([scale, bias])),
    )
    packed.fill(**tensors, **(_si_tensors(mlp.si, f"{name}.si", packed.layer_norm) if mlp.si is not None else {}))


def _si_tensors(si: nn.Module, name: str, layer_norm: float | None) -> dict[str, Tensor]:
    expect(si.fc1, f"{name}.fc1", BinaryLinear)
    expect(si.fc2, f"{name}.fc2", BinaryLinear)
    with named(f"{name}.norm"):
        affine = torch.stack(norm_affine(si.norm, len(si.alpha), layer_norm))
    with named(f"{name}.fc1"):
        signs, _, _ = fold_linear(si.fc1)
        thresholds = hidden_thresholds(si.fc1, si.fc2.input_quantizer, si.act)
    with named(f"{name}.fc2"):
        signs2, scale, bias = fold_linear(si.fc2)
    return dict(
        si_affine=pad_channels(affine),
        si_gamma=si.fc1.input_quantizer.fold(),
        si_weight1=pack_signs(signs),
        si_thresholds1=thresholds,
        si_weight2=pack_signs(signs2),
        si_affine2=torch.stack([scale, bias]),
        si_alpha=pad_channels(si.alpha),
    )
