"""Curves show the numbers of the log, the stages and readable texts."""

import math

import numpy as np
import pytest

from mmbivit.analysis.figures.curves import curves_figure, running_mean
from mmbivit.analysis.training_log import Series, TrainingLog
from tests.analysis.figures.drawing import assert_texts_readable


def make_log(train, validation=None, steps=None, **kwargs):
    """A log of values at iterations 10, 20, ... or ``steps``, and of metrics in the end."""
    series = {key: Series(np.array(steps or range(10, 10 * len(v) + 10, 10)), np.array(v)) for key, v in train.items()}
    metrics = (
        {
            key: Series(np.array([v[0] for v in pairs]), np.array([v[1] for v in pairs]))
            for key, pairs in validation.items()
        }
        if validation
        else {}
    )
    return TrainingLog(
        work_dir=None, train=series, validation=metrics, flips={}, **dict(epoch_length=None, switches=()) | kwargs
    )


def lines(axis):
    """Points of the lines of a panel, without the mark of the switch."""
    return [line.get_xydata().tolist() for line in axis.get_lines() if "switch" not in line.get_label()]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()] if figure.legends else []


@pytest.mark.parametrize("window", [1, 3, 7, 31])
def test_running_mean_is_that_of_the_neighbours_that_are_numbers(window):
    values = np.random.default_rng(0).normal(size=30)
    values[[0, 11, 12, 13, 14]] = math.nan
    for place, mean in enumerate(running_mean(values, window)):
        near = [value for other, value in enumerate(values) if abs(other - place) <= window // 2 and value == value]
        assert mean == pytest.approx(sum(near) / len(near)) if near else math.isnan(mean)


def test_few_points_are_drawn_as_they_are():
    metrics = {"coco/bbox_mAP": [(20, 0.1), (40, 0.3)], "coco/bbox_mAP_50": [(20, 0.2)], "coco/segm_mAP": [(40, 0.2)]}
    log = make_log({"loss": [4.0, 3.0, math.inf, 2.0], "lr": [0.1, 0.2, 0.1, 0.0], "time": [1.0] * 4}, metrics)
    figure = curves_figure(log)
    loss, rate, precision = figure.axes
    (drawn,) = lines(loss)
    np.testing.assert_array_equal(drawn, [[10, 4], [20, 3], [30, math.nan], [40, 2]])
    assert lines(rate) == [[[10, 0.1], [20, 0.2], [30, 0.1], [40, 0.0]]]
    assert lines(precision) == [[[20, 0.1], [40, 0.3]], [[40, 0.2]]]
    assert [text.get_text() for text in precision.get_legend().get_texts()] == ["coco/bbox_mAP", "coco/segm_mAP"]
    first, second = precision.get_lines()
    assert first.get_linestyle() != second.get_linestyle() and first.get_marker() != second.get_marker()
    assert [axis.get_ylabel().split("\n")[0] for axis in figure.axes] == [
        "total loss",
        "learning rate",
        "average precision",
    ]
    assert precision.get_xlabel() == "iteration" and not legend(figure) and not figure.axes[0].child_axes
    assert_texts_readable(figure)


def test_many_points_have_a_running_mean_in_each_stage_for_itself():
    values = np.r_[np.full(60, 3.0), np.full(140, 1.0)]
    log = make_log({"loss": values, "loss_distill": np.full(60, 0.5), "lr": values}, switches=(600,))
    log.train["loss_distill"] = Series(np.arange(10, 610, 10), np.full(60, 0.5))
    loss, distill, rate = curves_figure(log).axes
    raw, *means = lines(loss)
    assert raw == [[10 * n, value] for n, value in enumerate(values, 1)]
    assert means == [raw[:60], raw[60:]]  # no step is smoothed away
    assert len(lines(distill)) == 2 and lines(rate) == [raw]
    noisy = make_log({"loss": np.random.default_rng(0).normal(5, 1, 80)})
    raw, mean = lines(curves_figure(noisy).axes[0])
    assert np.array(mean)[:, 1] == pytest.approx(running_mean(noisy.train["loss"].values, 5))


@pytest.mark.parametrize("switch, marked", [(20, True), (40, True), (41, False)])
def test_stage_1_is_shaded_and_the_switch_marked_if_it_has_been(switch, marked):
    log = make_log({"loss": [4.0, 3.0, 2.0, 1.0], "lr": [1.0] * 4}, switches=(switch,), epoch_length=20)
    figure = curves_figure(log)
    for axis in figure.axes:
        (stage,) = axis.patches
        assert (stage.get_x(), stage.get_width()) == (0, min(switch, 40))
        marks = [line for line in axis.get_lines() if "switch" in line.get_label()]
        assert [mark.get_xdata()[0] for mark in marks] == [switch] * marked
    labels = ["training stage 1"]
    labels += [f"switch to stage 2 after iteration {switch} (epoch {switch // 20})"] * marked
    assert sorted(legend(figure), reverse=True) == labels
    assert_texts_readable(figure)


def test_every_switch_of_a_plan_is_marked_and_its_stage_smoothed_for_itself():
    values = np.r_[np.full(60, 3.0), np.full(60, 2.0), np.full(80, 1.0)]
    figure = curves_figure(make_log({"loss": values, "lr": values}, switches=(600, 1200)))
    loss, _ = figure.axes
    raw, *means = (line for line in lines(loss) if len(line) > 2)
    assert means == [raw[:60], raw[60:120], raw[120:]]
    assert [patch.get_width() for patch in loss.patches] == [1200]
    expected = {"training stages 1 to 2", *(f"switch to stage {n} after iteration {600 * (n - 1)}" for n in (2, 3))}
    assert expected <= set(legend(figure))


def test_epochs_are_above_the_first_panel():
    figure = curves_figure(make_log({"loss": [4.0, 3.0, 2.0], "lr": [1.0] * 3}, epoch_length=15))
    (epochs,) = figure.axes[0].child_axes
    figure.draw_without_rendering()
    assert epochs.get_xlabel() == "epoch"
    assert epochs.get_xlim() == pytest.approx(np.array(figure.axes[0].get_xlim()) / 15)


@pytest.mark.parametrize(
    "loss, scale", [([20.0, 1.0], "log"), ([9.0, 1.0], "linear"), ([20.0, 0.0], "linear"), ([math.nan] * 2, "linear")]
)
def test_only_losses_over_more_than_a_decade_have_a_logarithmic_axis(loss, scale):
    figure = curves_figure(make_log({"loss": loss, "lr": [1.0, 0.01]}))
    assert [axis.get_yscale() for axis in figure.axes] == [scale, "linear"]


def test_a_classifier_and_unknown_metrics_have_panels_of_their_own():
    metrics = {"accuracy/top1": [(10, 40.0)], "accuracy/top5": [(10, 80.0)]}
    metrics |= {f"own/{letter}": [(10, 1.0)] for letter in "abcdef"}
    figure = curves_figure(make_log({"loss": [4.0]}, metrics))
    assert [axis.get_ylabel() for axis in figure.axes] == ["total loss", "accuracy (%)", "own"]
    assert [line.get_label() for line in figure.axes[2].get_lines()] == [f"own/{letter}" for letter in "abcd"]
    assert_texts_readable(figure)


def test_asked_keys_are_drawn_and_nothing_else():
    log = make_log({"loss": [4.0], "time": [0.5]}, {"mAP": [(10, 0.25)]})
    figure = curves_figure(log, ["time", "mAP", "time"])
    assert [axis.get_ylabel() for axis in figure.axes] == ["time", "mAP"]
    assert [lines(axis) for axis in figure.axes] == [[[[10, 0.5]]], [[[10, 0.25]]]]
    with pytest.raises(ValueError, match="has no 'tim'; did you mean 'time'"):
        curves_figure(log, ["tim"])
    with pytest.raises(ValueError, match="has no 'loss'; it has time"):
        curves_figure(make_log({"time": [0.5]}))
