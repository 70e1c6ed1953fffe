"""Packing of :class:`mmbivit.BinaryVisionTransformer`."""

import torch

from mmbivit.deploy.folding import norm_affine
from mmbivit.deploy.registry import packs
from mmbivit.models import BinaryVisionTransformer
from mmbivit.models.vit import ViTBlock, ViTStage
from mmbivit.packed import PackedVisionTransformer
from mmbivit.packed.packing import pad_channels

from .block import BLOCK_PARTS, block_options, pack_block, pack_patch_embed
from .checks import check_backbone, named

__all__ = ["pack_vit"]


@packs(BinaryVisionTransformer)
@torch.no_grad()
def pack_vit(backbone: BinaryVisionTransformer) -> PackedVisionTransformer:
    """Pack a ViT; see :func:`mmbivit.deploy.pack`."""
    check_backbone(backbone, (BinaryVisionTransformer, ViTStage, ViTBlock, *BLOCK_PARTS))
    blocks = backbone.stages[0].blocks
    first = blocks[0]
    packed = PackedVisionTransformer(
        embed_dims=backbone.num_features[0],
        depth=len(blocks),
        num_heads=first.attn.num_heads,
        hidden_dims=first.mlp.fc1.out_features,
        si_hidden=None if first.mlp.si is None else first.mlp.si.fc1.out_features,
        scale=float(first.attn.scale),
        pos_embed_shape=tuple(backbone.pos_embed_shape),
        extra_tokens=backbone.extra_tokens,
        out_type=backbone.out_type,
        window_size=first.mixing_window,
        global_blocks=tuple(i for i, block in enumerate(blocks) if block.window_size != block.mixing_window),
        patch_size=backbone.patch_embed.patch_size,
        in_channels=backbone.patch_embed.proj.in_channels,
        **block_options(backbone),
    )
    packed.to(next(backbone.parameters()).device)
    pack_patch_embed(backbone, packed)
    if backbone.extra_embed is not None:
        packed.extra_embed.copy_(backbone.extra_embed)
    for block in backbone.blocks():
        pack_block(block.module, packed.get_submodule(block.name), block.name)
    with named("norm0"):
        affine = norm_affine(backbone.norm0, backbone.num_features[0], packed.norm0.layer_norm)
    packed.norm0.fill(affine=pad_channels(torch.stack(affine)))
    return packed
