"""Paired comparisons against SciPy, and what the arms of the evidence change, with a tool instead of trainings."""

import json
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS, DefaultScope
from scipy import stats

from mmbivit.binary import BinaryLinear
from mmbivit.models import SpatialInteraction
from mmbivit_benchmarks.evidence import (
    ARMS,
    DETECTION,
    QUESTIONS,
    all_differences,
    arm_config,
    draw_differences,
    markdown_tables,
    run_arms,
)
from mmbivit_benchmarks.paired import compare_pairs

# Logs 10 times the number of the seed, and 1 more without spatial interaction.
TOOL = """
import json, sys
from pathlib import Path
from mmengine.config import Config
cfg, options = Config.fromfile(sys.argv[1]), dict(zip(sys.argv[2::2], sys.argv[3::2]))
work_dir, seed = Path(options["--work-dir"]), int(options["--seed"])
log = work_dir / "20260101_000000" / "vis_data" / "scalars.json"
log.parent.mkdir(parents=True)
accuracy = 10.0 * seed + (cfg.model.backbone.get("spatial_interaction") is None)
log.write_text(json.dumps({"accuracy/top1": accuracy, "step": 28}))
(work_dir / "last_checkpoint").write_text("epoch_28.pth")
"""


def test_interval_and_p_are_those_of_scipy():
    first, second = [52.3, 51.0, 54.4, 53.1, 52.0], [50.1, 51.4, 52.0, 52.9, 49.5]
    result = compare_pairs(first, second)
    interval = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert (result.low, result.high) == pytest.approx((interval.low, interval.high))
    flips = stats.permutation_test((result.each,), lambda x, axis: x.mean(axis), permutation_type="samples")
    assert result.p == pytest.approx(flips.pvalue)
    assert compare_pairs([1.0, 2.0, 3.0], [0.0, 0.0, 0.0]).p == 2 / 2**3
    with pytest.raises(ValueError, match="3 and 2 runs"):
        compare_pairs([1, 2, 3], [1, 2])


def test_an_arm_changes_what_it_says_and_nothing_else():
    checkpoint = Path("float.pth")
    built = {}
    for key, arm in ARMS.items():
        cfg = arm_config(arm, checkpoint)
        detector = key.startswith("detector")
        assert cfg.load_from == "float.pth" and (arm.task is DETECTION) == detector
        assert cfg.train_cfg.val_interval == (cfg.train_cfg.max_iters if detector else cfg.train_cfg.max_epochs)
        assert cfg.train_cfg.val_interval == (600 if detector else 28)
        with DefaultScope.overwrite_default_scope("mmdet" if detector else "mmengine"):
            built[key] = cfg, MODELS.build(cfg.model)
    for key, (cfg, model) in built.items():
        hooks = [hook for hook in cfg.get("custom_hooks", []) if "DecoupledTrainingHook" in hook.type]
        detector, key = key.startswith("detector"), key.removeprefix("detector_")
        branches = [module for module in model.modules() if isinstance(module, SpatialInteraction)]
        layers = [module for module in model.modules() if isinstance(module, BinaryLinear)]
        assert bool(branches) == ("no_si" not in key)
        assert {layer.weight_quantizer.ste for layer in layers} == {"plain" if "plain" in key else "theta"}
        assert bool(hooks) == (key.startswith(("two", "distil")))
        fresh = key == "two_stages_fresh" or key.startswith("distil") or (detector and "plain" not in key)
        assert [hook.get("reset_optimizer", False) for hook in hooks] == [fresh] * len(hooks)
        assert [bool(hook.teacher) for hook in hooks] == [key not in ("two_cycles", "distil_nothing")] * len(hooks)
        assert model.backbone.training_plan[0].weights == (key == "two_cycles")
        assert cfg.optim_wrapper.get("paramwise_cfg") == (
            dict(custom_keys={"si.alpha": dict(lr_mult=0.0)}) if key == "frozen_alpha" else None
        )
        start = float(key.removeprefix("alpha_")) if key.startswith("alpha") else 0.0
        assert all((branch.alpha == start).all() for branch in branches)
        if hooks and hooks[0].teacher:
            assert hooks[0].teacher.init_cfg.checkpoint == "float.pth"
            taps = {term.tap: term.weight for term in HOOKS.build(hooks[0]).terms}
            logits, both = dict(logits=1.0), dict(blocks=0.1, logits=1.0)
            assert taps == dict(distil_logits=logits, distil_both=both).get(key, dict(blocks=0.1))
    assert built["two_cycles"][0].param_scheduler == built["two_stages"][0].param_scheduler
    assert {name for question in QUESTIONS for pair in question.pairs for name in pair} == set(ARMS)


def test_runs_are_paired_resumed_and_tabulated(tmp_path):
    (tmp_path / "tool.py").write_text(TOOL)
    arms, lines = {name: ARMS[name] for name in ("si_mlp3", "no_si_mlp3")}, []
    for _ in range(2):
        lines.clear()
        results = run_arms(arms, (1, 2, 3), tmp_path, tmp_path / "tool.py", 2, lines.append)
    assert results == dict(float=[11, 21, 31], si_mlp3=[10, 20, 30], no_si_mlp3=[11, 21, 31])
    assert len(lines) == 9 and all("done before" in line for line in lines)
    assert json.loads((tmp_path / "results.json").read_text())["accuracies"] == results
    config = Config.fromfile(tmp_path / "si_mlp3_seed2" / "arm.py")
    assert config.load_from == str(tmp_path / "float_seed2" / "epoch_28.pth")
    table = markdown_tables(results)
    assert "| SI, MLP 3 - no SI, MLP 3 | -1.00 | -1.00 to -1.00 | 0.250 | -1.00, -1.00, -1.00 |" in table
    (axes,) = draw_differences(all_differences(results)).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["SI, MLP 3 - no SI, MLP 3"]
