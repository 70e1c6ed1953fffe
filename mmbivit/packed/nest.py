"""The packed NesT: the inference twin of ``mmbivit.BinaryNesT``, needing torch alone."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmbivit.checks import UserError, check_integer, check_integers, check_number

from .block import PackedBlock, PackedBlockConfig
from .modules import OutputNorm, PackedModule, PatchEmbedding, position_embedding
from .network import PackedNetwork, check_images, packed_network

__all__ = ["PackedAggregation", "PackedNesT", "PackedNesTConfig", "pool_map"]

EPS = 1e-6  # of LayerNorm


@dataclass(frozen=True)
class PackedNesTConfig(PackedBlockConfig):
    """Configuration of a :class:`PackedNesT`.

    Attributes:
        embed_dims: channels of the first stage; each stage doubles them.
        depths: blocks of each stage.
        num_heads: attention heads of each stage.
        hidden_dims: hidden width of the MLP of each stage.
        si_hidden: hidden tokens of the spatial interaction; ``None`` for none.
        scales: factor of the attention scores of each stage.
        side: tokens along the squares within which tokens attend and are mixed.
        grid: tokens along the position embedding of the first stage; each stage halves them.
        patch_size: pixels along a patch.
        in_channels: channels of the image.
        out_indices: stages whose normalised output is returned.

    The others are those of :class:`mmbivit.packed.block.PackedBlockConfig`.

    Raises:
        ValueError: if they make no network, or one that the kernels cannot compute.
    """

    embed_dims: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    hidden_dims: tuple[int, ...]
    si_hidden: int | None
    scales: tuple[float, ...]
    side: int
    grid: int
    patch_size: int = 4
    in_channels: int = 3
    out_indices: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("embed_dims", "patch_size", "in_channels"):
            check_integer(name, getattr(self, name), 1, 2**20)
        check_integer("side", self.side, 1, 128)
        check_integer("grid", self.grid, 1, 4096)
        if self.si_hidden is not None:
            check_integer("si_hidden", self.si_hidden, 1, 128**2)
        stages = len(self.depths)
        if not 1 <= stages <= 8 or {len(self.num_heads), len(self.hidden_dims), len(self.scales)} != {stages}:
            raise UserError("depths, num_heads, hidden_dims and scales need one entry for each of 1 to 8 stages")
        for name in ("depths", "num_heads", "hidden_dims"):
            check_integers(name, getattr(self, name), 1, 2**20)
        for scale in self.scales:
            check_number("scales", scale, -1e5, 1e5)
        for i, heads in enumerate(self.num_heads):
            channels = self.embed_dims * 2**i
            if channels % heads or channels // heads > 992:
                raise UserError(f"num_heads[{i}]={heads} of {channels} channels; expected heads of up to 992")
        if self.grid % 2 ** (stages - 1):
            raise UserError(f"grid={self.grid}; expected a multiple of {2 ** (stages - 1)}, as stages halve it")
        check_integers("out_indices", self.out_indices, 0, stages - 1)
        if list(self.out_indices) != sorted(set(self.out_indices)):
            raise UserError(f"out_indices={self.out_indices}; expected rising numbers of stages")


def pool_map(x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Take the maximum of 3 x 3 tokens with stride 2: a map ``(B, C, H, W) -> (B, ceil(H/2)*ceil(W/2), C)``.

    Where a side is even the pool looks beyond the bottom and right border only. Returns the tokens and their grid.
    """
    height, width = x.shape[2:]
    x = F.pad(x, (width % 2, 1, height % 2, 1), value=-torch.inf)
    x = F.max_pool2d(x, 3, stride=2)
    return x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3])


class PackedAggregation(PackedModule):
    """Float 3 x 3 convolution, into which a BatchNorm is folded, and max pool.

    Args:
        in_channels: channels ``C``.
        out_channels: channels ``D``.
        layer_norm: eps of the norm, if that is a LayerNorm.

    Shape: ``(B, H*W, C) -> (B, ceil(H/2)*ceil(W/2), D)``.
    """

    def __init__(self, in_channels: int, out_channels: int, layer_norm: float | None):
        super().__init__()
        self.layer_norm = layer_norm
        self._add("weight", out_channels, in_channels, 3, 3)
        self._add("bias", out_channels)
        if layer_norm:
            self._add("norm", 2, out_channels)

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Return the tokens and the height and width of their grid."""
        x = F.conv2d(x.transpose(1, 2).unflatten(2, hw_shape), self.weight, self.bias, padding=1)
        if self.layer_norm:
            x = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], *self.norm, self.layer_norm).permute(0, 3, 1, 2)  # type: ignore[call-arg]  # weight and bias
        x, hw_shape = pool_map(x)
        return x.contiguous(), hw_shape


class PackedNesTStage(nn.Module):
    """Aggregation of the stage before, or ``None``, a position embedding, then blocks of one resolution."""

    def __init__(self, blocks: list[PackedBlock], pool: PackedAggregation | None, grid: tuple[int, int], channels: int):
        super().__init__()
        self.grid = grid
        self.pool = pool
        self.register_buffer("pos_embed", torch.zeros(1, grid[0] * grid[1], channels))
        self.blocks = nn.ModuleList(blocks)


@packed_network
class PackedNesT(PackedNetwork):
    """NesT that computes with bits; made by :func:`mmbivit.deploy.pack` or :func:`mmbivit.deploy.load`.

    Args:
        options: the fields of :class:`PackedNesTConfig`.

    Shape: images ``(B, in_channels, H, W)`` float32 -> tuple of ``(B, embed_dims * 2**i, ceil(H / (4 * 2**i)), ...)``
    for ``i`` in ``out_indices``. No gradients.

    Raises:
        ValueError: for impossible sizes; and from ``forward``, for input of another dtype, rank or number of channels.
    """

    Config = PackedNesTConfig
    config: PackedNesTConfig

    def __init__(self, **options: Any):
        super().__init__(**options)
        config = self.config
        layer_norm = EPS if config.norm == "ln" else None
        self.num_features = [config.embed_dims * 2**i for i in range(len(config.depths))]
        self.out_indices = config.out_indices
        self.patch_embed = PatchEmbedding(config.in_channels, config.embed_dims, config.patch_size)
        self.stages = nn.ModuleList()
        for i, channels in enumerate(self.num_features):
            blocks = [
                PackedBlock(
                    config.build_attention(channels, config.num_heads[i], None, config.scales[i], layer_norm),
                    config.build_mlp(channels, config.hidden_dims[i], config.side**2, config.si_hidden, layer_norm),
                )
                for _ in range(config.depths[i])
            ]
            pool = PackedAggregation(self.num_features[i - 1], channels, layer_norm) if i else None
            grid = config.grid // 2**i
            self.stages.append(PackedNesTStage(blocks, pool, (grid, grid), channels))
        for i in self.out_indices:
            self.add_module(f"norm{i}", OutputNorm(self.num_features[i], layer_norm))
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the feature maps of ``out_indices``."""
        config = self.config
        check_images(images, config.in_channels)
        hw_shape = tuple(-(-side // config.patch_size) for side in images.shape[2:])
        x, outputs = self.patch_embed(images.contiguous()), []
        for i, stage in enumerate(self.stages):
            if stage.pool is not None:
                x, hw_shape = stage.pool(x, hw_shape)
            x = x + position_embedding(stage.pos_embed, stage.grid, hw_shape)
            self.planned(self._run, x, i, *hw_shape)
            if i in self.out_indices:
                outputs.append(getattr(self, f"norm{i}")(x, *hw_shape))
        return tuple(outputs)

    def _run(self, x: Tensor, stage: int, *hw_shape: int) -> tuple[()]:
        """Compute the blocks of a stage on tokens ``(B, H*W, C)`` in place."""
        layout = [*hw_shape, self.config.side, 0, int(self.config.mask_padding)]
        for block in self.stages[stage].blocks:
            block.attn(x, layout)
            block.mlp(x, layout)
        return ()
