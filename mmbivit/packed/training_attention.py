"""Binary attention in training: the native kernels on the CPU, :mod:`mmbivit.binary.kept_attention` elsewhere."""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mmbivit.binary.kept_attention import kept_attention

from .arguments import MOST_HEAD_CHANNELS, MOST_TOKENS, SELECTIONS
from .kernels import KERNELS, AttentionBitsArgs, AttentionGradientsArgs
from .packing import num_words, padded

__all__ = ["attention_step"]


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class _AttentionStep(torch.autograd.Function):
    """The kernels ``attention_bits`` and ``attention_gradients``, which keep two bits for each of ``qkv``."""

    @staticmethod
    def forward(
        ctx,
        qkv: Tensor,
        gamma: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        selection: tuple[float, float],
        divide: bool,
        num_heads: int,
        path: int,
    ) -> Tensor:
        groups, tokens, channels = qkv.shape
        channels //= 3
        head_dim = channels // num_heads
        qkv = qkv.contiguous()
        gamma = None if gamma is None else gamma.contiguous()
        if bias is not None:
            bias = F.pad(bias, (0, padded(tokens) - tokens), value=-torch.inf).contiguous()
        mask = None if mask is None else mask.contiguous()
        step, limit = (torch.full((num_heads,), number) for number in selection)
        share = max(1, -(-groups * num_heads // KERNELS.threads.value))
        sizes = groups, tokens, num_heads, head_dim, 0 if mask is None else len(mask), divide, share
        out = qkv.new_empty(groups, tokens, channels)
        bits = inside = None
        if any(ctx.needs_input_grad):
            shape = groups, num_heads, tokens, 3, num_words(head_dim)
            bits, inside = (qkv.new_empty(shape, dtype=torch.int32) for _ in range(2))
        addresses = [_address(part) for part in (qkv, gamma, bias, mask, out, bits, inside, step, limit)]
        KERNELS.call("attention_bits", path, AttentionBitsArgs(*addresses, SELECTIONS.index("below_best"), *sizes), out)
        ctx.save_for_backward(bits, inside, bias, mask, step, limit)
        ctx.path, ctx.sizes = path, sizes
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        bits, inside, bias, mask, step, limit = ctx.saved_tensors
        groups, tokens, num_heads, head_dim, _, _, share = ctx.sizes
        ranges, channels = -(-groups * num_heads // share), 3 * num_heads * head_dim
        grad = grad.contiguous()
        grad_qkv = grad.new_empty(groups, tokens, channels)
        # a sum for each range of units: what a thread adds up depends on how many there are, never on which is first
        grad_signed = grad.new_empty(ranges, channels) if ctx.needs_input_grad[1] else None
        grad_bias = grad.new_empty(ranges, num_heads, tokens, padded(tokens)) if ctx.needs_input_grad[2] else None
        inputs = grad, bits, inside, bias, mask, grad_qkv, grad_bias, grad_signed, step, limit
        args = AttentionGradientsArgs(*map(_address, inputs), SELECTIONS.index("below_best"), *ctx.sizes)
        KERNELS.call("attention_gradients", ctx.path, args, grad_qkv)
        grad_gamma = None if grad_signed is None else -grad_signed.sum(0)
        grad_bias = None if grad_bias is None else grad_bias.sum(0)[..., :tokens]
        return grad_qkv, grad_gamma, grad_bias, None, None, None, None, None


def attention_step(
    qkv: Tensor,
    gamma: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    ratio: float,
    divide: bool,
    num_heads: int,
) -> Tensor:
    """Attend as :func:`mmbivit.binary.kept_attention.kept_attention` does, on the CPU by native kernels.

    These take float32 of the CPU. Scores are then counts of differing bits and never leave the cache; keys whose scores
    lie within rounding errors of the limit may be selected otherwise than by torch. Gradients that are summed over
    groups depend on the number of threads, as sums in another order do.

    Args and result: see there.
    """
    path = _native_path(qkv, gamma, bias, mask, num_heads)
    if path is None:
        return kept_attention(qkv, gamma, bias, mask, scale, ratio, divide, num_heads)
    return _AttentionStep.apply(qkv, gamma, bias, mask, (2 * scale, math.log(ratio)), divide, num_heads, path)


def _native_path(
    qkv: Tensor, gamma: Tensor | None, bias: Tensor | None, mask: Tensor | None, num_heads: int
) -> int | None:
    """Return the code path whose kernels take such arguments, if there is one."""
    if torch.compiler.is_compiling():  # which looks into torch alone
        return None
    floats = [part for part in (qkv, gamma, bias) if part is not None]
    if any(part.dtype != torch.float32 for part in floats) or (mask is not None and mask.dtype != torch.bool):
        return None
    if qkv.shape[1] > MOST_TOKENS or qkv.shape[2] // 3 // num_heads > MOST_HEAD_CHANNELS:
        return None
    return KERNELS.path_for(qkv)
