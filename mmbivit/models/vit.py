"""Vision Transformer and DeiT, float or binary, with or without spatial interaction: one class."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from mmbivit.binary import Recipe, get_recipe
from mmbivit.checkpoints.names import vit as vit_names
from mmbivit.checks import UserError, check_choice, check_flag, check_integers
from mmbivit.registry import MODELS

from .arch import check_arch, check_image_size, check_settings, check_spatial_interaction, hidden_dims
from .attention import MultiHeadAttention
from .backbone import Backbone
from .block import TransformerBlock
from .layout import AllTokens, TokenLayout, WindowLayout, norm_tokens
from .mlp import DualBranchMLP, build_mixing
from .patch import PatchEmbed

__all__ = ["VIT_ARCHITECTURES", "BinaryVisionTransformer", "ViTBlock"]

VIT_ARCHITECTURES = {
    "tiny": dict(embed_dims=192, depths=(12,), num_heads=(3,)),
    "small": dict(embed_dims=384, depths=(12,), num_heads=(6,)),
    "base": dict(embed_dims=768, depths=(12,), num_heads=(12,)),
}


class ViTBlock(TransformerBlock):
    """Attention over all tokens, or inside windows, then the dual-branch MLP, each with a shortcut.

    Args:
        extra_tokens: how many tokens beside the grid come first, such as a class token.
        window_size: tokens along a window within which tokens attend; ``None`` for all of them.
        mixing_window: tokens along a window within which they are mixed; ``None`` for all of them.
        options: those of :class:`mmbivit.models.TransformerBlock`.

    Shape: ``(B, extra_tokens + H*W, C) -> (B, extra_tokens + H*W, C)``.
    """

    def __init__(self, extra_tokens: int, window_size: int | None, mixing_window: int | None, **options: Any):
        super().__init__(**options)
        self.extra_tokens = extra_tokens
        self.window_size = window_size
        self.mixing_window = mixing_window

    def layout(self, hw_shape: tuple[int, int]) -> TokenLayout:
        """Return within which groups the tokens of a grid of ``hw_shape`` attend to each other."""
        return self._layout(hw_shape, self.window_size)

    def mixing_layout(self, hw_shape: tuple[int, int]) -> TokenLayout:
        """Return within which groups they are mixed."""
        return self._layout(hw_shape, self.mixing_window)

    def _layout(self, hw_shape: tuple[int, int], window: int | None) -> TokenLayout:
        return AllTokens(hw_shape, self.extra_tokens) if window is None else WindowLayout(hw_shape, window)


class ViTStage(nn.Module):
    """All blocks."""

    def __init__(self, blocks: Sequence[ViTBlock]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)


@MODELS.register_module()
class BinaryVisionTransformer(Backbone):
    """Vision Transformer (ViT, DeiT) with 1-bit weights and activations and spatial interaction (SI-BiViT).

    ``recipe='float'`` is the float network, equal to timm's with the same weights. Float weights of timm and the
    official DeiT load into both (see :mod:`mmbivit.checkpoints`).

    In classification (``out_type='cls_token'``) all tokens attend to each other, a class token included, and spatial
    interaction mixes them all: 197 of an image of 224 pixels, 198 with a distillation token. The number of tokens is
    fixed then. In detection (``window_size=14``) it is as in ViTDet: no class token, most blocks attend inside windows
    and mix the tokens of windows, and some attend to the whole feature map.

    Args:
        arch: ``'tiny'``, ``'small'``, ``'base'``, or a dict with ``embed_dims``, ``depths`` and ``num_heads``, each of
            the latter with one number.
        recipe: a name of :data:`mmbivit.binary.RECIPES`, or a dict of changes to one.
        spatial_interaction: ``dict(ratio=1.0)`` adds the token-mixing branch with ``n' = ratio * n`` hidden tokens;
            ``None`` switches it off. ``alpha_init`` and ``per``: see :class:`mmbivit.models.SpatialInteraction`.
        out_type: ``'featmap'`` returns the grid of tokens as a feature map, ``'cls_token'`` the class token as a
            feature map of one place; with a distillation token the channels of both.
        window_size: tokens along the windows of detection; ``None`` for attention over all tokens.
        global_blocks: which blocks attend to the whole feature map all the same; ``()`` for none, by default the last
            of each quarter.
        class_token: whether there is one; ``None`` for where there are no windows.
        distillation_token: whether there is one beside it (DeiT, distilled).
        stage1: what is binary in training stage 1 of two, ``'activations'`` (the method, by default), ``'weights'``
            (the paper's baseline) or ``'all'``, spatial interaction included (a control).
        mlp_ratio: hidden width of the MLP over channels; the paper takes 3 with spatial interaction, 4 without.
        pretrain_img_size: image size in pixels of the position embedding, which is interpolated for others.
        in_channels: channels of the image.
        patch_size: pixels of a patch.
        out_indices: ``(0,)``, as there is one stage.
        qkv_bias: add a bias to queries, keys and values.
        qk_scale: factor of attention scores, ``head_dim ** -0.5`` by default.
        drop_rate: dropout rate of tokens, projections and MLPs.
        attn_drop_rate: dropout rate of attention weights.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
        with_cp: recompute blocks in the backward pass (less memory, more time).
        convert_weights: accept the key names of timm and DeiT on load; otherwise only our own.
        frozen_stages: freeze the patch embedding and the tokens beside the grid (0) and all blocks (1); -1 for none.
        norm_eval: keep the running statistics of BatchNorm fixed in training.
        mask_padding: never attend to the tokens that pad a feature map to whole windows.
        training_stages: a plan of training in place of ``stage1``, see :class:`mmbivit.models.TrainingStage`.
        init_cfg: ``dict(type='Pretrained', checkpoint=file, URL or timm://NAME, prefix='backbone.')`` or ``None``.

    Shape: images ``(B, in_channels, H, W)`` -> one map ``(B, C, ceil(H / patch_size), ceil(W / patch_size))``, or
    ``(B, C, 1, 1)`` of a class token.

    Raises:
        ValueError: for a setting of the wrong type or out of range, or settings that do not go together; the message
            names the key and what is allowed. From ``forward``, for an image of another size than
            ``pretrain_img_size`` where spatial interaction mixes all tokens.
    """

    weight_names = vit_names

    def __init__(
        self,
        arch: str | dict = "small",
        recipe: str | dict | Recipe = "sibivit",
        spatial_interaction: dict | None = None,
        out_type: str = "featmap",
        window_size: int | None = None,
        global_blocks: Sequence[int] | None = None,
        class_token: bool | None = None,
        distillation_token: bool = False,
        stage1: str | None = None,
        mlp_ratio: float = 4,
        pretrain_img_size: int | tuple[int, int] = 224,
        in_channels: int = 3,
        patch_size: int = 16,
        out_indices: Sequence[int] = (0,),
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
        embed_dims, depths, num_heads = check_arch(arch, VIT_ARCHITECTURES)
        if len(depths) != 1:
            raise UserError(f"arch.depths={depths}; allowed: one number, as all blocks have the same grid of tokens")
        super().__init__(1, out_indices, stage1, frozen_stages, norm_eval, convert_weights, init_cfg, training_stages)
        recipe = replace(get_recipe(recipe), norm_eps=1e-6)  # of timm's ViT
        mixing = check_spatial_interaction(spatial_interaction)
        check_settings(mlp_ratio=mlp_ratio, in_channels=in_channels, patch_size=patch_size, with_cp=with_cp)
        check_settings(drop_rate=drop_rate, attn_drop_rate=attn_drop_rate, drop_path_rate=drop_path_rate)
        check_settings(qkv_bias=qkv_bias, qk_scale=qk_scale, mask_padding=mask_padding)
        if window_size is not None:
            check_settings(window_size=window_size)
        if mixing is not None and mixing.axis == "grid" and window_size is not None:
            raise UserError("spatial_interaction.axis='grid'; allowed: 'window', as window_size is given")
        grid = tuple(-(-pixels // patch_size) for pixels in check_image_size(pretrain_img_size))
        self.extra_tokens = _check_tokens(out_type, window_size, class_token, distillation_token)
        self.out_type = out_type
        self.num_features, self.strides = [embed_dims], [patch_size]
        self.num_mixed_tokens = None
        if mixing is not None:
            self.num_mixed_tokens = window_size**2 if window_size else self.extra_tokens + grid[0] * grid[1]

        self.patch_embed = PatchEmbed(in_channels, embed_dims, patch_size, None)
        self._add_position_embedding(grid, embed_dims)  # type: ignore[arg-type]  # two sides
        tokens = torch.zeros(1, self.extra_tokens, embed_dims)
        self.extra_embed = nn.Parameter(tokens) if self.extra_tokens else None
        self.drop_after_pos = nn.Dropout(drop_rate)
        rates = torch.linspace(0, drop_path_rate, depths[0], device="cpu").tolist()
        everywhere = _check_global_blocks(global_blocks, depths[0], window_size)
        blocks = [
            ViTBlock(
                self.extra_tokens,
                None if i in everywhere else window_size,
                window_size,
                embed_dims=embed_dims,
                attn=MultiHeadAttention(
                    embed_dims, num_heads[0], recipe, qkv_bias, qk_scale, attn_drop_rate, proj_drop=drop_rate
                ),
                mlp=DualBranchMLP(
                    embed_dims,
                    hidden_dims(embed_dims, mlp_ratio),
                    recipe,
                    build_mixing(embed_dims, self.num_mixed_tokens, recipe, mixing),  # type: ignore[arg-type]  # no mixing, no number
                    drop_rate,
                ),
                recipe=recipe,
                drop_path=rates[i],
                with_cp=with_cp,
                mask_padding=mask_padding,
            )
            for i in range(depths[0])
        ]
        self.stages = nn.ModuleList([ViTStage(blocks)])
        self.norm0 = recipe.norm_layer(embed_dims)
        self._finish_init()

    @property
    def out_channels(self) -> list[int]:
        """Channels of the map that is returned."""
        return [self.num_features[0] * (self.extra_tokens if self.out_type == "cls_token" else 1)]

    def _init_linear_layers(self) -> None:
        super()._init_linear_layers()
        if self.extra_embed is not None:
            trunc_normal_(self.extra_embed, std=0.02)

    def _freeze_stages(self) -> None:
        super()._freeze_stages()
        if self.frozen_stages >= 0 and self.extra_embed is not None:
            self.extra_embed.requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Return one feature map."""
        x, hw_shape = self.embed(images)
        if self.num_mixed_tokens is not None and self.stages[0].blocks[0].mixing_window is None:
            check_grid(hw_shape, self.pos_embed_shape, self.patch_embed.patch_size)
        if self.extra_embed is not None:
            x = torch.cat([self.extra_embed.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
        for block in self.stages[0].blocks:
            x = block(x, hw_shape)
        if self.out_type == "cls_token":
            return (norm_tokens(self.norm0, x)[:, : self.extra_tokens].flatten(1)[..., None, None],)
        return (self.feature_map(x[:, self.extra_tokens :], hw_shape, 0),)


def check_grid(hw_shape: tuple[int, int], expected: tuple[int, int], patch_size: int) -> None:
    """Raise a ValueError for images of another size than the one whose tokens are mixed."""
    if hw_shape != expected:
        height, width = (side * patch_size for side in expected)
        raise UserError(
            f"images make {hw_shape[0]} x {hw_shape[1]} tokens; spatial_interaction mixes the {expected[0]} x "
            f"{expected[1]} of pretrain_img_size: give images of {height} x {width} pixels, or window_size"
        )


def _check_tokens(out_type: str, window_size: int | None, class_token: bool | None, distillation_token: bool) -> int:
    """Return how many tokens there are beside the grid."""
    check_choice("out_type", out_type, ("featmap", "cls_token"))
    check_flag("distillation_token", distillation_token)
    if class_token is None:
        class_token = window_size is None
    check_flag("class_token", class_token)
    if class_token and window_size is not None:
        raise UserError(f"class_token=True and window_size={window_size}; allowed: no class token in windows")
    if not class_token and (distillation_token or out_type == "cls_token"):
        key = "distillation_token=True" if distillation_token else "out_type='cls_token'"
        raise UserError(f"{key} needs a class token; allowed: with window_size=None and class_token=True")
    return class_token + distillation_token


def _check_global_blocks(blocks: Sequence[int] | None, depth: int, window_size: int | None) -> tuple[int, ...]:
    """Return the blocks that attend to the whole feature map, where the others attend inside windows."""
    if window_size is None:
        if blocks is not None:
            raise UserError(f"global_blocks={blocks!r}; allowed: None, as without window_size all blocks are global")
        return ()
    if blocks is None:
        return tuple(sorted({depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)} - {-1}))
    if blocks:
        check_integers("global_blocks", blocks, 0, depth - 1)
    return tuple(blocks)
