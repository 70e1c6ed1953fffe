"""Operators of networks with a shortcut around every binary layer (ReactNet, BinaryViT).

Such a layer computes ``RPReLU(scale * (Sign(x - threshold) . W) + bias + R(x))`` of floats, with ``R`` of
:func:`mmbivit.binary.repeat_or_average`, or 0 where neither width is a multiple of the other. As an argument it is
three tensors: thresholds ``(K padded)``, a packed weight, and ``(5, N padded)``: scale, bias, and gamma, slope and zeta
of the RPReLU. All else is as in :mod:`mmbivit.packed.operators`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import kernels
from . import residual_reference as reference
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

__all__ = ["residual_attention_", "residual_linear", "residual_mlp_"]

define("residual_linear(Tensor x, Tensor in_affine, Tensor[] layer, int n) -> Tensor")
define(
    "residual_attention_(Tensor(a!) x, Tensor in_affine, Tensor[] qkv, Tensor head_threshold, Tensor? position_bias, "
    "str selection, Tensor step, Tensor limit, Tensor head_out, Tensor[] proj, SymInt[] layout, int head_dim, "
    "bool head_shortcut, bool divide, Tensor? normed=None) -> ()"
)
define(
    "residual_mlp_(Tensor(a!) x, Tensor in_affine, Tensor[] fc1, Tensor[] fc2, int hidden, Tensor[] si, int si_hidden, "
    "SymInt[] layout, Tensor? normed=None) -> ()"
)


def _check_layer(name: str, layer: Sequence[Tensor], n: int, k: int) -> list[int]:
    if len(layer) != 3:
        raise ValueError(f"{name} has {len(layer)} tensors; expected 3")
    threshold, weight, out = layer
    return [
        check_tensor(f"{name} threshold", threshold, (padded(k),)),
        check_weight(f"{name} weight", weight, n, k),
        check_tensor(f"{name} out", out, (5, padded(n))),
    ]


def residual_linear(x: Tensor, in_affine: Tensor, layer: Sequence[Tensor], n: int) -> Tensor:
    """Layer with a shortcut, of ``gain * x + shift``: float32 ``(M, K) -> (M, n)``; ``in_affine`` has no threshold."""
    check_positive(n=n)
    rows, k = x.shape
    args = (
        check_tensor("x", x, (rows, k)),
        *check_pair("in_affine", in_affine, padded(k)),
        *_check_layer("layer", layer, n, k),
    )
    if (path := native_path(x, args)) is None:
        return reference.residual_linear(x, in_affine, layer, n)
    out = x.new_empty(rows, n)
    kernels.KERNELS.call("residual_linear", path, kernels.ResidualLinearArgs(*args, out.data_ptr(), rows, k, n), out)
    return out


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
    normed: Tensor | None = None,
) -> None:
    """Add window attention, its layers with shortcuts, to ``x (B, height * width, C)`` in place.

    Args:
        in_affine: of the norm alone, thresholds are those of ``qkv``.
        qkv: layer ``C -> 3 * C``.
        head_threshold: of queries, keys and values, ``(3 * C padded)``.
        position_bias: ``(heads, T, T padded to 16)``, -inf on the padding; ``None`` for 0.
        selection, step, limit: see :func:`mmbivit.packed.operators.window_attention_`.
        head_out: scale and bias of the sum of selected values, and the RPReLU that follows, ``(5, C padded)``.
        proj: layer ``C -> C``.
        layout: height, width, window, shift, mask_padding.
        head_dim: channels of a head.
        head_shortcut: add queries, keys and values before the RPReLU of ``head_out``.
        divide: divide by the number of selected keys.
        normed: what the norm takes in place of ``x``, of its shape: where it is a LayerNorm, ``x`` without mean and
            with variance 1.
    """
    windows = check_layout(x, layout)
    batch, _, channels = x.shape
    heads, tokens = len(step), windows.tokens
    check_positive(channels=channels, heads=heads, head_dim=head_dim)
    choice = check_selection(selection, step, limit, heads, head_dim)
    if heads * head_dim != channels:
        raise ValueError(f"{heads} heads of head_dim={head_dim}; expected {channels} channels in all")
    args = (
        *check_inputs(x, normed),
        *check_pair("in_affine", in_affine, padded(channels)),
        *_check_layer("qkv", qkv, 3 * channels, channels),
        check_tensor("head_threshold", head_threshold, (padded(3 * channels),)),
        None
        if position_bias is None
        else check_tensor("position_bias", position_bias, (heads, tokens, padded(tokens))),
        check_tensor("head_out", head_out, (5, padded(channels))),
        *_check_layer("proj", proj, channels, channels),
        *choice,
    )
    if (path := native_path(x, args)) is None:
        reference.residual_attention_(
            x, in_affine, qkv, head_threshold, position_bias, selection, step, limit, head_out, proj, layout,
            head_dim, head_shortcut, divide, normed,
        )  # fmt: skip
        return
    sizes = batch, *windows.numbers, channels, heads, head_dim, head_shortcut, divide
    kernels.KERNELS.call("residual_attention", path, kernels.ResidualAttentionArgs(*args, *sizes))


def residual_mlp_(
    x: Tensor,
    in_affine: Tensor,
    fc1: Sequence[Tensor],
    fc2: Sequence[Tensor],
    hidden: int,
    si: Sequence[Tensor],
    si_hidden: int,
    layout: Sequence[int],
    normed: Tensor | None = None,
) -> None:
    """Add the MLP over channels, and the one over the tokens of windows, to ``x (B, height * width, C)`` in place.

    Args:
        in_affine: of the norm alone.
        fc1: layer ``C -> hidden``.
        fc2: layer ``hidden -> C``.
        hidden: hidden channels.
        si: nothing, or the spatial interaction: affine of its norm ``(2, C padded)``, the tensors of its two layers
            ``T -> si_hidden -> T``, which have weight rows ``(N, words)`` and no padding, and ``alpha (C padded)``.
        si_hidden: hidden tokens.
        layout: height, width, window, shift, mask_padding.
        normed: see :func:`residual_attention_`.
    """
    windows = check_layout(x, layout)
    batch, _, channels = x.shape
    check_positive(channels=channels, hidden=hidden)
    args = (
        *check_inputs(x, normed),
        *check_pair("in_affine", in_affine, padded(channels)),
        *_check_layer("fc1", fc1, hidden, channels),
        *_check_layer("fc2", fc2, channels, hidden),
        *(_check_si(si, channels, windows.tokens, si_hidden) if si else [None] * 9),
    )
    if (path := native_path(x, args)) is None:
        reference.residual_mlp_(x, in_affine, fc1, fc2, hidden, si, si_hidden, layout, normed)
        return
    values = large_windows(x, windows, si_hidden, torch.float32) if si else None
    sizes = None if values is None else values.data_ptr(), batch, *windows.numbers, channels, hidden, si_hidden
    made = () if values is None else (values,)
    kernels.KERNELS.call("residual_mlp", path, kernels.ResidualMlpArgs(*args, *sizes), *made)


def _check_si(si: Sequence[Tensor], channels: int, tokens: int, hidden: int) -> list[int]:
    if len(si) != 8 or not 1 <= hidden <= MOST_TOKENS:
        raise ValueError(f"si has {len(si)} tensors and si_hidden is {hidden}; expected 8, and 1 to {MOST_TOKENS}")
    args = [*check_pair("si affine", si[0], padded(channels))]
    for i, k, n in ((1, tokens, hidden), (4, hidden, tokens)):
        threshold, weight, out = si[i : i + 3]
        args += [
            check_tensor("si threshold", threshold, (k,)),
            check_tensor("si weight", weight, (n, num_words(k)), torch.int32),
            check_tensor("si out", out, (5, n)),
        ]
    return [*args, check_tensor("si alpha", si[7], (padded(channels),))]


def _fake_linear(x: Tensor, in_affine, layer, n: int) -> Tensor:
    return x.new_empty(len(x), n)


register((residual_linear, _fake_linear), (residual_attention_, fake_in_place), (residual_mlp_, fake_in_place))
