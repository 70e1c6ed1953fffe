"""Convolutions with 1-bit weights and inputs."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmbivit.checks import UserError

from .kept import kept_convolution
from .layers import BinaryLayer, RPReLU, repeat_or_average
from .quantizers import ActivationQuantizer, RSign, WeightQuantizer, WeightSign

__all__ = ["BinaryConv2d", "BinaryConvTranspose2d"]


class BinaryConv2d(BinaryLayer, nn.Conv2d):
    """2D convolution with 1-bit weights and inputs, and what usually surrounds it: ``RPReLU(BN(y) + R(x))``.

    ``y = conv(input_quantizer(pad(x)), weight_quantizer(W)) + bias``; by default with a threshold for each input
    channel (SI-BiViT, Eq. 3) and a scale for each output channel (Eq. 4), taken over its ``in_channels * kernel``
    weights. Norm, shortcut and RPReLU (Bi-Real Net; BinaryViT, Eq. 2 and 3) are off by default.

    The input is padded *before* it is binarized: what ``padding`` adds is 0, whose sign is one bit of each channel,
    ``Sign(0 - gamma)``, so that every input of the product is -1 or +1 at the border, too, and a packed kernel pads
    with one word for all borders. Other padding modes repeat bits of the map.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as in
            :class:`torch.nn.Conv2d`; ``groups`` can only be 1.
        input_quantizer: binarizes the input, for this layer alone; ``RSign(in_channels)`` by default.
        weight_quantizer: binarizes the weights, for this layer alone; ``WeightSign()`` by default.
        norm: put a BatchNorm behind the product, in place of the bias.
        shortcut: add the input, averaged over ``stride x stride`` and by :func:`repeat_or_average` brought to
            ``out_channels``. Where shapes do not allow that there is none.
        act: put an RPReLU at the end.
        like_float: start like a float layer with the same weights, of a trained detector for example, whose output the
            input itself explains little of. From the first batch of training the layer takes the unit in which inputs
            are compared with thresholds, their root mean square, which is also the window of the gradient; and the norm
            takes the mean and deviation that the float product has there. The shortcut has a learned factor for each
            channel, which is 0 at first.

    Shape: ``(B, in_channels, H, W) -> (B, out_channels, H', W')``, as in :class:`torch.nn.Conv2d`.

    Raises:
        ValueError: for more than one group.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device=None,
        dtype=None,
        *,
        input_quantizer: ActivationQuantizer | None = None,
        weight_quantizer: WeightQuantizer | None = None,
        norm: bool = False,
        shortcut: bool = False,
        act: bool = False,
        like_float: bool = False,
    ):
        if groups != 1:
            raise UserError(f"groups={groups}; a binary convolution can only have groups=1")
        super().__init__(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation, groups),
            bias=bias and not norm,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )
        here = dict(device=device, dtype=dtype)
        self.input_quantizer = (input_quantizer or RSign(in_channels)).to(**here)
        self.weight_quantizer = (weight_quantizer or WeightSign()).to(**here)
        self.norm = nn.BatchNorm2d(out_channels, **here) if norm else None
        self.act = RPReLU(out_channels).to(**here) if act else None
        self.shortcut = (
            shortcut and self._keeps_grid() and (in_channels % out_channels == 0 or out_channels % in_channels == 0)
        )
        self.like_float = like_float
        if like_float:
            self._add_start()

    @classmethod
    def from_float(cls, conv: nn.Conv2d, **options) -> "BinaryConv2d":
        """Make a binary convolution that starts from the weights and bias of ``conv`` (copied, not shared).

        Args:
            conv: the float layer.
            options: quantizers, and other arguments of the class.

        Raises:
            ValueError: for a transposed convolution, or one with groups.
        """
        if not isinstance(conv, nn.Conv2d):
            raise UserError(f"a {type(conv).__name__} cannot be made binary; expected a Conv2d")
        return cls(
            *(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation),  # type: ignore[arg-type]  # pairs
            groups=conv.groups,
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
            **options,
        )._copy_from(conv)

    def forward(self, x: Tensor) -> Tensor:
        self._start([x])
        y = self._product(x)
        return self._finish(x, y if self.norm is None else self.norm(y))

    def over_levels(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Apply the layer to several maps ``(B, in_channels, H_i, W_i)``, which share the statistics of its norm.

        In training, a norm of each map for itself would have statistics of its own there, but those of all in
        evaluation.
        """
        self._start(maps)
        products = [self._product(x) for x in maps]
        if self.norm is not None:
            products = _normed_together(self.norm, products) if self.norm.training else map(self.norm, products)  # type: ignore[assignment]  # read once
        return [self._finish(x, y) for x, y in zip(maps, products, strict=True)]

    def _keeps_grid(self) -> bool:
        """Whether the output has a value for each ``stride x stride`` of the input."""
        if isinstance(self.padding, str):
            return self.padding == "same"
        sides = zip(self.kernel_size, self.padding, self.dilation, strict=True)
        return all(2 * padding == dilation * (size - 1) for size, padding, dilation in sides)

    def _start(self, maps: Sequence[Tensor]) -> None:
        if self.like_float:
            self._start_like_float(
                maps, lambda: [self._conv_forward(x, self.weight, None).permute(0, 2, 3, 1) for x in maps]
            )

    def _product(self, x: Tensor) -> Tensor:
        if any(self._reversed_padding_repeated_twice):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=mode)
        signs = self.input_quantizer(self._scaled_input(x).permute(0, 2, 3, 1))
        return _convolve(self, signs, self._scaled_weight(), transposed=False)

    def _finish(self, x: Tensor, y: Tensor) -> Tensor:
        y = y.permute(0, 2, 3, 1)
        if self.shortcut:
            if self.stride != (1, 1):
                x = F.avg_pool2d(x, self.stride, ceil_mode=True, count_include_pad=False)
            added = repeat_or_average(x.permute(0, 2, 3, 1), self.out_channels)
            y = y + (added * self.shortcut_scale.to(y.dtype) if self.like_float else added)
        return (y if self.act is None else self.act(y)).permute(0, 3, 1, 2)


class BinaryConvTranspose2d(BinaryLayer, nn.ConvTranspose2d):
    """Transposed convolution with 1-bit weights and inputs whose kernels do not overlap: it enlarges a map.

    Each output is one product of ``in_channels`` signs, with a scale for each output channel.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size, stride, bias, device, dtype: as in :class:`torch.nn.ConvTranspose2d`, both sizes equal.
        input_quantizer: binarizes the input, for this layer alone; ``RSign(in_channels)`` by default.
        weight_quantizer: binarizes the weights, for this layer alone; ``WeightSign()`` by default.

    Shape: ``(B, in_channels, H, W) -> (B, out_channels, H * stride, W * stride)``.

    Raises:
        ValueError: for kernels that overlap, or leave gaps.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int],
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        input_quantizer: ActivationQuantizer | None = None,
        weight_quantizer: WeightQuantizer | None = None,
    ):
        here = dict(device=device, dtype=dtype)
        super().__init__(in_channels, out_channels, kernel_size, stride, bias=bias, **here)
        if self.kernel_size != self.stride:
            raise UserError(
                f"kernel_size={kernel_size} and stride={stride}; a binary transposed convolution needs them to be equal"
            )
        self.input_quantizer = (input_quantizer or RSign(in_channels)).to(**here)
        self.weight_quantizer = (weight_quantizer or WeightSign()).to(**here)

    @classmethod
    def from_float(cls, conv: nn.ConvTranspose2d, **options) -> "BinaryConvTranspose2d":
        """Make a binary layer that starts from the weights and bias of ``conv`` (copied, not shared).

        Args:
            conv: the float layer.
            options: its quantizers.

        Raises:
            ValueError: for anything but a transposed convolution without padding and groups, or overlapping kernels.
        """
        if not isinstance(conv, nn.ConvTranspose2d) or conv.groups != 1 or any((*conv.padding, *conv.output_padding)):
            raise UserError(f"a {type(conv).__name__} with padding or groups cannot be made binary here")
        return cls(
            *(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride),  # type: ignore[arg-type]  # pairs, of which torch says tuple[int, ...]
            bias=conv.bias is not None,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
            **options,
        )._copy_from(conv)

    def weight_rows(self) -> Tensor:
        return self.weight.transpose(0, 1).flatten(1)

    def effective_weight(self) -> Tensor:
        rows = self.weight_quantizer(self.weight_rows())
        return rows.view(self.out_channels, self.in_channels, *self.kernel_size).transpose(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        return _convolve(self, self.input_quantizer(x.permute(0, 2, 3, 1)), self.effective_weight(), transposed=True)


def _convolve(layer: BinaryLayer, signs: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """Convolve what the quantizers made: of the input ``(B, H, W, C)``, which is padded already."""
    x, options = signs.permute(0, 3, 1, 2), dict(stride=layer.stride, dilation=layer.dilation)
    if not layer.input_quantizer.keeps_bits:
        return (F.conv_transpose2d if transposed else F.conv2d)(x, weight, layer.bias, **options)
    levels, binary_weight = layer.input_quantizer.kept_levels(signs), layer.weight_quantizer.two_levels
    return kept_convolution(x, weight, layer.bias, transposed, levels, binary_weight, **options)


def _normed_together(norm: nn.Module, maps: Sequence[Tensor]) -> list[Tensor]:
    """Normalise maps ``(B, C, H_i, W_i)`` by their common statistics."""
    rows = [y.transpose(0, 1).flatten(1) for y in maps]
    normed = norm(torch.cat(rows, dim=1)[None, :, :, None])[0, :, :, 0].split([row.shape[1] for row in rows], dim=1)
    return [
        part.view(y.shape[1], y.shape[0], *y.shape[2:]).transpose(0, 1) for part, y in zip(normed, maps, strict=True)
    ]
