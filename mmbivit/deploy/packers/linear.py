"""Packing of a single binary linear layer."""

import torch
from torch import nn

from mmbivit.binary import BinaryLinear, RPReLU
from mmbivit.checks import UserError
from mmbivit.deploy.folding import fold_linear, norm_affine, sign_affine
from mmbivit.deploy.registry import packs
from mmbivit.packed import PackedLinear
from mmbivit.packed.packing import pack_weight, pad_channels

__all__ = ["pack_linear"]


@packs(BinaryLinear)
@torch.no_grad()
def pack_linear(
    layer: BinaryLinear, norm: nn.Module | None = None, norm_after: nn.Module | None = None, act: RPReLU | None = None
) -> PackedLinear:
    """Pack a binary linear layer and what surrounds it, in the order norm, layer, norm_after, act.

    Args:
        layer: with binary weights and inputs.
        norm: BatchNorm of the input, in evaluation.
        norm_after: BatchNorm of the output, in evaluation.
        act: activation function of the output.

    Raises:
        ValueError: for a layer of an earlier training stage, or a norm or activation that cannot be folded.
    """
    if act is not None and type(act) is not RPReLU:
        raise UserError(f"act is {type(act).__name__}; a packed layer with float output knows RPReLU only")
    packed = PackedLinear(layer.in_features, layer.out_features, rprelu=act is not None)
    signs, scale, bias = fold_linear(layer)
    gain, shift = norm_affine(norm_after, layer.out_features)
    tensors = dict(
        in_affine=sign_affine(norm, layer.input_quantizer),
        weight=pack_weight(signs),
        out_affine=pad_channels(torch.stack([gain * scale, gain * bias + shift])),
    )
    if act is not None:
        tensors["rprelu"] = pad_channels(torch.stack([act.gamma, act.slope, act.zeta]))
    packed.fill(**tensors)
    return packed
