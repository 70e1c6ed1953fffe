"""Packing of :class:`mmbivit.BinaryNesT`."""

import torch

from mmbivit.deploy.folding import norm_affine
from mmbivit.deploy.registry import packs
from mmbivit.models import BinaryNesT
from mmbivit.models.nest import Aggregation, NesTBlock, NesTStage
from mmbivit.packed import PackedNesT
from mmbivit.packed.nest import PackedAggregation
from mmbivit.packed.packing import pad_channels

from .block import BLOCK_PARTS, block_options, pack_block, pack_patch_embed
from .checks import check_backbone, named

__all__ = ["pack_nest"]


@packs(BinaryNesT)
@torch.no_grad()
def pack_nest(backbone: BinaryNesT) -> PackedNesT:
    """Pack a NesT; see :func:`mmbivit.deploy.pack`."""
    check_backbone(backbone, (BinaryNesT, NesTStage, NesTBlock, Aggregation, *BLOCK_PARTS))
    blocks = [stage.blocks[0] for stage in backbone.stages]
    packed = PackedNesT(
        embed_dims=backbone.num_features[0],
        depths=tuple(len(stage.blocks) for stage in backbone.stages),
        num_heads=tuple(block.attn.num_heads for block in blocks),
        hidden_dims=tuple(block.mlp.fc1.out_features for block in blocks),
        si_hidden=None if blocks[0].mlp.si is None else blocks[0].mlp.si.fc1.out_features,
        scales=tuple(float(block.attn.scale) for block in blocks),
        side=blocks[0].side,
        grid=backbone.stages[0].grid[0],
        patch_size=backbone.patch_embed.patch_size,
        in_channels=backbone.patch_embed.proj.in_channels,
        out_indices=tuple(backbone.out_indices),
        **block_options(backbone),
    )
    packed.to(next(backbone.parameters()).device)
    pack_patch_embed(backbone, packed)
    for i, (stage, packed_stage) in enumerate(zip(backbone.stages, packed.stages, strict=True)):
        packed_stage.pos_embed.copy_(stage.pos_embed)
        if stage.pool is not None:
            with named(f"stages.{i}.pool.norm"):
                _pack_aggregation(stage.pool, packed_stage.pool)
    for block in backbone.blocks():
        pack_block(block.module, packed.get_submodule(block.name), block.name)
    for i in backbone.out_indices:
        with named(f"norm{i}"):
            norm = getattr(packed, f"norm{i}")
            affine = norm_affine(getattr(backbone, f"norm{i}"), backbone.num_features[i], norm.layer_norm)
        norm.fill(affine=pad_channels(torch.stack(affine)))
    return packed


def _pack_aggregation(pool: Aggregation, packed: PackedAggregation) -> None:
    weight, bias = pool.conv.weight.double(), pool.conv.bias.double()  # type: ignore[union-attr]  # it has a bias
    gain, shift = norm_affine(pool.norm, pool.conv.out_channels, packed.layer_norm)
    if packed.layer_norm:
        packed.fill(weight=weight, bias=bias, norm=torch.stack([gain, shift]))
    else:
        packed.fill(weight=weight * gain.view(-1, 1, 1, 1), bias=bias * gain + shift)
