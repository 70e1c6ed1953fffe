"""NesT, the nested hierarchical transformer, float or binary, with or without spatial interaction: one class."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from mmbivit.binary import Recipe, get_recipe
from mmbivit.checkpoints.names import nest as nest_names
from mmbivit.checks import UserError
from mmbivit.packed.modules import position_embedding
from mmbivit.packed.nest import pool_map
from mmbivit.registry import MODELS

from .arch import check_arch, check_image_size, check_settings, check_spatial_interaction, hidden_dims
from .attention import MultiHeadAttention
from .backbone import Backbone
from .block import TransformerBlock
from .layout import WindowLayout, norm_tokens
from .mlp import DualBranchMLP, build_mixing
from .patch import PatchEmbed

__all__ = ["NEST_ARCHITECTURES", "Aggregation", "BinaryNesT", "NesTBlock", "NesTStage"]

NEST_ARCHITECTURES = {
    "tiny": dict(embed_dims=96, depths=(2, 2, 8), num_heads=(3, 6, 12)),
    "small": dict(embed_dims=96, depths=(2, 2, 20), num_heads=(3, 6, 12)),
    "base": dict(embed_dims=128, depths=(2, 2, 20), num_heads=(4, 8, 16)),
}


class Aggregation(nn.Module):
    """Lead from one stage to the next: float 3 x 3 convolution, norm, 3 x 3 max pool of stride 2.

    Args:
        in_channels: channels ``C`` of a token before.
        out_channels: channels ``D`` after.
        recipe: which norm to build.

    Shape: ``(B, H*W, C) -> (B, ceil(H/2)*ceil(W/2), D)``; where a side is even the pool looks beyond the bottom and
    right border, as in the published weights.
    """

    def __init__(self, in_channels: int, out_channels: int, recipe: Recipe):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm = recipe.norm_layer(out_channels)

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Return the tokens and the height and width of their grid."""
        x = self.conv(x.transpose(1, 2).unflatten(2, hw_shape))
        x = norm_tokens(self.norm, x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, hw_shape)
        return pool_map(x)


class NesTBlock(TransformerBlock):
    """Attention inside square blocks of the feature map, then the dual-branch MLP, each with a shortcut.

    Args:
        side: tokens along a block.
        options: those of :class:`mmbivit.models.TransformerBlock`.

    Shape: ``(B, H*W, C) -> (B, H*W, C)``.
    """

    def __init__(self, side: int, **options):
        super().__init__(**options)
        self.side = side

    def layout(self, hw_shape: tuple[int, int]) -> WindowLayout:
        """Return how the tokens of a grid of ``hw_shape`` lie in blocks."""
        return WindowLayout(hw_shape, self.side)


class NesTStage(nn.Module):
    """Aggregation of the stage before, a position embedding, then blocks of one resolution.

    Args:
        blocks: the blocks.
        pool: aggregation; ``None`` in the first stage.
        grid: height and width that the position embedding is made for.
        channels: of a token.
    """

    def __init__(self, blocks: Sequence[NesTBlock], pool: Aggregation | None, grid: tuple[int, int], channels: int):
        super().__init__()
        self.grid = grid
        self.pool = pool
        self.pos_embed = nn.Parameter(torch.zeros(1, grid[0] * grid[1], channels))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Return the tokens after the blocks, and the height and width of their grid."""
        if self.pool is not None:
            x, hw_shape = self.pool(x, hw_shape)
        x = x + position_embedding(self.pos_embed, self.grid, hw_shape)
        for block in self.blocks:
            x = block(x, hw_shape)
        return x, hw_shape


@MODELS.register_module()
class BinaryNesT(Backbone):
    """NesT with 1-bit weights and activations and spatial interaction (SI-BiViT 4.1.1).

    Attention, and spatial interaction, stay inside blocks of 14 x 14 tokens of an image of 224 pixels: 16 of them in
    the first stage, 4 in the second, 1 in the third. Larger feature maps have more blocks. Between stages there is a
    float convolution in every recipe, as the operations that the paper counts contain it.

    ``recipe='float'`` is the float network, equal to timm's ``nest_tiny_jx`` and the like with the same weights, which
    load into both.

    Args:
        arch: ``'tiny'``, ``'small'``, ``'base'``, or a dict with ``embed_dims``, ``depths`` and ``num_heads``.
        recipe: a name of :data:`mmbivit.binary.RECIPES`, or a dict of changes to one.
        spatial_interaction: ``dict(ratio=1.0)`` adds the branch that mixes the tokens of a block, with ``n' = ratio *
            n`` hidden tokens; ``None`` switches it off. ``alpha_init`` and ``per``: see
            :class:`mmbivit.models.SpatialInteraction`.
        stage1: what is binary in training stage 1 of two, ``'activations'`` (the method, by default), ``'weights'``
            (the paper's baseline) or ``'all'``, spatial interaction included (a control).
        mlp_ratio: hidden width of the MLP over channels; the paper takes 3 with spatial interaction, 4 without.
        pretrain_img_size: image size in pixels that decides the size of blocks, the same in each stage, and of the
            position embeddings, which are interpolated for others.
        in_channels: channels of the image.
        patch_size: pixels of a patch.
        out_indices: stages whose normalised output is returned.
        qkv_bias: add a bias to queries, keys and values.
        qk_scale: factor of attention scores, ``head_dim ** -0.5`` by default.
        drop_rate: dropout rate of tokens, projections and MLPs.
        attn_drop_rate: dropout rate of attention weights.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0. timm's 0.5 is for float networks.
        with_cp: recompute blocks in the backward pass (less memory, more time).
        convert_weights: accept timm's key names on load; otherwise only our own.
        frozen_stages: freeze the patch embedding (0) and the first stages (1, 2, ...); -1 for none.
        norm_eval: keep the running statistics of BatchNorm fixed in training.
        mask_padding: never attend to the tokens that pad a feature map to whole blocks.
        training_stages: a plan of training in place of ``stage1``, see :class:`mmbivit.models.TrainingStage`.
        init_cfg: ``dict(type='Pretrained', checkpoint=file, URL or timm://NAME, prefix='backbone.')`` or ``None``.

    Shape: images ``(B, in_channels, H, W)`` -> tuple of ``(B, C * 2**i, ceil(H / (4 * 2**i)), ...)`` for ``i`` in
    ``out_indices``.

    Raises:
        ValueError: for a setting of the wrong type or out of range, or a ``pretrain_img_size`` whose feature map does
            not halve into blocks; the message names the key and what is allowed.
    """

    weight_names = nest_names

    def __init__(
        self,
        arch: str | dict = "tiny",
        recipe: str | dict | Recipe = "sibivit",
        spatial_interaction: dict | None = None,
        stage1: str | None = None,
        mlp_ratio: float = 4,
        pretrain_img_size: int | tuple[int, int] = 224,
        in_channels: int = 3,
        patch_size: int = 4,
        out_indices: Sequence[int] = (0, 1, 2),
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        with_cp: bool = False,
        convert_weights: bool = True,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        mask_padding: bool = True,
        training_stages: Sequence[dict] | None = None,
        init_cfg: dict | None = None,
    ):
        embed_dims, depths, num_heads = check_arch(arch, NEST_ARCHITECTURES)
        super().__init__(
            len(depths), out_indices, stage1, frozen_stages, norm_eval, convert_weights, init_cfg, training_stages
        )
        recipe = replace(get_recipe(recipe), norm_eps=1e-6)  # of timm's NesT
        mixing = check_spatial_interaction(spatial_interaction)
        if mixing is not None and mixing.axis == "grid":
            raise UserError("spatial_interaction.axis='grid'; allowed: 'window', the blocks of the feature map")
        check_settings(mlp_ratio=mlp_ratio, in_channels=in_channels, patch_size=patch_size, with_cp=with_cp)
        check_settings(drop_rate=drop_rate, attn_drop_rate=attn_drop_rate, drop_path_rate=drop_path_rate)
        check_settings(qkv_bias=qkv_bias, qk_scale=qk_scale, mask_padding=mask_padding)
        grid = _check_grid(check_image_size(pretrain_img_size), patch_size, len(depths))
        side = grid // 2 ** (len(depths) - 1)
        self.num_features = [embed_dims * 2**i for i in range(len(depths))]
        self.strides = [patch_size * 2**i for i in range(len(depths))]

        self.patch_embed = PatchEmbed(in_channels, embed_dims, patch_size, None)
        self.drop_after_pos = nn.Dropout(drop_rate)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.stages = nn.ModuleList()
        for i, (channels, depth, heads) in enumerate(zip(self.num_features, depths, num_heads, strict=True)):
            blocks = [
                NesTBlock(
                    side,
                    embed_dims=channels,
                    attn=MultiHeadAttention(
                        channels, heads, recipe, qkv_bias, qk_scale, attn_drop_rate, proj_drop=drop_rate
                    ),
                    mlp=DualBranchMLP(
                        channels,
                        hidden_dims(channels, mlp_ratio),
                        recipe,
                        build_mixing(channels, side**2, recipe, mixing),
                        drop_rate,
                    ),
                    recipe=recipe,
                    drop_path=next(rates),
                    with_cp=with_cp,
                    mask_padding=mask_padding,
                )
                for _ in range(depth)
            ]
            pool = Aggregation(self.num_features[i - 1], channels, recipe) if i else None
            self.stages.append(NesTStage(blocks, pool, (grid // 2**i, grid // 2**i), channels))
        for i in self.out_indices:
            self.add_module(f"norm{i}", recipe.norm_layer(self.num_features[i]))
        self._finish_init()

    def _init_linear_layers(self) -> None:
        super()._init_linear_layers()
        for stage in self.stages:
            trunc_normal_(stage.pos_embed, std=0.02)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the feature maps of ``out_indices``."""
        x, hw_shape = self.embed(images)
        outputs = []
        for i, stage in enumerate(self.stages):
            x, hw_shape = stage(x, hw_shape)
            if i in self.out_indices:
                outputs.append(self.feature_map(x, hw_shape, i))
        return tuple(outputs)


def _check_grid(image_size: tuple[int, int], patch_size: int, num_stages: int) -> int:
    """Return the tokens along the first feature map, which has ``2**(num_stages - 1)`` blocks along each side."""
    unit = patch_size * 2 ** (num_stages - 1)
    if image_size[0] != image_size[1] or image_size[0] % unit:
        raise UserError(
            f"pretrain_img_size={image_size}; allowed: one number, a multiple of {unit}, as {num_stages} stages have "
            f"blocks of one size"
        )
    return image_size[0] // patch_size
