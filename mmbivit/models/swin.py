"""Swin Transformer, float or binary, with or without spatial interaction: one class."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from mmengine.logging import MMLogger
from mmengine.model import BaseModule
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mmbivit.binary import Recipe
from mmbivit.checkpoints import load_checkpoint_file, load_pretrained, register_key_mapping
from mmbivit.checks import check_choice, check_number
from mmbivit.registry import MODELS

from .arch import (
    check_arch,
    check_image_size,
    check_indices,
    check_init_cfg,
    check_recipe,
    check_settings,
    check_spatial_interaction,
    hidden_dims,
)
from .attention import WindowAttention
from .layout import WindowLayout, norm_tokens
from .mlp import DualBranchMLP, SpatialInteraction
from .stage import STAGE1_MODES, StagedModule

__all__ = ["BinarySwinTransformer", "PatchEmbed", "PatchMerging", "SwinBlock", "SwinStage"]


class PatchEmbed(nn.Module):
    """Cut an image into patches and project each to a token; float in every recipe (SI-BiViT 4.1.1).

    Args:
        in_channels: channels of the image.
        embed_dims: channels ``C`` of a token.
        patch_size: height and width of a patch in pixels; the image is padded to whole patches with 0.
        norm: normalises the tokens, or ``None``.

    Shape: ``(B, in_channels, H, W) -> (B, H'*W', C)`` with ``H' = ceil(H / patch_size)``.
    """

    def __init__(self, in_channels: int, embed_dims: int, patch_size: int, norm: nn.Module | None):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, embed_dims, patch_size, stride=patch_size)
        self.norm = norm

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return the tokens and the height and width of their grid."""
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % self.patch_size, 0, -height % self.patch_size))
        x = self.proj(images)
        hw_shape = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)
        return (x if self.norm is None else norm_tokens(self.norm, x)), hw_shape


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


class SwinBlock(nn.Module):
    """(Shifted) window attention, then the dual-branch MLP, each with a shortcut.

    Args:
        embed_dims: channels ``C``.
        num_heads: attention heads.
        hidden_dims: hidden width of the MLP.
        window_size: height and width of a window in tokens.
        shift: cyclic shift of the windows in tokens.
        recipe: which quantizers, activation function and norm to build.
        si_ratio: hidden over input tokens of the spatial interaction branch; ``None`` for no branch.
        qkv_bias, qk_scale, attn_drop, drop, shift_single_window, mask_padding: see :class:`BinarySwinTransformer`.
        drop_path: probability of dropping a branch of a sample.
        with_cp: recompute the block in the backward pass.

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
        si_ratio: float | None,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        drop: float = 0.0,
        drop_path: float = 0.0,
        with_cp: bool = False,
        shift_single_window: bool = True,
        mask_padding: bool = True,
    ):
        super().__init__()
        self.window_size = window_size
        self.shift = shift
        self.shift_single_window = shift_single_window
        self.mask_padding = mask_padding
        self.with_cp = with_cp
        self.norm1 = recipe.norm_layer(embed_dims)
        self.attn = WindowAttention(embed_dims, num_heads, window_size, recipe, qkv_bias, qk_scale, attn_drop, drop)
        si = None if si_ratio is None else SpatialInteraction(embed_dims, window_size**2, si_ratio, recipe)
        self.mlp = DualBranchMLP(embed_dims, hidden_dims, recipe, si, drop)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Transform tokens that lie on a grid of ``hw_shape``."""
        if self.with_cp and self.training and x.requires_grad:
            contexts = (nullcontext(), _KeptBNStats(self))
            return checkpoint(self._forward, x, hw_shape, use_reentrant=False, context_fn=lambda: contexts)
        return self._forward(x, hw_shape)

    def _forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        single = min(hw_shape) <= self.window_size and not self.shift_single_window
        layout = WindowLayout(hw_shape, self.window_size, 0 if single else self.shift)
        mask = layout.attention_mask(self.mask_padding, x.device)
        x = x + self.drop_path(layout.merge(self.attn(layout.split(norm_tokens(self.norm1, x)), mask)))
        return x + self.drop_path(self.mlp(x, layout))


class _KeptBNStats:
    """Keeps the running statistics of BatchNorm while a checkpointed block is computed again; may be entered anew."""

    def __init__(self, module: nn.Module):
        self._norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def __enter__(self) -> None:
        self._kept = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in self._norms]
        for norm in self._norms:
            norm.momentum = 0.0

    def __exit__(self, *exc_info: object) -> None:
        for norm, (momentum, batches) in zip(self._norms, self._kept, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(batches)


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
class BinarySwinTransformer(StagedModule, BaseModule):
    """Swin Transformer with 1-bit weights and activations and spatial interaction (SI-BiViT).

    ``recipe='float'`` is the float Swin, equal to ``mmdet.SwinTransformer`` with the same weights. Float weights of
    mmdet, timm and the official Swin load into both (see :mod:`mmbivit.checkpoints`).

    Args:
        arch: ``'tiny'``, ``'small'``, ``'base'``, or a dict with ``embed_dims``, ``depths`` and ``num_heads``.
        recipe: a name of :data:`mmbivit.binary.RECIPES`, or a dict of changes to one.
        spatial_interaction: ``dict(ratio=1.0)`` adds the token-mixing branch with ``n' = ratio * n`` hidden tokens;
            ``None`` switches it off.
        stage1: what is binary in training stage 1, ``'activations'`` (the method) or ``'weights'`` (the paper's
            baseline).
        mlp_ratio: hidden width of the MLP over channels; the paper takes 3 with spatial interaction, 4 without.
        pretrain_img_size: image size in pixels that ``use_abs_pos_embed`` is made for; other sizes are interpolated.
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
        init_cfg: ``dict(type='Pretrained', checkpoint=file, URL or timm://NAME, prefix='backbone.')`` or ``None``.

    Shape: images ``(B, in_channels, H, W)`` -> tuple of ``(B, C * 2**i, ceil(H / (4 * 2**i)), ...)`` for ``i`` in
    ``out_indices``.

    Raises:
        ValueError: for a setting of the wrong type or out of range, an unknown arch, recipe or stage, heads that do not
            divide the channels, or a fractional width; the message names the key and what is allowed.
    """

    def __init__(
        self,
        arch: str | dict = "tiny",
        recipe: str | dict | Recipe = "sibivit",
        spatial_interaction: dict | None = None,
        stage1: str = "activations",
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
        init_cfg: dict | None = None,
    ):
        check_init_cfg(init_cfg)
        super().__init__(init_cfg=init_cfg)
        embed_dims, depths, num_heads = check_arch(arch)
        recipe, mask_padding, downsample = check_recipe(recipe, mask_padding, downsample)
        si_ratio = check_spatial_interaction(spatial_interaction)
        check_indices(out_indices, frozen_stages, len(depths))
        check_choice("stage1", stage1, STAGE1_MODES)
        check_settings(mlp_ratio=mlp_ratio, in_channels=in_channels, patch_size=patch_size, window_size=window_size)
        check_settings(drop_rate=drop_rate, attn_drop_rate=attn_drop_rate, drop_path_rate=drop_path_rate)
        check_settings(qkv_bias=qkv_bias, patch_norm=patch_norm, use_abs_pos_embed=use_abs_pos_embed, with_cp=with_cp)
        check_settings(shift_single_window=shift_single_window, convert_weights=convert_weights, norm_eval=norm_eval)
        if qk_scale is not None:
            check_number("qk_scale", qk_scale, 0, 1e6, above=True)
        image_size = check_image_size(pretrain_img_size)
        self.num_features = [embed_dims * 2**i for i in range(len(depths))]
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval

        def patch_norm_layer(channels: int) -> nn.Module | None:
            return recipe.norm_layer(channels) if patch_norm else None

        self.patch_embed = PatchEmbed(in_channels, embed_dims, patch_size, patch_norm_layer(embed_dims))
        self.absolute_pos_embed = None
        if use_abs_pos_embed:
            self.pos_embed_shape = tuple(-(-pixels // patch_size) for pixels in image_size)
            tokens = self.pos_embed_shape[0] * self.pos_embed_shape[1]
            self.absolute_pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dims))
        self.drop_after_pos = nn.Dropout(drop_rate)

        merging_recipe = replace(recipe, linear=downsample)
        drop_path = iter(torch.linspace(0, drop_path_rate, sum(depths)).tolist())
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
                    si_ratio=si_ratio,
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

        self._init_linear_layers()
        self._init_stage(stage1)
        register_key_mapping(self, convert_foreign=convert_weights)
        self._freeze_stages()

    def _init_linear_layers(self) -> None:
        """Initialise linear layers as Swin does: truncated normal, standard deviation 0.02, biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.absolute_pos_embed is not None:
            trunc_normal_(self.absolute_pos_embed, std=0.02)

    def init_weights(self) -> None:
        """Load the checkpoint of ``init_cfg``, if there is one; ``__init__`` has initialised everything already.

        Raises:
            ValueError: if the checkpoint is of another architecture.
        """
        if self.init_cfg:
            file = self.init_cfg["checkpoint"]
            missing, unexpected = load_pretrained(self, load_checkpoint_file(file), prefix=self.init_cfg.get("prefix"))
            MMLogger.get_current_instance().info(
                f"{type(self).__name__}: loaded {file}; missing {missing or 'none'}, unexpected {unexpected or 'none'}"
            )
        self._is_init = True

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the feature maps of ``out_indices``."""
        x, hw_shape = self.patch_embed(images)
        if self.absolute_pos_embed is not None:
            x = x + self._position_embedding(hw_shape)
        x = self.drop_after_pos(x)
        outputs = []
        for i, stage in enumerate(self.stages):
            x = stage(x, hw_shape)
            if i in self.out_indices:
                out = norm_tokens(getattr(self, f"norm{i}"), x)
                outputs.append(out.view(out.shape[0], *hw_shape, -1).permute(0, 3, 1, 2).contiguous())
            if stage.downsample is not None:
                x, hw_shape = stage.downsample(x, hw_shape)
        return tuple(outputs)

    def _position_embedding(self, hw_shape: tuple[int, int]) -> Tensor:
        if hw_shape == self.pos_embed_shape:
            return self.absolute_pos_embed
        grid = self.absolute_pos_embed.transpose(1, 2).unflatten(2, self.pos_embed_shape)
        return F.interpolate(grid, size=hw_shape, mode="bicubic").flatten(2).transpose(1, 2)

    def train(self, mode: bool = True) -> "BinarySwinTransformer":
        """Switch between training and evaluation, but leave frozen parts in evaluation."""
        super().train(mode)
        self._freeze_stages()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def _freeze_stages(self) -> None:
        if self.frozen_stages < 0:
            return
        frozen = [self.patch_embed, *self.stages[: self.frozen_stages]]
        frozen += [getattr(self, f"norm{i}") for i in self.out_indices if i < self.frozen_stages]
        for module in frozen:
            module.eval().requires_grad_(False)
        self.drop_after_pos.eval()
        if self.absolute_pos_embed is not None:
            self.absolute_pos_embed.requires_grad_(False)
