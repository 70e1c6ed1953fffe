"""Training by the native kernels: binary products that keep bits for the backward pass, and nothing else of their size.

Products of two binary sides count bits, as packed networks do, and are exact. See :mod:`mmbivit.binary.kept` for the
form in plain torch, which is the specification, and serves on other devices and in other dtypes.
"""

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mmbivit.binary.kept import RPRELU, Follower
from mmbivit.binary.native import TrainingKernels, offer_kernels

from . import kernels
from .kernels import KERNELS
from .packing import num_words, pad_channels, padded, word_blocks
from .training_attention import attention_step

STEP = 56  # rows whose gradients are summed up together: ROWS_AT_A_TIME of csrc/kernels.h


def _call(name: str, args: ctypes.Structure) -> None:
    KERNELS.call(name, KERNELS.paths[KERNELS.path], args)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _bits(rows: int, k: int) -> Tensor:
    return torch.empty(rows, num_words(k), dtype=torch.int32)


def _step_sums(rows: int, *shape: int) -> Tensor:
    return torch.zeros(-(-rows // STEP), *shape)


def sign_bits(x: Tensor, gamma: Tensor | None, with_signs: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return of ``(M, K)`` the bits of ``Sign(x - gamma)``, where its gradient passes, and the signs as floats."""
    rows, k = x.shape
    bits, inside = _bits(rows, k), _bits(rows, k)
    signs = torch.empty_like(x) if with_signs else None
    pointers = map(_pointer, (x, gamma, bits, inside, signs))
    _call("sign_bits", kernels.SignBitsArgs(*pointers, rows, k))
    return bits, inside, signs


def unpack_rows(bits: Tensor, k: int, scale: Tensor | None = None) -> Tensor:
    """Return bit rows as ``-scale`` and ``scale``, ``(M, K)``; ``scale`` is ``(M,)``, or ``None`` for 1."""
    out = torch.empty(len(bits), k)
    _call("unpack", kernels.UnpackArgs(bits.data_ptr(), _pointer(scale), out.data_ptr(), len(bits), k))
    return out


def pass_inside(grad: Tensor, inside: Tensor) -> Tensor:
    """Set ``grad (M, K)`` to 0 where bits are not set, in place; returns the sums of its columns."""
    rows, k = grad.shape
    sums = _step_sums(rows, padded(k))
    _call("pass_inside", kernels.PassInsideArgs(*map(_pointer, (inside, grad, sums)), rows, k, STEP))
    return sums.sum(0)[:k]


class _BinaryWeight(NamedTuple):
    """Weights ``scale * Sign(w - mean)`` of each row: bit rows, and two numbers for each."""

    bits: Tensor
    scale: Tensor
    mean: Tensor

    @classmethod
    def of(cls, weight: Tensor, center: str) -> "_BinaryWeight":
        """Binarize latent weights ``(N, K)``; ``center`` is ``'row'`` or ``'none'``."""
        rows, k = weight.shape
        found = cls(_bits(rows, k), torch.empty(rows), torch.zeros(rows))
        pointers = map(_pointer, (weight, found.mean, found.scale, found.bits))
        _call("weight_bits", kernels.WeightBitsArgs(*pointers, rows, k, center == "row"))
        return found

    def latent_gradient(self, grad: Tensor, weight: Tensor, ste: str, center: str) -> Tensor:
        """Make the gradient of the latent weights of that of the binary ones, in place."""
        if ste != "identity":
            pointers = map(_pointer, (weight, self.mean, self.scale if ste == "theta" else None, grad))
            _call("weight_gradients", kernels.WeightGradientsArgs(*pointers, *weight.shape, center == "row"))
        return grad


class _Product:
    """What a product of bit rows and binary weights is computed from, a second time in the backward pass."""

    def __init__(self, bits: Tensor, weight: _BinaryWeight, bias: Tensor | None, k: int):
        self.bits, self.k, self.n = bits, k, len(weight.scale)
        self.weight, self.scale = word_blocks(weight.bits), pad_channels(weight.scale)
        self.bias = torch.zeros(padded(self.n)) if bias is None else pad_channels(bias)

    def compute(self, rprelu: Tensor | None = None) -> Tensor:
        """Return the product, or what RPReLU makes of it: ``(M, N)``."""
        rows, out = len(self.bits), torch.empty(len(self.bits), self.n)
        pointers = map(_pointer, (self.bits, self.weight, self.scale, self.bias, rprelu, out))
        _call("bits_linear", kernels.BitsLinearArgs(*pointers, rows, self.k, self.n))
        return out


def _rprelu_gradients(grad: Tensor, rprelu: Tensor, y: Tensor | _Product) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``y (M, N)``, and of gamma, slope and zeta, ``(3, N)``."""
    rows, n = grad.shape
    out, sums = torch.empty_like(grad), _step_sums(rows, 3, padded(n))
    if isinstance(y, _Product):
        source = (None, *map(_pointer, (y.bits, y.weight, y.scale, y.bias)))
        k = y.k
    else:
        source, k = (y.data_ptr(), None, None, None, None), 0
    pointers = map(_pointer, (rprelu, grad, out, sums))
    _call("rprelu_gradients", kernels.RPReLUGradientsArgs(*source, *pointers, rows, k, n, STEP))
    return out, sums.sum(0)[:, :n]


class _Linear(torch.autograd.Function):
    """See :class:`mmbivit.binary.native.TrainingKernels`; keeps bits of the input, and where gradients pass."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        gamma: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        rule: tuple[str, str] | None,
        follower: Follower | None,
        *parameters: Tensor,
    ) -> Tensor:
        rows, weight = x.reshape(-1, x.shape[-1]).contiguous(), weight.contiguous()
        act = pad_channels(torch.stack(parameters)) if follower is RPRELU else None
        signs: Any  # a Tensor where there is no rule
        bits, inside, signs = sign_bits(rows, gamma, with_signs=rule is None)
        ctx.rule, ctx.follower, ctx.shape = rule, follower, x.shape
        binary = () if rule is None else _BinaryWeight.of(weight, rule[1])
        if not binary:
            y = F.linear(signs, weight, bias)
            if act is not None:
                _call("rprelu", kernels.RPReLUArgs(y.data_ptr(), act.data_ptr(), *y.shape))
        else:
            y = _Product(bits, binary, bias, rows.shape[1]).compute(act)
        ctx.num_parameters = len(parameters)
        ctx.save_for_backward(bits, inside, weight, bias, act, *parameters, *binary)
        y = y.view(*x.shape[:-1], len(weight))
        return y if follower is None or act is not None else follower.forward(y, *parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        bits, inside, weight, bias, act, *others = ctx.saved_tensors
        parameters, binary = others[: ctx.num_parameters], others[ctx.num_parameters :]
        binary, k = _BinaryWeight(*binary) if binary else None, weight.shape[1]
        y: Any  # of _Product, or made already
        of_parameters: Any
        signs, of_parameters = unpack_rows(bits, k), ()
        if ctx.follower is not None:
            y = F.linear(signs, weight, bias) if binary is None else _Product(bits, binary, bias, k)
        if act is not None:
            grad, of_parameters = _rprelu_gradients(grad.reshape(-1, len(weight)).contiguous(), act, y)
        elif ctx.follower is not None:
            y = (y if binary is None else y.compute()).view_as(grad)
            grad, *of_parameters = ctx.follower.backward(grad, y, *parameters)
        grad = grad.reshape(-1, len(weight)).contiguous()
        needs_x, needs_gamma, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        of_x = of_gamma = of_weight = of_bias = None
        if needs_x or needs_gamma:
            of_x = grad.mm(weight if binary is None else unpack_rows(binary.bits, k, binary.scale))
            of_gamma = -pass_inside(of_x, inside)
            of_x = of_x.view(ctx.shape)
        if needs_weight:
            of_weight = grad.t().mm(signs)
            if binary is not None:
                of_weight = binary.latent_gradient(of_weight, weight, *ctx.rule)
        if needs_bias:
            of_bias = -of_parameters[0] if act is not None else grad.sum(0)
        return of_x, of_gamma if needs_gamma else None, of_weight, of_bias, None, None, *of_parameters


offer_kernels(TrainingKernels(lambda: KERNELS.path in KERNELS.paths, _Linear.apply, attention_step))
