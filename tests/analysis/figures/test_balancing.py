import numpy as np
import pytest

from mmbivit.analysis.figures.balancing import balancing_figure
from tests.analysis.figures.drawing import assert_texts_readable

SWIN_S = [f"stages.{i}.blocks.{j}" for i, depth in enumerate((2, 2, 18, 2)) for j in range(depth)]


def make_factors(names, channels):
    rng = np.random.default_rng(0)
    return {name: (rng.normal(0, 0.6, channels) ** 3).astype(np.float32) for name in names}  # some lie far out


def test_boxes_show_extremes_and_quartiles():
    factors = make_factors(("stages.0.blocks.0", "stages.1.blocks.0"), 8)
    boxes = balancing_figure(factors).axes[0]
    assert [label.get_text() for label in boxes.get_xticklabels()] == ["0.0", "1.0"]
    for place, values in enumerate(factors.values(), 1):
        ordered = np.sort(values).astype(float)
        median = (ordered[3] + ordered[4]) / 2
        quartiles = 0.25 * ordered[1] + 0.75 * ordered[2], 0.75 * ordered[5] + 0.25 * ordered[6]
        lines = [
            line for line in boxes.lines if len(line.get_xdata()) and abs(np.mean(line.get_xdata()) - place) < 1e-6
        ]
        ends = sorted({float(y) for line in lines for y in line.get_ydata()})
        assert ends == pytest.approx([ordered[0], quartiles[0], median, quartiles[1], ordered[-1]])
        box = boxes.patches[place - 1].get_path().vertices
        assert (box[:, 1].min(), box[:, 1].max()) == pytest.approx(quartiles)


def test_grids_have_the_numbers_and_mark_the_extremes():
    factors = {"stages.0.blocks.0": np.arange(-4, 4) / 10, "stages.1.blocks.0": np.linspace(0.5, -0.25, 16)}
    _, first, second = balancing_figure(factors).axes
    assert first.get_title().startswith("block 0.0: 8 of 8 channels")
    assert second.get_title().startswith("block 1.0: 16 of 16 channels")
    texts = [text.get_text() for text in first.texts]
    assert texts[::2] == ["▼ -0.40", "-0.30", "-0.20", "-0.10", "0.00", "0.10", "0.20", "▲ 0.30"]
    assert texts[1::2] == [f"channel {i}" for i in range(8)]
    cells = np.ma.filled(second.images[0].get_array(), np.nan)
    assert cells.shape == (2, 10)
    np.testing.assert_allclose(cells.flat[:16], factors["stages.1.blocks.0"])
    assert np.isnan(cells.flat[16:]).all()
    marked = {text.get_text(): text.get_position() for text in second.texts if text.get_weight() == "bold"}
    assert set(marked) == {"▲ 0.50", "▼ -0.25"}
    assert [round(x) for x in marked["▼ -0.25"]] == [5, 1]  # channel 15
    assert first.images[0].get_clim() == second.images[0].get_clim() == (-0.4, 0.5)  # one shade, one value


def test_some_channels_of_two_of_many_blocks():
    factors = make_factors(SWIN_S, 384)
    _, first, second = balancing_figure(factors).axes
    for axes, name, label in ((first, SWIN_S[0], "0.0"), (second, SWIN_S[17], "2.13")):
        assert axes.get_title().startswith(f"block {label}: 30 of 384 channels")
        channels = [int(text.get_text().split()[1]) for text in axes.texts[1::2]]
        assert len(set(channels)) == 30
        assert channels == sorted(channels)
        assert {int(factors[name].argmin()), int(factors[name].argmax())} <= set(channels)
        np.testing.assert_array_equal(axes.images[0].get_array().ravel(), factors[name][channels])


def test_one_block_whose_factors_are_all_alike():
    figure = balancing_figure({"stages.0.blocks.0": np.zeros(8, dtype=np.float32)})
    assert len(figure.axes) == 2
    assert_texts_readable(figure)


@pytest.mark.parametrize(
    "largest, text",
    [(12.3, "▲ 12.30"), (0.123, "▲ 0.12"), (0.0456, "▲ 0.046"), (0.00123, "▲ 0.0012"), (4e-5, "▲ 4e-05")],
)
def test_two_digits_of_the_largest(largest, text):
    figure = balancing_figure({"stages.0.blocks.0": np.array([largest, largest / -1e4, -largest])})
    assert figure.axes[1].texts[0].get_text() == text
    if "e" not in text:
        assert figure.axes[1].texts[2].get_text() == "0." + "0" * (len(text.partition(".")[2]))  # and not -0.00


@pytest.mark.parametrize(
    "names, channels, scale", [(SWIN_S[:2], 8, 1), (SWIN_S, 96, 1), (SWIN_S[:2], 96, 0.002), (SWIN_S[:2], 96, 1e-6)]
)
def test_texts_can_be_read(names, channels, scale):
    factors = {name: scale * values for name, values in make_factors(names, channels).items()}
    assert_texts_readable(balancing_figure(factors))
