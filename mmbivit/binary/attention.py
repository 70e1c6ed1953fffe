"""Binarization of attention: 1-bit queries, keys and values, and probabilities in {0, 1}."""

import torch
from torch import Tensor, nn

from mmbivit.checks import UserError

from .functional import elastic_binary, score_sign, straight_through, threshold_mask
from .kept_attention import kept_attention
from .learned_scale import LearnedScale
from .native import native_kernels
from .quantizers import ActivationQuantizer, is_observed

__all__ = [
    "ElasticAttention",
    "KeySelection",
    "ScoreSign",
    "SoftmaxThreshold",
    "attention_by_bits",
    "relative_position_index",
]


class KeySelection(ActivationQuantizer):
    """Base of what selects keys, so that weights are 0, or the same for all keys of a query that are selected.

    Attributes:
        selection: by what, as packed networks call it: see :class:`mmbivit.packed.modules.PackedAttention`.
        divide: whether weights are divided by the number of selected keys.
    """

    selection: str
    divide = False


class SoftmaxThreshold(KeySelection):
    """Binarize attention scores: a key is selected where its softmax reaches a quarter of the row's maximum.

    Forward: ``1[p >= ratio * max(p)] / number selected`` with ``p = softmax(scores)`` over the keys. Since
    ``p >= ratio * p_max`` is ``s >= s_max + ln(ratio)``, inference needs no exponential. Dividing by the number of
    selected keys keeps the attention output in [-1, 1], inside the straight-through window of the next sign; where
    that sign's threshold is 0 it changes nothing.
    Backward: straight through the selection into the softmax; the count is a constant.
    Source: BiViT's softmax-aware binarization, as used by SI-BiViT; BiViT does not divide.

    Args:
        ratio: fraction of the row maximum that selects a key, in (0, 1].
        divide: divide by the number of selected keys.

    Shape: scores ``(*, queries, keys)`` -> weights of the same shape, rows sum to 1 if divided; the softmax itself
    where ``binarize`` is off.
    """

    selection = "ratio"

    def __init__(self, ratio: float = 0.25, divide: bool = True):
        super().__init__()
        if not 0 < ratio <= 1:
            raise UserError(f"ratio must lie in (0, 1], got {ratio}")
        self.ratio = ratio
        self.divide = divide

    def forward(self, scores: Tensor) -> Tensor:
        probabilities = scores.softmax(dim=-1)
        if not self.binarize:
            return probabilities
        selected = threshold_mask(probabilities.detach(), self.ratio)
        weights = straight_through(selected, probabilities)
        return weights / selected.sum(dim=-1, keepdim=True) if self.divide else weights

    def fold(self) -> float:
        """Return ``ratio``: packed, a key is selected by its score, where ``s >= s_max + ln(ratio)``."""
        return self.ratio

    def extra_repr(self) -> str:
        return f"ratio={self.ratio}, divide={self.divide}"


class ScoreSign(KeySelection):
    """Attention without a softmax: a key is selected where its score is positive (BiBERT).

    Forward and backward: :func:`mmbivit.binary.score_sign`. A masked key has a score of ``-inf`` and is never selected.

    Args:
        zero: select a score of 0, too (Bi-Real Net as Bi-ViT 3.1 compares with it: as printed, the sign of a softmax,
            which is positive, would select every key).

    Shape: scores ``(*, queries, keys)`` -> weights 0 and 1 of the same shape; the softmax where ``binarize`` is off.
    """

    def __init__(self, zero: bool = False):
        super().__init__()
        self.zero = zero

    def forward(self, scores: Tensor) -> Tensor:
        return score_sign(scores, self.zero, self.keeps_bits) if self.binarize else scores.softmax(dim=-1)

    @property
    def selection(self) -> str:
        return "nonnegative" if self.zero else "positive"

    def fold(self) -> float:
        """Return 0, which scores are compared with."""
        return 0.0

    def extra_repr(self) -> str:
        return f"zero={self.zero}"


class ElasticAttention(KeySelection):
    """Attention probabilities in {0, alpha}: ``alpha * round(clip(p / alpha, 0, 1))`` with a learned alpha.

    See :func:`mmbivit.binary.elastic_binary`, of ``p``, the softmax (BiT; BinaryViT, Eq. 7). With a scale per head it
    is Bi-ViT's ``alpha_A``, whose ``alpha * Sign(A / alpha)`` (Eq. 10) is constant as printed, as ``A`` is positive.

    Args:
        num_heads: how many scales, one for each head; 1 for one of all.
        start: alpha at the start; ``None`` for ``factor`` times the mean probability of the first batch.
        factor: see ``start``; BiT has 4.
        scale_gradient: divide the gradient of alpha by the square root of how many values share it (LSQ).

    Shape: scores ``(B, heads, queries, keys)`` -> weights of the same shape; the softmax where ``binarize`` is off.
    """

    selection = "share"

    def __init__(
        self, num_heads: int = 1, start: float | None = None, factor: float = 4.0, scale_gradient: bool = True
    ):
        super().__init__()
        self.factor = factor
        self.scale_gradient = scale_gradient
        self.scale = LearnedScale(num_heads, start)

    def forward(self, scores: Tensor) -> Tensor:
        probabilities = scores.softmax(dim=-1)
        self.scale.start_from(lambda: self.factor * self._mean(probabilities))
        if not self.binarize:
            return probabilities
        return elastic_binary(probabilities, self.scale.positive().view(-1, 1, 1), self.scale_gradient)

    def fold(self) -> Tensor:
        """Return alpha ``(num_heads,)`` or ``(1,)``, float64: packed, a key is selected where ``p >= alpha / 2``."""
        return self.scale.positive().detach().double()

    def _mean(self, probabilities: Tensor) -> Tensor:
        means = probabilities.detach().float().mean(dim=(0, 2, 3))
        return means if len(self.scale.value) > 1 else means.mean().view(1)


def attention_by_bits(
    qkv: Tensor,
    qkv_quantizer: nn.Module,
    attention: nn.Module,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    num_heads: int,
) -> Tensor | None:
    """Attend so that two bits for each query, key and value are kept for the backward pass, and nothing else.

    ``None`` where the parts are others than an :class:`RSign` and a :class:`SoftmaxThreshold`, one of them is being
    observed, or floats are to be kept.

    Args:
        qkv: queries, keys and values, each of all heads, ``(G, n, 3 * C)``.
        qkv_quantizer: makes them 1 bit.
        attention: makes scores into weights.
        bias, mask, scale, num_heads: see :func:`mmbivit.binary.kept_attention.kept_attention`.

    Returns:
        ``(G, n, C)``.
    """
    if type(attention) is not SoftmaxThreshold or not attention.binarize or not attention.keeps_bits:
        return None
    if not isinstance(qkv_quantizer, ActivationQuantizer) or not qkv_quantizer.is_clipped_sign:
        return None
    if is_observed(attention) or is_observed(qkv_quantizer):
        return None
    gamma = qkv_quantizer.thresholds
    kernels = native_kernels(qkv, gamma, bias)
    attend = kept_attention if kernels is None else kernels.attention
    gamma = None if gamma is None else gamma.to(qkv.dtype)
    return attend(qkv, gamma, bias, mask, scale, attention.ratio, attention.divide, num_heads)


def relative_position_index(window_size: int) -> Tensor:
    """Return, for each query and key of a window, the row of the relative position bias table.

    The offset ``(dy, dx)`` from key to query has row ``(dy + w - 1) * (2w - 1) + dx + w - 1``.

    Returns:
        Integer tensor ``(window_size**2, window_size**2)`` with values in ``[0, (2*window_size - 1)**2)``.
    """
    ys, xs = torch.meshgrid(torch.arange(window_size), torch.arange(window_size), indexing="ij")
    ys, xs = ys.flatten(), xs.flatten()
    offset_y = ys[:, None] - ys[None, :] + window_size - 1
    offset_x = xs[:, None] - xs[None, :] + window_size - 1
    return offset_y * (2 * window_size - 1) + offset_x
