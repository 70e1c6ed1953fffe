"""The ablation's table from logs written by hand."""

import json

import pytest

from mmbivit import config_path
from mmbivit.apis.ablation import ARMS, markdown_table, read_last_metrics, run_arms


def write_run(folder, *values):
    lines = [dict(loss=1.0, step=1)]
    names = ("bbox_mAP", "bbox_mAP_50", "segm_mAP", "segm_mAP_50")
    lines += [{f"coco/{name}": value for name in names} | dict(step=9) for value in values]
    log = folder / "20260101_000000" / "vis_data" / "scalars.json"
    log.parent.mkdir(parents=True)
    log.write_text("\n".join(map(json.dumps, lines)))


def test_table_of_finished_runs_has_mean_and_sample_deviation(tmp_path):
    for seed, value in ((0, 0.2), (1, 0.4)):
        write_run(tmp_path / f"single_stage_si_seed{seed}", 0.1, value)
    arm = "single stage, SI, MLP 3"
    results = run_arms([arm], [0, 1], tmp_path, tmp_path / "no_tool", tmp_path, tmp_path, jobs=1)
    row = markdown_table(results).splitlines()[-1]
    assert row == f"| {arm} " + "| 0.300 ± 0.141 " * 4 + "| 0.200, 0.400 |"  # sqrt(2 * 0.1**2 / 1)


def test_a_run_without_metrics_is_an_error_that_names_its_log(tmp_path):
    assert read_last_metrics(tmp_path) is None
    with pytest.raises(RuntimeError, match=r"single_stage_si_seed3.log\.txt"):
        run_arms(["single stage, SI, MLP 3"], [3], tmp_path, tmp_path / "no_tool.py", tmp_path, tmp_path, jobs=1)


def test_every_arm_has_a_config():
    assert len({config_path(config) for config in ARMS.values()}) == len(ARMS)
