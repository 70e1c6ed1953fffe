"""Packed layers with a shortcut around every binary layer, the twins of those in :mod:`mmbivit.packed.modules`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import residual_operators  # noqa: F401  it registers its operators
from .modules import PackedAttention, PackedModule, join_neighbours, layer_normed
from .packing import num_words, padded

__all__ = ["PackedResidualAttention", "PackedResidualLinear", "PackedResidualMLP", "PackedResidualPatchMerging"]


class ResidualModule(PackedModule):
    """Base of modules with layers that have a shortcut."""

    def _add_layer(self, name: str, in_features: int, out_features: int) -> None:
        self._add(f"{name}_threshold", padded(in_features))
        self._add_weight(f"{name}_weight", out_features, in_features)
        self._add(f"{name}_out", 5, padded(out_features))

    def _layer(self, name: str) -> list[Tensor]:
        return [self._buffers[f"{name}_{part}"] for part in ("threshold", "weight", "out")]


class PackedResidualLinear(ResidualModule):
    """Binary linear layer on bits, with its norms, shortcut and RPReLU in one operator.

    ``RPReLU(scale * (Sign(n - gamma) . W_b) + bias + R(n))`` with ``n = gain * x + shift`` (BinaryViT, Eq. 2 and 3).

    Args:
        in_features: size of the last input axis.
        out_features: size of the last output axis.

    Shape: ``(*, in_features) -> (*, out_features)``, float32.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self._add("in_affine", 2, padded(in_features))
        self._add_layer("layer", in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        out = torch.ops.mmbivit.residual_linear(rows, self.in_affine, self._layer("layer"), self.out_features)
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class PackedResidualPatchMerging(PackedResidualLinear):
    """Join 2 x 2 tokens: norm and binary projection to twice the channels, with its shortcut.

    Args:
        embed_dims: channels ``C``.
        layer_norm: eps of the norm, if that is a LayerNorm.

    Shape: ``(B, H*W, C) -> (B, ceil(H/2)*ceil(W/2), 2*C)``.
    """

    def __init__(self, embed_dims: int, layer_norm: float | None = None):
        super().__init__(4 * embed_dims, 2 * embed_dims)
        self.layer_norm = layer_norm

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        rows = join_neighbours(x, height, width)
        return super().forward(layer_normed(rows, self.layer_norm) if self.layer_norm else rows)


class PackedResidualAttention(ResidualModule, PackedAttention):
    """Norm, (shifted) window attention and shortcut, every layer with a shortcut of its own.

    Args:
        embed_dims: channels ``C``.
        num_heads: heads.
        window_size: tokens along a window with relative position biases, up to 31; ``None`` for none.
        scale: factor of the scores.
        head_shortcut: whether queries, keys and values are added to the heads' output.
        options: the others of :class:`mmbivit.packed.modules.PackedAttention`.

    Shape: ``x (B, H*W, C)`` is changed in place.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        window_size: int | None,
        scale: float,
        head_shortcut: bool,
        **options: Any,
    ):
        super().__init__(embed_dims, num_heads, window_size, scale, **options)
        self.head_shortcut = head_shortcut
        self._add_layer("qkv", embed_dims, 3 * embed_dims)
        self._add("head_threshold", padded(3 * embed_dims))
        self._add("head_out", 5, padded(embed_dims))
        self._add_layer("proj", embed_dims, embed_dims)

    def forward(self, x: Tensor, layout: Sequence[int]) -> None:
        """Add attention to the tokens; ``layout`` is height, width, window, shift, mask_padding."""
        torch.ops.mmbivit.residual_attention_(
            x,
            self.in_affine,
            self._layer("qkv"),
            self.head_threshold,
            self.position_bias,
            *self._selection(),
            self.head_out,
            self._layer("proj"),
            layout,
            self.head_dim,
            self.head_shortcut,
            self.divide,
            layer_normed(x, self.layer_norm) if self.layer_norm else None,
        )


class PackedResidualMLP(ResidualModule):
    """Norm, MLP over channels, spatial interaction over the tokens of squares, and shortcut, floats between products.

    Args:
        embed_dims: channels ``C``.
        hidden_dims: hidden width.
        num_tokens: tokens ``T`` of a square that is mixed, such as a window.
        si_hidden: hidden tokens of the spatial interaction; ``None`` for none.
        layer_norm: see :class:`mmbivit.packed.modules.PackedAttention`.

    Shape: ``x (B, H*W, C)`` is changed in place.
    """

    def __init__(
        self, embed_dims: int, hidden_dims: int, num_tokens: int, si_hidden: int | None, layer_norm: float | None = None
    ):
        super().__init__()
        self.layer_norm = layer_norm
        self.hidden_dims = hidden_dims
        self.si_hidden = si_hidden
        self._add("in_affine", 2, padded(embed_dims))
        self._add_layer("fc1", embed_dims, hidden_dims)
        self._add_layer("fc2", hidden_dims, embed_dims)
        if si_hidden is not None:
            self._add("si_affine", 2, padded(embed_dims))
            for name, inputs, outputs in (("si1", num_tokens, si_hidden), ("si2", si_hidden, num_tokens)):
                self._add(f"{name}_threshold", inputs)
                self._add(f"{name}_weight", outputs, num_words(inputs), dtype=torch.int32)
                self._add(f"{name}_out", 5, outputs)
            self._add("si_alpha", padded(embed_dims))

    def forward(self, x: Tensor, layout: Sequence[int]) -> None:
        """Add both branches to the tokens; ``layout`` is height, width, window, shift, mask_padding."""
        si = []
        if self.si_hidden is not None:
            si = [self.si_affine, *self._layer("si1"), *self._layer("si2"), self.si_alpha]
        normed = layer_normed(x, self.layer_norm) if self.layer_norm else None
        layers = self._layer("fc1"), self._layer("fc2")
        torch.ops.mmbivit.residual_mlp_(
            x, self.in_affine, *layers, self.hidden_dims, si, self.si_hidden or 0, layout, normed
        )
