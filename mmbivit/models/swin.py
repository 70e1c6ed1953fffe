"""Swin Transformer, float or binary, with or without spatial interaction: one class."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmbivit.binary import Recipe
from mmbivit.checkpoints.names import swin as swin_names
from mmbivit.registry import MODELS

from .arch import (
    MixingSettings,
    check_arch,
    check_image_size,
    check_recipe,
    check_settings,
    check_spatial_interaction,
    grid_sides,
    hidden_dims,
)
from .attention import WindowAttention
from .backbone import Backbone
from .block import TransformerBlock
from .layout import WindowLayout, norm_tokens
from .mlp import DualBranchMLP, build_mixing
from .patch import PatchEmbed

__all__ = ["BinarySwinTransformer", "PatchMerging", "SwinBlock", "SwinStage"]


class PatchMerging(nn.Module):
    """Join 2 x 2 neighbouring tokens and project them to twice the channels.

    The four tokens are concatenated in the order of the official Swin: top left, bottom left, top right, bottom right.

    Args:
        embed_dims: channels ``C``.
        recipe: which linear layer to build.
        norm: normalises the ``4 * C`` channels, or ``None``.

    Shape: ``(B, H*W, C) -> (B, ceil(H/2)*ceil(W/2), 2*C)``; odd sizes are padded with 0 at the bottom and right.
    """

    def __init__(self, embed_dims: int, recipe: Recipe, norm: nn.Module | None):
        super().__init__()
        self.norm = norm
        self.reduction = recipe.build_linear(4 * embed_dims, 2 * embed_dims, bias=False)

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Return the merged tokens and the height and width of their grid."""
        batch, _, channels = x.shape
        height, width = hw_shape
        x = F.pad(x.view(batch, height, width, channels), (0, 0, 0, width % 2, 0, height % 2))
        merged = (x.shape[1] // 2, x.shape[2] // 2)
        x = x.view(batch, merged[0], 2, merged[1], 2, channels)
        x = x.permute(0, 1, 3, 4, 2, 5).reshape(batch, -1, 4 * channels)
        x = x if self.norm is None else norm_tokens(self.norm, x)
        return self.reduction(x), merged


class SwinBlock(TransformerBlock):
    """(Shifted) window attention, then the dual-branch MLP, each with a shortcut.

    Args:
        embed_dims: channels ``C``.
        num_heads: attention heads.
        hidden_dims: hidden width of the MLP.
        window_size: height and width of a window in tokens.
        shift: cyclic shift of the windows in tokens.
        recipe: which quantizers, activation function and norm to build.
        mixing: settings of the spatial interaction branch; ``None`` for no branch.
        mixing_side: tokens along a square of those that it mixes, where that is no window; ``None`` for windows.
        drop: dropout rate of the projection and the MLP.
        shift_single_window: see :class:`BinarySwinTransformer`.
        qkv_bias, qk_scale, attn_drop: see :class:`mmbivit.models.MultiHeadAttention`.
        options: ``drop_path``, ``with_cp`` and ``mask_padding`` of :class:`mmbivit.models.TransformerBlock`.

    Shape: ``(B, H*W, C) -> (B, H*W, C)``.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        hidden_dims: int,
        window_size: int,
        shift: int,
        recipe: Recipe,
        mixing: MixingSettings | None,
        mixing_side: int | None = None,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        drop: float = 0.0,
        shift_single_window: bool = True,
        **options: Any,
    ):
        attn = WindowAttention(
            embed_dims,
            num_heads,
            window_size,
            recipe,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            attn_drop=attn_drop,
            proj_drop=drop,
        )
        tokens = (mixing_side or window_size) ** 2
        mlp = DualBranchMLP(embed_dims, hidden_dims, recipe, build_mixing(embed_dims, tokens, recipe, mixing), drop)
        super().__init__(embed_dims, attn, mlp, recipe, **options)
        self.window_size = window_size
        self.shift = shift
        self.shift_single_window = shift_single_window
        self.mixing_side = mixing_side

    def layout(self, hw_shape: tuple[int, int]) -> WindowLayout:
        """Return how the tokens of a grid of ``hw_shape`` lie in windows."""
        single = min(hw_shape) <= self.window_size and not self.shift_single_window
        return WindowLayout(hw_shape, self.window_size, 0 if single else self.shift)

    def mixing_layout(self, hw_shape: tuple[int, int]) -> WindowLayout:
        """Return in which squares of a grid of ``hw_shape`` tokens are mixed."""
        return self.layout(hw_shape) if self.mixing_side is None else WindowLayout(hw_shape, self.mixing_side)


class SwinStage(nn.Module):
    """Blocks of one resolution, then patch merging to the next.

    Args:
        blocks: the blocks, every second one with shifted windows.
        downsample: leads to the next stage; ``None`` in the last one.
    """

    def __init__(self, blocks: Sequence[SwinBlock], downsample: PatchMerging | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Apply the blocks: ``(B, H*W, C) -> (B, H*W, C)``."""
        for block in self.blocks:
            x = block(x, hw_shape)
        return x


@MODELS.register_module()
class BinarySwinTransformer(Backbone):
    """Swin Transformer with 1-bit weights and activations and spatial interaction (SI-BiViT).

    ``recipe='float'`` is the float Swin, equal to ``mmdet.SwinTransformer`` with the same weights. Float weights of
    mmdet, timm and the official Swin load into both (see :mod:`mmbivit.checkpoints`).

    Args:
        arch: ``'tiny'``, ``'small'``, ``'base'``, or a dict with ``embed_dims``, ``depths`` and ``num_heads``.
        recipe: a name of :data:`mmbivit.binary.RECIPES`, or a dict of changes to one.
        spatial_interaction: ``dict(ratio=1.0)`` adds the token-mixing branch with ``n' = ratio * n`` hidden tokens;
            ``None`` switches it off. ``axis='window'`` mixes within the block's own windows, at any image size alike;
            ``'grid'`` mixes the whole feature map of an image of ``pretrain_img_size``, and tiles of that size of any
            other, as the operation counts of the paper have it. ``alpha_init`` and ``per``: see
            :class:`mmbivit.models.SpatialInteraction`.
        stage1: what is binary in training stage 1 of two, ``'activations'`` (the method, by default), ``'weights'``
            (the paper's baseline) or ``'all'``, spatial interaction included (a control).
        mlp_ratio: hidden width of the MLP over channels; the paper takes 3 with spatial interaction, 4 without.
        pretrain_img_size: image size in pixels that ``use_abs_pos_embed`` is made for, to which other sizes are
            interpolated, and whose feature maps ``spatial_interaction`` mixes with ``axis='grid'``.
        in_channels: channels of the image.
        patch_size: pixels of a patch.
        window_size: tokens along a window.
        out_indices: stages whose normalised output is returned.
        qkv_bias: add a bias to queries, keys and values.
        qk_scale: factor of attention scores, ``head_dim ** -0.5`` by default.
        patch_norm: normalise after patch embedding and before the projection of patch merging.
        drop_rate: dropout rate of tokens, projections and MLPs.
        attn_drop_rate: dropout rate of attention weights.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
        use_abs_pos_embed: add a learnable position embedding to the tokens.
        with_cp: recompute blocks in the backward pass (less memory, more time).
        shift_single_window: shift windows also where a feature map is not longer than one, as mmdet does for detection;
            ``False`` for classification, as in timm and the official Swin: at 224 pixels the last stage is one window.
        convert_weights: accept the key names of other Swin implementations on load; otherwise only our own.
        frozen_stages: freeze the patch embedding (0) and the first stages (1, 2, ...); -1 for none.
        norm_eval: keep the running statistics of BatchNorm fixed in training.
        mask_padding: never attend to the tokens that pad a feature map to whole windows. ``None`` for True, but False
            with ``recipe='float'``: float Swin as released attends to them.
        downsample: linear layers of patch merging, ``'binary'`` or ``'float'``; ``None`` for what the recipe has.
        training_stages: a plan of training in place of ``stage1``, such as
            ``[dict(activations=True, weights=['attn']), dict(activations=True, weights=['attn', 'mlp'])]``: what is
            binary in each stage but the last, see :class:`mmbivit.models.TrainingStage`. In the last one all is, and
            spatial interaction is awake.
        init_cfg: ``dict(type='Pretrained', checkpoint=file, URL or timm://NAME, prefix='backbone.')`` or ``None``.

    Shape: images ``(B, in_channels, H, W)`` -> tuple of ``(B, C * 2**i, ceil(H / (4 * 2**i)), ...)`` for ``i`` in
    ``out_indices``.

    Raises:
        ValueError: for a setting of the wrong type or out of range, an unknown arch, recipe or stage, heads that do not
            divide the channels, or a fractional width; the message names the key and what is allowed.
    """

    weight_names = swin_names
    binary_options = (*Backbone.binary_options, "downsample", "mask_padding")

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
        window_size: int = 7,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        patch_norm: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        use_abs_pos_embed: bool = False,
        with_cp: bool = False,
        shift_single_window: bool = True,
        convert_weights: bool = True,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        mask_padding: bool | None = None,
        downsample: str | None = None,
        training_stages: Sequence[dict] | None = None,
        init_cfg: dict | None = None,
    ):
        embed_dims, depths, num_heads = check_arch(arch)
        super().__init__(
            len(depths), out_indices, stage1, frozen_stages, norm_eval, convert_weights, init_cfg, training_stages
        )
        recipe, mask_padding, downsample = check_recipe(recipe, mask_padding, downsample)
        mixing = check_spatial_interaction(spatial_interaction)
        check_settings(mlp_ratio=mlp_ratio, in_channels=in_channels, patch_size=patch_size, window_size=window_size)
        check_settings(drop_rate=drop_rate, attn_drop_rate=attn_drop_rate, drop_path_rate=drop_path_rate)
        check_settings(qkv_bias=qkv_bias, patch_norm=patch_norm, use_abs_pos_embed=use_abs_pos_embed, with_cp=with_cp)
        check_settings(shift_single_window=shift_single_window, qk_scale=qk_scale)
        image_size = check_image_size(pretrain_img_size)
        mixing_sides: Sequence[int | None] = [None] * len(depths)
        if mixing is not None and mixing.axis == "grid":
            mixing_sides = grid_sides(image_size, patch_size, len(depths))
        self.num_features = [embed_dims * 2**i for i in range(len(depths))]
        self.strides = [patch_size * 2**i for i in range(len(depths))]

        def patch_norm_layer(channels: int) -> nn.Module | None:
            return recipe.norm_layer(channels) if patch_norm else None

        self.patch_embed = PatchEmbed(in_channels, embed_dims, patch_size, patch_norm_layer(embed_dims))
        if use_abs_pos_embed:
            self._add_position_embedding(tuple(-(-pixels // patch_size) for pixels in image_size), embed_dims)  # type: ignore[arg-type]  # two sides
        self.drop_after_pos = nn.Dropout(drop_rate)

        merging_recipe = replace(recipe, linear=downsample)  # type: ignore[arg-type]  # checked
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu")  # numbers, also for "meta"
        drop_path = iter(rates.tolist())
        self.stages = nn.ModuleList()
        for i, (channels, depth, heads) in enumerate(zip(self.num_features, depths, num_heads, strict=True)):
            blocks = [
                SwinBlock(
                    channels,
                    heads,
                    hidden_dims(channels, mlp_ratio),
                    window_size,
                    shift=window_size // 2 if block % 2 else 0,
                    recipe=recipe,
                    mixing=mixing,
                    mixing_side=mixing_sides[i],
                    qkv_bias=qkv_bias,
                    qk_scale=qk_scale,
                    attn_drop=attn_drop_rate,
                    drop=drop_rate,
                    drop_path=next(drop_path),
                    with_cp=with_cp,
                    shift_single_window=shift_single_window,
                    mask_padding=mask_padding,
                )
                for block in range(depth)
            ]
            last = i == len(depths) - 1
            merging = None if last else PatchMerging(channels, merging_recipe, patch_norm_layer(4 * channels))
            self.stages.append(SwinStage(blocks, merging))
        for i in self.out_indices:
            self.add_module(f"norm{i}", recipe.norm_layer(self.num_features[i]))

        self._finish_init()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the feature maps of ``out_indices``."""
        x, hw_shape = self.embed(images)
        outputs = []
        for i, stage in enumerate(self.stages):
            x = stage(x, hw_shape)
            if i in self.out_indices:
                outputs.append(self.feature_map(x, hw_shape, i))
            if stage.downsample is not None:
                x, hw_shape = stage.downsample(x, hw_shape)
        return tuple(outputs)
