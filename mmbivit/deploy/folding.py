"""From simulated layers to packed parameters: norms folded into scales, functions into integer thresholds."""

import copy

import torch
from torch import Tensor, nn

from mmbivit.binary import ActivationQuantizer, BinaryLayer, BinaryLinear, RPReLU
from mmbivit.checks import UserError
from mmbivit.packed.packing import pad_channels
from mmbivit.packed.thresholds import count_thresholds

__all__ = ["fold_linear", "hidden_thresholds", "norm_affine", "sign_affine"]

# Applied to each channel by itself; whether they have one hill or valley is checked on their values.
FUNCTIONS = (RPReLU, nn.GELU, nn.PReLU, nn.ReLU, nn.Identity)


def norm_affine(norm: nn.Module | None, channels: int, layer_norm: float | None = None) -> tuple[Tensor, Tensor]:
    """Return gain and shift ``(C,)``, float64, that equal a BatchNorm in evaluation; 1 and 0 for ``None``.

    Args:
        norm: of so many ``channels``.
        layer_norm: eps of the LayerNorm that it is, whose affine alone is returned.

    Raises:
        ValueError: for any other norm, a BatchNorm without running statistics, or a LayerNorm with another eps than
            packed networks have.
    """
    if norm is None:
        return torch.ones(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    if layer_norm:
        if not isinstance(norm, nn.LayerNorm) or norm.eps != layer_norm:
            raise UserError(f"{norm} cannot be folded; expected LayerNorm with eps={layer_norm:g}")
        return norm.weight.detach().double(), norm.bias.detach().double()
    is_batch_norm = isinstance(norm, nn.modules.batchnorm._BatchNorm)
    if not is_batch_norm or norm.running_mean is None or norm.running_var is None:
        raise UserError(f"{type(norm).__name__} cannot be folded; expected BatchNorm with running statistics")
    gain = (norm.running_var.double() + norm.eps).rsqrt()
    shift = -norm.running_mean.double() * gain
    if norm.affine:
        weight, bias = norm.weight.detach().double(), norm.bias.detach().double()
        gain, shift = weight * gain, weight * shift + bias
    return gain, shift


def sign_affine(norm: nn.Module | None, quantizer: ActivationQuantizer, layer_norm: float | None = None) -> Tensor:
    """Return gain and shift ``(2, C padded)`` with ``quantizer(norm(x)) = Sign(gain * x + shift)``.

    For a LayerNorm, ``x`` there is what it makes of its input before its affine.
    """
    gamma = quantizer.fold()
    gain, shift = norm_affine(norm, len(gamma), layer_norm)
    # -1 makes the bits of padding channels 0.
    return torch.stack([pad_channels(gain), pad_channels(shift - gamma, -1.0)])


def fold_linear(layer: BinaryLayer) -> tuple[Tensor, Tensor, Tensor]:
    """Return the signs of a layer's weights ``(N, K)`` (booleans), scales and biases ``(N,)`` of its product, float64.

    The product is that of signs, whatever the levels of the input are.

    Raises:
        ValueError: if its weights or inputs are float now, as in an earlier training stage, or its weights do not fold.
    """
    if layer.weight_bits != 1 or layer.input_bits != 1:
        raise UserError(
            f"has {layer.weight_bits}-bit weights and {layer.input_bits}-bit inputs, which belong to an earlier "
            "training stage; train on to the last, then pack"
        )
    levels = layer.input_quantizer.levels()
    if levels.shape[1] != 1:
        raise UserError(f"has inputs with {levels.shape[1]} scales; expected one, with which its products are scaled")
    low, high = levels[:, 0]
    signs, scale = layer.folded_weight()
    scale = scale.double()
    bias = torch.zeros_like(scale) if layer.bias is None else layer.bias.detach().double()
    sums = 2 * signs.sum(1) - signs.shape[1]  # of weights -1 and 1
    return signs, scale * (high - low) / 2, bias + scale * sums * (high + low) / 2


def hidden_thresholds(layer: BinaryLinear, quantizer: ActivationQuantizer, act: nn.Module | None = None) -> Tensor:
    """Return the thresholds ``(2, N)`` of ``quantizer(act(layer(x)))`` on counts of differing bits.

    Raises:
        ValueError: for an activation function that is unknown, or has several hills.
    """
    if act is not None and type(act) not in FUNCTIONS:
        known = ", ".join(function.__name__ for function in FUNCTIONS)
        raise UserError(f"activation function {type(act).__name__} is unknown; a hidden layer of bits knows {known}")
    _, scale, bias = fold_linear(layer)
    counts = torch.arange(layer.in_features + 1, dtype=torch.float64)
    y = (layer.in_features - 2 * counts)[:, None] * scale + bias
    with torch.no_grad():
        y = y if act is None else copy.deepcopy(act).double()(y)
    return count_thresholds((y >= quantizer.fold()).T)
