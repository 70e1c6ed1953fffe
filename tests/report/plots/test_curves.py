"""Curves of a work dir as training leaves it."""

import pytest

from mmbivit.apis import train, train_config
from mmbivit.report.plots.curves import plot_curves
from tests.analysis.logs import logged


def test_curves_of_a_classifier_in_two_stages(tmp_path, classifier_configs, float_classifier):
    """Switch, epochs and metrics come from what MMEngine wrote, here in two epochs of three iterations."""
    work_dir, options = str(tmp_path / "run"), {"experiment_name": "curves"}
    config, teacher = classifier_configs["binary"], str(float_classifier)
    train(train_config(config, work_dir=work_dir, seed=0, float_checkpoint=teacher, cfg_options=options))
    entries = logged(tmp_path / "run")
    figure = plot_curves(work_dir)
    total, distill, rate, accuracy = figure.axes
    trained = [entry for entry in entries if "iter" in entry]
    assert len(trained) == 6
    for axis, key in ((total, "loss"), (rate, "lr")):
        assert axis.get_lines()[0].get_xydata().tolist() == [[entry["iter"], entry[key]] for entry in trained]
    in_stage_1 = [[entry["iter"], entry["loss_distill"]] for entry in trained if "loss_distill" in entry]
    assert distill.get_lines()[0].get_xydata().tolist() == in_stage_1 and len(in_stage_1) == 3
    tested = [entry["accuracy/top1"] for entry in entries if "accuracy/top1" in entry]
    assert accuracy.get_lines()[0].get_xydata().tolist() == [[3, tested[0]], [6, tested[1]]]
    assert total.patches[0].get_width() == 3
    (asked,) = plot_curves(work_dir, ["lr"]).axes
    assert asked.get_lines()[0].get_xydata().tolist() == rate.get_lines()[0].get_xydata().tolist()


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is empty; give the --work-dir of a training run"):
        plot_curves(tmp_path)
