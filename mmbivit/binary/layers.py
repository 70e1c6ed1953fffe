"""Layers of the binary network. Each carries its bit widths and honours every argument of its torch layer."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .functional import binarize_weight, rprelu, sign_ste

__all__ = ["ActivationQuantizer", "BinaryLinear", "RPReLU", "RSign"]


class ActivationQuantizer(nn.Module):
    """Base of everything that makes activations 1 bit; a training stage may switch it off with ``binarize``."""

    def __init__(self):
        super().__init__()
        self.binarize = True

    @property
    def bits(self) -> int:
        """Bits of one output value as it is computed now."""
        return 1 if self.binarize else 32


class RSign(ActivationQuantizer):
    """Sign with a learnable threshold per channel (SI-BiViT, Eq. 3; ReActNet).

    Forward ``Sign(x - gamma)``, backward Eq. 2; see :func:`mmbivit.binary.functional.sign_ste`.

    Args:
        num_features: size of the last axis.

    Shape: ``(*, num_features) -> (*, num_features)``, values -1 and +1; the input itself where ``binarize`` is off.
    """

    def __init__(self, num_features: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        return sign_ste(x, self.gamma.to(x.dtype)) if self.binarize else x

    def extra_repr(self) -> str:
        return str(self.gamma.numel())


class RPReLU(nn.Module):
    """``PReLU(x - gamma) + zeta``, all three parameters per channel (ReActNet; replaces GELU in SI-BiViT 4.1.3).

    Args:
        num_features: size of the last axis.
        slope: initial factor of the negative side.

    Shape: ``(*, num_features) -> (*, num_features)``.
    """

    def __init__(self, num_features: int, slope: float = 0.25):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(num_features))
        self.slope = nn.Parameter(torch.full((num_features,), slope))
        self.zeta = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        return rprelu(x, self.gamma.to(x.dtype), self.slope.to(x.dtype), self.zeta.to(x.dtype))

    def extra_repr(self) -> str:
        return str(self.gamma.numel())


class BinaryLinear(nn.Linear):
    """Linear layer with 1-bit weights and inputs (SI-BiViT, Eq. 3-5).

    ``y = x_b @ W_b.T + bias`` with ``x_b = Sign(x - gamma)`` and ``W_b = theta * Sign(W - mu)``. Training simulates
    the bits with floats; the product of signs equals ``theta * (2 * popcount(XNOR(x_b, W_b)) - in_features)``.

    The training stages switch either side to float: ``binarize_weight`` and ``input_quantizer.binarize`` are plain
    attributes that :func:`mmbivit.models.stage.set_stage` sets.

    Args:
        in_features: size of the last input axis, also the number of thresholds.
        out_features: size of the last output axis, also the number of scales.
        bias: add a float bias per output.
        device: as in :class:`torch.nn.Linear`.
        dtype: as in :class:`torch.nn.Linear`.

    Shape: ``(*, in_features) -> (*, out_features)``.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None):
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.input_quantizer = RSign(in_features).to(device=device, dtype=dtype)
        self.binarize_weight = True

    @classmethod
    def from_float(cls, linear: nn.Linear) -> "BinaryLinear":
        """Make a binary layer that starts from the weights and bias of ``linear`` (copied, not shared)."""
        layer = cls(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        with torch.no_grad():
            layer.weight.copy_(linear.weight)
            if linear.bias is not None:
                layer.bias.copy_(linear.bias)
        return layer

    @property
    def weight_bits(self) -> int:
        """Bits of one weight as it is used now: 1, or 32 while the weights are float."""
        return 1 if self.binarize_weight else 32

    @property
    def input_bits(self) -> int:
        """Bits of one input as it is used now: 1, or 32 while the activations are float."""
        return self.input_quantizer.bits

    @property
    def product_bits(self) -> tuple[tuple[int, int], ...]:
        """Bits of the two sides of each product that the forward pass computes, now and in its order."""
        return ((self.input_bits, self.weight_bits),)

    def effective_weight(self) -> Tensor:
        """Return the weight matrix that multiplies the input now: binarized, or the latent one."""
        return binarize_weight(self.weight) if self.binarize_weight else self.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.input_quantizer(x), self.effective_weight(), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight_bits={self.weight_bits}, input_bits={self.input_bits}"
