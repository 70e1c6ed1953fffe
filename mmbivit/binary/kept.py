"""Functions that keep bits for the backward pass, where those of :mod:`.functional` and torch keep floats.

They compute the same values and gradients, by the same operations. What a binary product needs later is what its two
sides were made of: a bit for each value, and the two levels that the bits stand for. What comes right behind a product
(an activation function, a scale) gets its input back by computing the product again from these bits, and keeps
nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .bits import pack_all, unpack_all
from .functional import binarize_weight, mean_over, rprelu_gradients, shifted_prelu, sign

__all__ = ["GELU", "RELU", "ROW_SCALE", "RPRELU", "Follower", "kept_binary_weight", "kept_convolution", "kept_product"]


class _KeptWeightSign(torch.autograd.Function):
    """``theta * Sign(w - mu)``; keeps the latent weights, which are there anyway, and a number or two a row."""

    @staticmethod
    def forward(ctx, weight: Tensor, learned: Tensor | None, ste: Any, center: Any, scale: Any) -> Tensor:
        binary = binarize_weight(weight, ste, center, scale if learned is None else learned)
        ctx.ste, ctx.center = ste, center
        ctx.save_for_backward(
            weight,
            None if center == "none" else mean_over(weight, center),
            (binary[:, :1].abs() if learned is None else learned[:, None]) if ste == "theta" else None,
            learned,
        )
        return binary

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        weight, mu, theta, learned = ctx.saved_tensors
        centred = weight if mu is None else weight - mu
        grad_learned = None if learned is None else (grad * sign(centred)).sum(1)
        if ctx.ste != "identity":
            grad = (grad if theta is None else grad * theta) * (centred.abs() <= 1)
            if mu is not None:
                # mu depends on every weight: a common shift changes no sign and gets no gradient.
                grad = grad - mean_over(grad, ctx.center)
        return grad, grad_learned, None, None, None


def kept_binary_weight(weight: Tensor, ste: str, center: str, scale: str | Tensor) -> Tensor:
    """Binarize a weight matrix as :func:`mmbivit.binary.binarize_weight` does, and keep nothing of its size."""
    learned = scale if isinstance(scale, Tensor) else None
    return _KeptWeightSign.apply(weight, learned, ste, center, scale)


@dataclass(frozen=True)
class Follower:
    """What follows a product ``y`` and needs it again in the backward pass.

    Args:
        forward: ``y`` and parameters to the output.
        backward: the output's gradient, ``y`` and parameters to the gradients of ``y`` and of each parameter.
    """

    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, ...]]


def _row_scale_gradients(grad: Tensor, y: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    return grad * alpha[:, None], (grad * y).sum(-1).sum(0)


RPRELU = Follower(
    lambda y, gamma, slope, zeta: shifted_prelu(y - gamma, slope, zeta),
    lambda grad, y, gamma, slope, zeta: rprelu_gradients(grad, y - gamma, slope),
)
GELU = Follower(F.gelu, lambda grad, y: (torch.ops.aten.gelu_backward(grad, y),))
RELU = Follower(F.relu, lambda grad, y: (torch.ops.aten.threshold_backward(grad, y, 0),))
# alpha (C,) of y (B, C, n)
ROW_SCALE = Follower(lambda y, alpha: y * alpha.to(y.dtype)[:, None], _row_scale_gradients)


class _KeptProduct(torch.autograd.Function):
    """``follower(x @ weight.T + bias)``; a side with two levels is kept as bits."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        levels: Tensor | None,
        binary_weight: bool,
        follower: Follower | None,
        *parameters: Tensor,
    ) -> Tensor:
        y = F.linear(x, weight, bias)
        ctx.x_shape, ctx.x_dtype, ctx.y_dtype, ctx.follower = x.shape, x.dtype, y.dtype, follower
        ctx.weight_shape, ctx.weight_dtype = weight.shape, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(
            x if levels is None else pack_all(x > 0),
            levels,
            pack_all(weight > 0) if binary_weight else weight,
            weight[:, :1].abs() if binary_weight else None,
            None if follower is None else bias,
            *parameters,
        )
        return y if follower is None else follower.forward(y, *(part.to(y.dtype) for part in parameters))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, levels, weight, scale, bias, *parameters = ctx.saved_tensors
        if levels is not None:
            x = restored(x, ctx.x_shape, levels[0], levels[1])
        if scale is not None:
            weight = restored(weight, ctx.weight_shape, -scale, scale)
        # Autocast is off here: cast as it did in the forward pass.
        x, weight = x.to(ctx.y_dtype), weight.to(ctx.y_dtype)
        of_parameters: list[Tensor] = []
        if ctx.follower is not None:
            y = F.linear(x, weight, None if bias is None else bias.to(ctx.y_dtype))
            grad, *of_parameters = ctx.follower.backward(grad, y, *(part.to(y.dtype) for part in parameters))
            of_parameters = [part.to(like.dtype) for part, like in zip(of_parameters, parameters, strict=True)]
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = rows.mm(weight).view(ctx.x_shape).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = rows.t().mm(x.reshape(-1, x.shape[-1])).to(ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, *of_parameters


def restored(bits: Tensor, shape: torch.Size, low: Tensor, high: Tensor) -> Tensor:
    """Return the values ``(*, C)`` that bits stand for: ``low`` and ``high``, broadcast from the last axes."""
    # Far faster than torch.where on CPUs, and exact: low is 0 or -high.
    return unpack_all(bits, shape).view(torch.int8).to(high.dtype).mul_(high - low).add_(low)


def kept_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    levels: Tensor | None = None,
    binary_weight: bool = True,
    follower: Follower | None = None,
    parameters: tuple[Tensor, ...] = (),
) -> Tensor:
    """Multiply as :func:`torch.nn.functional.linear`, and keep bits of the sides that are binary.

    Args:
        x: ``(*, in_features)``.
        weight: ``(out_features, in_features)``.
        bias: ``(out_features,)``, or ``None``.
        levels: the two values of ``x``, ``(2, in_features)`` or ``(2, 1)``, of which the first is not positive and the
            second is; ``None`` if it has others, and is kept as it is.
        binary_weight: whether each row of ``weight`` has the values ``-theta`` and ``theta``; otherwise it is kept as
            it is, which is free for a parameter.
        follower: what is computed from the product right behind it.
        parameters: its parameters.
    """
    return _KeptProduct.apply(x, weight, bias, levels, binary_weight, follower, *parameters)


class _KeptConvolution(torch.autograd.Function):
    """A convolution, or a transposed one, without padding; a side with two levels is kept as bits."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        dilation: Sequence[int],
        transposed: bool,
        levels: Tensor | None,
        binary_weight: bool,
    ) -> Tensor:
        ctx.options = stride, (0, 0), dilation, transposed, (0, 0), 1
        convolve = F.conv_transpose2d if transposed else F.conv2d
        y = convolve(x, weight, bias, stride=stride, dilation=dilation)
        ctx.x_dtype, ctx.y_dtype, ctx.weight_dtype = x.dtype, y.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        last = x.permute(0, 2, 3, 1)
        ctx.last_shape, ctx.weight_shape = last.shape, weight.shape
        one_each = weight[:1, :, :1, :1] if transposed else weight[:, :1, :1, :1]
        ctx.save_for_backward(
            x if levels is None else pack_all(last > 0),
            levels,
            pack_all(weight > 0) if binary_weight else weight,
            one_each.abs() if binary_weight else None,
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, levels, weight, scale = ctx.saved_tensors
        if levels is not None:
            x = restored(x, ctx.last_shape, levels[0], levels[1]).permute(0, 3, 1, 2)
        if scale is not None:
            weight = restored(weight, ctx.weight_shape, -scale, scale)
        needed = ctx.needs_input_grad[:3]
        found = torch.ops.aten.convolution_backward(
            grad, x.to(ctx.y_dtype), weight.to(ctx.y_dtype), [grad.shape[1]], *ctx.options, needed
        )
        dtypes = ctx.x_dtype, ctx.weight_dtype, ctx.bias_dtype
        found = [
            of.to(dtype) if is_needed else None for of, dtype, is_needed in zip(found, dtypes, needed, strict=True)
        ]
        return *found, None, None, None, None, None


def kept_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transposed: bool,
    levels: Tensor | None,
    binary_weight: bool,
    stride: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Convolve as :func:`torch.nn.functional.conv2d` without padding, and keep bits of the sides that are binary.

    Args:
        x: ``(B, C, H, W)``.
        weight: ``(N, C, kernel, kernel)``, or ``(C, N, kernel, kernel)`` if ``transposed``.
        bias: ``(N,)``, or ``None``.
        transposed: as :func:`torch.nn.functional.conv_transpose2d`.
        levels: see :func:`kept_product`.
        binary_weight: whether the weights of each output channel have the values ``-theta`` and ``theta``.
        stride, dilation: along height and width.
    """
    return _KeptConvolution.apply(x, weight, bias, stride, dilation, transposed, levels, binary_weight)
