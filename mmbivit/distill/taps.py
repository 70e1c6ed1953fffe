"""What distillation compares: modules of student and teacher whose outputs correspond, by name.

A tap takes the model, its backbone and the teacher (a backbone or a whole model), and returns the modules of both.
"""

from torch import nn

from mmbivit.checks import UserError
from mmbivit.models import ImageClassifier, find_blocks

__all__ = ["TAPS", "check_blocks_match"]

Modules = dict[str, nn.Module]


def block_outputs(model: nn.Module, backbone: nn.Module, teacher: nn.Module) -> tuple[Modules, Modules]:
    """Return all blocks of a backbone that have trainable parameters.

    Raises:
        ValueError: if the teacher's blocks do not match the student's.
    """
    teacher = getattr(teacher, "backbone", teacher)
    check_blocks_match(backbone, teacher)
    blocks = {
        name: block.module
        for name, block in find_blocks(backbone).items()
        if any(parameter.requires_grad for parameter in block.module.parameters())
    }
    found = find_blocks(teacher)
    return blocks, {name: found[name].module for name in blocks}


def logits(model: nn.Module, backbone: nn.Module, teacher: nn.Module) -> tuple[Modules, Modules]:
    """Return the heads of two classifiers.

    Raises:
        ValueError: if one of them is no classifier, or they have different classes.
    """
    for network, what in ((model, "the model"), (teacher, "the teacher")):
        if not isinstance(network, ImageClassifier):
            raise UserError(
                f"{what} is a {type(network).__name__}, which has no logits of classes to distil; take a loss of "
                "blocks, or mmbivit.ImageClassifier as model and as teacher"
            )
    counts = model.head.out_features, teacher.head.out_features
    if counts[0] != counts[1]:
        raise UserError(f"the teacher has {counts[1]} classes and the student {counts[0]}: their logits do not match")
    return dict(logits=model.head), dict(logits=teacher.head)


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


TAPS = dict(blocks=block_outputs, logits=logits)
