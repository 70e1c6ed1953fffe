"""Binary attention that keeps bits for the backward pass, where its parts keep scores, softmax, weights and signs.

It computes the values and gradients of :func:`mmbivit.binary.sign_ste`, :class:`mmbivit.binary.SoftmaxThreshold` and
the two products between them, by the same operations: the backward pass makes scores and softmax again.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .bits import pack_all, unpack_all
from .functional import sign, sum_to_last, threshold_mask

__all__ = ["kept_attention"]


def _autocast_now(device_type: str) -> AbstractContextManager:
    """Return the autocast of the forward pass, for the backward pass, where there is none."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    return torch.autocast(device_type, dtype=dtype, enabled=enabled)


def _heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Take queries, keys and values ``(G, heads, n, d)`` out of ``(G, n, 3 * C)``."""
    return qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _join_heads(parts: list[Tensor]) -> Tensor:
    """Join parts ``(G, heads, n, d)`` to ``(G, n, parts * C)``."""
    return torch.stack(parts).permute(1, 3, 0, 2, 4).flatten(2)


def _softmax(products: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    """Return the softmax over keys of ``products + bias`` ``(G, heads, n, n)``, masked keys left out."""
    scores = products if bias is None else products + bias
    if mask is not None:
        groups = scores.view(-1, len(mask), *scores.shape[1:])
        scores = groups.masked_fill(mask[:, None], -torch.inf).view(scores.shape)
    return scores.softmax(dim=-1)


class _KeptAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        qkv: Tensor,
        gamma: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        scale: float,
        ratio: float,
        divide: bool,
        num_heads: int,
    ) -> Tensor:
        shifted = qkv if gamma is None else qkv - gamma
        query, key, value = _heads(sign(shifted), num_heads)
        softmax = _softmax((query * scale) @ key.transpose(-2, -1), bias, mask)
        weights = threshold_mask(softmax, ratio)
        if divide:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        ctx.scale, ctx.ratio, ctx.divide, ctx.num_heads = scale, ratio, divide, num_heads
        ctx.shape, ctx.dtype, ctx.sign_dtype = qkv.shape, qkv.dtype, shifted.dtype
        ctx.gamma_dtype = None if gamma is None else gamma.dtype
        ctx.autocast = _autocast_now(qkv.device.type)
        ctx.save_for_backward(pack_all(shifted >= 0), pack_all(shifted.abs() <= 1), bias, mask)
        return _join_heads([weights @ value])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        bits, inside, bias, mask = ctx.saved_tensors
        signs = unpack_all(bits, ctx.shape).view(torch.int8).to(ctx.sign_dtype).mul_(2).sub_(1)
        query, key, value = _heads(signs, ctx.num_heads)
        grad = grad.unflatten(-1, (ctx.num_heads, -1)).transpose(1, 2)
        with ctx.autocast:
            query = query * ctx.scale
            products = query @ key.transpose(-2, -1)
            softmax = _softmax(products, bias, mask)
            weights = threshold_mask(softmax, ctx.ratio)
            grad_softmax = (grad @ value.transpose(-2, -1)).to(softmax.dtype)
            if ctx.divide:
                number = weights.sum(dim=-1, keepdim=True)
                weights, grad_softmax = weights / number, grad_softmax / number
            grad_value = weights.transpose(-2, -1) @ grad
            # straight through the selection; numbers are constants
            grad_scores = torch._softmax_backward_data(grad_softmax, softmax, -1, softmax.dtype)
            grad_bias = grad_scores.sum(0).to(bias.dtype) if ctx.needs_input_grad[2] else None
            grad_products = grad_scores.to(products.dtype)
            grad_query = (grad_products @ key) * ctx.scale
            grad_key = grad_products.transpose(-2, -1) @ query
        parts = [part.to(ctx.sign_dtype) for part in (grad_query, grad_key, grad_value)]
        grad_qkv = _join_heads(parts) * unpack_all(inside, ctx.shape).view(torch.int8).to(ctx.sign_dtype)
        grad_gamma = -sum_to_last(grad_qkv, 1).to(ctx.gamma_dtype) if ctx.needs_input_grad[1] else None
        return grad_qkv.to(ctx.dtype), grad_gamma, grad_bias, None, None, None, None, None


def kept_attention(
    qkv: Tensor,
    gamma: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    ratio: float,
    divide: bool,
    num_heads: int,
) -> Tensor:
    """Attend with 1-bit queries, keys and values to the keys that :class:`mmbivit.binary.SoftmaxThreshold` selects.

    Forward: ``q, k, v = Sign(qkv - gamma)``, ``p = softmax(scale * q k^T + bias)``, ``w = 1[p >= ratio * max(p)]``,
    divided by the number of selected keys or not, and ``w v``.
    Backward: straight through the selection into the softmax, and through the signs where ``|qkv - gamma| <= 1``;
    numbers of selected keys are constants. Two bits for each of ``qkv`` are kept for it.

    Args:
        qkv: queries, keys and values, each of all heads, ``(G, n, 3 * C)``.
        gamma: thresholds ``(3 * C,)``; ``None`` for 0.
        bias: what is added to scores, ``(num_heads, n, n)``, or ``None``.
        mask: True where a key is masked, ``(groups, n, n)``, of ``G`` in turn, or ``None``. A query attends to a key.
        scale: factor of the products ``q k^T``.
        ratio: fraction of the largest probability that selects a key, in (0, 1].
        divide: whether weights are divided by the number of selected keys.
        num_heads: number of heads.

    Returns:
        ``(G, n, C)``.
    """
    return _KeptAttention.apply(qkv, gamma, bias, mask, scale, ratio, divide, num_heads)
