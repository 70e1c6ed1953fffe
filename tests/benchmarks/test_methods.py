"""The grid of methods: what its arms train, and its table, with a tool instead of trainings."""

import itertools
from pathlib import Path

import pytest
from mmengine.registry import MODELS, DefaultScope

from mmbivit.binary import RECIPES, get_recipe
from mmbivit_benchmarks.evidence import ARMS, arm_config, run_arms
from mmbivit_benchmarks.methods import METHODS, PAPER, arm_names, differences, markdown_table, method_arms

from .test_evidence import TOOL


def test_every_method_is_trained_with_and_without_spatial_interaction():
    assert set(METHODS) == set(RECIPES) - {"float"} and set(PAPER) <= set(METHODS)
    arms = method_arms()
    assert len(arms) == 2 * len(METHODS)
    for method, has_si in itertools.product(METHODS, (False, True)):
        arm = arms[arm_names(method)[has_si]]
        cfg = arm_config(arm, Path("float.pth"))
        assert cfg.load_from == "float.pth" and not cfg.get("custom_hooks")
        with DefaultScope.overwrite_default_scope("mmengine"):
            block = next(MODELS.build(cfg.model).backbone.blocks()).module
        assert (block.mlp.si is not None) == has_si
        assert block.mlp.fc1.out_features == 32 * (3 if has_si else 4)
        assert type(block.attn.attention) is type(get_recipe(method).build_attention(2))


def test_the_runs_of_sibivit_are_those_of_the_evidence():
    for name in arm_names("sibivit"):
        assert method_arms()[name].task == ARMS[name].task
        ours, theirs = (arm_config(arm, Path("float.pth")) for arm in (method_arms()[name], ARMS[name]))
        assert ours.to_dict() == theirs.to_dict()


def test_the_table_has_paired_differences(tmp_path):
    (tmp_path / "tool.py").write_text(TOOL)
    results = run_arms(
        method_arms(("reactnet", "bit")), (1, 2, 3), tmp_path, tmp_path / "tool.py", 2, lambda line: None
    )
    assert list(results) == ["float", "reactnet_no_si", "reactnet_si", "bit_no_si", "bit_si"]
    found = differences(results)
    assert list(found) == ["reactnet", "bit"] and found["bit"].each == (-1, -1, -1)
    second, first = markdown_table(results).splitlines()[2:]
    assert first == "| `bit` | 21.00 | 20.00 | -1.00 | -1.00 to -1.00 | 0.250 | +9.25 |"
    assert second.endswith("| 0.250 |  |")
    with pytest.raises(ValueError, match="a paired comparison needs"):
        differences(dict(bit_si=[1.0], bit_no_si=[2.0]))
