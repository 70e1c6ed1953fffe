"""Attention, float or binary."""

from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from mmbivit.binary import Recipe, attention_by_bits, relative_position_index

__all__ = ["Attention", "MultiHeadAttention", "WindowAttention", "find_attention"]


class Attention(nn.Module):
    """Base of attention modules, which says what counts, pictures and distillation of them need.

    A subclass takes groups of tokens ``(B * groups, n, C)`` first, and has ``num_heads``; ``qkv``, whose output
    ``(B * groups, n, 3 * C)`` are queries, keys and values, each of all heads; ``qkv_quantizer``, which makes these
    1 bit; and ``attention``, which makes scores ``(B * groups, num_heads, queries, keys)`` into weights.
    """

    num_heads: int
    qkv: nn.Module
    attention: nn.Module
    qkv_quantizer: nn.Module

    def __init__(self):
        super().__init__()
        self.query_norm: nn.Module | None = None
        self.key_norm: nn.Module | None = None

    def norm_heads(self, qkv: Tensor) -> Tensor:
        """Normalise the queries and keys of each head in ``(*, 3 * C)``, where there are norms of them."""
        if self.query_norm is None:
            return qkv
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        return torch.stack([self.query_norm(query), self.key_norm(key), value], dim=-3).flatten(-3)  # type: ignore[misc]  # both, or neither

    @property
    def product_bits(self) -> tuple[tuple[int, int], ...]:
        """Bits of the two sides of ``q k^T`` and of ``weights v``, now; what has no ``bits`` of its own is float."""
        qkv, weights = (getattr(module, "bits", 32) for module in (self.qkv_quantizer, self.attention))
        return (qkv, qkv), (weights, qkv)


class MultiHeadAttention(Attention):
    """Multi-head self-attention inside groups of tokens (ViT; SI-BiViT 4.1).

    Binary: queries, keys and values are signs with own thresholds (Eq. 3), scores ``q k^T / sqrt(d)`` select
    keys (:class:`mmbivit.binary.SoftmaxThreshold`), the selected values are averaged, and both projections are
    binary linear layers.

    Args:
        embed_dims: channels ``C``, divisible by ``num_heads``.
        num_heads: number of heads.
        recipe: which quantizers to build.
        qkv_bias: add a bias to queries, keys and values.
        qk_scale: factor of the scores, ``head_dim ** -0.5`` by default.
        attn_drop: dropout rate of the attention weights.
        proj_drop: dropout rate of the output.

    Shape: ``(B * groups, n, C) -> (B * groups, n, C)``.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        recipe: Recipe,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.scale = qk_scale or (embed_dims // num_heads) ** -0.5
        self.qkv = recipe.build_linear(embed_dims, 3 * embed_dims, bias=qkv_bias, place="qkv")
        self.qkv_quantizer = recipe.build_qkv_quantizer(3 * embed_dims, num_heads)
        self.query_norm, self.key_norm = (recipe.build_head_norm(embed_dims // num_heads) for _ in range(2))
        self.attention = recipe.build_attention(num_heads)
        self.head_shortcut = recipe.build_head_shortcut(embed_dims)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = recipe.build_linear(embed_dims, embed_dims, place="proj")
        self.proj_drop = nn.Dropout(proj_drop)

    def position_bias(self) -> Tensor | None:
        """Return what is added to the scores of each head, query and key, ``(num_heads, n, n)``, if anything is."""
        return None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend within each group.

        Args:
            x: tokens ``(B * groups, n, C)``.
            mask: True where a key is masked, ``(groups, n, n)``; the same for each image.
        """
        qkv = self.norm_heads(self.qkv(x))
        heads = None
        if self.attn_drop.p == 0 or not self.training:
            heads = attention_by_bits(
                *(qkv, self.qkv_quantizer, self.attention, self.position_bias(), mask, self.scale, self.num_heads)
            )
        if heads is None:
            heads = self._heads(qkv, mask)
        if self.head_shortcut is not None:
            heads = self.head_shortcut(heads, qkv)
        return self.proj_drop(self.proj(heads))

    def _heads(self, qkv: Tensor, mask: Tensor | None) -> Tensor:
        """Attend: ``(B * groups, n, 3 * C) -> (B * groups, n, C)``."""
        batch, tokens = qkv.shape[:2]
        query, key, value = self.qkv_quantizer(qkv).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        scores = (query * self.scale) @ key.transpose(-2, -1)
        if (bias := self.position_bias()) is not None:
            scores = scores + bias
        if mask is not None:
            groups = len(mask)
            scores = scores.view(-1, groups, self.num_heads, tokens, tokens).masked_fill(mask[:, None], -torch.inf)
            scores = scores.view(batch, self.num_heads, tokens, tokens)
        weights = self.attn_drop(self.attention(scores))
        return (weights @ value).transpose(1, 2).reshape(batch, tokens, -1)


class WindowAttention(MultiHeadAttention):
    """Multi-head self-attention inside square windows, whose scores have a relative position bias (Swin).

    Args:
        embed_dims: channels ``C``, divisible by ``num_heads``.
        num_heads: number of heads.
        window_size: height and width of a window in tokens; ``N = window_size**2``.
        recipe: which quantizers to build.
        options: those of :class:`MultiHeadAttention`.

    Shape: ``(num_windows * B, N, C) -> (num_windows * B, N, C)``.
    """

    def __init__(self, embed_dims: int, num_heads: int, window_size: int, recipe: Recipe, **options: Any):
        super().__init__(embed_dims, num_heads, recipe, **options)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))
        self.register_buffer("relative_position_index", relative_position_index(window_size), persistent=False)
        trunc_normal_(self.relative_position_bias_table, std=0.02)

    def position_bias(self) -> Tensor:
        """Return the bias of each head, query and key, ``(num_heads, N, N)``."""
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)


def find_attention(block: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """Return the one attention of a block, and the part of it that makes scores into weights; ``None`` without one.

    Args:
        block: has an :class:`Attention`, or mmdet's of Swin, which has ``num_heads`` and ``qkv`` as well.
    """
    ours = [(part, part.attention) for part in block.modules() if isinstance(part, Attention)]
    found = ours or [
        (part, part.softmax) for part in block.modules() if isinstance(getattr(part, "softmax", None), nn.Softmax)
    ]
    return found[0] if len(found) == 1 else None
