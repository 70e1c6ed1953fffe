"""The operators of packed networks: native kernels where they run, the torch reference elsewhere.

They are ``torch.ops.mmbivit.*``, with fake implementations, so ``torch.compile`` and ``torch.export`` take them.

``in_affine`` is ``(2, K)``, gain and shift of what is signed, ``Sign(gain * x + shift)``: a norm and a threshold in
one. ``out_affine`` is ``(2, N)``, scale and bias of an accumulator. ``thresholds`` are those of
:func:`mmbivit.packed.thresholds.count_thresholds`. All are padded to whole blocks of 16 channels, weights and bits are
laid out as in :mod:`mmbivit.packed.packing`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import kernels, reference
from .packing import LANES, num_blocks, num_words, padded

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

MOST_WINDOW_TOKENS = 31 * 31
MOST_MIXED_TOKENS = 128 * 128  # 16,384: an image of 512 pixels in patches of 4
FEW_TOKENS = 100  # of a window; where one has more, threads share its channels
MOST_HEAD_CHANNELS = 31 * 32  # whose differing bits the kernels count in bytes
LARGEST_STEP = 1e6  # far from what overflows a score
OTHER_DEVICE = "the first argument is on the CPU and another one is not; move them to one device"
ELSEWHERE = -1  # in place of the address of a tensor that is not in the memory of the CPU


# Checks. The native kernels derive every size from these shapes, so a wrong one must not get through.


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> int:
    """Raise unless a tensor has the shape and dtype and is contiguous; returns its address, if that is ours to read."""
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)}; expected {dtype} {shape} to fit the other arguments"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous; call .contiguous() first")
    return tensor.data_ptr() if tensor.is_cpu else ELSEWHERE


def _inputs(x: Tensor, normed: Tensor | None) -> tuple[int, int]:
    """Check what an operator changes in place, and what it signs; returns both addresses."""
    address = _check("x", x, tuple(x.shape))
    return address, address if normed is None else _check("normed", normed, tuple(x.shape))


def _pair(name: str, tensor: Tensor, size: int, dtype: torch.dtype = torch.float32) -> tuple[int, int]:
    """Check a ``(2, size)`` tensor; returns the addresses of both rows."""
    start = _check(name, tensor, (2, size), dtype)
    return start, ELSEWHERE if start == ELSEWHERE else start + size * tensor.element_size()


def _weight(name: str, weight: Tensor, n: int, k: int) -> int:
    return _check(name, weight, (num_blocks(n), num_words(k), LANES), torch.int32)


def _positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size}; allowed: 1 or more")


def _path(x: Tensor, addresses: Sequence[int | None]) -> int | None:
    """Return the native path for ``x``; raises if there is one and an argument is on another device."""
    path = kernels.KERNELS.path_for(x)
    if path is not None and ELSEWHERE in addresses:
        raise ValueError(OTHER_DEVICE)
    return path


# Operators


def _define(schema: str) -> None:
    name, arguments = schema.split("(", 1)
    torch.library.define(f"mmbivit::{name}", f"({arguments}", tags=(torch.Tag.pt2_compliant_tag,))


_define("pack_affine(Tensor x, Tensor affine) -> Tensor")
_define("binary_matmul(Tensor a, Tensor weight, int k, int n) -> Tensor")
_define(
    "binary_linear(Tensor x, Tensor in_affine, Tensor weight, Tensor out_affine, int n, Tensor? rprelu=None, "
    "Tensor? add=None) -> Tensor"
)
_define(
    "patch_merging(Tensor x, Tensor in_affine, Tensor weight, Tensor out_affine, SymInt height, SymInt width, int n)"
    " -> Tensor"
)
_define("patch_embedding(Tensor images, Tensor weight, Tensor bias, int patch, int n) -> Tensor")
_define("feature_map(Tensor x, Tensor affine, SymInt height, SymInt width) -> Tensor")
_define(
    "window_attention_(Tensor(a!) x, Tensor in_affine, Tensor padding, Tensor qkv_weight, Tensor qkv_thresholds, "
    "Tensor position_bias, Tensor value_ratio, Tensor proj_weight, Tensor proj_affine, SymInt[] layout, int head_dim, "
    "float step, float margin, Tensor? normed=None) -> ()"
)
_define(
    "dual_branch_mlp_(Tensor(a!) x, Tensor in_affine, Tensor fc1_weight, Tensor fc1_thresholds, Tensor fc2_weight, "
    "Tensor fc2_affine, int hidden, Tensor[] si, int si_hidden, SymInt[] layout, Tensor? normed=None) -> ()"
)


def pack_affine(x: Tensor, affine: Tensor) -> Tensor:
    """``Sign(gain * x + shift)`` as bit rows: float32 ``(M, K) -> (M, ceil(K / 32))`` int32."""
    rows, k = x.shape
    args = _check("x", x, (rows, k)), *_pair("affine", affine, padded(k))
    if (path := _path(x, args)) is None:
        return reference.pack_affine(x, affine)
    out = x.new_empty(rows, num_words(k), dtype=torch.int32)
    kernels.KERNELS.call("pack", path, kernels.PackArgs(*args, out.data_ptr(), rows, k))
    return out


def binary_matmul(a: Tensor, weight: Tensor, k: int, n: int) -> Tensor:
    """Integer accumulators of bit rows ``(M, words)`` and a packed weight: int32 ``(M, n)``."""
    _positive(k=k, n=n)
    rows = len(a)
    args = _check("a", a, (rows, num_words(k)), torch.int32), _weight("weight", weight, n, k)
    if (path := _path(a, args)) is None:
        return reference.binary_matmul(a, weight, k, n)
    out = a.new_empty(rows, n)
    kernels.KERNELS.call("matmul", path, kernels.MatmulArgs(*args, out.data_ptr(), rows, k, n))
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
    _positive(n=n)
    rows, k = x.shape
    args = (
        _check("x", x, (rows, k)),
        *_pair("in_affine", in_affine, padded(k)),
        _weight("weight", weight, n, k),
        *_pair("out_affine", out_affine, padded(n)),
        None if rprelu is None else _check("rprelu", rprelu, (3, padded(n))),
        None if add is None else _check("add", add, (rows, n)),
    )
    if (path := _path(x, args)) is None:
        return reference.binary_linear(x, in_affine, weight, out_affine, n, rprelu, add)
    out = x.new_empty(rows, n)
    kernels.KERNELS.call("linear", path, kernels.LinearArgs(*args, out.data_ptr(), rows, k, n))
    return out


def patch_merging(
    x: Tensor, in_affine: Tensor, weight: Tensor, out_affine: Tensor, height: int, width: int, n: int
) -> Tensor:
    """Binary patch merging: float32 ``(B, height * width, C) -> (B, ceil(height / 2) * ceil(width / 2), n)``."""
    _positive(height=height, width=width, n=n)
    batch, _, channels = x.shape
    args = (
        _check("x", x, (batch, height * width, channels)),
        *_pair("in_affine", in_affine, padded(4 * channels)),
        _weight("weight", weight, n, 4 * channels),
        *_pair("out_affine", out_affine, padded(n)),
    )
    if (path := _path(x, args)) is None:
        return reference.patch_merging(x, in_affine, weight, out_affine, height, width, n)
    out = x.new_empty(batch, -(-height // 2) * -(-width // 2), n)
    kernels.KERNELS.call("merge", path, kernels.MergeArgs(*args, out.data_ptr(), batch, height, width, channels, n))
    return out


def patch_embedding(images: Tensor, weight: Tensor, bias: Tensor, patch: int, n: int) -> Tensor:
    """Float projection of patches: ``(B, C, H, W) -> (B, ceil(H / patch) * ceil(W / patch), n)``.

    Args:
        weight: ``(C * patch * patch, n padded)``, the first axis in the order of ``(C, patch, patch)``.
        bias: ``(n padded)``.
        patch: pixels along a patch; images are padded with 0 to whole patches.
    """
    batch, channels, height, width = images.shape
    _positive(channels=channels, height=height, width=width, patch=patch, n=n)
    args = (
        _check("images", images, (batch, channels, height, width)),
        _check("weight", weight, (channels * patch**2, padded(n))),
        _check("bias", bias, (padded(n),)),
    )
    if (path := _path(images, args)) is None:
        return reference.patch_embedding(images, weight, bias, patch, n)
    out = _fake_embedding(images, weight, bias, patch, n)
    kernels.KERNELS.call(
        "embed", path, kernels.EmbedArgs(*args, out.data_ptr(), batch, channels, height, width, patch, n)
    )
    return out


def feature_map(x: Tensor, affine: Tensor, height: int, width: int) -> Tensor:
    """``gain * x + shift`` as a map: float32 ``(B, height * width, C) -> (B, C, height, width)``."""
    batch, _, channels = x.shape
    args = _check("x", x, (batch, height * width, channels)), *_pair("affine", affine, padded(channels))
    if (path := _path(x, args)) is None:
        return reference.feature_map(x, affine, height, width)
    out = _fake_map(x, affine, height, width)
    kernels.KERNELS.call("map", path, kernels.MapArgs(*args, out.data_ptr(), batch, height * width, channels))
    return out


def _check_layout(x: Tensor, layout: Sequence[int], most_tokens: int) -> None:
    if x.ndim != 3 or len(layout) != 5:
        raise ValueError(f"x has {x.ndim} axes and layout {len(layout)} numbers; expected 3 and 5")
    height, width, window, shift, _ = layout
    if x.shape[1] != height * width or min(height, width) < 1:
        raise ValueError(f"x has {x.shape[1]} tokens; layout says {height} x {width}")
    if not 0 <= shift < window or window**2 > most_tokens:
        most = math.isqrt(most_tokens)
        raise ValueError(f"window {window} and shift {shift}; expected 0 <= shift < window <= {most}")


def window_attention_(
    x: Tensor,
    in_affine: Tensor,
    padding: Tensor,
    qkv_weight: Tensor,
    qkv_thresholds: Tensor,
    position_bias: Tensor,
    value_ratio: Tensor,
    proj_weight: Tensor,
    proj_affine: Tensor,
    layout: Sequence[int],
    head_dim: int,
    step: float,
    margin: float,
    normed: Tensor | None = None,
) -> None:
    """Add window attention to ``x (B, height * width, C)`` in place; all in between are bits.

    Queries, keys and values are bits by thresholds. A key is selected where ``score >= best score - margin``, with
    ``score = position_bias - step * (differing bits)``, and an output is +1 where the share of set bits among the
    selected values reaches ``value_ratio``. Each head has ``head_dim`` channels, padded to whole blocks of 16.

    Args:
        padding: bits ``(words)`` of a padding token.
        position_bias: ``(heads, T, T padded to 16)``, -inf on the padding.
        value_ratio: ``(heads * padded head_dim)``; infinite on the padding.
        layout: height, width, window, shift, mask_padding.
        normed: what is signed in place of ``x``, of its shape: where the norm is a LayerNorm, ``x`` without mean and
            with variance 1.
    """
    _check_layout(x, layout, MOST_WINDOW_TOKENS)
    batch, tokens, channels = x.shape
    heads = len(position_bias)
    _positive(channels=channels, heads=heads, head_dim=head_dim)
    if head_dim > MOST_HEAD_CHANNELS or not abs(step) <= LARGEST_STEP or not 0 <= margin <= LARGEST_STEP:
        raise ValueError(
            f"head_dim={head_dim}, step={step}, margin={margin}; allowed: up to {MOST_HEAD_CHANNELS}, and numbers up "
            f"to {LARGEST_STEP:g}, margin not negative"
        )
    inner = heads * padded(head_dim)
    args = (
        *_inputs(x, normed),
        *_pair("in_affine", in_affine, padded(channels)),
        _check("padding", padding, (num_words(channels),), torch.int32),
        _weight("qkv_weight", qkv_weight, 3 * inner, channels),
        *_pair("qkv_thresholds", qkv_thresholds, 3 * inner, torch.int32),
        _check("position_bias", position_bias, (heads, layout[2] ** 2, padded(layout[2] ** 2))),
        _check("value_ratio", value_ratio, (inner,)),
        _weight("proj_weight", proj_weight, channels, inner),
        *_pair("proj_affine", proj_affine, padded(channels)),
    )
    if (path := _path(x, args)) is None:
        reference.window_attention_(
            x, in_affine, padding, qkv_weight, qkv_thresholds, position_bias, value_ratio, proj_weight, proj_affine,
            layout, head_dim, step, margin, normed,
        )  # fmt: skip
        return
    kernels.KERNELS.call(
        "attention", path, kernels.AttentionArgs(*args, batch, *layout, channels, heads, head_dim, step, margin)
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
    _check_layout(x, layout, MOST_MIXED_TOKENS)
    batch, tokens, channels = x.shape
    _positive(channels=channels, hidden=hidden)
    args = (
        *_inputs(x, normed),
        *_pair("in_affine", in_affine, padded(channels)),
        _weight("fc1_weight", fc1_weight, hidden, channels),
        *_pair("fc1_thresholds", fc1_thresholds, padded(hidden), torch.int32),
        _weight("fc2_weight", fc2_weight, channels, hidden),
        *_pair("fc2_affine", fc2_affine, padded(channels)),
        *(_check_si(si, channels, layout[2] ** 2, si_hidden) if si else [None] * 10),
    )
    if (path := _path(x, args)) is None:
        reference.dual_branch_mlp_(
            x, in_affine, fc1_weight, fc1_thresholds, fc2_weight, fc2_affine, hidden, si, si_hidden, layout, normed
        )
        return
    bits = _si_bits(x, si_hidden, layout) if si and layout[2] ** 2 > FEW_TOKENS else None
    address = None if bits is None else bits.data_ptr()
    kernels.KERNELS.call("mlp", path, kernels.MlpArgs(*args, address, batch, *layout, channels, hidden, si_hidden))


def _si_bits(x: Tensor, hidden: int, layout: Sequence[int]) -> Tensor:
    """Make room for the hidden bits of all windows."""
    height, width, window = layout[:3]
    windows = len(x) * -(-height // window) * -(-width // window)
    return x.new_empty((windows, num_blocks(x.shape[2]), num_words(hidden), LANES), dtype=torch.int32)


def _check_si(si: Sequence[Tensor], channels: int, tokens: int, hidden: int) -> list[int]:
    if len(si) != 7 or not 1 <= hidden <= MOST_MIXED_TOKENS:
        raise ValueError(
            f"si has {len(si)} tensors and si_hidden is {hidden}; expected 7, and 1 to {MOST_MIXED_TOKENS}"
        )
    affine, gamma, weight1, thresholds1, weight2, affine2, alpha = si
    return [
        *_pair("si affine", affine, padded(channels)),
        _check("si gamma", gamma, (tokens,)),
        _check("si weight 1", weight1, (hidden, num_words(tokens)), torch.int32),
        *_pair("si thresholds 1", thresholds1, hidden, torch.int32),
        _check("si weight 2", weight2, (tokens, num_words(hidden)), torch.int32),
        *_pair("si affine 2", affine2, tokens),
        _check("si alpha", alpha, (padded(channels),)),
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
    return x.new_empty(x.shape[0], x.shape[2], height, width)


def _fake_in_place(x: Tensor, *args, **options) -> None:
    return None


def _checked(fake: Callable) -> Callable:
    """Refuse what torch hands to a fake although the first argument is real: a mixture with tensors on meta."""

    def checked(x: Tensor, *args: Any, **options: Any) -> Any:
        if type(x) is Tensor and not x.is_meta:
            raise ValueError(OTHER_DEVICE)
        return fake(x, *args, **options)

    return checked


def _register() -> None:
    operators = (
        (pack_affine, _fake_pack_affine),
        (binary_matmul, _fake_matmul),
        (binary_linear, _fake_linear),
        (patch_merging, _fake_merging),
        (patch_embedding, _fake_embedding),
        (feature_map, _fake_map),
        (window_attention_, _fake_in_place),
        (dual_branch_mlp_, _fake_in_place),
    )
    for function, fake in operators:
        name = f"mmbivit::{function.__name__}"
        torch.library.impl(name, "CompositeExplicitAutograd", function)
        torch.library.register_fake(name, _checked(fake))


_register()
