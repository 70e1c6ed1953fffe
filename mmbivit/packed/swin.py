"""The packed Swin Transformer: the inference twin of ``mmbivit.BinarySwinTransformer``, needing torch alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmbivit.checks import UserError

from .block import PackedBlock, PackedBlockConfig
from .modules import (
    LAYER_NORM_EPS,
    FloatPatchMerging,
    OutputNorm,
    PackedPatchMerging,
    PatchEmbedding,
    position_embedding,
)
from .network import PackedNetwork, check_images, packed_network
from .residual import PackedResidualPatchMerging

__all__ = ["PackedSwinConfig", "PackedSwinTransformer"]


class PackedStage(nn.Module):
    """Blocks of one resolution, then patch merging, or ``None`` in the last stage."""

    def __init__(self, blocks: Sequence[PackedBlock], downsample: nn.Module | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


@dataclass(frozen=True)
class PackedSwinConfig(PackedBlockConfig):
    """Configuration of a :class:`PackedSwinTransformer`.

    Attributes:
        embed_dims: channels of the first stage; each stage doubles them.
        depths: blocks of each stage.
        num_heads: attention heads of each stage.
        hidden_dims: hidden width of the MLP of each stage.
        si_hidden: hidden tokens of the spatial interaction, of all stages alike or of each; ``None`` for none.
        scales: factor of the attention scores of each stage.
        window_size: tokens along a window, up to 31.
        patch_size: pixels along a patch.
        in_channels: channels of the image.
        out_indices: stages whose normalised output is returned.
        float_downsample: patch merging with float weights and inputs.
        pos_embed_shape: grid of a position embedding that is added to the tokens; ``None`` for none.
        shift_single_window: shift windows also where a feature map is not longer than one.
        si_sides: tokens along the squares that are mixed, of each stage; ``None`` where those are the windows.
        patch_norm: whether norms follow the patch embedding and precede patch merging; of LayerNorm alone.

    The others are those of :class:`mmbivit.packed.block.PackedBlockConfig`.

    Raises:
        ValueError: if they make no network, or one that the kernels cannot compute.
    """

    embed_dims: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    hidden_dims: tuple[int, ...]
    si_hidden: int | tuple[int, ...] | None
    scales: tuple[float, ...]
    window_size: int = 7
    patch_size: int = 4
    in_channels: int = 3
    out_indices: tuple[int, ...] = (0, 1, 2, 3)
    float_downsample: bool = False
    pos_embed_shape: tuple[int, int] | None = None
    shift_single_window: bool = True
    si_sides: tuple[int, ...] | None = None
    patch_norm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_sizes()
        self._check_stages()
        if self.window_size > 31 or max(self.mixing_sides) > 128 or max(self.mixing_hidden, default=0) > 128**2:
            raise UserError(
                f"window_size={self.window_size}, si_sides={self.si_sides}, si_hidden={self.si_hidden}; "
                f"allowed: up to 31, 128 and {128**2}"
            )
        if not all(isinstance(scale, float) and abs(scale) <= 1e5 for scale in self.scales):
            raise UserError(f"scales={self.scales}; expected numbers up to 1e5")
        if self.pos_embed_shape is not None and len(self.pos_embed_shape) != 2:
            raise UserError(f"pos_embed_shape={self.pos_embed_shape}; expected height and width")

    @property
    def mixing_sides(self) -> tuple[int, ...]:
        """Tokens along the squares that are mixed, by stage."""
        return (self.window_size,) * len(self.depths) if self.si_sides is None else self.si_sides

    @property
    def mixing_hidden(self) -> tuple[int, ...]:
        """Hidden tokens of the spatial interaction by stage; none without it."""
        if isinstance(self.si_hidden, int):
            return (self.si_hidden,) * len(self.depths)
        return self.si_hidden or ()

    def _check_sizes(self) -> None:
        single = ("embed_dims", "window_size", "patch_size", "in_channels")
        several = ("depths", "num_heads", "hidden_dims", "pos_embed_shape", "si_hidden", "si_sides")
        optional = ("si_hidden", "si_sides", "pos_embed_shape")
        for name in (*single, *several):
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            values = (value,) if name in single or (name == "si_hidden" and type(value) is int) else value
            if not isinstance(values, tuple) or not all(type(size) is int and size >= 1 for size in values):
                raise UserError(f"{name}={value}; expected whole numbers of 1 or more")

    def _check_stages(self) -> None:
        stages = len(self.depths)
        if not 1 <= stages <= 8 or {len(self.num_heads), len(self.hidden_dims), len(self.scales)} != {stages}:
            raise UserError("depths, num_heads, hidden_dims and scales need one entry for each of 1 to 8 stages")
        for name, values in (("si_hidden", self.mixing_hidden), ("si_sides", self.mixing_sides)):
            if values and len(values) != stages:
                raise UserError(f"{name}={getattr(self, name)}; expected an entry for each of {stages} stages")
        for i, heads in enumerate(self.num_heads):
            channels = self.embed_dims * 2**i
            if channels % heads:
                raise UserError(f"num_heads[{i}]={heads} does not divide {channels} channels")
            if channels // heads > 992:
                raise UserError(f"num_heads[{i}]={heads}: a head has {channels // heads} channels; allowed: 992")
        indices = self.out_indices
        if not isinstance(indices, tuple) or not indices or tuple(sorted(set(indices))) != indices:
            raise UserError(f"out_indices={indices}; expected rising numbers of stages")
        if not all(type(i) is int and 0 <= i < stages for i in indices):
            raise UserError(f"out_indices={indices}; allowed: 0 to {stages - 1}")


@packed_network
class PackedSwinTransformer(PackedNetwork):
    """Swin Transformer that computes with bits; made by :func:`mmbivit.deploy.pack` or :func:`mmbivit.deploy.load`.

    Args:
        options: the fields of :class:`PackedSwinConfig`.

    Shape: images ``(B, in_channels, H, W)`` float32 -> tuple of ``(B, embed_dims * 2**i, ceil(H / (4 * 2**i)), ...)``
    for ``i`` in ``out_indices``. No gradients.

    Raises:
        ValueError: for impossible sizes; and from ``forward``, for input of another dtype, rank or number of channels.
    """

    Config = PackedSwinConfig
    config: PackedSwinConfig

    def __init__(self, **options: Any):
        super().__init__(**options)
        config = self.config
        self.num_features = [config.embed_dims * 2**i for i in range(len(config.depths))]
        self.out_indices = config.out_indices
        layer_norm = LAYER_NORM_EPS if config.norm == "ln" else None
        self.patch_embed = PatchEmbedding(
            config.in_channels, config.embed_dims, config.patch_size, layer_norm if config.patch_norm else None
        )
        grid = config.pos_embed_shape
        embedding = None if grid is None else torch.zeros(1, grid[0] * grid[1], config.embed_dims)
        self.register_buffer("absolute_pos_embed", embedding)
        self.stages = nn.ModuleList(map(self._stage, range(len(config.depths))))
        for i in self.out_indices:
            self.add_module(f"norm{i}", OutputNorm(self.num_features[i], layer_norm))
        self.eval()

    def _stage(self, i: int) -> PackedStage:
        config, channels = self.config, self.num_features[i]
        window, layer_norm = config.window_size, LAYER_NORM_EPS if config.norm == "ln" else None
        tokens = config.mixing_sides[i] ** 2
        si_hidden = config.mixing_hidden[i] if config.mixing_hidden else None
        blocks = [
            PackedBlock(
                config.build_attention(channels, config.num_heads[i], window, config.scales[i], layer_norm),
                config.build_mlp(channels, config.hidden_dims[i], tokens, si_hidden, layer_norm),
                shift=window // 2 if block % 2 else 0,
            )
            for block in range(config.depths[i])
        ]
        if i == len(config.depths) - 1:
            return PackedStage(blocks, None)
        merging = PackedResidualPatchMerging if config.residual else PackedPatchMerging
        merging = FloatPatchMerging if config.float_downsample else merging
        return PackedStage(blocks, merging(channels, layer_norm if config.patch_norm else None))

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the feature maps of ``out_indices``."""
        check_images(images, self.config.in_channels)
        size = self.patch_embed.patch_size
        return self.planned(self._run, images.contiguous(), -(-images.shape[2] // size), -(-images.shape[3] // size))

    def _run(self, images: Tensor, *hw_shape: int) -> tuple[Tensor, ...]:
        x = self.patch_embed(images)
        if self.absolute_pos_embed is not None:
            x = x + position_embedding(self.absolute_pos_embed, self.config.pos_embed_shape, hw_shape)  # type: ignore[arg-type]  # no embedding, no shape
        outputs = []
        for i, stage in enumerate(self.stages):
            for block in stage.blocks:
                layout = self._layout(hw_shape, block.shift)
                block.attn(x, layout)
                block.mlp(x, layout if self.config.si_sides is None else [*hw_shape, self.config.si_sides[i], 0, 0])
            if i in self.out_indices:
                outputs.append(getattr(self, f"norm{i}")(x, *hw_shape))
            if stage.downsample is not None:
                x = stage.downsample(x, *hw_shape)
                hw_shape = ((hw_shape[0] + 1) // 2, (hw_shape[1] + 1) // 2)
        return tuple(outputs)

    def _layout(self, hw_shape: tuple[int, ...], shift: int) -> list[int]:
        """Return height, width, window, shift and mask_padding, as the operators take them."""
        window = self.config.window_size
        single = min(hw_shape) <= window and not self.config.shift_single_window
        return [*hw_shape, window, 0 if single else shift, int(self.config.mask_padding)]
