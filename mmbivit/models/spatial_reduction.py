"""Attention whose keys and values are averages over squares of tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmbivit.binary import Recipe

from .attention import Attention
from .layout import AllTokens

__all__ = ["ReducedLayout", "ReducedQKV", "SpatialReductionAttention"]


@dataclass(frozen=True)
class ReducedLayout(AllTokens):
    """One group of all tokens, whose keys are averages over squares of them.

    Args:
        side: tokens along a square; those at a border may be smaller.
    """

    side: int = 1

    def spread(self, weights: Tensor) -> Tensor:
        """Share the weight of each key ``(*, keys)`` among the tokens of its square, ``(*, H*W)``."""
        rows, columns = (torch.arange(length) // self.side for length in self.hw_shape)
        keys = (rows[:, None] * (columns[-1] + 1) + columns).flatten()
        return (weights / keys.bincount())[..., keys]


class ReducedQKV(nn.Module):
    """Queries of all tokens; keys and values of averages over squares of them (BinaryViT, Eq. 14).

    Keys and values are repeated for all tokens of a square (nearest neighbour), as Eq. 15 adds them to the heads.

    Args:
        channels: channels ``C``.
        reduction: tokens along a square.
        recipe: which layers to build.
        bias: whether layers have one.

    Shape: ``(B, H*W, C) -> (B, H*W, 3 * C)``.
    """

    def __init__(self, channels: int, reduction: int, recipe: Recipe, bias: bool = True):
        super().__init__()
        self.side = reduction
        self.query = recipe.build_linear(channels, channels, bias=bias, place="qkv")
        self.reduction = recipe.build_linear(channels, channels, bias=bias, place="qkv")
        self.key_value = recipe.build_linear(channels, 2 * channels, bias=bias, place="qkv")

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        grid = F.avg_pool2d(x.transpose(1, 2).unflatten(2, hw_shape), self.side, ceil_mode=True)
        small = self.key_value(self.reduction(grid.flatten(2).transpose(1, 2)))
        grid = small.transpose(1, 2).unflatten(2, grid.shape[2:])
        grid = grid.repeat_interleave(self.side, 2).repeat_interleave(self.side, 3)[..., : hw_shape[0], : hw_shape[1]]
        return torch.cat([self.query(x), grid.flatten(2).transpose(1, 2)], dim=-1)


class SpatialReductionAttention(Attention):
    """Attention of all tokens to all tokens, or to averages over squares of them (BinaryViT, Eq. 6-8 and 14-15).

    Args:
        channels: channels ``C``, divisible by ``num_heads``.
        num_heads: number of heads.
        reduction: tokens along the squares whose averages are keys and values; 1 for none.
        recipe: which quantizers, layers and shortcuts to build.
        attn_drop: dropout rate of the attention weights.
        drop: dropout rate of the output.

    Shape: ``(B, H*W, C) -> (B, H*W, C)``.
    """

    def __init__(
        self, channels: int, num_heads: int, reduction: int, recipe: Recipe, attn_drop: float = 0.0, drop: float = 0.0
    ):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (channels // num_heads) ** -0.5
        self.side = reduction
        if reduction == 1:  # the same layer for all three: each output channel has its own shortcut and RPReLU
            self.qkv = recipe.build_linear(channels, 3 * channels, place="qkv")
        else:
            self.qkv = ReducedQKV(channels, reduction, recipe)
        self.qkv_quantizer = recipe.build_qkv_quantizer(3 * channels, num_heads)
        self.query_norm, self.key_norm = (recipe.build_head_norm(channels // num_heads) for _ in range(2))
        self.attention = recipe.build_attention(num_heads)
        self.head_shortcut = recipe.build_head_shortcut(channels)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = recipe.build_linear(channels, channels, place="proj")
        self.proj_drop = nn.Dropout(drop)

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Attend; ``hw_shape`` is the grid of the tokens."""
        batch, tokens, channels = x.shape
        qkv = self.norm_heads(self.qkv(x) if self.side == 1 else self.qkv(x, hw_shape))
        query, key, value = self.qkv_quantizer(qkv).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        if self.side > 1:  # one token of each square stands for all
            key, value = (self._first_of_squares(y, hw_shape) for y in (key, value))
        weights = self.attn_drop(self.attention((query * self.scale) @ key.transpose(-2, -1)))
        x = (weights @ value).transpose(1, 2).reshape(batch, tokens, channels)
        if self.head_shortcut is not None:
            x = self.head_shortcut(x, qkv)
        return self.proj_drop(self.proj(x))

    def _first_of_squares(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        return x.unflatten(2, hw_shape)[:, :, :: self.side, :: self.side].flatten(2, 3)
