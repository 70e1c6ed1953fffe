"""Binarization of attention: 1-bit queries, keys and values, and probabilities in {0, 1}."""

import torch
from torch import Tensor

from mmbivit.checks import UserError

from .functional import straight_through, threshold_mask
from .quantizers import ActivationQuantizer

__all__ = ["SoftmaxThreshold", "relative_position_index"]


class SoftmaxThreshold(ActivationQuantizer):
    """Binarize attention scores: a key is selected where its softmax reaches a quarter of the row's maximum.

    Forward: ``1[p >= ratio * max(p)] / number selected`` with ``p = softmax(scores)`` over the keys. Since
    ``p >= ratio * p_max`` is ``s >= s_max + ln(ratio)``, inference needs no exponential. Dividing by the number of
    selected keys keeps the attention output in [-1, 1], inside the straight-through window of the next sign; where
    that sign's threshold is 0 it changes nothing.
    Backward: straight through the selection into the softmax; the count is a constant.
    Source: BiViT's softmax-aware binarization, as used by SI-BiViT.

    Args:
        ratio: fraction of the row maximum that selects a key, in (0, 1].

    Shape: scores ``(*, queries, keys)`` -> weights of the same shape, rows sum to 1; the softmax itself where
    ``binarize`` is off.
    """

    def __init__(self, ratio: float = 0.25):
        super().__init__()
        if not 0 < ratio <= 1:
            raise UserError(f"ratio must lie in (0, 1], got {ratio}")
        self.ratio = ratio

    def forward(self, scores: Tensor) -> Tensor:
        probabilities = scores.softmax(dim=-1)
        if not self.binarize:
            return probabilities
        selected = threshold_mask(probabilities.detach(), self.ratio)
        return straight_through(selected, probabilities) / selected.sum(dim=-1, keepdim=True)

    def fold(self) -> float:
        """Return ``ratio``: packed, a key is selected by its score, where ``s >= s_max + ln(ratio)``."""
        return self.ratio

    def extra_repr(self) -> str:
        return f"ratio={self.ratio}"


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
