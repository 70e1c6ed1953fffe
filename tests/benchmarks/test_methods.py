"""The grid of methods: what its arms train, and its table, with a tool instead of trainings."""

from pathlib import Path

import pytest
from mmengine.registry import MODELS, DefaultScope

from mmbivit.binary import RECIPES, get_recipe
from mmbivit_benchmarks.evidence import arm_config, run_arms
from mmbivit_benchmarks.methods import METHODS, PAPER, differences, markdown_table, method_arms

from .test_evidence import TOOL


def test_every_method_is_trained_with_and_without_spatial_interaction():
    assert set(METHODS) == set(RECIPES) - {"float"} and set(PAPER) <= set(METHODS)
    arms = method_arms()
    assert len(arms) == 2 * len(METHODS)
    for name, arm in arms.items():
        cfg = arm_config(arm, Path("float.pth"))
        assert cfg.load_from == "float.pth" and not cfg.get("custom_hooks")
        with DefaultScope.overwrite_default_scope("mmengine"):
            block = next(MODELS.build(cfg.model).backbone.blocks()).module
        method, has_si = name.removesuffix("_no_si").removesuffix("_si"), not name.endswith("_no_si")
        assert (block.mlp.si is not None) == has_si
        assert block.mlp.fc1.out_features == 32 * (3 if has_si else 4)
        assert type(block.attn.attention) is type(get_recipe(method).build_attention(2))


def test_the_table_has_paired_differences(tmp_path):
    (tmp_path / "tool.py").write_text(TOOL)
    results = run_arms(
        method_arms(("bit", "reactnet")), (1, 2, 3), tmp_path, tmp_path / "tool.py", 2, lambda line: None
    )
    assert list(results) == ["float", "bit_no_si", "bit_si", "reactnet_no_si", "reactnet_si"]
    found = differences(results)
    assert list(found) == ["bit", "reactnet"] and found["bit"].each == (-1, -1, -1)
    first, second = markdown_table(results).splitlines()[2:]
    assert first == "| `bit` | 21.00 | 20.00 | -1.00 | -1.00 to -1.00 | 0.250 | +9.25 |"
    assert second.endswith("| 0.250 |  |")
    with pytest.raises(ValueError, match="a paired comparison needs"):
        differences(dict(bit_si=[1.0], bit_no_si=[2.0]))
