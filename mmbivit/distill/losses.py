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

__all__ = [
    "AttentionRankingLoss",
    "BlockMSELoss",
    "DetectorMSELoss",
    "DirectionMatchingLoss",
    "HardCrossEntropyLoss",
    "SoftCrossEntropyLoss",
]


@MODELS.register_module()
class BlockMSELoss(nn.Module):
    """``MSE(A_student, A_teacher)`` of block outputs (SI-BiViT, Eq. 9), computed in float32.

    With ``reduction='sum'`` it is BiT's layerwise loss of hidden states, without the term of the embeddings that
    its code adds.

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
class DetectorMSELoss(BlockMSELoss):
    """``MSE`` of what a detector computes outside its backbone, as :class:`BlockMSELoss`; the teacher is a detector.

    Ours, not of the papers, which have float necks and heads.

    Args:
        of: ``'neck'`` for the maps of the neck, ``'dense_head'`` for scores and regressions of an RPN or a dense head,
            ``'box_head'`` and ``'mask_head'`` for the outputs of these, in the regions that the student trains on.
        normalize, reduction: see :class:`BlockMSELoss`.

    Raises:
        ValueError: if an argument is none of those; it names the argument.
    """

    def __init__(self, of: str, normalize: bool = True, reduction: str = "mean"):
        super().__init__(normalize, reduction)
        check_choice("of", of, ("neck", "dense_head", "box_head", "mask_head"))
        self.tap = of
        self.log_name = f"loss_distill_{of}"


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


@MODELS.register_module()
class HardCrossEntropyLoss(nn.Module):
    """``-log softmax(s)_y`` with ``y = argmax_c t_c``, the teacher's top class, mean over images, in float32.

    Bi-ViT's loss, which is DeiT's hard distillation, is 0.5 of it and 0.5 of the task loss.
    """

    tap = "logits"
    log_name = "loss_distill_hard"

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        """Compare logits ``(B, num_classes)``; returns a scalar."""
        return F.cross_entropy(student["logits"].float(), teacher["logits"].argmax(dim=1))


@MODELS.register_module()
class DirectionMatchingLoss(nn.Module):
    """``sum over blocks of || S_s / ||S_s|| - S_t / ||S_t|| ||`` (BiBERT), in float32.

    ``S`` are the similarities ``Y Y^T / sqrt(d)`` of the tokens of a group, head by head, where Y are the queries, the
    keys and the values before they are binarized, with a term for each of the three; or the outputs of blocks
    themselves. As in the published code, a norm is over the whole batch; its term for the embeddings is left out. The
    factor ``1 / sqrt(d)`` cancels. What is 0 has the direction 0.

    Args:
        of: ``'qkv'`` or ``'blocks'``; BiBERT has both, and the logits' soft cross-entropy.

    Raises:
        ValueError: if it is neither.
    """

    def __init__(self, of: str = "qkv"):
        super().__init__()
        check_choice("of", of, ("qkv", "blocks"))
        self.tap = of
        self.log_name = f"loss_distill_direction_{of}"

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        """Compare queries, keys and values ``(3, groups, heads, n, d)``, or outputs ``(B, N, C)``; returns a scalar."""
        differences = (self._directions(values) - self._directions(teacher[name]) for name, values in student.items())
        return torch.stack([torch.linalg.vector_norm(difference, dim=1).sum() for difference in differences]).sum()

    def _directions(self, values: Tensor) -> Tensor:
        """Return what is compared of a block as unit vectors, one a row."""
        values = values.float()
        if self.tap == "blocks":
            rows = values.flatten()[None]
        else:
            with torch.autocast(values.device.type, enabled=False):
                rows = (values @ values.transpose(-2, -1)).flatten(1)
        norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        return rows / norm.masked_fill(norm == 0, 1)


@MODELS.register_module()
class AttentionRankingLoss(nn.Module):
    """``sum_blocks || psi(A_t) - psi(A_s) ||`` with ``psi(A)[n] = A[n] - A[n - 1]`` (Bi-ViT, Eq. 12-13), in float32.

    ``n`` is the query, and the first one follows the last. The paper's weight is 10. A norm is over heads, queries and
    keys of one group of tokens, and the mean over groups and images is taken, of which the paper says nothing.

    Args:
        maps: ``'softmax'`` takes as ``A_s`` the softmax of the scores, which the paper calls A (Eq. 1, 2, 9);
            ``'weights'`` the weights that the student makes of it (``b_A`` there), straight through whose binarization
            the gradient then goes.

    Raises:
        ValueError: if it is neither.
    """

    log_name = "loss_distill_ranking"

    def __init__(self, maps: str = "softmax"):
        super().__init__()
        check_choice("maps", maps, ("softmax", "weights"))
        self.tap = "attention_scores" if maps == "softmax" else "attention_weights"

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        """Compare scores or weights ``(groups, heads, queries, keys)``; returns a scalar."""
        terms = []
        for name, maps in student.items():
            difference = self._maps(teacher[name]) - self._maps(maps)  # psi is linear
            order = difference - difference.roll(1, dims=-2)
            terms.append(torch.linalg.vector_norm(order.flatten(1), dim=1).mean())
        return torch.stack(terms).sum()

    def _maps(self, seen: Tensor) -> Tensor:
        return seen.float().softmax(dim=-1) if self.tap == "attention_scores" else seen.float()
