"""Packing of :class:`mmbivit.BinarySwinTransformer`."""

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from mmbivit.binary import (
    BinaryLinear,
    HeadShortcut,
    LearnedScale,
    ResidualBinaryLinear,
    RPReLU,
)
from mmbivit.checks import UserError
from mmbivit.deploy.folding import fold_linear, hidden_thresholds, norm_affine, sign_affine
from mmbivit.deploy.registry import packs
from mmbivit.models import BinarySwinTransformer, DualBranchMLP, SpatialInteraction, WindowAttention
from mmbivit.models.patch import PatchEmbed
from mmbivit.models.swin import PatchMerging, SwinBlock, SwinStage
from mmbivit.packed import (
    PackedResidualAttention,
    PackedResidualPatchMerging,
    PackedSwinConfig,
    PackedSwinTransformer,
)
from mmbivit.packed.modules import FloatPatchMerging, PackedDualBranchMLP, PackedPatchMerging, PackedWindowAttention
from mmbivit.packed.packing import pack_signs, pack_weight, pad_channels, padded
from mmbivit.packed.swin import PackedBlock

from .checks import check_backbone, expect, named
from .heads import head_tensors, selection_options
from .residual import pack_residual_attention, pack_residual_merging, pack_residual_mlp

__all__ = ["pack_swin"]

_KNOWN = (
    *(BinarySwinTransformer, SwinStage, SwinBlock, PatchEmbed, PatchMerging),
    *(WindowAttention, DualBranchMLP, SpatialInteraction),
    *(BinaryLinear, ResidualBinaryLinear, HeadShortcut, LearnedScale, RPReLU),
    *(nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.SyncBatchNorm, nn.LayerNorm, nn.Softmax),
    *(nn.ModuleList, nn.Identity, nn.Dropout, DropPath, nn.GELU, nn.PReLU, nn.ReLU),
)


@packs(BinarySwinTransformer)
@torch.no_grad()
def pack_swin(backbone: BinarySwinTransformer) -> PackedSwinTransformer:
    """Pack a Swin; see :func:`mmbivit.deploy.pack`."""
    check_backbone(backbone, _KNOWN)
    packed = PackedSwinTransformer(**vars(_config(backbone)))
    packed.to(next(backbone.parameters()).device)
    _pack_patch_embed(backbone, packed)
    for block in backbone.blocks():
        _pack_block(block.module, packed.get_submodule(block.name), block.name)
    for i, (stage, packed_stage) in enumerate(zip(backbone.stages, packed.stages, strict=True)):
        if stage.downsample is not None:
            _pack_merging(stage.downsample, packed_stage.downsample, f"stages.{i}.downsample")
    for i in backbone.out_indices:
        with named(f"norm{i}"):
            norm = getattr(packed, f"norm{i}")
            affine = norm_affine(getattr(backbone, f"norm{i}"), backbone.num_features[i], norm.layer_norm)
        norm.fill(affine=pad_channels(torch.stack(affine)))
    return packed


def _config(backbone: BinarySwinTransformer) -> PackedSwinConfig:
    blocks = [stage.blocks[0] for stage in backbone.stages]
    branches = [block.mlp.si for block in blocks]
    sides = tuple(block.mixing_side for block in blocks)
    attn = blocks[0].attn
    residual = isinstance(attn.qkv, ResidualBinaryLinear)
    options = selection_options({f"{block.name}.attn": block.module.attn for block in backbone.blocks()})
    reductions = [stage.downsample.reduction for stage in backbone.stages if stage.downsample is not None]
    return PackedSwinConfig(
        embed_dims=backbone.num_features[0],
        depths=tuple(len(stage.blocks) for stage in backbone.stages),
        num_heads=tuple(block.attn.num_heads for block in blocks),
        hidden_dims=tuple(block.mlp.fc1.out_features for block in blocks),
        si_hidden=_si_hidden(branches),
        scales=tuple(float(block.attn.scale) for block in blocks),
        window_size=blocks[0].window_size,
        patch_size=backbone.patch_embed.patch_size,
        in_channels=backbone.patch_embed.proj.in_channels,
        out_indices=tuple(backbone.out_indices),
        float_downsample=bool(reductions) and type(reductions[0]) is nn.Linear,
        pos_embed_shape=None if backbone.absolute_pos_embed is None else tuple(backbone.pos_embed_shape),
        shift_single_window=blocks[0].shift_single_window,
        mask_padding=blocks[0].mask_padding,
        si_sides=None if branches[0] is None or None in sides else sides,
        norm="ln" if isinstance(blocks[0].norm1, nn.LayerNorm) else "bn",
        patch_norm=backbone.patch_embed.norm is not None,
        residual=residual,
        head_shortcut=residual and attn.head_shortcut is not None,
        select_ratio=options.pop("ratio"),
        **options,
    )


def _si_hidden(branches: list[SpatialInteraction | None]) -> int | tuple[int, ...] | None:
    """Return the hidden tokens of all stages alike, or of each."""
    if branches[0] is None:
        return None
    hidden = tuple(si.fc1.out_features for si in branches)
    return hidden[0] if len(set(hidden)) == 1 else hidden


def _pack_patch_embed(backbone: BinarySwinTransformer, packed: PackedSwinTransformer) -> None:
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


def _pack_block(block: nn.Module, packed: PackedBlock, name: str) -> None:
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


def _si_tensors(si: nn.Module, name: str, layer_norm: bool) -> dict[str, Tensor]:
    expect(si.fc1, f"{name}.fc1", BinaryLinear)
    expect(si.fc2, f"{name}.fc2", BinaryLinear)
    if not si.active:
        raise UserError(f"{name} is idle, as in an earlier training stage; train on to the last, then pack")
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


def _pack_merging(merging: nn.Module, packed: nn.Module, name: str) -> None:
    if isinstance(packed, FloatPatchMerging):
        expect(merging.reduction, f"{name}.reduction", nn.Linear)
        with named(f"{name}.norm"):
            gain, shift = norm_affine(merging.norm, merging.reduction.in_features, packed.layer_norm)
        weight = merging.reduction.weight.double()
        packed.fill(weight=weight * gain, bias=weight @ shift)
        return
    if isinstance(packed, PackedResidualPatchMerging):
        pack_residual_merging(merging, packed, name)
        return
    assert isinstance(packed, PackedPatchMerging)
    expect(merging.reduction, f"{name}.reduction", BinaryLinear)
    with named(f"{name}.norm"):
        in_affine = sign_affine(merging.norm, merging.reduction.input_quantizer, packed.layer_norm)
    with named(f"{name}.reduction"):
        signs, scale, bias = fold_linear(merging.reduction)
    affine = pad_channels(torch.stack([scale, bias]))
    packed.fill(in_affine=in_affine, weight=pack_weight(signs), out_affine=affine)
