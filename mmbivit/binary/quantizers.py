"""Quantizers: the parts that make one side of a product 1 bit, and what training and packing ask of them.

A part is asked, never recognised by its class: which ``side`` of a product it makes, its ``bits`` now, the
``extra_numbers`` that a packed layer keeps for it, and how it folds into one. A training stage sets ``binarize``.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mmbivit.checks import UserError

from .functional import binarize_weight, elastic_binary, scaled_sign, sign_ste
from .kept import kept_binary_weight
from .learned_scale import LearnedScale

__all__ = [
    "ActivationQuantizer",
    "ElasticBinary",
    "LearnedScaleWeightSign",
    "ObservedAsNow",
    "Quantizer",
    "RSign",
    "ScaledSign",
    "WeightQuantizer",
    "WeightSign",
]


class Quantizer(nn.Module):
    """Base of all quantizers; those of activations and of weights have a base of their own.

    Where ``binarize`` is off, a quantizer returns what it would return in a float network.

    Attributes:
        keep_bits: whether bits are kept for the backward pass where they suffice; see :class:`mmbivit.binary.Recipe`.
    """

    side: ClassVar[Literal["activations", "weights"]]
    keep_bits = True

    def __init__(self):
        super().__init__()
        self.binarize = True

    @property
    def bits(self) -> int:
        """Bits of one output value as it is computed now."""
        return 1 if self.binarize else 32

    @property
    def keeps_bits(self) -> bool:
        """Whether bits are kept now."""
        return self.keep_bits and torch.is_grad_enabled()

    def _refuse(self) -> ValueError:
        return UserError(f"{type(self).__name__} does not fold into a packed layer; those of recipe 'sibivit' do")


class ObservedAsNow:
    """Within this context, which may be entered anew, modules count as observed that were so when it was made.

    Args:
        root: the module whose parts are meant.
    """

    modules: ClassVar[frozenset[nn.Module]] = frozenset()

    def __init__(self, root: nn.Module):
        self._now = frozenset(part for part in root.modules() if is_observed(part))

    def __enter__(self) -> None:
        self._before = ObservedAsNow.modules
        ObservedAsNow.modules = self._before | self._now

    def __exit__(self, *exc_info: object) -> None:
        ObservedAsNow.modules = self._before


def is_observed(module: nn.Module) -> bool:
    """Whether hooks look at what a module takes or makes, so that it must be called."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or module in ObservedAsNow.modules


class ActivationQuantizer(Quantizer):
    """Base of everything that makes activations 1 bit."""

    side = "activations"

    @property
    def thresholds(self) -> Tensor | None:
        """What values are compared with, one number per channel ``(C,)``; ``None`` where there is no such number."""
        return None

    def fold(self) -> Tensor:
        """Return what packing needs: thresholds ``(C,)``, float64; a bit is 1 if ``x >= threshold``.

        Raises:
            ValueError: naming the class, if the output is anything else, so that it cannot be packed.
        """
        raise self._refuse()

    def levels(self) -> Tensor:
        """Return what the bits 0 and 1 stand for, ``(2, groups)``, float64, for equally many adjacent channels each."""
        return torch.tensor([[-1.0], [1.0]], dtype=torch.float64)

    def kept_levels(self, x: Tensor) -> Tensor | None:
        """Return the two values of an output ``x``, in its dtype, ``(2, C)`` or ``(2, 1)``: the first is not positive.

        A product keeps bits of ``x`` then. ``None``, the default, where there is no such pair of values.
        """
        return None

    @property
    def is_clipped_sign(self) -> bool:
        """Whether it is, now, ``Sign(x - thresholds)`` with the gradient of Eq. 2."""
        return False


class WeightQuantizer(Quantizer):
    """Base of everything that makes weights ``(out_features, in_features)`` 1 bit."""

    side = "weights"

    def extra_numbers(self, weight: Tensor) -> int:
        """Return how many floats a packed layer keeps beside the bits, without this module's own parameters."""
        return 0

    @property
    def two_levels(self) -> bool:
        """Whether each row of the output has two values, one the negative of the other, so that bits can be kept."""
        return False

    @property
    def sign_rule(self) -> tuple[str, str] | None:
        """``ste`` and ``center`` of what is, now, :func:`mmbivit.binary.binarize_weight` with a scale per row.

        ``None`` if it is anything else.
        """
        return None

    def fold(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the signs of weights (booleans ``(N, K)``) and the scale of each row ``(N,)``, as if binarized now.

        Raises:
            ValueError: naming the class, if weights are not a sign times a scale per row.
        """
        raise self._refuse()


class RSign(ActivationQuantizer):
    """Sign with a learnable threshold per channel (SI-BiViT, Eq. 3; ReActNet).

    Forward ``Sign(x - gamma)``, backward Eq. 2; see :func:`mmbivit.binary.functional.sign_ste`.

    Args:
        num_features: size of the last axis.
        ste: ``'clip'`` or ``'poly'``, which gradient.
        threshold: ``'channel'`` for one that is learned per channel, ``'none'`` for 0.

    Shape: ``(*, num_features) -> (*, num_features)``, values -1 and +1; the input itself where ``binarize`` is off.
    """

    def __init__(
        self,
        num_features: int,
        ste: Literal["clip", "poly"] = "clip",
        threshold: Literal["channel", "none"] = "channel",
    ):
        super().__init__()
        self.num_features = num_features
        self.ste = ste
        self.gamma = nn.Parameter(torch.zeros(num_features)) if threshold == "channel" else None

    def forward(self, x: Tensor) -> Tensor:
        if not self.binarize:
            return x
        gamma = None if self.gamma is None else self.gamma.to(x.dtype)
        return sign_ste(x, gamma, self.ste, self.keeps_bits)

    def kept_levels(self, x: Tensor) -> Tensor | None:
        return x.new_tensor([[-1.0], [1.0]]) if self.binarize else None

    @property
    def is_clipped_sign(self) -> bool:
        return self.binarize and self.ste == "clip"

    @property
    def thresholds(self) -> Tensor | None:
        return self.gamma

    def fold(self) -> Tensor:
        return _fold(self.gamma, self.num_features)

    def extra_repr(self) -> str:
        return f"{self.num_features}, ste={self.ste!r}"


class ScaledSign(ActivationQuantizer):
    """Sign times a learned scale, which is the window of the gradient, too (BiT; Bi-ViT, Eq. 9-11).

    Forward ``alpha * Sign(x - gamma)``, see :func:`mmbivit.binary.scaled_sign`. ``alpha`` starts as twice the mean
    magnitude of the first batch.

    Args:
        num_features: size of the last axis.
        threshold: ``'channel'`` for a gamma that is learned per channel (BiT's shift is its negative), ``'none'`` for
            0.
        groups: how many scales, each of equally many adjacent channels.

    Shape: ``(*, num_features) -> (*, num_features)``; the input itself where ``binarize`` is off.
    """

    def __init__(self, num_features: int, threshold: Literal["channel", "none"] = "channel", groups: int = 1):
        super().__init__()
        self.num_features = num_features
        self.gamma = nn.Parameter(torch.zeros(num_features)) if threshold == "channel" else None
        self.scale = LearnedScale(groups)

    def forward(self, x: Tensor) -> Tensor:
        gamma = None if self.gamma is None else self.gamma.to(x.dtype)
        self.scale.start_from(lambda: 2 * _mean_magnitudes(x if gamma is None else x - gamma, len(self.scale.value)))
        return scaled_sign(x, self.scale.positive(), gamma, self.keeps_bits) if self.binarize else x

    @property
    def thresholds(self) -> Tensor | None:
        return self.gamma

    def fold(self) -> Tensor:
        return _fold(self.gamma, self.num_features)

    def levels(self) -> Tensor:
        alpha = self.scale.positive().detach().double()
        return torch.stack([-alpha, alpha])

    def kept_levels(self, x: Tensor) -> Tensor | None:
        if not self.binarize:
            return None
        alpha = self.scale.positive().detach().to(x.dtype)
        return torch.stack([-alpha, alpha]).repeat_interleave(x.shape[-1] // len(alpha), dim=1)


class ElasticBinary(ActivationQuantizer):
    """Values of an activation function that is not negative, in {0, alpha} with a learned alpha (BiT).

    Forward ``alpha * round(clip((x - gamma) / alpha, 0, 1))``, see :func:`mmbivit.binary.elastic_binary`. ``alpha``
    starts as four times the mean magnitude of the first batch.

    Args:
        num_features: size of the last axis.
        threshold: ``'channel'`` for a gamma that is learned per channel, ``'none'`` for 0.

    Shape: ``(*, num_features) -> (*, num_features)``; the input itself where ``binarize`` is off.
    """

    def __init__(self, num_features: int, threshold: Literal["channel", "none"] = "channel"):
        super().__init__()
        self.num_features = num_features
        self.gamma = nn.Parameter(torch.zeros(num_features)) if threshold == "channel" else None
        self.scale = LearnedScale(1)

    def forward(self, x: Tensor) -> Tensor:
        shifted = x if self.gamma is None else x - self.gamma.to(x.dtype)
        self.scale.start_from(lambda: 4 * _mean_magnitudes(shifted, 1))
        return elastic_binary(shifted, self.scale.positive()) if self.binarize else x

    @property
    def thresholds(self) -> Tensor | None:
        return self.gamma

    def fold(self) -> Tensor:
        return _fold(self.gamma, self.num_features) + self.levels()[1] / 2

    def levels(self) -> Tensor:
        alpha = self.scale.positive().detach().double()
        return torch.stack([torch.zeros_like(alpha), alpha])

    def kept_levels(self, x: Tensor) -> Tensor | None:
        if not self.binarize:
            return None
        alpha = self.scale.positive().detach().to(x.dtype)
        return torch.stack([torch.zeros_like(alpha), alpha])


def _fold(gamma: Tensor | None, num_features: int) -> Tensor:
    """Thresholds ``(C,)``, float64; ``None`` stands for 0."""
    return torch.zeros(num_features, dtype=torch.float64) if gamma is None else gamma.detach().double()


def _mean_magnitudes(x: Tensor, groups: int) -> Tensor:
    """Mean magnitude of each group of adjacent channels ``(groups,)``."""
    return x.detach().float().abs().flatten(0, -2).mean(0).view(groups, -1).mean(1)


class WeightSign(WeightQuantizer):
    """Sign of the centred weights times a scale, by default both per output channel (SI-BiViT, Eq. 4).

    Forward ``theta * Sign(W - mu)`` with ``mu = mean(W)`` and ``theta = mean(|W|)`` over each row; backward clipped
    straight-through; see :func:`mmbivit.binary.functional.binarize_weight`. It has no parameters.

    Args:
        ste: ``'theta'`` keeps the factor theta in the gradient, ``'plain'`` leaves it out, ``'identity'`` passes all.
        center: what mu is the mean of: ``'row'``, ``'tensor'``, or ``'none'`` for 0.
        scale: what theta is the mean of: ``'row'`` or ``'tensor'``.

    Shape: ``(out_features, in_features)``, unchanged; the weights themselves where ``binarize`` is off.
    """

    def __init__(
        self,
        ste: Literal["theta", "plain", "identity"] = "theta",
        center: Literal["row", "tensor", "none"] = "row",
        scale: Literal["row", "tensor"] = "row",
    ):
        super().__init__()
        self.ste, self.center, self.scale = ste, center, scale

    def forward(self, weight: Tensor) -> Tensor:
        if not self.binarize:
            return weight
        binarized = kept_binary_weight if self.keeps_bits else binarize_weight
        return binarized(weight, self.ste, self.center, self.scale)

    @property
    def two_levels(self) -> bool:
        return self.binarize

    @property
    def sign_rule(self) -> tuple[str, str] | None:
        return (self.ste, self.center) if self.binarize and self.scale == "row" and self.center != "tensor" else None

    def extra_numbers(self, weight: Tensor) -> int:
        return len(weight) if self.scale == "row" else 1  # theta

    def fold(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        binary = binarize_weight(weight.detach(), self.ste, self.center, self.scale)
        # torch.signbit tells -0.0 from 0.0, which matters where all weights of a row, and so their scale, are 0.
        return ~torch.signbit(binary), binary[:, 0].abs()

    def extra_repr(self) -> str:
        return f"ste={self.ste!r}, center={self.center!r}, scale={self.scale!r}"


class LearnedScaleWeightSign(WeightQuantizer):
    """Sign of the centred weights times a learned scale per output channel, which starts as their mean magnitude.

    As BiViT's published code has it; see :func:`mmbivit.binary.binarize_weight`.

    Args:
        out_features: rows of the weights.
        ste: ``'theta'`` has the scale as a factor of the gradient, ``'plain'`` leaves it out, ``'identity'`` passes
            all.
        center: what mu is the mean of: ``'row'``, ``'tensor'``, or ``'none'`` for 0.

    Shape: ``(out_features, in_features)``, unchanged; the weights themselves where ``binarize`` is off.
    """

    def __init__(
        self,
        out_features: int,
        ste: Literal["theta", "plain", "identity"] = "theta",
        center: Literal["row", "tensor", "none"] = "row",
    ):
        super().__init__()
        self.ste, self.center = ste, center
        self.scale = LearnedScale(out_features)

    def forward(self, weight: Tensor) -> Tensor:
        self.scale.start_from(lambda: weight.detach().float().abs().mean(1))
        if not self.binarize:
            return weight
        binarized = kept_binary_weight if self.keeps_bits else binarize_weight
        return binarized(weight, self.ste, self.center, self.scale.value.to(weight.dtype))

    @property
    def two_levels(self) -> bool:
        return self.binarize

    def fold(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        signs = ~torch.signbit(binarize_weight(weight.detach(), self.ste, self.center))
        scale = self.scale.value.detach()
        return signs ^ (scale < 0)[:, None], scale.abs()

    def extra_repr(self) -> str:
        return f"ste={self.ste!r}, center={self.center!r}"
