"""The operators of packed networks in plain torch: slow, readable, and the specification of the native kernels.

Arguments and results are those of the custom operators in :mod:`mmbivit.packed.operators`, which documents them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .arguments import Layout, read_layout
from .packing import LANES, WORD_BITS, pack_signs, unpack_signs, unpack_weight
from .thresholds import bits_from_counts

__all__ = [
    "binary_linear",
    "binary_matmul",
    "count_differing_rows",
    "dual_branch_mlp_",
    "feature_map",
    "pack_affine",
    "patch_embedding",
    "patch_merging",
    "query_scores",
    "select_keys",
    "window_attention_",
    "window_tokens",
]


def count_differing(a: Tensor, weight: Tensor) -> Tensor:
    """Count differing bits: rows ``(M, words)`` and a weight ``(blocks, words, 16)`` -> int32 ``(M, blocks * 16)``."""
    bits = a.shape[-1] * WORD_BITS
    # Products of -1 and +1 sum up exactly in float32 up to 2^24.
    left = unpack_signs(a, bits).float() * 2 - 1
    right = unpack_weight(weight, len(weight) * LANES, bits).float() * 2 - 1
    return ((bits - left @ right.T) / 2).to(torch.int32)


def affine_signs(x: Tensor, affine: Tensor) -> Tensor:
    """Booleans ``gain * x + shift >= 0`` of ``(*, K)`` and ``(2, K padded to 16)``."""
    gain, shift = affine[:, : x.shape[-1]]
    return torch.addcmul(shift, x, gain) >= 0


def pack_affine(x: Tensor, affine: Tensor) -> Tensor:
    """Sign ``gain * x + shift``, as bit rows."""
    return pack_signs(affine_signs(x, affine))


def binary_matmul(a: Tensor, weight: Tensor, k: int, n: int) -> Tensor:
    """Return integer accumulators ``k - 2 * (differing bits)``."""
    return (k - 2 * count_differing(a, weight)[..., :n]).contiguous()


def binary_linear(
    x: Tensor, in_affine: Tensor, weight: Tensor, out_affine: Tensor, n: int, rprelu: Tensor | None, add: Tensor | None
) -> Tensor:
    """Sign, multiply, scale, RPReLU and shortcut."""
    y = _scaled(pack_affine(x, in_affine), weight, out_affine, x.shape[-1], n)
    if rprelu is not None:
        gamma, slope, zeta = rprelu[:, :n]
        shifted = y - gamma
        y = shifted.clamp(min=0) + slope * shifted.clamp(max=0) + zeta
    return y if add is None else y + add


def _scaled(bits: Tensor, weight: Tensor, affine: Tensor, k: int, n: int) -> Tensor:
    scale, bias = affine[:, :n]
    return binary_matmul(bits, weight, k, n) * scale + bias


def window_tokens(layout: Layout) -> tuple[Tensor, Tensor]:
    """Find which token lies where in each (shifted) window.

    Returns:
        The index of the token, -1 for padding, and a region number: tokens of equal region attend to each other. Both
        ``(num_windows, tokens of a window)``.
    """
    sides = layout.window_height, layout.window_width
    padded = [-(-size // side) * side for size, side in zip((layout.height, layout.width), sides, strict=True)]
    position = [torch.arange(size) for size in padded]
    y, x = ((axis + layout.shift) % size for axis, size in zip(position, padded, strict=True))
    inside = (y[:, None] < layout.height) & (x < layout.width)
    index = torch.where(inside, y[:, None] * layout.width + x, -1)
    # After a shift the last window along an axis holds tokens of both borders, which are not neighbours.
    rows, columns = (
        torch.where(axis >= size - side, 1, 0) + torch.where(axis >= size - layout.shift, 1, 0)
        for axis, size, side in zip(position, padded, sides, strict=True)
    )
    region = rows[:, None] * 3 + columns if layout.shift else torch.zeros_like(index)
    if layout.mask_padding:
        region = region.masked_fill(index < 0, -1)
    return _to_windows(index, *sides), _to_windows(region, *sides)


def _to_windows(grid: Tensor, high: int, wide: int) -> Tensor:
    height, width = grid.shape
    return grid.view(height // high, high, width // wide, wide).transpose(1, 2).reshape(-1, high * wide)


def query_scores(query: Tensor, key: Tensor, position_bias: Tensor | None, step: Tensor, region: Tensor) -> Tensor:
    """Score keys ``(B, windows, heads, tokens, head_dim)`` in {0, 1} by differing bits; -inf in other regions."""
    differing = query @ (1 - key).transpose(-2, -1) + (1 - query) @ key.transpose(-2, -1)
    scores = -step.view(-1, 1, 1) * differing
    if position_bias is not None:
        scores = position_bias[..., : key.shape[-2]] + scores
    return scores.masked_fill((region[:, :, None] != region[:, None, :])[:, None], -torch.inf)


def window_attention_(
    x: Tensor,
    in_affine: Tensor,
    padding: Tensor,
    qkv_weight: Tensor,
    qkv_thresholds: Tensor,
    position_bias: Tensor | None,
    selection: str,
    step: Tensor,
    limit: Tensor,
    value_ratio: Tensor,
    value_offset: Tensor | None,
    proj_weight: Tensor,
    proj_affine: Tensor,
    layout: Sequence[int],
    head_dim: int,
    normed: Tensor | None,
) -> None:
    """Add window attention to the tokens in place."""
    index, region = (t.to(x.device) for t in window_tokens(read_layout(layout)))
    heads, tokens = len(step), index.shape[1]
    bits = pack_affine(x if normed is None else normed, in_affine)[:, index.clamp(min=0)]  # (B, windows, tokens, words)
    bits = torch.where((index < 0)[..., None], padding, bits)
    qkv = bits_from_counts(count_differing(bits.flatten(0, 2), qkv_weight), qkv_thresholds)
    qkv = qkv.view(len(x), len(index), tokens, 3, heads, qkv.shape[-1] // (3 * heads)).permute(3, 0, 1, 4, 2, 5).float()
    query, key, value = qkv  # (B, windows, heads, tokens, padded head_dim), in {0, 1}
    scores = query_scores(query, key, position_bias, step, region)
    selected = select_keys(scores, selection, limit).float()
    needed = value_ratio.view(heads, 1, -1) * selected.sum(dim=-1, keepdim=True)
    if value_offset is not None:
        needed = needed + value_offset.view(heads, 1, -1)
    fires = selected @ value >= needed
    fires = fires.permute(0, 1, 3, 2, 4).flatten(-2)  # (B, windows, tokens, heads * padded head_dim)
    out = _scaled(pack_signs(fires).flatten(0, 2), proj_weight, proj_affine, heads * head_dim, x.shape[-1])
    real = index >= 0
    x[:, index[real]] += out.view(len(x), *index.shape, x.shape[-1])[:, real]


def select_keys(scores: Tensor, selection: str, limit: Tensor) -> Tensor:
    """Select keys by their scores ``(*, heads, queries, keys)``: booleans."""
    limit = limit.view(-1, 1, 1)
    if selection == "below_best":
        return scores >= scores.amax(dim=-1, keepdim=True) + limit
    return (scores.log_softmax(dim=-1) if selection == "share" else scores) >= limit


def dual_branch_mlp_(
    x: Tensor,
    in_affine: Tensor,
    fc1_weight: Tensor,
    fc1_thresholds: Tensor,
    fc2_weight: Tensor,
    fc2_affine: Tensor,
    hidden: int,
    si: Sequence[Tensor],
    si_hidden: int,
    layout: Sequence[int],
    normed: Tensor | None,
) -> None:
    """Add the MLP and the spatial interaction to the tokens in place."""
    signed = x if normed is None else normed
    counts = count_differing(pack_affine(signed, in_affine).flatten(0, 1), fc1_weight)
    bits = pack_signs(bits_from_counts(counts, fc1_thresholds)[:, :hidden])
    out = _scaled(bits, fc2_weight, fc2_affine, hidden, x.shape[-1]).view(x.shape)
    if si:
        out += _spatial_interaction(signed, *si, si_hidden, layout)  # type: ignore[call-arg, arg-type]  # as many as it takes
    x += out


def _spatial_interaction(
    x: Tensor,
    affine: Tensor,
    gamma: Tensor,
    weight1: Tensor,
    thresholds1: Tensor,
    weight2: Tensor,
    affine2: Tensor,
    alpha: Tensor,
    hidden: int,
    layout: Sequence[int],
) -> Tensor:
    channels = x.shape[-1]
    index = window_tokens(read_layout(layout))[0].to(x.device)
    gain, shift = affine[:, :channels]
    windows = torch.addcmul(shift, x, gain)[:, index.clamp(min=0)]
    windows = windows.masked_fill((index < 0)[..., None], 0.0).transpose(-2, -1)  # (B, windows, C, tokens)
    bits = pack_signs(windows >= gamma)
    bits = pack_signs(bits_from_counts(count_differing_rows(bits, weight1), thresholds1))
    scale, bias = affine2
    mixed = ((hidden - 2 * count_differing_rows(bits, weight2)) * scale + bias).transpose(-2, -1) * alpha[:channels]
    real = index >= 0
    out = torch.zeros_like(x)
    out[:, index[real]] = mixed[:, real]
    return out


def count_differing_rows(a: Tensor, weight: Tensor) -> Tensor:
    """Count differing bits of ``(*, words)`` and plain rows ``(N, words)`` -> ``(*, N)``."""
    differing = unpack_signs(a, a.shape[-1] * WORD_BITS).float()
    rows = unpack_signs(weight, weight.shape[-1] * WORD_BITS).float()
    return (differing @ (1 - rows).T + (1 - differing) @ rows.T).to(torch.int32)


def patch_merging(
    x: Tensor, in_affine: Tensor, weight: Tensor, out_affine: Tensor, height: int, width: int, n: int
) -> Tensor:
    """Join 2 x 2 tokens, sign and multiply."""
    grid = x.new_zeros(len(x), height + height % 2, width + width % 2, x.shape[-1])
    grid[:, :height, :width] = x.view(len(x), height, width, x.shape[-1])
    parts = [grid[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
    merged = torch.cat(parts, dim=-1).flatten(1, 2)
    return _scaled(pack_affine(merged, in_affine), weight, out_affine, merged.shape[-1], n)


def patch_embedding(images: Tensor, weight: Tensor, bias: Tensor, patch: int, n: int) -> Tensor:
    """Project patches in float."""
    images = F.pad(images, (0, -images.shape[3] % patch, 0, -images.shape[2] % patch))
    return F.unfold(images, patch, stride=patch).transpose(1, 2) @ weight[:, :n] + bias[:n]


def feature_map(x: Tensor, affine: Tensor, height: int, width: int) -> Tensor:
    """Scale, shift and lay out as maps."""
    gain, shift = affine[:, : x.shape[-1]]
    return (x * gain + shift).unflatten(1, (height, width)).permute(0, 3, 1, 2)
