"""The operators of packed networks: native kernels where they run, the torch reference elsewhere.

They are ``torch.ops.mmbivit.*``, with fake implementations, so ``torch.compile`` and ``torch.export`` take them.

``in_affine`` is ``(2, K)``, gain and shift of what is signed, ``Sign(gain * x + shift)``: a norm and a threshold in
one. ``out_affine`` is ``(2, N)``, scale and bias of an accumulator. ``thresholds`` are those of
:func:`mmbivit.packed.thresholds.count_thresholds`. All are padded to whole blocks of 16 channels, weights and bits are
laid out as in :mod:`mmbivit.packed.packing`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import kernels, reference
from .arguments import (
    MOST_TOKENS,
    check_inputs,
    check_layout,
    check_pair,
    check_positive,
    check_selection,
    check_tensor,
    check_weight,
    define,
    fake_in_place,
    large_windows,
    native_path,
    register,
)
from .packing import num_words, padded

__all__ = [
    "binary_linear",
    "binary_matmul",
    "dual_branch_mlp_",
    "feature_map",
    "pack_affine",
    "patch_embedding",
    "patch_merging",
    "window_attention_",
]

define("pack_affine(Tensor x, Tensor affine) -> Tensor")
define("binary_matmul(Tensor a, Tensor weight, int k, int n) -> Tensor")
define(
    "binary_linear(Tensor x, Tensor in_affine, Tensor weight, Tensor out_affine, int n, Tensor? rprelu=None, "
    "Tensor? add=None) -> Tensor"
)
define(
    "patch_merging(Tensor x, Tensor in_affine, Tensor weight, Tensor out_affine, SymInt height, SymInt width, int n)"
    " -> Tensor"
)
define("patch_embedding(Tensor images, Tensor weight, Tensor bias, int patch, int n) -> Tensor")
define("feature_map(Tensor x, Tensor affine, SymInt height, SymInt width) -> Tensor")
define(
    "window_attention_(Tensor(a!) x, Tensor in_affine, Tensor padding, Tensor qkv_weight, Tensor qkv_thresholds, "
    "Tensor? position_bias, str selection, Tensor step, Tensor limit, Tensor value_ratio, Tensor? value_offset, "
    "Tensor proj_weight, Tensor proj_affine, SymInt[] layout, int head_dim, Tensor? normed=None) -> ()"
)
define(
    "dual_branch_mlp_(Tensor(a!) x, Tensor in_affine, Tensor fc1_weight, Tensor fc1_thresholds, Tensor fc2_weight, "
    "Tensor fc2_affine, int hidden, Tensor[] si, int si_hidden, SymInt[] layout, Tensor? normed=None) -> ()"
)


def pack_affine(x: Tensor, affine: Tensor) -> Tensor:
    """``Sign(gain * x + shift)`` as bit rows: float32 ``(M, K) -> (M, ceil(K / 32))`` int32."""
    rows, k = x.shape
    args = check_tensor("x", x, (rows, k)), *check_pair("affine", affine, padded(k))
    if (path := native_path(x, args)) is None:
        return reference.pack_affine(x, affine)
    out = x.new_empty(rows, num_words(k), dtype=torch.int32)
    kernels.KERNELS.call("pack", path, kernels.PackArgs(*args, out.data_ptr(), rows, k), out)
    return out


def binary_matmul(a: Tensor, weight: Tensor, k: int, n: int) -> Tensor:
    """Integer accumulators of bit rows ``(M, words)`` and a packed weight: int32 ``(M, n)``."""
    check_positive(k=k, n=n)
    rows = len(a)
    args = check_tensor("a", a, (rows, num_words(k)), torch.int32), check_weight("weight", weight, n, k)
    if (path := native_path(a, args)) is None:
        return reference.binary_matmul(a, weight, k, n)
    out = a.new_empty(rows, n)
    kernels.KERNELS.call("matmul", path, kernels.MatmulArgs(*args, out.data_ptr(), rows, k, n), out)
    return out


def binary_linear(
    x: Tensor,
    in_affine: Tensor,
    weight: Tensor,
    out_affine: Tensor,
    n: int,
    rprelu: Tensor | None = None,
    add: Tensor | None = None,
) -> Tensor:
    """Binary linear layer with everything around it: float32 ``(M, K) -> (M, n)``.

    ``RPReLU(scale * (Sign(gain * x + shift) . W) + bias) + add``; ``rprelu`` is ``(3, n padded)``: gamma, slope, zeta.
    """
    check_positive(n=n)
    rows, k = x.shape
    args = (
        check_tensor("x", x, (rows, k)),
        *check_pair("in_affine", in_affine, padded(k)),
        check_weight("weight", weight, n, k),
        *check_pair("out_affine", out_affine, padded(n)),
        None if rprelu is None else check_tensor("rprelu", rprelu, (3, padded(n))),
        None if add is None else check_tensor("add", add, (rows, n)),
    )
    if (path := native_path(x, args)) is None:
        return reference.binary_linear(x, in_affine, weight, out_affine, n, rprelu, add)
    out = x.new_empty(rows, n)
    kernels.KERNELS.call("linear", path, kernels.LinearArgs(*args, out.data_ptr(), rows, k, n), out)
    return out


def patch_merging(
    x: Tensor, in_affine: Tensor, weight: Tensor, out_affine: Tensor, height: int, width: int, n: int
) -> Tensor:
    """Binary patch merging: float32 ``(B, height * width, C) -> (B, ceil(height / 2) * ceil(width / 2), n)``."""
    check_positive(height=height, width=width, n=n)
    batch, _, channels = x.shape
    args = (
        check_tensor("x", x, (batch, height * width, channels)),
        *check_pair("in_affine", in_affine, padded(4 * channels)),
        check_weight("weight", weight, n, 4 * channels),
        *check_pair("out_affine", out_affine, padded(n)),
    )
    if (path := native_path(x, args)) is None:
        return reference.patch_merging(x, in_affine, weight, out_affine, height, width, n)
    out = x.new_empty(batch, -(-height // 2) * -(-width // 2), n)
    sizes = batch, height, width, channels, n
    kernels.KERNELS.call("merge", path, kernels.MergeArgs(*args, out.data_ptr(), *sizes), out)
    return out


def patch_embedding(images: Tensor, weight: Tensor, bias: Tensor, patch: int, n: int) -> Tensor:
    """Float projection of patches: ``(B, C, H, W) -> (B, ceil(H / patch) * ceil(W / patch), n)``.

    Args:
        weight: ``(C * patch * patch, n padded)``, the first axis in the order of ``(C, patch, patch)``.
        bias: ``(n padded)``.
        patch: pixels along a patch; images are padded with 0 to whole patches.
    """
    batch, channels, height, width = images.shape
    check_positive(channels=channels, height=height, width=width, patch=patch, n=n)
    args = (
        check_tensor("images", images, (batch, channels, height, width)),
        check_tensor("weight", weight, (channels * patch**2, padded(n))),
        check_tensor("bias", bias, (padded(n),)),
    )
    if (path := native_path(images, args)) is None:
        return reference.patch_embedding(images, weight, bias, patch, n)
    out = _fake_embedding(images, weight, bias, patch, n)
    sizes = batch, channels, height, width, patch, n
    kernels.KERNELS.call("embed", path, kernels.EmbedArgs(*args, out.data_ptr(), *sizes), out)
    return out


def feature_map(x: Tensor, affine: Tensor, height: int, width: int) -> Tensor:
    """``gain * x + shift`` as a map: float32 ``(B, height * width, C) -> (B, C, height, width)``, channels last."""
    batch, _, channels = x.shape
    args = check_tensor("x", x, (batch, height * width, channels)), *check_pair("affine", affine, padded(channels))
    if (path := native_path(x, args)) is None:
        return reference.feature_map(x, affine, height, width)
    out = _fake_map(x, affine, height, width)
    kernels.KERNELS.call("map", path, kernels.MapArgs(*args, out.data_ptr(), batch * height * width, channels), out)
    return out


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
    normed: Tensor | None = None,
) -> None:
    """Add window attention to ``x (B, height * width, C)`` in place; all in between are bits.

    Queries, keys and values are bits by thresholds. A key is selected by its
    ``score = position_bias - step * (differing bits)``, and an output is +1 where the number of set bits among the
    selected values reaches ``value_ratio * selected + value_offset``. Each head has ``head_dim`` channels, padded to
    whole blocks of 16.

    Args:
        padding: bits ``(words)`` of a padding token.
        position_bias: ``(heads, T, T padded to 16)``, -inf on the padding; ``None`` for 0.
        selection: ``'below_best'`` selects where a score reaches the best one of its query plus ``limit``, ``'above'``
            where it reaches ``limit``, ``'share'`` where the softmax reaches ``exp(limit)``.
        step: ``(heads)``.
        limit: ``(heads)``.
        value_ratio: ``(heads * padded head_dim)``; infinite on the padding.
        value_offset: the same, finite; ``None`` for 0.
        layout: height, width, window, shift, mask_padding.
        normed: what is signed in place of ``x``, of its shape: where the norm is a LayerNorm, ``x`` without mean and
            with variance 1.
    """
    windows = check_layout(x, layout)
    batch, _, channels = x.shape
    heads, tokens = len(step), windows.tokens
    check_positive(channels=channels, heads=heads, head_dim=head_dim)
    choice = check_selection(selection, step, limit, heads, head_dim)
    inner = heads * padded(head_dim)
    args = (
        *check_inputs(x, normed),
        *check_pair("in_affine", in_affine, padded(channels)),
        check_tensor("padding", padding, (num_words(channels),), torch.int32),
        check_weight("qkv_weight", qkv_weight, 3 * inner, channels),
        *check_pair("qkv_thresholds", qkv_thresholds, 3 * inner, torch.int32),
        None
        if position_bias is None
        else check_tensor("position_bias", position_bias, (heads, tokens, padded(tokens))),
        check_tensor("value_ratio", value_ratio, (inner,)),
        None if value_offset is None else check_tensor("value_offset", value_offset, (inner,)),
        check_weight("proj_weight", proj_weight, channels, inner),
        *check_pair("proj_affine", proj_affine, padded(channels)),
        *choice,
    )
    if (path := native_path(x, args)) is None:
        reference.window_attention_(
            x, in_affine, padding, qkv_weight, qkv_thresholds, position_bias, selection, step, limit, value_ratio,
            value_offset, proj_weight, proj_affine, layout, head_dim, normed,
        )  # fmt: skip
        return
    kernels.KERNELS.call(
        "attention", path, kernels.AttentionArgs(*args, batch, *windows.numbers, channels, heads, head_dim)
    )


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
    normed: Tensor | None = None,
) -> None:
    """Add the MLP over channels, and the one over the tokens of windows, to ``x (B, height * width, C)`` in place.

    Args:
        si: nothing, or the spatial interaction: affine of its norm ``(2, C padded)``, thresholds ``gamma (T)``, weight
            rows ``(si_hidden, words)``, thresholds ``(2, si_hidden)``, weight rows ``(T, words)``, scale and bias
            ``(2, T)``, and ``alpha (C padded)``.
        layout: height, width, window, shift, mask_padding.
        normed: see :func:`window_attention_`.
    """
    windows = check_layout(x, layout)
    batch, tokens, channels = x.shape
    check_positive(channels=channels, hidden=hidden)
    args = (
        *check_inputs(x, normed),
        *check_pair("in_affine", in_affine, padded(channels)),
        check_weight("fc1_weight", fc1_weight, hidden, channels),
        *check_pair("fc1_thresholds", fc1_thresholds, padded(hidden), torch.int32),
        check_weight("fc2_weight", fc2_weight, channels, hidden),
        *check_pair("fc2_affine", fc2_affine, padded(channels)),
        *(_check_si(si, channels, windows.tokens, si_hidden) if si else [None] * 10),
    )
    if (path := native_path(x, args)) is None:
        reference.dual_branch_mlp_(
            x, in_affine, fc1_weight, fc1_thresholds, fc2_weight, fc2_affine, hidden, si, si_hidden, layout, normed
        )
        return
    bits = large_windows(x, windows, num_words(si_hidden), torch.int32) if si else None
    sizes = None if bits is None else bits.data_ptr(), batch, *windows.numbers, channels, hidden, si_hidden
    made = () if bits is None else (bits,)
    kernels.KERNELS.call("mlp", path, kernels.MlpArgs(*args, *sizes), *made)


def _check_si(si: Sequence[Tensor], channels: int, tokens: int, hidden: int) -> list[int]:
    if len(si) != 7 or not 1 <= hidden <= MOST_TOKENS:
        raise ValueError(f"si has {len(si)} tensors and si_hidden is {hidden}; expected 7, and 1 to {MOST_TOKENS}")
    affine, gamma, weight1, thresholds1, weight2, affine2, alpha = si
    return [
        *check_pair("si affine", affine, padded(channels)),
        check_tensor("si gamma", gamma, (tokens,)),
        check_tensor("si weight 1", weight1, (hidden, num_words(tokens)), torch.int32),
        *check_pair("si thresholds 1", thresholds1, hidden, torch.int32),
        check_tensor("si weight 2", weight2, (tokens, num_words(hidden)), torch.int32),
        *check_pair("si affine 2", affine2, tokens),
        check_tensor("si alpha", alpha, (padded(channels),)),
    ]


def _fake_pack_affine(x: Tensor, affine: Tensor) -> Tensor:
    return x.new_empty(len(x), num_words(x.shape[1]), dtype=torch.int32)


def _fake_matmul(a: Tensor, weight: Tensor, k: int, n: int) -> Tensor:
    return a.new_empty(len(a), n)


def _fake_linear(x: Tensor, in_affine, weight, out_affine, n: int, rprelu=None, add=None) -> Tensor:
    return x.new_empty(len(x), n)


def _fake_merging(x: Tensor, in_affine, weight, out_affine, height: int, width: int, n: int) -> Tensor:
    return x.new_empty(len(x), ((height + 1) // 2) * ((width + 1) // 2), n)


def _fake_embedding(images: Tensor, weight, bias, patch: int, n: int) -> Tensor:
    batch, _, height, width = images.shape
    return images.new_empty(batch, ((height + patch - 1) // patch) * ((width + patch - 1) // patch), n)


def _fake_map(x: Tensor, affine, height: int, width: int) -> Tensor:
    return x.new_empty(x.shape[0], height, width, x.shape[2]).permute(0, 3, 1, 2)


register(
    (pack_affine, _fake_pack_affine),
    (binary_matmul, _fake_matmul),
    (binary_linear, _fake_linear),
    (patch_merging, _fake_merging),
    (patch_embedding, _fake_embedding),
    (feature_map, _fake_map),
    (window_attention_, fake_in_place),
    (dual_branch_mlp_, fake_in_place),
)
