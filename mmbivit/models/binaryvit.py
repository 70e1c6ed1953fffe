"""BinaryViT: a pyramid of transformer stages with average pooling branches, made for 1-bit weights and activations."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from mmbivit.binary import Recipe, RPReLU, get_recipe
from mmbivit.checks import UserError, check_choice, check_flag, check_integers
from mmbivit.packed.modules import join_neighbours, position_embedding
from mmbivit.registry import MODELS

from .arch import MAX_CHANNELS, check_arch, check_image_size, check_settings
from .backbone import Backbone
from .layout import norm_tokens
from .patch import PatchEmbed
from .recomputation import RecomputableBlock
from .spatial_reduction import ReducedLayout, SpatialReductionAttention

__all__ = [
    "BINARYVIT_ARCHITECTURES",
    "Affine",
    "BinaryDownsampling",
    "BinaryViT",
    "BinaryViTBlock",
    "FloatDownsampling",
    "PoolingBranches",
]

BINARYVIT_ARCHITECTURES = {
    "small": dict(
        embed_dims=64,
        depths=(3, 4, 8, 4),
        num_heads=(1, 2, 4, 8),
        hidden_dims=(512, 1024, 1024, 2048),
        reductions=(8, 4, 1, 1),
    ),
}
KERNELS = ((1, 3), (3, 1), (1, 5), (5, 1))  # of the pooling branches: height and width


class Affine(nn.Module):
    """Scale and shift each channel (BinaryViT, Eq. 12-13).

    Args:
        channels: size of the last axis.
        scale: of all channels at the start; shifts start at 0.

    Shape: ``(*, channels) -> (*, channels)``.
    """

    def __init__(self, channels: int, scale: float):
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels,), scale))
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.to(x.dtype) + self.shift.to(x.dtype)


class PoolingBranches(nn.Module):
    """Average pools along the width and the height, each with an affine of its own that starts at 0 (BinaryViT 3.2).

    Windows are 1 x 3, 3 x 1, 1 x 5 and 5 x 1 tokens with stride 1; the zeros beyond a border count.

    Args:
        channels: channels ``C`` of a token.

    Shape: ``(B, H*W, C) -> (B, H*W, C)``.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.affines = nn.ModuleList(Affine(channels, 0.0) for _ in KERNELS)

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Return the sum of all branches."""
        grid = x.transpose(1, 2).unflatten(2, hw_shape)
        pooled = (F.avg_pool2d(grid, size, 1, (size[0] // 2, size[1] // 2)) for size in KERNELS)
        return sum(affine(y.flatten(2).transpose(1, 2)) for affine, y in zip(self.affines, pooled, strict=True))


class FeedForward(nn.Module):
    """Two layers over channels.

    Args:
        channels: channels ``C``.
        hidden_dims: hidden width.
        recipe: which layers and activation function to build.
        drop: dropout rate after both.

    Shape: ``(*, C) -> (*, C)``.
    """

    def __init__(self, channels: int, hidden_dims: int, recipe: Recipe, drop: float = 0.0):
        super().__init__()
        self.fc1 = recipe.build_linear(channels, hidden_dims, place="fc1")
        self.act = recipe.build_act(hidden_dims)
        self.fc2 = recipe.build_linear(hidden_dims, channels, place="fc2")
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class BinaryViTBlock(RecomputableBlock):
    """``f = h + affine1(attn(norm1(h)))``, then ``f + affine2(mlp(norm2(f))) + pools(norm2(f))`` (BinaryViT, Fig. 1b).

    Args:
        channels: channels ``C``.
        num_heads: attention heads.
        reduction: see :class:`.spatial_reduction.SpatialReductionAttention`.
        hidden_dims: hidden width of the MLP.
        recipe: which quantizers, layers, activation function and norm to build.
        affine: scale and shift the outputs of attention and MLP.
        pool_branches: add the pooling branches.
        attn_drop: dropout rate of the attention weights.
        drop: dropout rate of projection and MLP.
        drop_path: probability of dropping attention, or MLP and pools, of a sample.
        with_cp: recompute the block in the backward pass.

    Shape: ``(B, H*W, C) -> (B, H*W, C)``.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        reduction: int,
        hidden_dims: int,
        recipe: Recipe,
        affine: bool = True,
        pool_branches: bool = True,
        attn_drop: float = 0.0,
        drop: float = 0.0,
        drop_path: float = 0.0,
        with_cp: bool = False,
    ):
        super().__init__(with_cp)
        self.norm1 = recipe.norm_layer(channels)
        self.attn = SpatialReductionAttention(channels, num_heads, reduction, recipe, attn_drop, drop)
        self.affine1 = Affine(channels, 0.1) if affine else nn.Identity()
        self.norm2 = recipe.norm_layer(channels)
        self.mlp = FeedForward(channels, hidden_dims, recipe, drop)
        self.affine2 = Affine(channels, 0.1) if affine else nn.Identity()
        self.pools = PoolingBranches(channels) if pool_branches else None
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def layout(self, hw_shape: tuple[int, int]) -> ReducedLayout:
        """Return that all tokens attend to each other, or to averages."""
        return ReducedLayout(hw_shape, side=self.attn.side)

    def _forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        x = x + self.drop_path(self.affine1(self.attn(norm_tokens(self.norm1, x), hw_shape)))
        normed = norm_tokens(self.norm2, x)
        y = self.affine2(self.mlp(normed))
        if self.pools is not None:
            y = y + self.pools(normed, hw_shape)
        return x + self.drop_path(y)


class BinaryDownsampling(nn.Module):
    """2 x 2 convolution of stride 2 with 1-bit weights and inputs, and a shortcut (BinaryViT 3.4).

    ``RPReLU(norm(conv(Sign(n))) + cat(pool(n), pool(n)))`` with ``n = norm(x)`` and ``pool`` the average of 2 x 2
    tokens. Weights are not centred. Float in the recipe that is.

    Args:
        channels: channels ``C``.
        recipe: which quantizers and norms to build.

    Shape: ``(B, H*W, C) -> (B, ceil(H/2)*ceil(W/2), 2*C)``.
    """

    def __init__(self, channels: int, recipe: Recipe):
        super().__init__()
        plain: dict[str, Any] = dict(layer_shortcut=False)
        if recipe.weight_quantizer is None:
            plain["weight_center"] = "none"
        self.norm = recipe.norm_layer(channels)
        self.proj = replace(recipe, **plain).build_linear(4 * channels, 2 * channels, bias=False)
        self.norm_after = recipe.norm_layer(2 * channels)
        self.act = RPReLU(2 * channels)

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Return the tokens and the height and width of their grid."""
        x = norm_tokens(self.norm, x)
        y = norm_tokens(self.norm_after, self.proj(join_neighbours(x, *hw_shape)))
        pooled = F.avg_pool2d(x.transpose(1, 2).unflatten(2, hw_shape), 2, ceil_mode=True)
        shortcut = pooled.flatten(2).transpose(1, 2).repeat(1, 1, 2)
        return self.act(y + shortcut), (pooled.shape[2], pooled.shape[3])


class FloatDownsampling(nn.Module):
    """Norm, float 2 x 2 convolution of stride 2, norm: the variant with a star in BinaryViT's Table 4.

    Args:
        channels: channels ``C``.
        recipe: which norms to build.

    Shape: ``(B, H*W, C) -> (B, ceil(H/2)*ceil(W/2), 2*C)``.
    """

    def __init__(self, channels: int, recipe: Recipe):
        super().__init__()
        self.norm = recipe.norm_layer(channels)
        self.conv = nn.Conv2d(channels, 2 * channels, 2, stride=2)
        self.norm_after = recipe.norm_layer(2 * channels)

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Return the tokens and the height and width of their grid."""
        grid = norm_tokens(self.norm, x).transpose(1, 2).unflatten(2, hw_shape)
        grid = self.conv(F.pad(grid, (0, hw_shape[1] % 2, 0, hw_shape[0] % 2)))
        return norm_tokens(self.norm_after, grid.flatten(2).transpose(1, 2)), (grid.shape[2], grid.shape[3])


class BinaryViTStage(nn.Module):
    """A position embedding, blocks of one resolution, then downsampling to the next.

    Args:
        blocks: the blocks.
        downsample: leads to the next stage; ``None`` in the last one.
        grid: height and width that the position embedding is made for.
        channels: of a token.
    """

    def __init__(
        self, blocks: Sequence[BinaryViTBlock], downsample: nn.Module | None, grid: tuple[int, int], channels: int
    ):
        super().__init__()
        self.grid = grid
        self.pos_embed = nn.Parameter(torch.zeros(1, grid[0] * grid[1], channels))
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Apply the blocks: ``(B, H*W, C) -> (B, H*W, C)``."""
        x = x + position_embedding(self.pos_embed, self.grid, hw_shape)
        for block in self.blocks:
            x = block(x, hw_shape)
        return x


@MODELS.register_module()
class BinaryViT(Backbone):
    """BinaryViT (*BinaryViT: Pushing Binary Vision Transformers Towards Convolutional Models*, CVPR workshops 2023).

    A pyramid of four stages. Attention in the first two is to averages of tokens; beside each MLP four average pools
    mix tokens; scales that are learned, and small at the start, stand before the shortcuts of blocks. Shortcuts and
    RPReLU around every layer, and attention, are the recipe's: ``'reactnet'`` is the paper's. Where text, equations and
    published code differ, see docs/methods.md and docs/backbones.md. A classifier of it pools all tokens.

    ``recipe='float'`` has float layers, LayerNorm and GELU, with the same branches.

    Args:
        arch: ``'small'``, or a dict with ``embed_dims``, ``depths``, ``num_heads``, ``hidden_dims`` and ``reductions``
            (tokens along the squares that are averaged for keys and values), the latter four with a number a stage.
        recipe: a name of :data:`mmbivit.binary.RECIPES`, or a dict of changes to one.
        pool_branches: whether there are pooling branches (BinaryViT 3.2).
        affine: whether there are scales before shortcuts (BinaryViT 3.3).
        downsample: between stages ``'binary'``, a layer of the recipe with a shortcut, or ``'float'``, a convolution
            (the paper's variant with a star).
        stage1: what is binary in training stage 1 of two, ``'activations'`` (by default), ``'weights'`` or ``'all'``.
        pretrain_img_size: image size in pixels of the position embeddings, which are interpolated for others.
        in_channels: channels of the image.
        patch_size: pixels of a patch.
        out_indices: stages whose normalised output is returned.
        drop_rate: dropout rate of tokens, projections and MLPs.
        attn_drop_rate: dropout rate of attention weights.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
        with_cp: recompute blocks in the backward pass (less memory, more time).
        frozen_stages: freeze the patch embedding (0) and the first stages (1, 2, ...); -1 for none.
        norm_eval: keep the running statistics of BatchNorm fixed in training.
        spatial_interaction: only ``None``: the pooling branches mix tokens here.
        training_stages: a plan of training in place of ``stage1``, see :class:`mmbivit.models.TrainingStage`.
        init_cfg: ``dict(type='Pretrained', checkpoint=file or URL, prefix='backbone.')`` or ``None``.

    Shape: images ``(B, in_channels, H, W)`` -> tuple of ``(B, C * 2**i, ceil(H / (4 * 2**i)), ...)`` for ``i`` in
    ``out_indices``.

    Raises:
        ValueError: for a setting of the wrong type or out of range; the message names the key and what is allowed.
    """

    def __init__(
        self,
        arch: str | dict = "small",
        recipe: str | dict | Recipe = "reactnet",
        pool_branches: bool = True,
        affine: bool = True,
        downsample: str = "binary",
        stage1: str | None = None,
        pretrain_img_size: int | tuple[int, int] = 224,
        in_channels: int = 3,
        patch_size: int = 4,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        with_cp: bool = False,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        spatial_interaction: None = None,
        training_stages: Sequence[dict] | None = None,
        init_cfg: dict | None = None,
    ):
        embed_dims, depths, num_heads, hidden, reductions = _check_arch(arch)
        super().__init__(len(depths), out_indices, stage1, frozen_stages, norm_eval, True, init_cfg, training_stages)
        recipe = get_recipe(recipe)
        if spatial_interaction is not None:
            raise UserError(f"spatial_interaction={spatial_interaction}; allowed: None, as pool_branches mix tokens")
        check_choice("downsample", downsample, ("binary", "float"))
        check_flag("pool_branches", pool_branches)
        check_flag("affine", affine)
        check_settings(in_channels=in_channels, patch_size=patch_size, with_cp=with_cp)
        check_settings(drop_rate=drop_rate, attn_drop_rate=attn_drop_rate, drop_path_rate=drop_path_rate)
        grid = tuple(-(-pixels // patch_size) for pixels in check_image_size(pretrain_img_size))
        self.num_features = [embed_dims * 2**i for i in range(len(depths))]
        self.strides = [patch_size * 2**i for i in range(len(depths))]

        self.patch_embed = PatchEmbed(in_channels, embed_dims, patch_size, recipe.norm_layer(embed_dims))
        self.drop_after_pos = nn.Dropout(drop_rate)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        downsampling = BinaryDownsampling if downsample == "binary" else FloatDownsampling
        self.stages = nn.ModuleList()
        for i, (channels, depth) in enumerate(zip(self.num_features, depths, strict=True)):
            blocks = [
                BinaryViTBlock(
                    channels,
                    num_heads[i],
                    reductions[i],
                    hidden[i],
                    recipe,
                    affine,
                    pool_branches,
                    attn_drop=attn_drop_rate,
                    drop=drop_rate,
                    drop_path=next(rates),
                    with_cp=with_cp,
                )
                for _ in range(depth)
            ]
            last = i == len(depths) - 1
            stage_grid = tuple(-(-side // 2**i) for side in grid)
            step = None if last else downsampling(channels, recipe)
            self.stages.append(BinaryViTStage(blocks, step, stage_grid, channels))
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
            x = stage(x, hw_shape)
            if i in self.out_indices:
                outputs.append(self.feature_map(x, hw_shape, i))
            if stage.downsample is not None:
                x, hw_shape = stage.downsample(x, hw_shape)
        return tuple(outputs)


def _check_arch(arch: str | dict) -> tuple[int, tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return channels, depths, heads, hidden widths and reductions of an architecture that fits together."""
    if isinstance(arch, str):
        check_choice("arch", arch, BINARYVIT_ARCHITECTURES)
        arch = BINARYVIT_ARCHITECTURES[arch]
    if not isinstance(arch, Mapping) or not {"hidden_dims", "reductions"} <= set(arch):
        raise UserError(
            f"arch={arch!r}; allowed: 'small', or dict(embed_dims=, depths=, num_heads=, hidden_dims=, reductions=)"
        )
    own = {name: arch[name] for name in ("hidden_dims", "reductions")}
    sizes = check_arch({name: value for name, value in arch.items() if name not in own})
    for name, values in own.items():
        check_integers(f"arch.{name}", values, 1, MAX_CHANNELS)
        if len(values) != len(sizes[1]):
            raise UserError(f"arch.{name}={values}; allowed: a number for each of {len(sizes[1])} stages")
    return (*sizes, tuple(own["hidden_dims"]), tuple(own["reductions"]))
