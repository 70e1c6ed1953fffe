"""The arms of the benchmark of binary necks and heads: what each changes, what it costs, and how its table reads."""

import json
from pathlib import Path

import pytest
from mmengine.registry import MODELS, DefaultScope
from scipy import stats

from mmbivit.models.stage import staged_modules
from mmbivit_benchmarks.evidence import arm_config
from mmbivit_benchmarks.heads import (
    ARMS,
    CONVOLUTIONS,
    METRICS,
    PARTS,
    Cost,
    coco_cost,
    differences,
    markdown_table,
    read_scores,
)

NAMES = dict(neck="neck", rpn="rpn_head", box="roi_head.bbox_head", mask="roi_head.mask_head")


def test_an_arm_changes_what_it_says_and_nothing_else():
    for key, arm in ARMS.items():
        cfg = arm_config(arm, Path("float.pth"))
        assert cfg.load_from == cfg.custom_hooks[0].teacher.init_cfg.checkpoint == "float.pth"
        with DefaultScope.overwrite_default_scope("mmdet"):
            parts = staged_modules(MODELS.build(cfg.model))
        wanted = {"float_heads": (), "float_faster": (), **{part: (part,) for part in PARTS}}.get(key, tuple(PARTS))
        assert set(parts) == {"backbone", *(NAMES[part] for part in wanted)}, key
        layers = [
            layer for part in list(parts.values())[1:] for layer in part.modules() if hasattr(layer, "like_float")
        ]
        assert any(layer.shortcut for layer in layers) == (bool(layers) and key not in ("all_no_shortcut", "box"))
        assert {layer.norm is None for layer in layers} <= {key == "all_no_norm"}
        rates = (cfg.optim_wrapper.get("paramwise_cfg") or {}).get("custom_keys", {})
        faster = {"all_same_rate": (), "float_faster": tuple(PARTS)}.get(key, wanted)
        assert set(rates) == {CONVOLUTIONS[part] for part in faster if part != "box"}
        longer = 2 if key == "all_longer" else 1
        assert (cfg.train_cfg.max_iters, cfg.train_cfg.val_interval) == (600 * longer, 600 * longer)
        assert cfg.custom_hooks[0].switch_iter == 200 * longer and cfg.param_scheduler[-1].end == 600 * longer
        losses = cfg.custom_hooks[0].distill_loss
        losses = losses if isinstance(losses, list) else [losses]
        assert [loss.get("of") for loss in losses] == [None, "neck"][
            : 1 + (key not in ("float_heads", "float_faster", "all_not_distilled"))
        ]


def test_costs_are_those_of_the_coco_detector():
    reference, whole = coco_cost(ARMS["float_heads"]), coco_cost(ARMS["all"])
    assert reference.gops == pytest.approx(177.8, abs=0.1) and reference.megabytes == pytest.approx(84.9, abs=0.2)
    assert whole.gops < 15 and whole.megabytes < 11  # the aims


def test_scores_are_read_compared_and_tabulated(tmp_path):
    box = dict(float_heads=[60.0, 61.0, 59.0], all=[57.0, 59.5, 56.0])
    for arm, values in box.items():
        for seed, value in enumerate(values):
            folder = tmp_path / f"{arm}_seed{seed}"
            folder.mkdir()
            entry = {METRICS["box"]: value / 100, METRICS["mask"]: (value - 2) / 100}
            (folder / "evaluations.json").write_text(json.dumps([{}, entry]))
    scores = read_scores(tmp_path, tuple(box), (0, 1, 2))
    assert scores["all"]["mask"] == pytest.approx([55.0, 57.5, 54.0])
    interval = stats.ttest_rel(box["all"], box["float_heads"]).confidence_interval(0.95)
    found = differences(scores)["box AP50 against float neck and heads"]
    assert list(found) == [ARMS["all"].label]
    assert (found[ARMS["all"].label].low, found[ARMS["all"].label].high) == pytest.approx((interval.low, interval.high))
    table = markdown_table(scores, dict(float_heads=Cost(177.8, 84.9), all=Cost(14.8, 10.4)))
    assert f"| -2.5 | {interval.low:+.1f} to {interval.high:+.1f} |" in table and "| 14.8 | 10.4 |" in table
