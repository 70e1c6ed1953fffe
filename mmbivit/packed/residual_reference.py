"""The operators of :mod:`mmbivit.packed.residual_operators` in plain torch: the specification of their kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmbivit.binary import repeat_or_average

from .arguments import read_layout
from .packing import pack_signs
from .reference import binary_matmul, count_differing_rows, query_scores, select_keys, window_tokens

__all__ = ["residual_attention_", "residual_linear", "residual_mlp_", "rprelu"]


def _normed(x: Tensor, affine: Tensor) -> Tensor:
    gain, shift = affine[:, : x.shape[-1]]
    return torch.addcmul(shift, x, gain)


def rprelu(y: Tensor, gamma: Tensor, slope: Tensor, zeta: Tensor) -> Tensor:
    """``PReLU(y - gamma) + zeta`` of the last axis."""
    shifted = y - gamma
    return shifted.clamp(min=0) + slope * shifted.clamp(max=0) + zeta


def _shortcut(x: Tensor, n: int) -> Tensor:
    """Bring ``(*, K)`` to ``(*, n)``; 0 where neither width is a multiple of the other."""
    fits = max(n, x.shape[-1]) % min(n, x.shape[-1]) == 0
    return repeat_or_average(x, n) if fits else x.new_zeros(*x.shape[:-1], n)


def _layer(x: Tensor, layer: Sequence[Tensor], n: int) -> Tensor:
    """Apply a layer to floats ``(*, K) -> (*, n)``."""
    threshold, weight, out = layer
    bits = pack_signs(x >= threshold[: x.shape[-1]])
    product = binary_matmul(bits.flatten(0, -2), weight, x.shape[-1], n).view(*x.shape[:-1], n)
    scale, bias, *act = out[:, :n]
    return rprelu(product * scale + bias + _shortcut(x, n), *act)


def _token_layer(x: Tensor, layer: Sequence[Tensor]) -> Tensor:
    """The same over tokens ``(*, C, K) -> (*, C, n)``, whose weight is rows."""
    threshold, weight, (scale, bias, *act) = layer
    differing = count_differing_rows(pack_signs(x >= threshold), weight)
    return rprelu((x.shape[-1] - 2 * differing) * scale + bias + _shortcut(x, len(weight)), *act)


def residual_linear(x: Tensor, in_affine: Tensor, layer: Sequence[Tensor], n: int) -> Tensor:
    """Norm, layer and shortcut."""
    return _layer(_normed(x, in_affine), layer, n).contiguous()


def residual_attention_(
    x: Tensor,
    in_affine: Tensor,
    qkv: Sequence[Tensor],
    head_threshold: Tensor,
    position_bias: Tensor | None,
    selection: str,
    step: Tensor,
    limit: Tensor,
    head_out: Tensor,
    proj: Sequence[Tensor],
    layout: Sequence[int],
    head_dim: int,
    head_shortcut: bool,
    divide: bool,
    normed: Tensor | None,
) -> None:
    """Add window attention to the tokens in place."""
    index, region = (t.to(x.device) for t in window_tokens(read_layout(layout)))
    heads, channels = len(step), x.shape[-1]
    windows = _normed(x if normed is None else normed, in_affine)[:, index.clamp(min=0)]
    windows = windows.masked_fill((index < 0)[..., None], 0.0)  # (B, windows, tokens, C)
    values = _layer(windows, qkv, 3 * channels)
    bits = (values >= head_threshold[: 3 * channels]).float()
    query, key, value = bits.view(*windows.shape[:3], 3, heads, head_dim).permute(3, 0, 1, 4, 2, 5)
    scores = query_scores(query, key, position_bias, step, region)
    selected = select_keys(scores, selection, limit)
    out = selected.float() @ (2 * value - 1)
    out = out / selected.sum(dim=-1, keepdim=True) if divide else out
    gain, bias, *act = head_out[:, :channels]
    out = out.permute(0, 1, 3, 2, 4).flatten(-2) * gain + bias
    if head_shortcut:
        out = out + values.unflatten(-1, (3, channels)).sum(dim=-2)
    out = _layer(rprelu(out, *act), proj, channels)
    real = index >= 0
    x[:, index[real]] += out[:, real]


def residual_mlp_(
    x: Tensor,
    in_affine: Tensor,
    fc1: Sequence[Tensor],
    fc2: Sequence[Tensor],
    hidden: int,
    si: Sequence[Tensor],
    si_hidden: int,
    layout: Sequence[int],
    normed: Tensor | None,
) -> None:
    """Add the MLP and the spatial interaction to the tokens in place."""
    source = x if normed is None else normed
    out = _layer(_layer(_normed(source, in_affine), fc1, hidden), fc2, x.shape[-1])
    if si:
        affine, *layers, alpha = si
        index = window_tokens(read_layout(layout))[0].to(x.device)
        windows = _normed(source, affine)[:, index.clamp(min=0)].masked_fill((index < 0)[..., None], 0.0)
        mixed = _token_layer(_token_layer(windows.transpose(-2, -1), layers[:3]), layers[3:])
        real = index >= 0
        out[:, index[real]] += (mixed.transpose(-2, -1) * alpha[: x.shape[-1]])[:, real]
    x += out
