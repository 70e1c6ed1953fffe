"""Gradient conflict: does distillation pull the spatial interaction branch where the task pulls it?"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmbivit.checks import UserError
from mmbivit.distill import BlockMSELoss, Distiller, DistillTerm
from mmbivit.engine.decoupled_training_hook import find_staged_backbone
from mmbivit.models.backbone import find_blocks
from mmbivit.models.mlp import SpatialInteraction
from mmbivit.models.stage import StagedModule

from .unchanged import unchanged

__all__ = ["ConflictRow", "GradientConflict", "gradient_conflict", "split_gradient"]

WEIGHTS = ("fc1.weight", "fc2.weight")


def split_gradient(distill: Tensor, task: Tensor) -> tuple[float, float]:
    """Split the size of a distillation gradient into what agrees with the task's and what does not (Eq. 10-11).

    ``g+ = sum_i |distill_i| I_i`` and ``g- = sum_i |distill_i| (1 - I_i)``, with ``I_i = 1`` where both gradients of an
    element have the same sign, else 0. The sign is -1, 0 or 1: an element that the task leaves alone (gradient 0) is
    no agreement, so it goes to ``g-``; where ``distill_i`` is 0, it adds nothing to either. Eq. 10 prints ``-I_i`` in
    ``g-``, which would make it ``-g+``; the text and Figure 4 show the sum over the elements with ``I_i = 0``.

    Args:
        distill: gradient of the distillation loss, of any shape.
        task: gradient of the task's loss, of the same shape.

    Returns:
        ``g+`` (harmonious) and ``g-`` (conflicting).
    """
    size = distill.double().abs()
    harmonious = distill.sign() == task.sign()  # gradients, not bits: their 0 is a third value here
    return size[harmonious].sum().item(), size[~harmonious].sum().item()


@dataclass(frozen=True)
class ConflictRow:
    """Gradient conflict of one weight, the mean over batches.

    Args:
        block: name of the block in the backbone, such as ``stages.0.blocks.1``.
        weight: name of the weight in the block's spatial interaction branch, ``fc1.weight`` or ``fc2.weight``.
        harmonious: ``g+``, in units of the distillation loss per unit of weight.
        conflicting: ``g-``, in the same units.
    """

    block: str
    weight: str
    harmonious: float
    conflicting: float


@dataclass(frozen=True)
class GradientConflict:
    """Gradient conflict of a network.

    Args:
        rows: of each weight of the spatial interaction branches, in the order of the network.
        batches: batches that were averaged.
    """

    rows: tuple[ConflictRow, ...]
    batches: int

    @property
    def harmonious(self) -> float:
        """``g+`` of all weights."""
        return sum(row.harmonious for row in self.rows)

    @property
    def conflicting(self) -> float:
        """``g-`` of all weights."""
        return sum(row.conflicting for row in self.rows)

    @property
    def share(self) -> float:
        """Share of the distillation gradient that conflicts, ``g- / (g+ + g-)``."""
        return self.conflicting / (self.harmonious + self.conflicting)

    def by_block(self) -> dict[str, tuple[float, float]]:
        """Return ``g+`` and ``g-`` by block."""
        sums: dict[str, tuple[float, float]] = {}
        for row in self.rows:
            harmonious, conflicting = sums.get(row.block, (0.0, 0.0))
            sums[row.block] = (harmonious + row.harmonious, conflicting + row.conflicting)
        return sums


def gradient_conflict(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    terms: Sequence[DistillTerm] = (DistillTerm(BlockMSELoss()),),
) -> GradientConflict:
    """Measure how far distillation would pull the spatial interaction branches against the task (SI-BiViT 3.3.2).

    The set-up of Figure 4(a): the model as in stage 2, weights binary and the branches active, with the distillation
    of stage 1 switched on. For each batch, both losses are differentiated by each weight of the branches, and
    :func:`split_gradient` compares the two; the results are averaged over the batches.

    The model runs in training mode, BatchNorm on the batch's statistics. Afterwards its modes, buffers, gradients and
    hooks are as before; random numbers are drawn, for stochastic depth and whatever the task samples.

    Args:
        model: detector or classifier, called as ``model(**batch, mode='loss')``.
        teacher: float backbone with the same blocks, or a classifier with one; it is frozen, in evaluation mode.
        batches: normalised batches, at least one.
        terms: the distillation losses; their weights are factors of all results.

    Raises:
        ValueError: if the model has no branch that gets a gradient, is not in its last stage, or does not fit the
            teacher; and if a gradient is no number.
    """
    backbone = find_staged_backbone(model)
    weights = _branch_weights(backbone)
    distiller = Distiller(model, backbone, teacher, terms)
    try:
        with unchanged(model, training=True):
            splits = [_split_gradients(model, batch, list(weights.values())) for batch in batches]
    finally:
        distiller.remove()
    if not splits:
        raise UserError("there is no batch to compare gradients on")
    means = torch.tensor(splits, dtype=torch.float64).mean(0).tolist()
    rows = tuple(ConflictRow(*key, *mean) for key, mean in zip(weights, means, strict=True))
    result = GradientConflict(rows, len(splits))
    if result.harmonious + result.conflicting == 0:
        raise UserError(
            "the gradient of the distillation loss is 0 in all spatial interaction weights: is distill_weight 0?"
        )
    return result


def _branch_weights(backbone: StagedModule) -> dict[tuple[str, str], nn.Parameter]:
    """Return the trainable weights of the spatial interaction branches by block and name."""
    if backbone.stage != backbone.last_stage:
        raise UserError(
            f"the model is in training stage {backbone.stage}, where it is not all binary; "
            f"give a checkpoint of stage {backbone.last_stage}"
        )
    branches = {
        name: module
        for name, block in find_blocks(backbone).items()
        for module in block.module.modules()
        if isinstance(module, SpatialInteraction)
    }
    if not branches:
        raise UserError(
            "the backbone has no spatial interaction branch, whose gradients are compared; "
            "give a config with backbone.spatial_interaction=dict(ratio=1.0)"
        )
    weights = {(name, weight): branch.get_parameter(weight) for name, branch in branches.items() for weight in WEIGHTS}
    trainable = {key: weight for key, weight in weights.items() if weight.requires_grad}
    if not trainable:
        raise UserError("all spatial interaction branches are frozen; set backbone.frozen_stages=-1")
    if not any(branches[name].alpha.any() for name, _ in trainable):
        raise UserError(
            "all balancing factors alpha are 0, as in a fresh branch, so no gradient reaches the spatial interaction "
            "weights; give a checkpoint that was trained in stage 2"
        )
    return trainable


def _split_gradients(
    model: nn.Module, batch: Mapping[str, Any], weights: list[nn.Parameter]
) -> list[tuple[float, float]]:
    """Return ``g+`` and ``g-`` of each weight for a batch; a weight that a loss does not reach has gradient 0."""
    losses = model(**batch, mode="loss")
    distill_loss = sum(losses.pop(key) for key in [*losses] if key.startswith("loss_distill"))
    task_loss, _ = model.parse_losses(losses)
    distill = torch.autograd.grad(distill_loss, weights, retain_graph=True, materialize_grads=True)
    task = torch.autograd.grad(task_loss, weights, materialize_grads=True)
    if not all(gradient.isfinite().all() for gradient in (*distill, *task)):
        raise UserError("a gradient of the spatial interaction weights is not finite: has training diverged?")
    return [split_gradient(*gradients) for gradients in zip(distill, task, strict=True)]
