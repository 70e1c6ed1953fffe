"""What binary necks and heads cost in AP, and what they save: arms that differ in one thing, on digit scenes."""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from mmengine.registry import MODELS, DefaultScope

from mmbivit import get_config
from mmbivit.analysis import complexity

from .evidence import DETECTOR_TWO_STAGES, Arm, set_value
from .paired import PairedDifference, compare_pairs

__all__ = ["ARMS", "Cost", "REFERENCE", "coco_cost", "differences", "markdown_table", "read_scores"]

FULL = "digits/mask_rcnn_sibivit_full"
COCO = "mask_rcnn_sibivit_swin_t_full"
IMAGE = (3, 800, 1344)
REFERENCE = "float_heads"
METRICS = {"box": "coco/bbox_mAP_50", "mask": "coco/segm_mAP_50"}
PARTS = {
    "neck": "model.neck.binary",
    "rpn": "model.rpn_head.binary",
    "box": "model.roi_head.bbox_head.binary",
    "mask": "model.roi_head.mask_head.binary",
}
CONVOLUTIONS = {"neck": "fpn_convs", "rpn": "rpn_conv", "mask": ".convs."}


def _only(*parts: str) -> tuple[tuple[str, object], ...]:
    """Return the changes that leave these parts binary, with the learning rates of binary convolutions."""
    rates = {name: dict(lr_mult=5.0) for part, name in CONVOLUTIONS.items() if part in parts}
    others = tuple((key, None) for part, key in PARTS.items() if part not in parts)
    return (*others, ("optim_wrapper.paramwise_cfg.custom_keys", rates))


def _all_with(**settings: Any) -> tuple[tuple[str, object], ...]:
    return tuple((key, lambda binary: dict(binary, **settings)) for key in PARTS.values())


def _without_neck_loss(losses: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [loss for loss in losses if loss.get("of") != "neck"]


def _twice(number: int | None) -> int | None:
    return None if number is None else 2 * number


def _twice_as_long(schedulers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [dict(scheduler, begin=2 * scheduler["begin"], end=2 * scheduler["end"]) for scheduler in schedulers]


_LONGER = (
    ("train_cfg.max_iters", _twice),
    ("custom_hooks.0.switch_iter", _twice),
    ("param_scheduler", _twice_as_long),
)

ARMS = {
    REFERENCE: Arm("float neck and heads", DETECTOR_TWO_STAGES),
    "float_faster": Arm(
        "float, with the learning rates of binary convolutions",
        DETECTOR_TWO_STAGES,
        (("optim_wrapper.paramwise_cfg", dict(custom_keys={key: dict(lr_mult=5.0) for key in CONVOLUTIONS.values()})),),
    ),
    **{part: Arm(f"{part} binary", FULL, _only(part)) for part in PARTS},
    "all": Arm("all binary (recommended)", FULL),
    "all_longer": Arm("all, twice the iterations", FULL, _LONGER),
    "all_same_rate": Arm("all, one learning rate", FULL, (("optim_wrapper.paramwise_cfg.custom_keys", {}),)),
    "all_no_shortcut": Arm("all, without shortcuts", FULL, _all_with(shortcut=False)),
    "all_no_norm": Arm("all, without norms", FULL, _all_with(norm=False)),
    "all_not_distilled": Arm("all, neck not distilled", FULL, (("custom_hooks.0.distill_loss", _without_neck_loss),)),
}


def read_scores(out: Path, arms: Sequence[str], seeds: Sequence[int]) -> dict[str, dict[str, list[float]]]:
    """Return AP50 of boxes and masks in percent by arm, in the order of the seeds, of runs that are done."""
    scores: dict[str, dict[str, list[float]]] = {}
    for arm in arms:
        entries = [json.loads((out / f"{arm}_seed{seed}" / "evaluations.json").read_text())[-1] for seed in seeds]
        scores[arm] = {kind: [100 * entry[metric] for entry in entries] for kind, metric in METRICS.items()}
    return scores


@dataclass(frozen=True)
class Cost:
    """What a detector for COCO with the parts of an arm costs, at 800 x 1344.

    Args:
        gops: ``BOPs / 64 + FLOPs``, in 1e9.
        megabytes: of its parameters, 1 bit a binary weight and float32 for the others.
    """

    gops: float
    megabytes: float


def coco_cost(arm: Arm) -> Cost:
    """Count the Mask R-CNN Swin-T whose parts are binary as those of an arm."""
    cfg = get_config(COCO)
    changes = arm.changes if arm.base == FULL else _only()
    for key, value in changes:
        if key in PARTS.values():
            set_value(cfg, key, value)
    with DefaultScope.overwrite_default_scope("mmdet"):
        counted = complexity(MODELS.build(copy.deepcopy(cfg.model)).eval(), IMAGE)
    return Cost(counted.ops / 1e9, counted.size_bytes / 1e6)


def differences(scores: Mapping[str, Mapping[str, list[float]]]) -> dict[str, dict[str, PairedDifference]]:
    """Return the paired differences to float neck and heads, of boxes and masks, by the labels of the arms."""
    found = {}
    for kind in METRICS:
        found[f"{kind} AP50 against float neck and heads"] = {
            ARMS[arm].label: compare_pairs(values[kind], scores[REFERENCE][kind])
            for arm, values in scores.items()
            if arm in ARMS and arm != REFERENCE
        }
    return found


def markdown_table(scores: Mapping[str, Mapping[str, list[float]]], costs: Mapping[str, Cost]) -> str:
    """Format AP50, paired differences with their intervals, and costs as Markdown."""
    lines = [
        "| arm | box AP50 | difference | 95 % interval | mask AP50 | difference | 95 % interval | G OPs | MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, values in scores.items():
        cells = [ARMS[arm].label]
        for kind in METRICS:
            cells.append(f"{mean(values[kind]):.1f} ({', '.join(f'{value:.1f}' for value in values[kind])})")
            if arm == REFERENCE:
                cells += ["", ""]
            else:
                d = compare_pairs(values[kind], scores[REFERENCE][kind])
                cells += [f"{d.mean:+.1f}", f"{d.low:+.1f} to {d.high:+.1f}"]
        cells += [f"{costs[arm].gops:.1f}", f"{costs[arm].megabytes:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
