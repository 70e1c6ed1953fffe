"""The packed Vision Transformer: the inference twin of ``mmbivit.BinaryVisionTransformer``, needing torch alone."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmbivit.checks import UserError, check_choice, check_integer, check_integers, check_number

from .block import PackedBlock, PackedBlockConfig
from .modules import OutputNorm, PatchEmbedding, position_embedding
from .network import PackedNetwork, check_images, packed_network

__all__ = ["PackedVisionTransformer", "PackedVisionTransformerConfig"]

EPS = 1e-6  # of LayerNorm


@dataclass(frozen=True)
class PackedVisionTransformerConfig(PackedBlockConfig):
    """Configuration of a :class:`PackedVisionTransformer`.

    Attributes:
        embed_dims: channels of a token.
        depth: number of blocks.
        num_heads: attention heads.
        hidden_dims: hidden width of the MLP.
        si_hidden: hidden tokens of the spatial interaction; ``None`` for none.
        scale: factor of the attention scores.
        pos_embed_shape: grid of tokens of the position embedding.
        extra_tokens: tokens beside the grid, which come first.
        out_type: ``'featmap'`` or ``'cls_token'``.
        window_size: tokens along the windows within which tokens attend and are mixed; ``None`` for all tokens.
        global_blocks: blocks that attend to all tokens all the same.
        patch_size: pixels along a patch.
        in_channels: channels of the image.

    The others are those of :class:`mmbivit.packed.block.PackedBlockConfig`.

    Raises:
        ValueError: if they make no network, or one that the kernels cannot compute.
    """

    embed_dims: int
    depth: int
    num_heads: int
    hidden_dims: int
    si_hidden: int | None
    scale: float
    pos_embed_shape: tuple[int, int]
    extra_tokens: int = 0
    out_type: str = "featmap"
    window_size: int | None = None
    global_blocks: tuple[int, ...] = ()
    patch_size: int = 16
    in_channels: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("embed_dims", "num_heads", "hidden_dims", "patch_size", "in_channels"):
            check_integer(name, getattr(self, name), 1, 2**20)
        check_integer("depth", self.depth, 1, 1000)
        check_integer("extra_tokens", self.extra_tokens, 0, 2)
        check_integers("pos_embed_shape", self.pos_embed_shape, 1, 4096)
        if len(self.pos_embed_shape) != 2:
            raise UserError(f"pos_embed_shape={self.pos_embed_shape}; expected height and width")
        check_number("scale", self.scale, -1e5, 1e5)
        check_choice("out_type", self.out_type, ("featmap", "cls_token"))
        if self.window_size is not None:
            check_integer("window_size", self.window_size, 1, 128)
        if self.global_blocks:
            check_integers("global_blocks", self.global_blocks, 0, self.depth - 1)
        if self.si_hidden is not None:
            check_integer("si_hidden", self.si_hidden, 1, 128**2)
            if self.num_tokens > 128**2:
                raise UserError(f"spatial interaction mixes {self.num_tokens} tokens; allowed: {128**2}")
        if self.embed_dims % self.num_heads or self.embed_dims // self.num_heads > 992:
            raise UserError(
                f"num_heads={self.num_heads} of {self.embed_dims} channels; expected heads of up to 992 each"
            )
        if self.extra_tokens and self.window_size is not None:
            raise UserError(
                f"extra_tokens={self.extra_tokens} and window_size={self.window_size}; expected one of them"
            )
        if self.out_type == "cls_token" and not self.extra_tokens:
            raise UserError("out_type='cls_token' needs a class token; expected extra_tokens of 1 or 2")

    @property
    def num_tokens(self) -> int:
        """Tokens that are mixed."""
        if self.window_size is not None:
            return self.window_size**2
        return self.extra_tokens + self.pos_embed_shape[0] * self.pos_embed_shape[1]


class PackedViTStage(nn.Module):
    """All blocks."""

    def __init__(self, blocks: list[PackedBlock]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)


@packed_network
class PackedVisionTransformer(PackedNetwork):
    """Vision Transformer that computes with bits; made by :func:`mmbivit.deploy.pack` or :func:`mmbivit.deploy.load`.

    Args:
        options: the fields of :class:`PackedVisionTransformerConfig`.

    Shape: images ``(B, in_channels, H, W)`` float32 -> one map ``(B, embed_dims, ceil(H / patch_size), ...)``, or
    ``(B, extra_tokens * embed_dims, 1, 1)`` of the tokens beside the grid. No gradients.

    Raises:
        ValueError: for impossible sizes; and from ``forward``, for input of another dtype, rank or number of channels,
            or another number of tokens than spatial interaction mixes.
    """

    Config = PackedVisionTransformerConfig
    config: PackedVisionTransformerConfig

    def __init__(self, **options: Any):
        super().__init__(**options)
        config, channels = self.config, self.config.embed_dims
        layer_norm = EPS if config.norm == "ln" else None
        self.num_features, self.out_indices = [channels], (0,)
        self.patch_embed = PatchEmbedding(config.in_channels, channels, config.patch_size)
        grid = config.pos_embed_shape
        self.register_buffer("absolute_pos_embed", torch.zeros(1, grid[0] * grid[1], channels))
        extra = torch.zeros(1, config.extra_tokens, channels) if config.extra_tokens else None
        self.register_buffer("extra_embed", extra)
        blocks = [
            PackedBlock(
                config.build_attention(channels, config.num_heads, None, config.scale, layer_norm),
                config.build_mlp(channels, config.hidden_dims, config.num_tokens, config.si_hidden, layer_norm),
            )
            for _ in range(config.depth)
        ]
        self.stages = nn.ModuleList([PackedViTStage(blocks)])
        self.norm0 = OutputNorm(channels, layer_norm)
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Return one feature map."""
        config = self.config
        check_images(images, config.in_channels)
        hw_shape = tuple(-(-side // config.patch_size) for side in images.shape[2:])
        if config.si_hidden is not None and config.window_size is None and hw_shape != config.pos_embed_shape:
            raise UserError(
                f"images make {hw_shape} tokens; spatial interaction mixes those of a grid of {config.pos_embed_shape}"
            )
        x = self.patch_embed(images.contiguous())
        x = x + position_embedding(self.absolute_pos_embed, config.pos_embed_shape, hw_shape)
        if self.extra_embed is not None:
            x = torch.cat([self.extra_embed.expand(len(x), -1, -1), x], dim=1)
        self.planned(self._run, x, *hw_shape)
        if config.out_type == "cls_token":
            x = x[:, : config.extra_tokens].contiguous()
            return (self.norm0(x, 1, config.extra_tokens).flatten(2).transpose(1, 2).reshape(len(x), -1, 1, 1),)
        return (self.norm0(x[:, config.extra_tokens :].contiguous(), *hw_shape),)

    def _run(self, x: Tensor, *hw_shape: int) -> tuple[()]:
        """Compute all blocks on tokens ``(B, N, C)`` in place."""
        config, tokens = self.config, x.shape[1]
        everywhere = [1, tokens, 1, 0, 0, tokens]
        windows = everywhere
        if config.window_size is not None:
            windows = [*hw_shape, config.window_size, 0, int(config.mask_padding)]
        for i, block in enumerate(self.stages[0].blocks):
            block.attn(x, everywhere if i in config.global_blocks else windows)
            block.mlp(x, windows)
        return ()
