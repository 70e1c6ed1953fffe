"""Places of a detector outside its backbone: what its neck and its heads return.

The teacher is a whole detector. Its RoI heads see the regions that the student trains on, by its own features.
"""

from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn

from mmbivit.checks import UserError

from .place import Place, Places

__all__ = ["REGIONS", "box_outputs", "dense_outputs", "mask_outputs", "neck_outputs", "region_places", "run_teacher"]

REGIONS = ("box_head", "mask_head")  # taps whose teacher needs the student's regions
_EXTRACTORS = dict(box_head="bbox_roi_extractor", mask_head="mask_roi_extractor")
_KINDS = ("cls", "bbox")
_HEADS = dict(box_head="bbox_head", mask_head="mask_head")


def neck_outputs(model: nn.Module, backbone: nn.Module, teacher: nn.Module) -> tuple[Places, Places]:
    """Take the maps ``(B, C, H_i, W_i)`` that the necks return.

    Raises:
        ValueError: if one of the two is no detector with a neck, or the necks return other maps.
    """
    necks = [_part(detector, "neck", whose) for detector, whose in _both(model, teacher)]
    shapes = [(neck.num_outs, neck.out_channels) for neck in necks]
    _check_equal("necks", "maps and channels", *shapes)
    return tuple({str(i): Place(neck, partial(_level, i)) for i in range(neck.num_outs)} for neck in necks)


def _level(i: int, args: tuple, output: tuple[Tensor, ...]) -> Tensor:
    return output[i]


def dense_outputs(model: nn.Module, backbone: nn.Module, teacher: nn.Module) -> tuple[Places, Places]:
    """Take scores and regressions of all anchors ``(B, anchors * values, H_i, W_i)``, of an RPN or a dense head.

    Raises:
        ValueError: if one of the two has no such head, or the heads have other levels or anchors.
    """
    heads = [_dense_head(detector, whose) for detector, whose in _both(model, teacher)]
    shapes = [(len(head.prior_generator.strides), head.num_base_priors, head.cls_out_channels) for head in heads]
    _check_equal("dense heads", "levels, anchors and classes", *shapes)
    levels = range(shapes[0][0])
    return tuple(
        {f"{kind}{i}": Place(head, partial(_output, j, i)) for j, kind in enumerate(_KINDS) for i in levels}
        for head in heads
    )


def _dense_head(detector: nn.Module, whose: str) -> nn.Module:
    return _part(detector, "rpn_head" if hasattr(detector, "rpn_head") else "bbox_head", whose)


def _output(kind: int, level: int, args: tuple, output: tuple[list[Tensor], ...]) -> Tensor:
    return output[kind][level]


def box_outputs(model: nn.Module, backbone: nn.Module, teacher: nn.Module) -> tuple[Places, Places]:
    """Take scores ``(regions, classes + 1)`` and regressions of box heads, of each cascade stage.

    Raises:
        ValueError: if one of the two has no such heads, or they have other outputs.
    """
    both = [_roi_parts(detector, "box_head", whose) for detector, whose in _both(model, teacher)]
    _check_equal(
        "box heads", "outputs", *([(h.fc_cls.out_features, h.fc_reg.out_features) for h in heads] for heads in both)
    )
    return tuple(
        {f"{kind}{i}": Place(head, partial(_level, j)) for i, head in enumerate(heads) for j, kind in enumerate(_KINDS)}
        for heads in both
    )


def mask_outputs(model: nn.Module, backbone: nn.Module, teacher: nn.Module) -> tuple[Places, Places]:
    """Take the logits ``(regions, classes, H, W)`` of mask heads, of each cascade stage.

    Raises:
        ValueError: if one of the two has no such heads, or they have other classes.
    """
    both = [_roi_parts(detector, "mask_head", whose) for detector, whose in _both(model, teacher)]
    _check_equal("mask heads", "classes", *([head.num_classes for head in heads] for heads in both))
    return tuple({str(i): Place(head) for i, head in enumerate(heads)} for heads in both)


def region_places(model: nn.Module, tap: str) -> Places:
    """Return where the regions ``(regions, 5)`` of the student pass that a tap compares, one place a cascade stage."""
    extractors = _as_list(getattr(model.roi_head, _EXTRACTORS[tap]))
    return {str(i): Place(extractor, lambda args, output: args[1]) for i, extractor in enumerate(extractors)}


def run_teacher(teacher: nn.Module, images: Tensor, taps: set[str], regions: Mapping[tuple[str, str], Tensor]) -> None:
    """Run as much of a teacher as some taps need.

    Args:
        teacher: a backbone, a classifier or a detector.
        images: ``(B, C, H, W)``.
        taps: what is compared.
        regions: the student's, by tap and cascade stage.
    """
    if not hasattr(teacher, "extract_feat"):
        teacher(images)
        return
    maps = teacher.extract_feat(images)
    if "dense_head" in taps:
        _dense_head(teacher, "the teacher")(maps)
    for (tap, stage), rois in regions.items():
        extractor = _as_list(getattr(teacher.roi_head, _EXTRACTORS[tap]))[int(stage)]
        features = extractor(maps[: extractor.num_inputs], rois)
        _as_list(getattr(teacher.roi_head, _HEADS[tap]))[int(stage)](features)


def _roi_parts(detector: nn.Module, tap: str, whose: str) -> list[nn.Module]:
    roi_head = _part(detector, "roi_head", whose)
    heads = _as_list(_part(roi_head, _HEADS[tap], f"roi_head of {whose}"))
    _part(roi_head, _EXTRACTORS[tap], f"roi_head of {whose}")
    return heads


def _as_list(modules: nn.Module) -> list[nn.Module]:
    return list(modules) if isinstance(modules, nn.ModuleList) else [modules]


def _both(model: nn.Module, teacher: nn.Module) -> tuple[tuple[nn.Module, str], ...]:
    return (model, "the model"), (teacher, "the teacher")


def _part(module: nn.Module, name: str, whose: str) -> nn.Module:
    if (part := getattr(module, name, None)) is None:
        raise UserError(
            f"{whose} is a {type(module).__name__} without {name}, so there is nothing to distil there; give a whole "
            "detector as teacher, such as dict(type='mmdet.MaskRCNN', ...), or take a loss of blocks"
        )
    return part


def _check_equal(what: str, of: str, student: object, teacher: object) -> None:
    if student != teacher:
        raise UserError(f"{what} do not match: {of} of the student are {student}, of the teacher {teacher}")
