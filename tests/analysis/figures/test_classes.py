"""What the pictures of classes and of classified images draw."""

import io

import numpy as np
import pytest

from mmbivit.analysis.figures.classes import classes_figure
from mmbivit.analysis.figures.classifications import classifications_figure
from mmbivit.analysis.figures.detections import Instance, detections_figure
from tests.analysis.figures.drawing import assert_texts_readable


def test_bars_have_the_values_and_lines_their_means():
    boxes, masks = [0.5, None, 0.1], [0.25, None, 0.45]
    figure = classes_figure(["cat", "dog", "bird"], {"boxes": boxes, "masks": masks}, "AP (0 to 1)")
    (axes,) = figure.axes
    widths = [[bar.get_width() for bar in bars] for bars in axes.containers]
    assert widths == [[0.5, 0, 0.1], [0.25, 0, 0.45]]
    assert [line.get_xdata()[0] for line in axes.get_lines()] == pytest.approx([0.3, 0.35])  # of those that are known
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog", "bird"]
    assert axes.get_xlabel() == "AP (0 to 1)"
    assert {bar.get_hatch() for bar in axes.containers[0]} != {bar.get_hatch() for bar in axes.containers[1]}
    # the first class is on top, and bars of a class do not overlap
    tops = [bar.get_y() for bars in axes.containers for bar in bars]
    assert (
        axes.yaxis_inverted() and tops[0] < tops[1] and tops[3] >= tops[0] + axes.containers[0][0].get_height() - 1e-9
    )
    assert_texts_readable(figure)


ODD = ["a$\\nosuch$b", "tab\tline\n", "bad\udcff", "$", "<b>&", ""]


def test_odd_names_of_classes_are_drawn_as_they_are():
    figure = classes_figure(ODD, {"boxes": [0.5] * len(ODD)}, "AP")
    figure.savefig(io.BytesIO(), format="svg")
    drawn = [label._preprocess_math(label.get_text())[0] for label in figure.axes[0].get_yticklabels()]
    assert drawn == ["a$\\nosuch$b", "tab\ufffdline\ufffd", "bad\ufffd", "$", "<b>&", ""]
    image = np.zeros((8, 8, 3), np.uint8)
    classifications_figure([image] * len(ODD), [f"{name}\nright" for name in ODD]).savefig(io.BytesIO())
    objects = [[Instance(name, (1, 1, 5, 5), score=0.5) for name in ODD]]
    detections_figure([image], {ODD[0]: objects}, ODD).savefig(io.BytesIO())


@pytest.mark.parametrize("count", [1, 5])
def test_images_have_their_captions_in_order(count):
    images = [np.full((8, 8, 3), 10 * i, dtype=np.uint8) for i in range(count)]
    captions = [f"{i} % a name of a class that is very long indeed\nright" for i in range(count)]
    figure = classifications_figure(images, captions)
    shown = [axes for axes in figure.axes if axes.images]
    assert [int(axes.images[0].get_array()[0, 0, 0]) for axes in shown] == [10 * i for i in range(count)]
    for i, axes in enumerate(shown):
        first, second = axes.get_xlabel().splitlines()
        assert first.startswith(f"{i} % a name of a") and first.endswith("…") and second == "right"
    assert not any(axes.axison for axes in figure.axes[count:])
    assert_texts_readable(figure)
