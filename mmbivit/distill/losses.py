"""Distillation losses."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmbivit.checks import check_flag
from mmbivit.registry import MODELS

__all__ = ["BlockMSELoss"]


@MODELS.register_module()
class BlockMSELoss(nn.Module):
    """Mean over blocks of ``MSE(A_student, A_teacher)`` (SI-BiViT, Eq. 9), computed in float32.

    Args:
        normalize: divide each block's term by the variance of the teacher's output, so that the term has no unit and
            1 means "as far off as the mean would be". Eq. 9 has no such factor.

    Raises:
        ValueError: if ``normalize`` is neither ``True`` nor ``False``.
    """

    def __init__(self, normalize: bool = False):
        super().__init__()
        check_flag("normalize", normalize)
        self.normalize = normalize

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        """Compare features of equal names and shapes; returns a scalar."""
        terms = []
        for name, feature in student.items():
            target = teacher[name].float()
            term = F.mse_loss(feature.float(), target)
            terms.append(term / target.var().clamp(min=1e-6) if self.normalize else term)
        return torch.stack(terms).mean()
