"""Adds a distillation loss to a model's own losses, from outside the model."""

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from mmbivit.checks import UserError
from mmbivit.models.backbone import find_blocks
from mmbivit.models.observation import observed

__all__ = ["BlockDistiller"]


class BlockDistiller:
    """Adds ``loss_distill`` to the losses of a model by forward hooks; :meth:`remove` leaves no trace.

    The term is computed inside the model's forward, so autocast, gradient accumulation and DDP treat it like any
    other loss. The teacher stays outside the module tree: no optimizer, EMA or checkpoint sees it.

    Args:
        model: the unwrapped model, called as ``model(inputs, data_samples, mode='loss')``.
        student: its backbone. Blocks without trainable parameters are left out.
        teacher: float backbone with the same blocks; it is frozen here.
        loss: module called with the features of student and teacher, by block name.
        weight: factor of the term.

    Raises:
        ValueError: if the teacher's blocks do not match the student's.
    """

    def __init__(self, model: nn.Module, student: nn.Module, teacher: nn.Module, loss: nn.Module, weight: float):
        check_blocks_match(student, teacher)
        blocks = {
            name: block.module
            for name, block in find_blocks(student).items()
            if any(parameter.requires_grad for parameter in block.module.parameters())
        }
        teacher.eval()  # not chained: mmdet's Swin returns None
        teacher.requires_grad_(False)
        found = find_blocks(teacher)
        teacher_blocks = {name: found[name].module for name in blocks}
        outputs: dict[str, Tensor] = {}
        watching = ExitStack()

        def start(module: nn.Module, args: tuple, kwargs: dict) -> None:
            watching.close()  # open still where the last forward failed
            outputs.clear()
            if _mode(args, kwargs) == "loss":
                watching.enter_context(observed(blocks, lambda name, _, output: outputs.update({name: output})))

        def add_loss(module: nn.Module, args: tuple, kwargs: dict, output: dict[str, Tensor]) -> None:
            if _mode(args, kwargs) != "loss":
                return
            watching.close()
            features = dict(outputs)
            outputs.clear()  # nothing here may hold their graph
            for name in blocks:
                if name not in features or not features[name].requires_grad:
                    raise RuntimeError(
                        f"the output of {name} has no gradient, so it cannot be distilled: does the block use "
                        "reentrant checkpointing, or was the backbone run under no_grad?"
                    )
            targets: dict[str, Tensor] = {}
            keep = observed(teacher_blocks, lambda name, _, output: targets.update({name: output}))
            with torch.no_grad(), keep:
                teacher(kwargs["inputs"] if "inputs" in kwargs else args[0])
            output["loss_distill"] = weight * loss(features, targets)

        self._handles = [
            model.register_forward_pre_hook(start, with_kwargs=True),
            model.register_forward_hook(add_loss, with_kwargs=True),
        ]
        self._watching = watching

    def remove(self) -> None:
        """Remove every hook and let go of the teacher."""
        for handle in self._handles:
            handle.remove()
        self._watching.close()
        self._handles = []


def check_blocks_match(student: nn.Module, teacher: nn.Module) -> None:
    """Check that two backbones have the same blocks with the same channels.

    Raises:
        ValueError: naming what differs.
    """
    widths = []
    for backbone in (student, teacher):
        widths.append({name: block.channels for name, block in find_blocks(backbone).items()})
        if not widths[-1]:
            raise UserError(f"{type(backbone).__name__} has no blocks that are known, so there is nothing to distil")
    if widths[0] == widths[1]:
        return
    names = sorted(widths[0].keys() | widths[1].keys())
    differing = [name for name in names if widths[0].get(name) != widths[1].get(name)]
    name = differing[0]
    student_width, teacher_width = (width.get(name, "no such block") for width in widths)
    raise UserError(
        f"the teacher's blocks do not match the student's in {len(differing)} places, first {name}: channels of the "
        f"student {student_width}, of the teacher {teacher_width}; give the teacher the student's arch "
        "(embed_dims and depths)"
    )


def _mode(args: tuple, kwargs: dict) -> str:
    """The ``mode`` of a call ``model(inputs, data_samples, mode)``."""
    return kwargs.get("mode", args[2] if len(args) > 2 else "tensor")
