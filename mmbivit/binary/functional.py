"""Sign, straight-through gradients and scales: each formula once (SI-BiViT, Eq. 1-5).

Everything here is a pure function of tensors. ``Sign(0)`` is +1 (Eq. 1), so a sign is always one bit.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

__all__ = ["binarize_weight", "rprelu", "sign", "sign_ste", "straight_through", "threshold_mask"]


def sign(x: Tensor) -> Tensor:
    """Return +1 where ``x >= 0`` and -1 elsewhere, in the dtype of ``x`` (Eq. 1; no gradient)."""
    # Adding 0 turns -0.0 into +0.0. On the CPU, torch.where with two scalars is far slower.
    return torch.copysign(torch.ones((), dtype=x.dtype, device=x.device), x + 0.0)


def _inside(x: Tensor) -> Tensor:
    """Return 1 where ``|x| <= 1``, as one byte an element."""
    # The CPU writes and multiplies int8 two to three times as fast as bool.
    return torch.le(x.abs(), 1, out=torch.empty(x.shape, dtype=torch.int8, device=x.device))


class _ThresholdSign(torch.autograd.Function):
    """``Sign(x - gamma)``; keeps for the backward pass where the gradient passes, as one byte an element for 'clip'."""

    @staticmethod
    def forward(ctx, x: Tensor, gamma: Tensor | None, ste: str) -> Tensor:
        shifted = x if gamma is None else x - gamma
        ctx.save_for_backward(_inside(shifted) if ste == "clip" else (2 - 2 * shifted.abs()).clamp(min=0))
        ctx.gamma_ndim = None if gamma is None else gamma.dim()
        return sign(shifted)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (slope,) = ctx.saved_tensors
        grad_x = grad * slope
        if ctx.gamma_ndim is None or not ctx.needs_input_grad[1]:
            return grad_x, None, None
        return grad_x, -_sum_to_last(grad_x, ctx.gamma_ndim), None


def _sum_to_last(x: Tensor, ndim: int) -> Tensor:
    """Sum over all but the last ``ndim`` axes."""
    return x.sum(dim=tuple(range(x.dim() - ndim))) if x.dim() > ndim else x


def sign_ste(x: Tensor, gamma: Tensor | None = None, ste: Literal["clip", "poly"] = "clip") -> Tensor:
    """Binarize activations: ``Sign(x - gamma)`` with a straight-through gradient.

    Forward (Eq. 3): +1 where ``x >= gamma``, else -1.
    Backward (Eq. 2): the gradient passes where ``|x - gamma| <= 1`` and is 0 elsewhere; ``gamma`` receives its
    negative, summed over the axes it was broadcast over. With ``ste='poly'`` it passes times
    ``max(0, 2 - 2 |x - gamma|)``, the quadratic surrogate of Bi-Real Net.

    Args:
        x: activations ``(*, C)``.
        gamma: thresholds whose shape equals the last axes of ``x``; ``None`` for 0.
        ste: which of the two gradients.

    Returns:
        Tensor ``(*, C)`` of -1 and +1 in the dtype of ``x``.
    """
    return _ThresholdSign.apply(x, gamma, ste)


class _WeightSign(torch.autograd.Function):
    """``theta * Sign(w - mu)``, theta treated as a constant."""

    @staticmethod
    def forward(ctx, weight: Tensor, ste: str, center: str, scale: str) -> Tensor:
        centred = weight if center == "none" else weight - _mean(weight, center)
        theta = _mean(weight.abs(), scale)
        ctx.ste, ctx.center = ste, center
        ctx.save_for_backward(None if ste == "identity" else _inside(centred), theta if ste == "theta" else None)
        return theta * sign(centred)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        inside, theta = ctx.saved_tensors
        if ctx.ste != "identity":
            grad = (grad if theta is None else grad * theta) * inside
            if ctx.center != "none":
                # mu depends on every weight: a common shift changes no sign and gets no gradient.
                grad = grad - _mean(grad, ctx.center)
        return grad, None, None, None


def _mean(weight: Tensor, over: str) -> Tensor:
    """Mean of each row ``(N, 1)``, or of the whole tensor ``(1, 1)``."""
    return weight.mean(dim=1, keepdim=True) if over == "row" else weight.mean().view(1, 1)


def binarize_weight(
    weight: Tensor,
    ste: Literal["theta", "plain", "identity"] = "theta",
    center: Literal["row", "tensor", "none"] = "row",
    scale: Literal["row", "tensor"] = "row",
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
        scale: what theta is the mean of.

    Returns:
        Tensor of the same shape, with the two values ``-theta`` and ``+theta`` in each row.
    """
    return _WeightSign.apply(weight, ste, center, scale)


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
        return F.prelu(shifted.flatten(0, -2), slope).view_as(shifted).add_(zeta)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        shifted, slope = ctx.saved_tensors
        positive = torch.gt(shifted, 0, out=torch.empty_like(shifted))
        grad_x = torch.addcmul(grad * slope, grad * positive, 1 - slope)
        grad_slope = _sum_to_last(grad * shifted.clamp(max=0), 1)
        return grad_x, -_sum_to_last(grad_x, 1), grad_slope, _sum_to_last(grad, 1)


def rprelu(x: Tensor, gamma: Tensor, slope: Tensor, zeta: Tensor) -> Tensor:
    """PReLU with a shifted input and output: ``PReLU(x - gamma) + zeta`` per channel (ReActNet; SI-BiViT 4.1.3).

    Args:
        x: ``(*, C)``.
        gamma: input shift ``(C,)``.
        slope: factor of the negative side ``(C,)``.
        zeta: output shift ``(C,)``.
    """
    return _RPReLU.apply(x, gamma, slope, zeta)
