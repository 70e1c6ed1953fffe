"""The picture of sign flips shows the shares of the log, in percent, and names its rows."""

import numpy as np
import pytest

from mmbivit.analysis.figures.flips import flips_figure
from mmbivit.analysis.training_log import Series, TrainingLog
from tests.analysis.figures.drawing import assert_texts_readable

BLOCK = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "spatial.fc1", "spatial.fc2")


def layers(depths):
    """Names as in a Swin of so many blocks a stage."""
    for stage, depth in enumerate(depths):
        yield from (f"backbone.stages.{stage}.blocks.{block}.{name}" for block in range(depth) for name in BLOCK)
        if stage < len(depths) - 1:
            yield f"backbone.stages.{stage}.downsample.reduction"


def make_log(names, steps, **kwargs):
    rng = np.random.default_rng(0)
    flips = {f"sign_flips/{name}": Series(np.array(steps), rng.uniform(size=len(steps)) / 10) for name in names}
    total = Series(np.array(steps), np.mean([series.values for series in flips.values()], axis=0))
    train = {"loss": Series(np.array([steps[-1] + 1]), np.array([1.0]))}
    kwargs = dict(epoch_length=None, switches=()) | kwargs
    return TrainingLog("some", train, {}, {"sign_flips": total} | flips, **kwargs)


def test_total_and_layers_are_those_of_the_log_in_percent():
    log = make_log(list(layers((1,))), [20, 40, 60])
    figure = flips_figure(log)
    top, bottom, bar = figure.axes
    (total,) = top.get_lines()
    assert total.get_xdata().tolist() == [20, 40, 60]
    assert total.get_ydata() == pytest.approx(100 * log.flips["sign_flips"].values)
    (mesh,) = bottom.collections
    shares = [100 * series.values for key, series in log.flips.items() if key != "sign_flips"]
    np.testing.assert_allclose(mesh.get_array().reshape(6, 3), shares)
    assert mesh.get_coordinates()[0, :, 0].tolist() == [0, 20, 40, 60] and bottom.yaxis_inverted()
    assert mesh.get_clim() == pytest.approx((0, np.max(shares)))
    assert top.get_ylabel() == "all layers: flipped signs (%)\nin 20 iterations"
    assert bar.get_ylabel() == "flipped signs (%)\nin 20 iterations" and bottom.get_xlabel() == "iteration"
    reds, greens, blues, _ = mesh.cmap(np.linspace(0, 1, 9)).T
    assert np.allclose(reds, greens) and np.allclose(reds, blues) and (np.diff(reds) < 0).all()


@pytest.mark.parametrize("steps, edges", [([30], [0, 30]), ([30, 40], [20, 30, 40]), ([4, 24], [0, 4, 24])])
def test_a_column_begins_where_the_hook_looked_before(steps, edges):
    (mesh,) = flips_figure(make_log(["a"], steps)).axes[1].collections
    assert mesh.get_coordinates()[0, :, 0].tolist() == edges


def test_few_layers_are_named_one_by_one():
    figure = flips_figure(make_log(list(layers((1, 1))), [1, 2], switches=(1,)))
    texts = figure.axes[1].get_yticklabels()
    assert [text.get_text() for text in texts] == [name.removeprefix("backbone.") for name in layers((1, 1))]
    assert figure.axes[1].get_yticks().tolist() == [row + 0.5 for row in range(13)]
    assert_texts_readable(figure)


def test_many_layers_are_named_by_their_blocks():
    """Those of Swin-S; a block's name stands at the middle of its rows."""
    names = list(layers((2, 2, 18, 2)))
    figure = flips_figure(make_log(names, [100, 200], switches=(150,), epoch_length=100))
    axis = figure.axes[1]
    labels = dict(zip((text.get_text() for text in axis.get_yticklabels()), axis.get_yticks(), strict=True))
    assert len(names) == 147 and len(labels) == 24 + 3
    assert labels["stages.0.downsample.reduction"] == 12.5
    assert labels["stages.2.blocks.17"] == names.index("backbone.stages.2.blocks.17.attn.qkv") + 3
    assert_texts_readable(figure)


@pytest.mark.parametrize("switch, marked", [(20, True), (42, False)])
def test_stages_are_marked_in_both_parts(switch, marked):
    figure = flips_figure(make_log(["a", "b"], [20, 40], switches=(switch,)))
    top, bottom, _ = figure.axes
    assert top.patches[0].get_width() == min(switch, 41)
    for lines in (top.get_lines()[1:], bottom.get_lines()):
        assert {line.get_xdata()[0] for line in lines} == ({switch} if marked else set())
    assert len(figure.legends[0].get_texts()) == 1 + marked


def test_a_layer_that_an_earlier_run_lacks_has_no_share_there():
    log = make_log(["a", "b"], [1, 2, 3])
    log.flips["sign_flips/b"] = Series(np.array([3]), np.array([0.25]))
    (mesh,) = flips_figure(log).axes[1].collections
    np.testing.assert_array_equal(np.ma.filled(mesh.get_array(), np.nan).reshape(2, 3)[1], [np.nan, np.nan, 25])


def test_a_log_without_flips_names_the_hook():
    log = TrainingLog("some", {"loss": Series(np.array([1]), np.array([1.0]))}, {}, {}, None, None)
    with pytest.raises(
        ValueError, match=r"^the log in some has no sign_flips: add dict\(type='mmbivit.SignFlipsHook'\)"
    ):
        flips_figure(log)
