"""The ablation's table from finished runs written by hand."""

import json

import pytest

from mmbivit import config_path
from mmbivit_benchmarks.ablation import ARMS, METRICS, markdown_table, run_arms


def test_table_of_finished_runs_has_mean_and_sample_deviation(tmp_path):
    for seed, value in ((0, 0.2), (1, 0.4)):
        work_dir = tmp_path / f"single_stage_si_seed{seed}"
        work_dir.mkdir()
        rows = [{f"coco/{name}": number for name in METRICS} for number in (0.1, value)]
        (work_dir / "evaluations.json").write_text(json.dumps(rows))
    arm = "single stage, SI, MLP 3"
    results = run_arms([arm], [0, 1], tmp_path, tmp_path / "no_tool", tmp_path, tmp_path, jobs=1)
    row = markdown_table(results).splitlines()[-1]
    assert row == f"| {arm} " + "| 0.300 ± 0.141 " * 4 + "| 0.200, 0.400 |"  # sqrt(2 * 0.1**2 / 1)


@pytest.mark.parametrize(("seeds", "jobs", "option"), [([0], 0, "--jobs"), ([0, -1], 1, "--seeds")])
def test_impossible_runs_are_refused_before_the_first(tmp_path, seeds, jobs, option):
    with pytest.raises(ValueError, match=option):
        run_arms(list(ARMS), seeds, tmp_path, tmp_path / "no_tool", tmp_path, tmp_path, jobs)


def test_every_arm_has_a_config():
    assert len({config_path(config) for config in ARMS.values()}) == len(ARMS)
