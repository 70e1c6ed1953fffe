"""Packing of the layers of necks and heads."""

import torch
from torch import Tensor

from mmbivit.binary import BinaryConv2d, BinaryConvTranspose2d, BinaryLayer, ResidualBinaryLinear
from mmbivit.deploy.folding import fold_linear, norm_affine, sign_affine
from mmbivit.deploy.registry import packs
from mmbivit.packed import PackedConv2d, PackedConvTranspose2d, PackedLinear, PackedMapLinear, PackedScaledLinear
from mmbivit.packed.packing import pack_signs, pack_weight, pad_channels, word_blocks

__all__ = ["pack_conv", "pack_conv_transpose", "pack_started_linear"]


@packs(BinaryConv2d)
@torch.no_grad()
def pack_conv(layer: BinaryConv2d) -> PackedConv2d:
    """Pack a binary convolution with its norm, shortcut and RPReLU.

    Raises:
        ValueError: for a layer of an earlier training stage, or a norm that cannot be folded.
    """
    packed = PackedConv2d(
        *(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride),
        padding=layer._reversed_padding_repeated_twice,
        dilation=layer.dilation,
        padding_mode=layer.padding_mode,
        rprelu=layer.act is not None,
        shortcut=layer.shortcut,
    )
    threshold, signs, out = _fold(layer)
    taps = signs.view(layer.weight.shape).permute(0, 2, 3, 1)  # (N, height, width, C)
    tensors = dict(
        threshold=pad_channels(threshold),
        weight=word_blocks(pack_signs(taps).flatten(1)),
        out_affine=pad_channels(out),
    )
    if layer.act is not None:
        tensors["rprelu"] = pad_channels(_rprelu(layer))
    if layer.shortcut:
        tensors["factor"] = pad_channels(_factor(layer))
    packed.fill(**tensors)
    return packed


@torch.no_grad()
def pack_started_linear(layer: ResidualBinaryLinear, order: Tensor | None = None) -> PackedLinear:
    """Pack a binary linear layer that started like a float one, with its norm, shortcut and RPReLU.

    Args:
        layer: with binary weights and inputs.
        order: which inputs come first, where those of the packed layer have another order than those of ``layer``.
    """
    act = layer.act is not None
    if layer.shortcut:
        packed = PackedScaledLinear(layer.in_features, layer.out_features, act)
        tensors = dict(factor=_factor(layer)) | (dict(act=_rprelu(layer)) if act else {})
    else:
        packed = (PackedLinear if order is None else PackedMapLinear)(layer.in_features, layer.out_features, act)
        tensors = dict(rprelu=pad_channels(_rprelu(layer))) if act else {}
    threshold, signs, out = _fold(layer)
    if order is not None:
        threshold, signs = threshold[order], signs[:, order]
    # -1 makes the bits of padding channels 0.
    affine = torch.stack([pad_channels(torch.ones_like(threshold)), pad_channels(-threshold, -1.0)])
    packed.fill(in_affine=affine, weight=pack_weight(signs), out_affine=pad_channels(out), **tensors)
    return packed


@packs(BinaryConvTranspose2d)
@torch.no_grad()
def pack_conv_transpose(layer: BinaryConvTranspose2d) -> PackedConvTranspose2d:
    """Pack a binary transposed convolution.

    Raises:
        ValueError: for a layer of an earlier training stage, or inputs that are not -1 and +1 times one scale.
    """
    packed = PackedConvTranspose2d(layer.in_channels, layer.out_channels, layer.kernel_size)
    signs, scale, bias = fold_linear(layer)
    taps = signs.view(layer.out_channels, layer.in_channels, -1).permute(2, 0, 1)  # (height * width, N, C)
    packed.fill(
        in_affine=sign_affine(None, layer.input_quantizer),
        weight=pack_weight(taps.flatten(0, 1)),
        out_affine=pad_channels(torch.stack([scale, bias]).repeat(1, len(taps))),
    )
    return packed


def _fold(layer: BinaryLayer) -> tuple[Tensor, Tensor, Tensor]:
    """Return thresholds ``(K,)`` or ``(C,)``, signs of weights, and scale and bias of a product, ``(2, N)``."""
    signs, scale, bias = fold_linear(layer)
    threshold = layer.input_quantizer.fold()
    if layer.like_float:
        unit = layer.input_scale.value.detach().double()
        threshold = threshold * unit
        if layer.norm is None:  # which would make up for the unit
            own = 0 if layer.bias is None else layer.bias.detach().double()
            scale, bias = scale * unit, own + (bias - own) * unit
    gain, shift = norm_affine(layer.norm, len(scale))
    return threshold, signs, torch.stack([gain * scale, gain * bias + shift])


def _rprelu(layer: BinaryLayer) -> Tensor:
    return torch.stack([layer.act.gamma, layer.act.slope, layer.act.zeta])


def _factor(layer: BinaryLayer) -> Tensor:
    return layer.shortcut_scale if layer.like_float else torch.ones(len(layer.weight_rows()))
