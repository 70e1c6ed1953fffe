"""Sign, straight-through gradients and scales: each formula once (SI-BiViT, Eq. 1-5).

Everything here is a pure function of tensors. ``Sign(0)`` is +1 (Eq. 1), so a sign is always one bit.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .bits import pack_all, unpack_all

__all__ = [
    "binarize_weight",
    "elastic_binary",
    "rprelu",
    "scaled_sign",
    "score_sign",
    "sign",
    "sign_ste",
    "straight_through",
    "threshold_mask",
]


def sign(x: Tensor) -> Tensor:
    """Return +1 where ``x >= 0`` and -1 elsewhere, in the dtype of ``x`` (Eq. 1; no gradient)."""
    # Adding 0 turns -0.0 into +0.0. On the CPU, torch.where with two scalars is far slower.
    return torch.copysign(torch.ones((), dtype=x.dtype, device=x.device), x + 0.0)


def _inside(x: Tensor) -> Tensor:
    """Return 1 where ``|x| <= 1``, as one byte an element."""
    # CPUs write and multiply int8 faster than bool.
    return torch.le(x.abs(), 1, out=torch.empty(x.shape, dtype=torch.int8, device=x.device))


def _kept(mask: Tensor, as_bits: bool) -> Tensor:
    """Return what is kept of 0 and 1 in bytes: the bytes, or bits."""
    return pack_all(mask.view(torch.bool)) if as_bits else mask


def _times(grad: Tensor, kept: Tensor, as_bits: bool) -> Tensor:
    """Multiply by what was kept."""
    return grad * (unpack_all(kept, grad.shape).view(torch.int8).to(grad.dtype) if as_bits else kept)


class _ThresholdSign(torch.autograd.Function):
    """``Sign(x - gamma)``; keeps for the backward pass where the gradient passes, as a byte or a bit an element.

    The gradient of 'poly' has other values than 0 and 1, which are kept as they are.
    """

    @staticmethod
    def forward(ctx, x: Tensor, gamma: Tensor | None, ste: str, keep_bits: bool) -> Tensor:
        shifted = x if gamma is None else x - gamma
        ctx.as_bits = keep_bits and ste == "clip"
        slope = _inside(shifted) if ste == "clip" else (2 - 2 * shifted.abs()).clamp(min=0)
        ctx.save_for_backward(_kept(slope, ctx.as_bits))
        ctx.gamma_ndim = None if gamma is None else gamma.dim()
        return sign(shifted)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        grad_x = _times(grad, *ctx.saved_tensors, ctx.as_bits)  # type: ignore[call-arg]  # one was saved
        if ctx.gamma_ndim is None or not ctx.needs_input_grad[1]:
            return grad_x, None, None, None
        return grad_x, -sum_to_last(grad_x, ctx.gamma_ndim), None, None


def sum_to_last(x: Tensor, ndim: int) -> Tensor:
    """Sum over all but the last ``ndim`` axes."""
    return x.sum(dim=tuple(range(x.dim() - ndim))) if x.dim() > ndim else x


def sign_ste(
    x: Tensor, gamma: Tensor | None = None, ste: Literal["clip", "poly"] = "clip", keep_bits: bool = False
) -> Tensor:
    """Binarize activations: ``Sign(x - gamma)`` with a straight-through gradient.

    Forward (Eq. 3): +1 where ``x >= gamma``, else -1.
    Backward (Eq. 2): the gradient passes where ``|x - gamma| <= 1`` and is 0 elsewhere; ``gamma`` receives its
    negative, summed over the axes it was broadcast over. With ``ste='poly'`` it passes times
    ``max(0, 2 - 2 |x - gamma|)``, the quadratic surrogate of Bi-Real Net.

    Args:
        x: activations ``(*, C)``.
        gamma: thresholds whose shape equals the last axes of ``x``; ``None`` for 0.
        ste: which of the two gradients.
        keep_bits: keep for the backward pass of 'clip' a bit an element, in place of a byte.

    Returns:
        Tensor ``(*, C)`` of -1 and +1 in the dtype of ``x``.
    """
    return _ThresholdSign.apply(x, gamma, ste, keep_bits)


class _ScaledSign(torch.autograd.Function):
    """``scale * Sign(x - gamma)`` with a learned scale for each group of adjacent channels."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, gamma: Tensor | None, keep_bits: bool) -> Tensor:
        shifted = x if gamma is None else x - gamma
        signs = sign(shifted)
        scales = scale.repeat_interleave(x.shape[-1] // len(scale)).to(x.dtype)
        kept = _kept(_inside(shifted / scales), keep_bits), _kept((signs > 0).view(torch.int8), keep_bits)
        ctx.save_for_backward(*kept)
        ctx.groups, ctx.as_bits = len(scale), keep_bits
        return scales * signs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        inside, positive = ctx.saved_tensors
        grad_x = _times(grad, inside, ctx.as_bits)
        signed = 2 * _times(grad, positive, ctx.as_bits) - grad
        grad_scale = signed.flatten(0, -2).sum(0, dtype=torch.float32).view(ctx.groups, -1).sum(1)
        grad_gamma = -sum_to_last(grad_x, 1) if ctx.needs_input_grad[2] else None
        return grad_x, grad_scale / (grad.numel() / ctx.groups) ** 0.5, grad_gamma, None


def scaled_sign(x: Tensor, scale: Tensor, gamma: Tensor | None = None, keep_bits: bool = False) -> Tensor:
    """Binarize activations with a learned scale: ``scale * Sign(x - gamma)``, whose window follows the scale.

    Backward: the gradient passes where ``|x - gamma| <= scale`` (Bi-ViT, Eq. 11); the scale receives
    ``sum(grad * Sign(x - gamma)) / sqrt(n)`` over the ``n`` values that share it (the gradient scale of LSQ, as in the
    published code of BiT).

    Args:
        x: activations ``(*, C)``.
        scale: positive factors ``(groups,)``, each of ``C / groups`` adjacent channels.
        gamma: thresholds ``(C,)``; ``None`` for 0. BiT's shift is its negative.
        keep_bits: keep two bits an element for the backward pass, in place of two bytes.

    Returns:
        Tensor ``(*, C)`` of -scale and +scale in the dtype of ``x``.
    """
    return _ScaledSign.apply(x, scale, gamma, keep_bits)


class _ElasticBinary(torch.autograd.Function):
    """``scale * round(clip(x / scale, 0, 1))``."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, scale_gradient: bool) -> Tensor:
        ratio = x / scale.to(x.dtype)
        ctx.save_for_backward(ratio)
        ctx.scale_shape, ctx.scale_gradient = scale.shape, scale_gradient
        return torch.where(ratio >= 0.5, scale.to(x.dtype), 0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (ratio,) = ctx.saved_tensors
        within = (ratio > 0) & (ratio < 1)
        slope = torch.where(within, (ratio >= 0.5).to(grad.dtype) - ratio, (ratio >= 1).to(grad.dtype))
        grad_scale = (grad * slope).float().sum_to_size(ctx.scale_shape)
        if ctx.scale_gradient:
            grad_scale = grad_scale / (grad.numel() / grad_scale.numel()) ** 0.5
        return grad * ((ratio >= 0) & (ratio <= 1)), grad_scale, None


def elastic_binary(x: Tensor, scale: Tensor, scale_gradient: bool = True) -> Tensor:
    """Binarize values that are not negative to {0, scale}: ``scale * round(clip(x / scale, 0, 1))``.

    Half is rounded up, so that ``x >= scale / 2`` is selected. Backward, with ``q = x / scale``: the gradient passes
    where ``0 <= q <= 1``; the scale receives ``sum(grad * (round(q) - q))`` over ``0 < q < 1`` plus ``sum(grad)`` over
    ``q >= 1`` (BiT's elastic binarization; BinaryViT, Eq. 7).

    Args:
        x: any shape.
        scale: positive, broadcastable to ``x``.
        scale_gradient: divide the gradient of each scale by the square root of how many values share it (LSQ).

    Returns:
        Tensor of 0 and scale in the shape and dtype of ``x``.
    """
    return _ElasticBinary.apply(x, scale, scale_gradient)


class _ScoreSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores: Tensor, zero: bool, keep_bits: bool) -> Tensor:
        inside = _inside(scores) if zero else (scores.abs() < 1).view(torch.int8)
        ctx.save_for_backward(_kept(inside, keep_bits))
        ctx.as_bits = keep_bits
        return (scores >= 0 if zero else scores > 0).to(scores.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _times(grad, *ctx.saved_tensors, ctx.as_bits), None, None  # type: ignore[call-arg]  # one was saved


def score_sign(scores: Tensor, zero: bool, keep_bits: bool = False) -> Tensor:
    """Select keys by the sign of their score: 1 where it is positive, else 0; a masked key (``-inf``) never.

    Backward: the gradient passes where ``|score| < 1``.

    Args:
        scores: any shape.
        zero: select a score of 0, too, and pass the gradient at ``|score| = 1``.
        keep_bits: keep for the backward pass a bit an element, in place of a byte.

    Returns:
        Tensor of 0 and 1 in the shape and dtype of ``scores``.
    """
    return _ScoreSign.apply(scores, zero, keep_bits)


class _WeightSign(torch.autograd.Function):
    """``theta * Sign(w - mu)``, theta a constant, or learned."""

    @staticmethod
    def forward(ctx, weight: Tensor, learned: Tensor | None, ste: str, center: str, scale: str) -> Tensor:
        centred = weight if center == "none" else weight - mean_over(weight, center)
        theta = mean_over(weight.abs(), scale) if learned is None else learned[:, None]
        signs = sign(centred)
        ctx.ste, ctx.center = ste, center
        ctx.save_for_backward(
            None if ste == "identity" else _inside(centred),
            theta if ste == "theta" else None,
            None if learned is None else signs,
        )
        return theta * signs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        inside, theta, signs = ctx.saved_tensors
        grad_learned = None if signs is None else (grad * signs).sum(1)
        if ctx.ste != "identity":
            grad = (grad if theta is None else grad * theta) * inside
            if ctx.center != "none":
                # mu depends on every weight: a common shift changes no sign and gets no gradient.
                grad = grad - mean_over(grad, ctx.center)
        return grad, grad_learned, None, None, None


def mean_over(weight: Tensor, over: str) -> Tensor:
    """Mean of each row ``(N, 1)``, or of the whole tensor ``(1, 1)``."""
    return weight.mean(dim=1, keepdim=True) if over == "row" else weight.mean().view(1, 1)


def binarize_weight(
    weight: Tensor,
    ste: Literal["theta", "plain", "identity"] = "theta",
    center: Literal["row", "tensor", "none"] = "row",
    scale: Literal["row", "tensor"] | Tensor = "row",
) -> Tensor:
    """Binarize a weight matrix: ``theta * Sign(W - mu)`` (Eq. 4), per output channel unless said.

    ``mu = mean(W)`` and ``theta = ||W||_1 / n`` over each row. Backward: clipped straight-through,
    ``dW = h - mean(h)`` with ``h = theta * dW_b * [|W - mu| <= 1]``; theta carries no gradient, mu does. With
    ``ste='plain'`` the factor theta is left out, so that ``dW`` is the gradient of ``clamp(W - mu, -1, 1)``, as in the
    published code of SI-BiViT, BiBERT, BinaryViT and Bi-ViT, where the formulas do not say it. With ``'identity'``
    ``dW = dW_b``, as in that of BiT.

    Args:
        weight: latent weights ``(out_features, in_features)``.
        ste: which of the three gradients.
        center: what mu is the mean of; ``'none'`` for 0.
        scale: what theta is the mean of; or learned scales ``(out_features,)`` in its place, which receive
            ``sum(dW_b * Sign(W - mu))`` over their row, as in the published code of BiViT.

    Returns:
        Tensor of the same shape, with the two values ``-theta`` and ``+theta`` in each row.
    """
    learned = scale if isinstance(scale, Tensor) else None
    return _WeightSign.apply(weight, learned, ste, center, scale)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """Return the values of ``hard`` with the gradient of ``soft`` (identity straight-through, same shapes)."""
    return _StraightThrough.apply(hard, soft)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hard: Tensor, soft: Tensor) -> Tensor:
        return hard.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def threshold_mask(probabilities: Tensor, ratio: float) -> Tensor:
    """Select the keys of a query: 1 where ``p >= ratio * max(p)`` over the last axis, else 0.

    A probability of exactly 0 (a masked key) is never selected.

    Args:
        probabilities: softmax output ``(*, keys)``.
        ratio: fraction of the row maximum, in (0, 1].
    """
    selected = probabilities >= ratio * probabilities.amax(dim=-1, keepdim=True)
    return (selected & (probabilities > 0)).to(probabilities.dtype)


class _RPReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gamma: Tensor, slope: Tensor, zeta: Tensor) -> Tensor:
        shifted = x - gamma
        ctx.save_for_backward(shifted, slope)
        return shifted_prelu(shifted, slope, zeta)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        shifted, slope = ctx.saved_tensors
        return rprelu_gradients(grad, shifted, slope)


def shifted_prelu(shifted: Tensor, slope: Tensor, zeta: Tensor) -> Tensor:
    """Return ``PReLU(shifted) + zeta``, where ``shifted`` is ``x - gamma``."""
    return F.prelu(shifted.reshape(-1, shifted.shape[-1]), slope).view(shifted.shape).add_(zeta)


def rprelu_gradients(grad: Tensor, shifted: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of ``x``, ``gamma``, ``slope`` and ``zeta``; see :func:`rprelu`."""
    positive = torch.gt(shifted, 0, out=torch.empty_like(shifted))
    grad_x = torch.addcmul(grad * slope, grad * positive, 1 - slope)
    grad_slope = sum_to_last(grad * shifted.clamp(max=0), 1)
    return grad_x, -sum_to_last(grad_x, 1), grad_slope, sum_to_last(grad, 1)


def rprelu(x: Tensor, gamma: Tensor, slope: Tensor, zeta: Tensor) -> Tensor:
    """PReLU with a shifted input and output: ``PReLU(x - gamma) + zeta`` per channel (ReActNet; SI-BiViT 4.1.3).

    Args:
        x: ``(*, C)``.
        gamma: input shift ``(C,)``.
        slope: factor of the negative side ``(C,)``.
        zeta: output shift ``(C,)``.
    """
    return _RPReLU.apply(x, gamma, slope, zeta)
