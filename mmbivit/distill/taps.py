"""What distillation compares: what student and teacher compute at the same places, by name.

A tap takes the model, its backbone and the teacher (a backbone or a whole model), and returns the places of both.
Places of a neck or of heads need a whole detector as teacher; see :mod:`.detectors` for those.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from mmbivit.checks import UserError
from mmbivit.models import Block, ImageClassifier, find_attention, find_blocks

from .detectors import box_outputs, dense_outputs, mask_outputs, neck_outputs
from .place import Place, Places

__all__ = ["TAPS", "check_blocks_match"]


def block_outputs(model: nn.Module, backbone: nn.Module, teacher: nn.Module) -> tuple[Places, Places]:
    """Take the outputs ``(B, N, C)`` of all blocks of a backbone that have trainable parameters.

    Raises:
        ValueError: if there are none, or the teacher's blocks do not match the student's.
    """
    return _places(_trained_blocks(backbone, teacher), Place)


def queries_keys_values(model: nn.Module, backbone: nn.Module, teacher: nn.Module) -> tuple[Places, Places]:
    """Take queries, keys and values of these blocks before they are 1 bit, ``(3, B * groups, heads, n, d)``.

    Raises:
        ValueError: as :func:`attention_scores`.
    """

    def place(block: nn.Module) -> Place:
        attention, _ = find_attention(block)
        return Place(attention.qkv, partial(_by_head, attention.num_heads))

    return _places(_attending_blocks(backbone, teacher), place)


def _by_head(num_heads: int, args: tuple, output: Tensor) -> Tensor:
    return output.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)


def attention_scores(model: nn.Module, backbone: nn.Module, teacher: nn.Module) -> tuple[Places, Places]:
    """Take the scores of attention in these blocks, ``(B * groups, heads, queries, keys)``; masked ones are -inf.

    Raises:
        ValueError: as :func:`block_outputs`, or if the attention of a block cannot be looked at, has other heads in the
            teacher, or is among other tokens.
    """

    def place(block: nn.Module) -> Place:
        _, weights = find_attention(block)
        return Place(weights, lambda args, output: args[0])

    return _places(_attending_blocks(backbone, teacher), place)


def attention_weights(model: nn.Module, backbone: nn.Module, teacher: nn.Module) -> tuple[Places, Places]:
    """Take the weights that are made of these scores, of the same shape: 1 bit in the student; masked ones are 0.

    Raises:
        ValueError: as :func:`attention_scores`.
    """
    return _places(_attending_blocks(backbone, teacher), lambda block: Place(find_attention(block)[1]))


def logits(model: nn.Module, backbone: nn.Module, teacher: nn.Module) -> tuple[Places, Places]:
    """Take the logits ``(B, num_classes)`` of two classifiers.

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
    return dict(logits=Place(model.head)), dict(logits=Place(teacher.head))


def _places(pairs: dict[str, tuple[Block, Block]], place: Callable[[nn.Module], Place]) -> tuple[Places, Places]:
    student, teacher = ({name: place(pair[i].module) for name, pair in pairs.items()} for i in (0, 1))
    return student, teacher


def _trained_blocks(backbone: nn.Module, teacher: nn.Module) -> dict[str, tuple[Block, Block]]:
    """Return the blocks with trainable parameters, and the teacher's of the same name."""
    teacher = getattr(teacher, "backbone", teacher)
    check_blocks_match(backbone, teacher)
    others = find_blocks(teacher)
    pairs = {
        name: (block, others[name])
        for name, block in find_blocks(backbone).items()
        if any(parameter.requires_grad for parameter in block.module.parameters())
    }
    if not pairs:
        raise UserError("all blocks of the backbone are frozen, so distillation has nothing to train; unfreeze some")
    return pairs


def _attending_blocks(backbone: nn.Module, teacher: nn.Module) -> dict[str, tuple[Block, Block]]:
    """Return the same, once it is known that their attention corresponds."""
    pairs = _trained_blocks(backbone, teacher)
    for name, pair in pairs.items():
        heads, groups = [], []
        for whose, block in zip(("model", "teacher"), pair, strict=True):
            if (found := find_attention(block.module)) is None:
                raise UserError(
                    f"{name} of the {whose} is a {type(block.module).__name__}, whose attention cannot be looked at; "
                    "take a loss of blocks, or backbones of mmbivit or mmdet.SwinTransformer"
                )
            heads.append(found[0].num_heads)
            groups.append(block.layout(block.hw_shape((224, 224))).grid_tokens())
        if heads[0] != heads[1]:
            raise UserError(
                f"{name} has {heads[1]} heads in the teacher and {heads[0]} in the student: their attention does not "
                "match; give the teacher the student's arch (num_heads)"
            )
        if not torch.equal(*groups):
            raise UserError(
                f"tokens of {name} attend to others in the teacher than in the student; give the teacher the "
                "student's options (such as window_size and shift_single_window)"
            )
    return pairs


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


TAPS = dict(
    blocks=block_outputs,
    qkv=queries_keys_values,
    attention_scores=attention_scores,
    attention_weights=attention_weights,
    logits=logits,
    neck=neck_outputs,
    dense_head=dense_outputs,
    box_head=box_outputs,
    mask_head=mask_outputs,
)
