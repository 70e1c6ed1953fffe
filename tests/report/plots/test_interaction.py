import io

import pytest
from rich.console import Console

from mmbivit.report.plots.interaction import interaction_table, measure_interaction, plot_interaction


def lines(table):
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table)
    return [line.replace("│", " ").replace("┃", " ").split() for line in console.export_text().splitlines()]


def test_detector(configs):
    # 64 x 64 pixels are 16 x 16 tokens, 9 windows of 7 x 7; then 8 x 8 tokens, 4 windows.
    capability = measure_interaction(configs["binary"], (64, 64))
    assert capability.attention == (9 + 4) * 2 * 49 * 48
    assert capability.times == 3
    assert measure_interaction(configs["binary"]).input_shape == (3, 64, 64)  # of the test pipeline


def test_classifier(classifier_configs):
    # 32 x 32 pixels are 8 x 8 tokens, 4 windows of 4 x 4; then 4 x 4 tokens, 1 window.
    capability = measure_interaction(classifier_configs["binary"])
    assert capability.input_shape == (3, 32, 32)
    assert capability.attention == (4 + 1) * 2 * 16 * 15


def test_table(classifier_configs):
    table = lines(interaction_table(measure_interaction(classifier_configs["binary"])))
    assert ["block", "module", "n", "n'", "windows", "SIC"] in table
    assert ["stages.0.blocks.0", "attn", "16", "4", "1,920"] in table
    assert ["stages.0.blocks.0", "mlp", "16", "4", "0"] in table
    assert ["stages.1.blocks.0", "mlp.si.fc2", "16", "16", "1", "480"] in table
    assert ["attention", "alone", "2,400"] in table
    assert ["all", "3", "times", "7,200"] in table


def test_plot(classifier_configs):
    (axes,) = plot_interaction(classifier_configs["binary"], (16, 32)).axes
    assert [bar.get_height() for bar in axes.containers[0]] == [2 * 480, 480]
    assert "32 x 16 pixels" in axes.get_title()


@pytest.mark.parametrize("name", ["configs", "classifier_configs"])
def test_a_float_config_is_refused_in_one_line(name, request):
    with pytest.raises(ValueError, match="the attention of stages.0.blocks.0 is float") as error:
        plot_interaction(request.getfixturevalue(name)["float"])
    assert "\n" not in str(error.value)


def test_other_models_are_refused_in_one_line(tmp_path):
    config = tmp_path / "config.py"
    config.write_text("model = dict(type='X')\n")
    with pytest.raises(ValueError, match=f"the model of {config} has no backbone"):
        plot_interaction(config)
    config.write_text("model = dict(backbone=dict(type='mmdet.ResNet', depth=18))\n")
    with pytest.raises(ValueError, match="ResNet has no spatial interaction capability"):
        plot_interaction(config, (32, 32))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        plot_interaction(tmp_path / "none.py")
