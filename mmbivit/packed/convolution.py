"""The layers of packed necks and heads."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmbivit.binary import repeat_or_average
from mmbivit.binary.functional import rprelu

from . import detection_operators  # noqa: F401  it registers torch.ops.mmbivit.binary_conv2d
from .detection_operators import ConvGeometry
from .modules import PackedLinear, PackedModule
from .packing import LANES, num_blocks, num_words, pad_channels, padded

__all__ = ["PackedConv2d", "PackedConvTranspose2d", "PackedMapLinear", "PackedScaledLinear"]


class PackedConv2d(PackedModule):
    """Binary convolution on bits: padding, sign, product, scale, bias, norm, shortcut and RPReLU in one operator.

    ``RPReLU(scale * conv(Sign(pad(x) - threshold), W_b) + bias + factor * R(x))``, where ``R`` averages over strides
    and brings the input to the channels of the output, as in :class:`mmbivit.binary.BinaryConv2d`.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: height and width.
        stride: along both.
        padding: on the left, right, top and bottom.
        dilation: along height and width.
        padding_mode: as in :class:`torch.nn.Conv2d`.
        rprelu: whether an RPReLU follows.
        shortcut: whether the input is added.

    Shape: ``(B, in_channels, H, W) -> (B, out_channels, H', W')``, float32, in channels-last memory; input in another
    memory format is copied first.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, ...],
        stride: tuple[int, ...] = (1, 1),
        padding: Sequence[int] = (0, 0, 0, 0),
        dilation: tuple[int, ...] = (1, 1),
        padding_mode: str = "zeros",
        rprelu: bool = False,
        shortcut: bool = False,
    ):
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        left, right, top, bottom = padding
        fused = padding_mode == "zeros" and left == right and top == bottom
        self.pad = tuple(padding) if any(padding) and not fused else None
        self.pad_mode = "constant" if padding_mode == "zeros" else padding_mode
        inside = (top, left) if fused else (0, 0)
        self.geometry = ConvGeometry(*kernel_size, *stride, *inside, *dilation)  # type: ignore[call-arg]  # of two each
        words = kernel_size[0] * kernel_size[1] * num_words(in_channels)
        self._add("threshold", padded(in_channels))
        self._add("weight", num_blocks(out_channels), words, LANES, dtype=torch.int32)
        self._add("out_affine", 2, padded(out_channels))
        self.register_buffer("rprelu", torch.zeros(3, padded(out_channels)) if rprelu else None)
        self.register_buffer("factor", torch.zeros(padded(out_channels)) if shortcut else None)

    def forward(self, x: Tensor) -> Tensor:
        return self._convolve(x)

    def apply_(self, x: Tensor) -> Tensor:
        """Apply the layer; in place where it has a shortcut and keeps shapes, and ``x`` is in channels-last memory."""
        rows = x.permute(0, 2, 3, 1)
        keeps_shape = self.geometry.out_size(*x.shape[2:]) == x.shape[2:] and self.in_channels == self.out_channels
        if self.factor is None or self.pad is not None or not keeps_shape or not rows.is_contiguous():
            return self(x)
        layer = self.threshold, self.weight, self.out_affine, self.geometry, self.rprelu, self.factor
        torch.ops.mmbivit.binary_conv2d_(rows, *layer)
        return x

    def predict(self, x: Tensor, layers: Sequence[nn.Conv2d]) -> list[Tensor]:
        """Apply float 1 x 1 convolutions to the output, in one operator that does not keep it.

        Args:
            x: ``(B, in_channels, H, W)``.
            layers: with a bias each.

        Returns:
            The output of each, in channels-last memory.
        """
        weight = torch.cat([layer.weight.flatten(1) for layer in layers])
        bias, sizes = torch.cat([layer.bias for layer in layers]), [layer.out_channels for layer in layers]  # type: ignore[misc]  # see layers
        out = self._convolve(x, pad_channels(weight.T).contiguous(), pad_channels(bias), len(bias))
        return list(out.split(sizes, dim=1))

    def _convolve(self, x: Tensor, *predictor: Tensor | int) -> Tensor:
        added = None if self.factor is None else self._added(x)
        if self.pad is not None:
            x = F.pad(x, self.pad, mode=self.pad_mode)
        out = torch.ops.mmbivit.binary_conv2d(
            *(_channels_last(x), self.threshold, self.weight, self.out_affine, self.out_channels, self.geometry),
            *(self.rprelu, added, self.factor, *predictor),
        )
        return out.permute(0, 3, 1, 2)

    def _added(self, x: Tensor) -> Tensor:
        """Return what the shortcut adds, ``(B, H', W', out_channels)``."""
        stride = self.geometry[2:4]
        if stride != (1, 1):
            x = F.avg_pool2d(x, stride, ceil_mode=True, count_include_pad=False)
        x = _channels_last(x)
        return x if self.in_channels == self.out_channels else repeat_or_average(x, self.out_channels).contiguous()

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, {self.geometry}"


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


class PackedScaledLinear(PackedLinear):
    """Binary linear layer on bits with a scaled shortcut: ``RPReLU(scale * (Sign(...) . W_b) + bias + factor * R(x))``.

    Args:
        in_features: size of the last input axis.
        out_features: size of the last output axis, a multiple of that of the input or a divisor of it.
        act: whether an RPReLU follows.

    Shape: ``(*, in_features) -> (*, out_features)``, float32.
    """

    def __init__(self, in_features: int, out_features: int, act: bool = False):
        super().__init__(in_features, out_features)
        self._add("factor", out_features)
        self.register_buffer("act", torch.zeros(3, out_features) if act else None)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x, (repeat_or_average(x, self.out_features) * self.factor).contiguous())
        if self.act is None:
            return y
        return rprelu(y, *self.act)


class PackedMapLinear(PackedLinear):
    """Binary linear layer of flattened maps whose channels come last: ``(B, H * W * C) -> (B, out_features)``."""

    channels_last = True


class PackedConvTranspose2d(PackedLinear):
    """Binary transposed convolution on bits, whose kernels do not overlap.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: height and width, also the strides.

    Shape: ``(B, in_channels, H, W) -> (B, out_channels, H * height, W * width)``, float32, in channels-last memory.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: tuple[int, ...]):
        super().__init__(in_channels, kernel_size[0] * kernel_size[1] * out_channels)
        self.kernel_size = kernel_size

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(_channels_last(x))  # (B, H, W, height * width * C)
        y = y.unflatten(-1, (*self.kernel_size, -1)).transpose(2, 3)
        return y.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
