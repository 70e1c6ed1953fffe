"""Layers of the binary network. Each carries its bit widths and honours every argument of its torch layer."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .functional import rprelu
from .quantizers import ActivationQuantizer, RSign, WeightQuantizer, WeightSign

__all__ = ["BinaryLinear", "HeadNorm", "HeadShortcut", "RPReLU", "ResidualBinaryLinear", "repeat_or_average"]


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

    ``y = x_b @ W_b.T + bias`` with ``x_b = input_quantizer(x)`` and ``W_b = weight_quantizer(W)``; by default
    ``x_b = Sign(x - gamma)`` and ``W_b = theta * Sign(W - mu)``. Training simulates the bits with floats; then the
    product equals ``theta * (2 * popcount(XNOR(x_b, W_b)) - in_features)``.

    The training stages switch either side to float by the ``binarize`` of its quantizer; ``binarize_weight`` is that of
    the weights.

    Args:
        in_features: size of the last input axis.
        out_features: size of the last output axis.
        bias: add a float bias per output.
        device: as in :class:`torch.nn.Linear`.
        dtype: as in :class:`torch.nn.Linear`.
        input_quantizer: binarizes the input, for this layer alone; ``RSign(in_features)`` by default.
        weight_quantizer: binarizes the weights, for this layer alone; ``WeightSign()`` by default.

    Shape: ``(*, in_features) -> (*, out_features)``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype=None,
        input_quantizer: ActivationQuantizer | None = None,
        weight_quantizer: WeightQuantizer | None = None,
    ):
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.input_quantizer = (input_quantizer or RSign(in_features)).to(device=device, dtype=dtype)
        self.weight_quantizer = (weight_quantizer or WeightSign()).to(device=device, dtype=dtype)

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        input_quantizer: ActivationQuantizer | None = None,
        weight_quantizer: WeightQuantizer | None = None,
    ) -> "BinaryLinear":
        """Make a binary layer that starts from the weights and bias of ``linear`` (copied, not shared)."""
        layer = cls(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
            input_quantizer=input_quantizer,
            weight_quantizer=weight_quantizer,
        )
        with torch.no_grad():
            layer.weight.copy_(linear.weight)
            if linear.bias is not None:
                layer.bias.copy_(linear.bias)
        return layer

    @property
    def binarize_weight(self) -> bool:
        """Whether the weights are binarized now."""
        return self.weight_quantizer.binarize

    @binarize_weight.setter
    def binarize_weight(self, binarize: bool) -> None:
        self.weight_quantizer.binarize = binarize

    @property
    def weight_bits(self) -> int:
        """Bits of one weight as it is used now: 1, or 32 while the weights are float."""
        return self.weight_quantizer.bits

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
        return self.weight_quantizer(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight_bits={self.weight_bits}, input_bits={self.input_bits}"


def repeat_or_average(x: Tensor, channels: int) -> Tensor:
    """Bring activations to another width without parameters: ``R(x)`` of BinaryViT, Eq. 3.

    ``n`` times wider: ``n`` copies side by side; ``n`` times narrower: the mean of ``n`` adjacent channels, as text and
    published code have it (the indices of the equation say blocks).

    Args:
        x: ``(*, C)``.
        channels: a multiple of ``C``, or a divisor.
    """
    if channels >= x.shape[-1]:
        return x.repeat(*[1] * (x.dim() - 1), channels // x.shape[-1])
    return x.unflatten(-1, (channels, -1)).mean(dim=-1)


class ResidualBinaryLinear(BinaryLinear):
    """Binary linear layer with norm, shortcut and activation: ``RPReLU(BN(y) + R(x))`` (BinaryViT, Eq. 2 and 3).

    ``R`` is :func:`repeat_or_average`. Where neither width is a multiple of the other there is no shortcut.

    Args:
        in_features, out_features, options: see :class:`BinaryLinear`.

    Shape: ``(*, in_features) -> (*, out_features)``.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **options):
        super().__init__(in_features, out_features, bias=bias, **options)
        self.norm = nn.BatchNorm1d(out_features)
        self.act = RPReLU(out_features)
        self.shortcut = in_features % out_features == 0 or out_features % in_features == 0

    def forward(self, x: Tensor) -> Tensor:
        y = _norm(self.norm, super().forward(x))
        return self.act(y + repeat_or_average(x, self.out_features) if self.shortcut else y)


class HeadNorm(nn.LayerNorm):
    """LayerNorm over the channels of each head, of queries or of keys (Bi-ViT's published code, for DeiT)."""


class HeadShortcut(nn.Module):
    """Adds queries, keys and values to the output of attention: ``RPReLU(BN(x) + Q + K + V)`` (BinaryViT, Eq. 8).

    Args:
        embed_dims: channels ``C``.

    Shape: ``(*, C)`` and queries, keys and values ``(*, 3 * C)`` before their sign -> ``(*, C)``.
    """

    def __init__(self, embed_dims: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(embed_dims)
        self.act = RPReLU(embed_dims)

    def forward(self, x: Tensor, qkv: Tensor) -> Tensor:
        return self.act(_norm(self.norm, x) + qkv.unflatten(-1, (3, -1)).sum(dim=-2))


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    return norm(x.flatten(0, -2)).view(x.shape)
