"""Packing of :class:`mmbivit.BinarySwinTransformer`."""

import torch
from torch import nn

from mmbivit.binary import BinaryLinear
from mmbivit.deploy.folding import fold_linear, norm_affine, sign_affine
from mmbivit.deploy.registry import packs
from mmbivit.models import BinarySwinTransformer, SpatialInteraction
from mmbivit.models.swin import PatchMerging, SwinBlock, SwinStage
from mmbivit.packed import PackedResidualPatchMerging, PackedSwinConfig, PackedSwinTransformer
from mmbivit.packed.modules import FloatPatchMerging, PackedPatchMerging
from mmbivit.packed.packing import pack_weight, pad_channels

from .block import BLOCK_PARTS, block_options, pack_block, pack_patch_embed
from .checks import check_backbone, expect, named
from .residual import pack_residual_merging

__all__ = ["pack_swin"]

_KNOWN = (BinarySwinTransformer, SwinStage, SwinBlock, PatchMerging, *BLOCK_PARTS)


@packs(BinarySwinTransformer)
@torch.no_grad()
def pack_swin(backbone: BinarySwinTransformer) -> PackedSwinTransformer:
    """Pack a Swin; see :func:`mmbivit.deploy.pack`."""
    check_backbone(backbone, _KNOWN)
    packed = PackedSwinTransformer(**vars(_config(backbone)))
    packed.to(next(backbone.parameters()).device)
    pack_patch_embed(backbone, packed)
    for block in backbone.blocks():
        pack_block(block.module, packed.get_submodule(block.name), block.name)
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
        pos_embed_shape=None if backbone.absolute_pos_embed is None else tuple(backbone.pos_embed_shape),  # type: ignore[arg-type]  # two
        shift_single_window=blocks[0].shift_single_window,
        si_sides=None if branches[0] is None or None in sides else sides,
        patch_norm=backbone.patch_embed.norm is not None,
        **block_options(backbone),
    )


def _si_hidden(branches: list[SpatialInteraction | None]) -> int | tuple[int, ...] | None:
    """Return the hidden tokens of all stages alike, or of each."""
    hidden = tuple(si.fc1.out_features for si in branches if si is not None)
    if not hidden:
        return None
    return hidden[0] if len(set(hidden)) == 1 else hidden


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
