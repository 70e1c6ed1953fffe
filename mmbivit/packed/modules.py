"""The layers of a packed network: parameters as bits, integer thresholds and folded scales, and one operator each.

They are made by :func:`mmbivit.deploy.pack` or filled from a file; all their tensors are buffers.
:mod:`mmbivit.packed.operators` defines the operators, :mod:`mmbivit.deploy.folding` computes what they take.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmbivit.binary import relative_position_index

from . import operators  # noqa: F401  it registers torch.ops.mmbivit
from .packing import LANES, num_blocks, num_words, pad_channels, padded

LAYER_NORM_EPS = 1e-5
# How a key is selected, and what the operators call it.
SELECTIONS = dict(ratio="below_best", positive="above", nonnegative="above", share="share")

__all__ = [
    "SELECTIONS",
    "FloatPatchMerging",
    "OutputNorm",
    "PackedAttention",
    "PackedDualBranchMLP",
    "PackedLinear",
    "PackedPatchMerging",
    "PackedWindowAttention",
    "PatchEmbedding",
]


class PackedModule(nn.Module):
    """Base of modules that hold packed parameters as buffers."""

    def _add(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        self.register_buffer(name, torch.zeros(shape, dtype=dtype))

    def _add_weight(self, name: str, out_features: int, in_features: int) -> None:
        self._add(name, num_blocks(out_features), num_words(in_features), LANES, dtype=torch.int32)

    def fill(self, **tensors: Tensor) -> None:
        """Set buffers by name; shapes must fit."""
        self.load_state_dict({name: tensor.to(self.get_buffer(name).dtype) for name, tensor in tensors.items()})


def layer_normed(x: Tensor, eps: float) -> Tensor:
    """Return tokens without mean and with variance 1 over channels, as LayerNorm makes them before its affine."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)


class PackedLinear(PackedModule):
    """Binary linear layer on bits: norm, sign, product, scale, bias, norm, RPReLU and shortcut in one operator.

    ``RPReLU(scale * (Sign(gain * x + shift) . W_b) + bias) + add`` (SI-BiViT, Eq. 3-5).

    Args:
        in_features: size of the last input axis.
        out_features: size of the last output axis.
        rprelu: whether an RPReLU follows.

    Shape: ``(*, in_features) -> (*, out_features)``, float32.
    """

    def __init__(self, in_features: int, out_features: int, rprelu: bool = False):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self._add("in_affine", 2, padded(in_features))
        self._add_weight("weight", out_features, in_features)
        self._add("out_affine", 2, padded(out_features))
        self.register_buffer("rprelu", torch.zeros(3, padded(out_features)) if rprelu else None)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """Apply the layer; ``add`` is a shortcut ``(*, out_features)``."""
        rows = x.reshape(-1, self.in_features)
        add = None if add is None else add.reshape(-1, self.out_features)
        out = torch.ops.mmbivit.binary_linear(
            rows, self.in_affine, self.weight, self.out_affine, self.out_features, self.rprelu, add
        )
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class PackedAttention(PackedModule):
    """Base of attention modules: how scores are made and keys selected.

    Args:
        embed_dims: channels ``C``.
        num_heads: heads.
        window_size: tokens along a window with relative position biases, up to 31; ``None`` for none.
        scale: factor of the scores.
        selection: one of :data:`SELECTIONS`, by which a key is selected: ``'ratio'`` by its share of the largest
            probability of the query, ``'positive'`` and ``'nonnegative'`` by its score, ``'share'`` by its probability,
            from a limit of each head.
        ratio: see ``selection``.
        divide: whether selected values are divided by their number.
        scaled_heads: whether each head has a further factor of its scores.
        layer_norm: eps of the norm, if that is a LayerNorm, which is not folded but for its affine; ``None`` for a
            BatchNorm.

    Attributes:
        step: what one differing bit takes from a score, ``(heads,)``; made of ``scale`` and the heads' own factors.
        limit: what a score must reach, as the operators take it.
        position_bias: of each head, query and key, ``(heads, T, T padded)``; -inf on the padding; or ``None``.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        window_size: int | None,
        scale: float,
        selection: str = "ratio",
        ratio: float = 0.25,
        divide: bool = True,
        scaled_heads: bool = False,
        layer_norm: float | None = None,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = embed_dims // num_heads
        self.window_size = window_size
        self.scale = scale
        self.selection = selection
        self.ratio = ratio
        self.divide = divide
        self.layer_norm = layer_norm
        table = None if window_size is None else torch.zeros((2 * window_size - 1) ** 2, num_heads)
        self.register_buffer("relative_position_bias_table", table)
        self.register_buffer("score_scale", torch.ones(num_heads) if scaled_heads else None)
        self.register_buffer("share", torch.zeros(num_heads) if selection == "share" else None)
        self._add("in_affine", 2, padded(embed_dims))
        self._expand()
        self.register_load_state_dict_post_hook(lambda module, _: module._expand())

    def _expand(self) -> None:
        """Make what the operators take of what is stored."""
        table, position_bias = self.relative_position_bias_table, None
        if table is not None:
            index = relative_position_index(self.window_size).to(table.device)  # type: ignore[arg-type]  # a table has a window
            position_bias = pad_channels(table[index].permute(2, 0, 1), -torch.inf).contiguous()
        device, heads = self.in_affine.device, self.num_heads
        step = torch.full((heads,), 2 * self.scale, device=device)
        if self.score_scale is not None:
            step = step * self.score_scale
        # The operators count differing bits down from 0, where a score starts at head_dim equal ones.
        lowest = -step * (self.head_dim / 2)
        if self.selection == "share":
            limit = self.share
        elif self.selection == "ratio":
            limit = torch.full((heads,), math.log(self.ratio), device=device)
        else:
            limit = lowest if self.selection == "nonnegative" else lowest.nextafter(torch.tensor(torch.inf))
        for name, tensor in dict(position_bias=position_bias, step=step, limit=limit).items():
            self.register_buffer(name, tensor, persistent=False)

    def _selection(self) -> tuple[str, Tensor, Tensor]:
        """Return the arguments ``selection``, ``step`` and ``limit`` of the operators."""
        return SELECTIONS[self.selection], self._buffers["step"], self._buffers["limit"]


class PackedWindowAttention(PackedAttention):
    """Norm, (shifted) window attention and shortcut, on bits from the first sign to the output projection.

    Args:
        embed_dims: channels ``C``.
        num_heads: heads; each one's channels are padded to a multiple of 16.
        window_size: tokens along a window with relative position biases, up to 31; ``None`` for none.
        scale: factor of the scores.
        options: the others of :class:`PackedAttention`.

    Shape: ``x (B, H*W, C)`` is changed in place.
    """

    # Looked up in _buffers: attributes of modules are slow, and there are many.
    NAMES = ("in_affine", "padding", "qkv_weight", "qkv_thresholds", "position_bias")
    LAST_NAMES = ("value_ratio", "value_offset", "proj_weight", "proj_affine")

    def __init__(self, embed_dims: int, num_heads: int, window_size: int | None, scale: float, **options: Any):
        super().__init__(embed_dims, num_heads, window_size, scale, **options)
        inner = num_heads * padded(self.head_dim)
        self._add("padding", num_words(embed_dims), dtype=torch.int32)
        self._add_weight("qkv_weight", 3 * inner, embed_dims)
        self._add("qkv_thresholds", 2, 3 * inner, dtype=torch.int32)
        self._add("value_ratio", inner)
        self.register_buffer("value_offset", None if self.divide else torch.zeros(inner))
        self._add_weight("proj_weight", embed_dims, inner)
        self._add("proj_affine", 2, padded(embed_dims))

    def forward(self, x: Tensor, layout: Sequence[int]) -> None:
        """Add attention to the tokens; ``layout`` is height, width, window, shift, mask_padding."""
        first = (self._buffers[name] for name in self.NAMES)
        last = (self._buffers[name] for name in self.LAST_NAMES)
        normed = layer_normed(x, self.layer_norm) if self.layer_norm else None
        torch.ops.mmbivit.window_attention_(x, *first, *self._selection(), *last, layout, self.head_dim, normed)


class PackedDualBranchMLP(PackedModule):
    """Norm, MLP over channels, spatial interaction over the tokens of squares, and shortcut, hidden layers as bits.

    Args:
        embed_dims: channels ``C``.
        hidden_dims: hidden width.
        num_tokens: tokens ``T`` of a square that is mixed, such as a window.
        si_hidden: hidden tokens of the spatial interaction; ``None`` for none.
        layer_norm: see :class:`PackedAttention`.

    Shape: ``x (B, H*W, C)`` is changed in place.
    """

    NAMES = ("in_affine", "fc1_weight", "fc1_thresholds", "fc2_weight", "fc2_affine")
    SI_NAMES = ("si_affine", "si_gamma", "si_weight1", "si_thresholds1", "si_weight2", "si_affine2", "si_alpha")

    def __init__(
        self, embed_dims: int, hidden_dims: int, num_tokens: int, si_hidden: int | None, layer_norm: float | None = None
    ):
        super().__init__()
        self.layer_norm = layer_norm
        self.hidden_dims = hidden_dims
        self.si_hidden = si_hidden
        self._add("in_affine", 2, padded(embed_dims))
        self._add_weight("fc1_weight", hidden_dims, embed_dims)
        self._add("fc1_thresholds", 2, padded(hidden_dims), dtype=torch.int32)
        self._add_weight("fc2_weight", embed_dims, hidden_dims)
        self._add("fc2_affine", 2, padded(embed_dims))
        if si_hidden is not None:
            self._add("si_affine", 2, padded(embed_dims))
            self._add("si_gamma", num_tokens)
            self._add("si_weight1", si_hidden, num_words(num_tokens), dtype=torch.int32)
            self._add("si_thresholds1", 2, si_hidden, dtype=torch.int32)
            self._add("si_weight2", num_tokens, num_words(si_hidden), dtype=torch.int32)
            self._add("si_affine2", 2, num_tokens)
            self._add("si_alpha", padded(embed_dims))

    def forward(self, x: Tensor, layout: Sequence[int]) -> None:
        """Add both branches to the tokens; ``layout`` is height, width, window, shift, mask_padding."""
        tensors = (self._buffers[name] for name in self.NAMES)
        si = [] if self.si_hidden is None else [self._buffers[name] for name in self.SI_NAMES]
        normed = layer_normed(x, self.layer_norm) if self.layer_norm else None
        torch.ops.mmbivit.dual_branch_mlp_(x, *tensors, self.hidden_dims, si, self.si_hidden or 0, layout, normed)


class PackedPatchMerging(PackedModule):
    """Join 2 x 2 tokens: norm, sign and binary projection to twice the channels.

    Args:
        embed_dims: channels ``C``.
        layer_norm: eps of the norm, if that is a LayerNorm.

    Shape: ``(B, H*W, C) -> (B, ceil(H/2)*ceil(W/2), 2*C)``.
    """

    def __init__(self, embed_dims: int, layer_norm: float | None = None):
        super().__init__()
        self.layer_norm = layer_norm
        self.out_features = 2 * embed_dims
        self._add("in_affine", 2, padded(4 * embed_dims))
        self._add_weight("weight", 2 * embed_dims, 4 * embed_dims)
        self._add("out_affine", 2, padded(2 * embed_dims))

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        affines = self.in_affine, self.weight, self.out_affine
        if not self.layer_norm:
            return torch.ops.mmbivit.patch_merging(x, *affines, height, width, self.out_features)
        rows = layer_normed(join_neighbours(x, height, width), self.layer_norm)
        out = torch.ops.mmbivit.binary_linear(rows.flatten(0, 1), *affines, self.out_features)
        return out.unflatten(0, rows.shape[:2])


class FloatPatchMerging(PackedModule):
    """The same with a float projection, into which the norm is folded (``downsample='float'`` of the backbone)."""

    def __init__(self, embed_dims: int, layer_norm: float | None = None):
        super().__init__()
        self.layer_norm = layer_norm
        self._add("weight", 2 * embed_dims, 4 * embed_dims)
        self._add("bias", 2 * embed_dims)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        rows = join_neighbours(x, height, width)
        return F.linear(layer_normed(rows, self.layer_norm) if self.layer_norm else rows, self.weight, self.bias)


def join_neighbours(x: Tensor, height: int, width: int) -> Tensor:
    """Concatenate 2 x 2 tokens: ``(B, H*W, C) -> (B, ceil(H/2)*ceil(W/2), 4*C)``."""
    grid = F.pad(x.view(x.shape[0], height, width, -1), (0, 0, 0, width % 2, 0, height % 2))
    parts = [grid[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
    return torch.cat(parts, dim=-1).flatten(1, 2)


def position_embedding(embedding: Tensor, shape: tuple[int, ...], hw_shape: tuple[int, ...]) -> Tensor:
    """Return a position embedding ``(1, N, C)`` of a grid of ``shape`` for one of ``hw_shape``."""
    if hw_shape == shape:
        return embedding
    grid = embedding.transpose(1, 2).unflatten(2, shape)
    return F.interpolate(grid, size=hw_shape, mode="bicubic").flatten(2).transpose(1, 2)


class PatchEmbedding(PackedModule):
    """Float patch embedding, its norm folded into it.

    Args:
        in_channels: channels of the image.
        embed_dims: channels of a token.
        patch_size: pixels along a patch.
        layer_norm: eps of a LayerNorm that follows, which does not fold.

    Shape: ``(B, in_channels, H, W) -> (B, H'*W', embed_dims)``, ``H' = ceil(H / patch_size)``.
    """

    def __init__(self, in_channels: int, embed_dims: int, patch_size: int, layer_norm: float | None = None):
        super().__init__()
        self.layer_norm = layer_norm
        self.embed_dims = embed_dims
        self.patch_size = patch_size
        self._add("weight", in_channels * patch_size**2, padded(embed_dims))
        self._add("bias", padded(embed_dims))
        if layer_norm:
            self._add("norm", 2, embed_dims)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.ops.mmbivit.patch_embedding(images, self.weight, self.bias, self.patch_size, self.embed_dims)
        return F.layer_norm(x, x.shape[-1:], *self.norm, self.layer_norm) if self.layer_norm else x  # type: ignore[call-arg]  # weight and bias


class OutputNorm(PackedModule):
    """Scale and shift the tokens; as a feature map, their channels come last in memory (``torch.channels_last``).

    Args:
        embed_dims: channels ``C``.
        layer_norm: eps of the norm, if that is a LayerNorm.

    Shape: ``(B, H*W, C) -> (B, C, H, W)``.
    """

    def __init__(self, embed_dims: int, layer_norm: float | None = None):
        super().__init__()
        self.layer_norm = layer_norm
        self._add("affine", 2, padded(embed_dims))

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = layer_normed(x, self.layer_norm) if self.layer_norm else x
        return torch.ops.mmbivit.feature_map(x, self.affine, height, width)
