from dataclasses import replace

import numpy as np
import pytest

from mmbivit.analysis.attention import AttentionMap
from mmbivit.analysis.figures.attention import attention_figure
from tests.analysis.figures.drawing import assert_texts_readable

# A window of 3 x 2 tokens of 8 pixels on a grid of 6 x 8, whose token in row 2, column 5 asks.
ROWS, COLUMNS, STRIDE = slice(1, 4), slice(5, 7), 8


def make_map(heads, binary, padding=0.0):
    rng = np.random.default_rng(0)
    weights = np.full((heads, 6, 8), np.nan, dtype=np.float32)
    window = rng.dirichlet(np.ones(6), heads).reshape(heads, 3, 2)
    if binary:
        window = (window >= 0.15) / (window >= 0.15).sum((1, 2), keepdims=True)
    weights[:, ROWS, COLUMNS] = window
    return AttentionMap("stages.1.blocks.0", weights, (2, 5), STRIDE, np.full(heads, padding), binary)


def make_figure(heads):
    pixels = np.random.default_rng(1).integers(0, 256, (46, 62, 3), dtype=np.uint8)
    maps = [("student", make_map(heads, True)), ("teacher", make_map(heads, False, 0.123))]
    return pixels, maps, attention_figure(pixels, maps)


def boxes(axes):
    return [(*patch.get_xy(), patch.get_width(), patch.get_height()) for patch in axes.patches]


def test_image_with_token_and_window():
    pixels, _, figure = make_figure(2)
    whole = figure.axes[0]
    np.testing.assert_array_equal(whole.images[0].get_array(), pixels)
    assert tuple(whole.images[0].get_extent()) == (0, 62, 46, 0)
    # x, y, width and height in pixels: the window, dashed, and the token.
    assert boxes(whole) == [(40, 8, 16, 24), (40, 16, 8, 8)]
    assert [patch.get_linestyle() for patch in whole.patches] == ["--", "solid"]
    assert figure.get_suptitle().endswith("at pixels x 40 to 47, y 16 to 23")


def test_heads_of_both_networks():
    pixels, maps, figure = make_figure(2)
    panels = np.array(figure.axes[1:]).reshape(2, 2)
    for row, (name, attention) in zip(panels, maps, strict=True):
        assert row[0].get_ylabel() == name
        for head, panel in enumerate(row):
            grey, shade = panel.images
            expected = 0.75 + 0.25 * (pixels * [0.299, 0.587, 0.114]).sum(-1) / 255
            np.testing.assert_allclose(grey.get_array(), expected)
            drawn = np.ma.filled(shade.get_array(), np.nan)
            np.testing.assert_array_equal(drawn, attention.weights[head])
            assert tuple(shade.get_extent()) == (0, 64, 48, 0)  # tokens reach over the image's 62 x 46 pixels
            assert shade.get_clim() == (0, np.nanmax(attention.weights[head]))
            assert boxes(panel) == [(40, 8, 16, 24), (40, 16, 8, 8)]
            assert (panel.get_xlim(), panel.get_ylim()) == ((28, 68), (44, -4))
    assert shade.cmap(0.0)[3] == 0 and shade.cmap(1.0)[3] > 0.8  # nothing over the image where nothing is selected
    chosen = [int((maps[0][1].weights[head] > 0).sum()) for head in range(2)]
    assert [panel.get_title() for panel in panels[0]] == [f"head {i + 1}: {n} of 6 keys" for i, n in enumerate(chosen)]
    largest = [np.nanmax(weights) for weights in maps[1][1].weights]
    assert [panel.get_title() for panel in panels[1]] == [
        f"head {i + 1}: up to {p:.2f}\n12% on padding" for i, p in enumerate(largest)
    ]


def test_the_share_of_a_class_token_has_its_own_name():
    attention = replace(make_map(2, False), beside=np.array([0.0, 0.456]))
    figure = attention_figure(np.zeros((46, 62, 3), dtype=np.uint8), [("student", attention)])
    assert [axes.get_title().split("\n")[1:] for axes in figure.axes[1:]] == [
        ["0% on class token"],
        ["46% on class token"],
    ]
    assert_texts_readable(figure)


@pytest.mark.parametrize("heads", [1, 24])
def test_texts_can_be_read(heads):
    _, _, figure = make_figure(heads)
    titles = [axes.get_title().partition(":")[0] for axes in figure.axes[1:]]
    for line in range(0, len(titles), 8 * 2 if heads > 8 else 2):
        first, last = line // 2 + 1, min(line // 2 + 8, heads)
        assert titles[line : line + 2 * (last - first + 1)] == [f"head {i}" for i in range(first, last + 1)] * 2
    assert_texts_readable(figure)
