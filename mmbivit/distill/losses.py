"""Distillation losses: modules that are called with what a tap took from student and teacher, by name.

``tap`` says what they compare (see :mod:`mmbivit.distill.taps`), ``log_name`` what the log calls them. A module of your
own without the two compares block outputs and is ``loss_distill``.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmbivit.checks import check_choice, check_flag
from mmbivit.registry import MODELS

__all__ = ["BlockMSELoss", "SoftCrossEntropyLoss"]


@MODELS.register_module()
class BlockMSELoss(nn.Module):
    """``MSE(A_student, A_teacher)`` of block outputs (SI-BiViT, Eq. 9), computed in float32.

    Args:
        normalize: divide each block's term by the variance of the teacher's output, so that the term has no unit and
            1 means "as far off as the mean would be". Eq. 9 has no such factor.
        reduction: ``'mean'`` or ``'sum'`` over blocks, of which Eq. 9 says neither.

    Raises:
        ValueError: if an argument is none of those; it names the argument.
    """

    tap = "blocks"
    log_name = "loss_distill"

    def __init__(self, normalize: bool = False, reduction: str = "mean"):
        super().__init__()
        check_flag("normalize", normalize)
        check_choice("reduction", reduction, ("mean", "sum"))
        self.normalize = normalize
        self.reduction = reduction

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        """Compare features of equal names and shapes; returns a scalar."""
        terms = []
        for name, feature in student.items():
            target = teacher[name].float()
            term = F.mse_loss(feature.float(), target)
            terms.append(term / target.var().clamp(min=1e-6) if self.normalize else term)
        total = torch.stack(terms).sum()
        return total / len(terms) if self.reduction == "mean" else total


@MODELS.register_module()
class SoftCrossEntropyLoss(nn.Module):
    """``-sum_c softmax(t)_c log softmax(s)_c``, mean over images, of logits of student and teacher, in float32.

    The published code of SI-BiViT has 0.95 of it in stage 2, beside 0.05 of the task loss; the paper does not.
    """

    tap = "logits"
    log_name = "loss_distill_logits"

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        """Compare logits ``(B, num_classes)``; returns a scalar."""
        targets = teacher["logits"].float().softmax(dim=1)
        return F.cross_entropy(student["logits"].float(), targets)
