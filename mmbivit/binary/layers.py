"""Layers of the binary network. Each carries its bit widths and honours every argument of its torch layer."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .functional import rprelu
from .kept import GELU, RELU, ROW_SCALE, RPRELU, Follower, kept_product
from .learned_scale import FirstBatch, LearnedScale
from .native import native_kernels
from .quantizers import ActivationQuantizer, RSign, WeightQuantizer, WeightSign, is_observed

__all__ = [
    "BinaryLayer",
    "BinaryLinear",
    "HeadNorm",
    "HeadShortcut",
    "RPReLU",
    "ResidualBinaryLinear",
    "product_and_act",
    "scaled_product",
    "repeat_or_average",
]


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


class BinaryLayer(nn.Module):
    """What binary layers of every kind say of themselves; a subclass has ``weight`` and the two quantizers."""

    weight: Tensor
    input_quantizer: ActivationQuantizer
    weight_quantizer: WeightQuantizer

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

    def weight_rows(self) -> Tensor:
        """Return the latent weights with a row for each output."""
        return self.weight.flatten(1)

    def effective_weight(self) -> Tensor:
        """Return the weights that multiply the input now: binarized, or the latent ones."""
        return self.weight_quantizer(self.weight_rows()).view_as(self.weight)

    def folded_weight(self) -> tuple[Tensor, Tensor]:
        """Return the signs of the weights (booleans, a row for each output) and the scales ``(outputs,)``."""
        return self.weight_quantizer.fold(self.weight_rows())

    def _add_start(self) -> None:
        """Let the layer start like a float one with its weights; see :class:`BinaryConv2d`."""
        self.input_scale = LearnedScale(1).requires_grad_(False)
        self.first_batch = FirstBatch(started=self.norm is None)
        self.shortcut_scale: Any = nn.Parameter(torch.zeros(len(self.weight_rows()))) if self.shortcut else None

    def _start_like_float(self, inputs: Sequence[Tensor], float_products: Callable[[], Sequence[Tensor]]) -> None:
        """Take the scale of inputs, and mean and deviation of what the float layer makes of them.

        Args:
            inputs: any shapes.
            float_products: makes the products of the latent weights, each with its channels last.
        """

        def scale() -> Tensor:
            return (sum(x.float().square().sum() for x in inputs) / sum(x.numel() for x in inputs)).sqrt().view(1)  # type: ignore[union-attr]  # sum() of none is 0

        def statistics() -> Tensor:
            rows = torch.cat([y.float().flatten(0, -2) for y in float_products()])
            mean = rows.mean(dim=0)
            return torch.stack([(rows - mean).square().mean(dim=0).sqrt(), mean])

        self.input_scale.start_from(scale)
        if (found := self.first_batch.take(statistics)) is not None:
            with torch.no_grad():
                self.norm.weight.copy_(found[0])
                self.norm.bias.add_(found[1])

    def _scaled_input(self, x: Tensor) -> Tensor:
        return x / self.input_scale.value.to(x.dtype) if self.like_float else x

    def _scaled_weight(self) -> Tensor:
        """Return the weights for inputs that were scaled; a norm makes up for the scale by itself."""
        weight = self.effective_weight()
        return weight * self.input_scale.value.to(weight.dtype) if self.like_float and self.norm is None else weight

    def _copy_from(self, layer: nn.Module) -> "BinaryLayer":
        """Take over weights and, where there is one here, the bias of a float layer."""
        with torch.no_grad():
            self.weight.copy_(layer.weight)
            if self.bias is not None and layer.bias is not None:
                self.bias.copy_(layer.bias)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args) -> None:
        if getattr(self, "norm", None) is not None:
            state_dict.pop(f"{prefix}bias", None)  # of a float layer; the norm would subtract it
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight_bits={self.weight_bits}, input_bits={self.input_bits}"


class BinaryLinear(BinaryLayer, nn.Linear):
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
    def from_float(cls, linear: nn.Linear, **options) -> "BinaryLinear":
        """Make a binary layer that starts from the weights and bias of ``linear`` (copied, not shared).

        Args:
            linear: the float layer.
            options: quantizers, and other arguments of the class.
        """
        return cls(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
            **options,
        )._copy_from(linear)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(x)

    def _forward(self, x: Tensor, follower: Follower | None = None, parameters: tuple[Tensor, ...] = ()) -> Tensor:
        """Return the output, or what a follower makes of it."""
        if self._is_plain_sign():
            operands = x, self.input_quantizer.thresholds, self.weight, self.bias
            if (kernels := native_kernels(*operands, *parameters)) is not None:
                return kernels.linear(*operands, self.weight_quantizer.sign_rule, follower, *parameters)
        return self._product(self.input_quantizer(x), self.weight_quantizer(self.weight), follower, parameters)

    def _is_plain_sign(self) -> bool:
        """Whether native kernels compute what the quantizers do now, in training."""
        inputs, weights = self.input_quantizer, self.weight_quantizer
        if not inputs.keeps_bits or not inputs.is_clipped_sign or is_observed(inputs) or is_observed(weights):
            return False
        return not weights.binarize or weights.sign_rule is not None

    def _product(
        self, x: Tensor, weight: Tensor, follower: Follower | None = None, parameters: tuple[Tensor, ...] = ()
    ) -> Tensor:
        """Multiply what the quantizers made."""
        levels = self.input_quantizer.kept_levels(x)
        binary_weight = self.weight_quantizer.two_levels
        if not self.input_quantizer.keeps_bits or (levels is None and not binary_weight and follower is None):
            y = F.linear(x, weight, self.bias)
            return y if follower is None else follower.forward(y, *parameters)
        return kept_product(x, weight, self.bias, levels, binary_weight, follower, parameters)


def product_and_act(layer: nn.Module, act: nn.Module, x: Tensor) -> Tensor:
    """Return ``act(layer(x))``; what the activation function needs in the backward pass is computed again there.

    Not so where either is being observed, or is not one of those that are known.
    """
    if not _can_be_followed(layer) or is_observed(act):
        return act(layer(x))
    if type(act) is RPReLU:
        return layer._forward(x, RPRELU, (act.gamma, act.slope, act.zeta))
    if type(act) is nn.GELU and act.approximate == "none":
        return layer._forward(x, GELU)
    return layer._forward(x, RELU) if type(act) is nn.ReLU else act(layer(x))


def scaled_product(layer: nn.Module, alpha: Tensor, x: Tensor) -> Tensor:
    """Return ``alpha[:, None] * layer(x)`` of ``(B, C, n)``; the product is computed again in the backward pass."""
    if _can_be_followed(layer):
        return layer._forward(x, ROW_SCALE, (alpha,))
    y = layer(x)
    return y * alpha.to(y.dtype)[:, None]


def _can_be_followed(layer: nn.Module) -> bool:
    return type(layer) is BinaryLinear and layer.input_quantizer.keeps_bits and not is_observed(layer)


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
        norm: whether there is a norm, in place of the bias.
        like_float: see :class:`BinaryConv2d`.
        shortcut: whether there is one, where widths allow it.
        act: whether there is an RPReLU.

    Shape: ``(*, in_features) -> (*, out_features)``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        norm: bool = True,
        shortcut: bool = True,
        act: bool = True,
        like_float: bool = False,
        **options,
    ):
        super().__init__(in_features, out_features, bias=bias and not norm, **options)
        self.norm = nn.BatchNorm1d(out_features) if norm else None
        self.act = RPReLU(out_features) if act else None
        self.shortcut = shortcut and (in_features % out_features == 0 or out_features % in_features == 0)
        self.like_float = like_float
        if like_float:
            self._add_start()

    def forward(self, x: Tensor) -> Tensor:
        if self.like_float:
            self._start_like_float([x], lambda: [F.linear(x, self.weight)])
        y = self._product(self.input_quantizer(self._scaled_input(x)), self._scaled_weight())
        if self.norm is not None:
            y = _norm(self.norm, y)
        if self.shortcut:
            added = repeat_or_average(x, self.out_features)
            y = y + (added * self.shortcut_scale.to(y.dtype) if self.like_float else added)
        return y if self.act is None else self.act(y)


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
