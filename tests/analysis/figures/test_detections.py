"""Detections side by side: what is drawn where, with which words and colours."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from pycocotools import mask as mask_utils

from mmbivit.analysis.figures.detections import Instance, detections_figure
from mmbivit.datasets.scene_drawing import PALETTE
from tests.analysis.figures.drawing import assert_texts_readable


def make_images():
    """One image that is bright on the left and dark on the right, and one upright, dark."""
    wide = np.full((40, 80, 3), 250, np.uint8)
    wide[:, 40:] = 10
    return [wide, np.full((80, 40, 3), 5, np.uint8)]


def make_mask():
    mask = np.zeros((40, 80), np.uint8, order="F")
    mask[10:30, 20:60] = 1
    return mask


def test_boxes_masks_classes_and_scores_are_where_they_belong():
    mask = make_mask()
    cat = Instance("cat", (20, 10, 40, 20), mask_utils.encode(mask), score=0.87)
    dog = Instance("dog", (5, 60, 30, 15), score=1.0)
    images = make_images()
    rows = {"annotation": [[Instance("dog", (1, 2, 10, 12))], []], "detector": [[cat], [dog, dog]]}
    axes = detections_figure(images, rows, ["cat", "dog"]).axes
    assert [[text.get_text() for text in axis.texts] for axis in axes] == [["dog"], [], ["cat .9"], ["dog 1.0"] * 2]
    assert [axis.get_ylabel() for axis in axes] == ["annotation", "", "detector", ""]
    assert [len(axis.patches) for axis in axes] == [1, 0, 1, 2]
    assert [len(axis.collections) for axis in axes] == [0, 0, 1, 0]  # outlines of masks
    box = axes[2].patches[0]
    assert (box.get_x(), box.get_y(), box.get_width(), box.get_height()) == (19.5, 9.5, 40, 20)
    pixels, tint = (image.get_array() for image in axes[2].images)
    np.testing.assert_array_equal(pixels, images[0])
    np.testing.assert_array_equal(tint[..., 3] > 0, mask)
    assert to_rgb(box.get_edgecolor()) == to_rgb(PALETTE[0])
    assert (
        to_rgb(axes[0].patches[0].get_edgecolor()) == to_rgb(axes[3].patches[0].get_edgecolor()) == to_rgb(PALETTE[1])
    )
    for axis in axes:  # the whole image is shown, whatever was drawn
        height, width = axis.images[0].get_size()
        assert (axis.get_xlim(), axis.get_ylim()) == ((-0.5, width - 0.5), (height - 0.5, -0.5))


@pytest.mark.parametrize("label", ["cat", "dog"])
def test_an_outline_has_one_around_it_that_differs_in_grey(label):
    """It is drawn over white and black, where red's complement would not help a grey printer."""
    cat = Instance(label, (20, 10, 40, 20), mask_utils.encode(make_mask()))
    (axis,) = detections_figure(make_images()[:1], {"": [[cat]]}, ["cat", "dog"]).axes
    for artist in (*axis.patches, *axis.collections):
        color = np.atleast_2d(artist.get_edgecolor())[0, :3]
        (around,) = artist.get_path_effects()
        around = to_rgb(around._gc["foreground"])
        assert abs((color - around) @ [0.299, 0.587, 0.114]) > 0.4


@pytest.mark.parametrize("x", [0, 40, 70, 79])
@pytest.mark.parametrize("y", [0, 20, 39])
def test_names_stay_in_the_image(x, y):
    instance = Instance("motorcycle", (x, y, 80 - x, 40 - y), score=0.9)
    figure = detections_figure(make_images(), {"detector": [[instance], []]}, ["motorcycle"])
    assert_texts_readable(figure)
    axis = figure.axes[0]
    (text,) = axis.texts
    inside, tag = axis.get_window_extent(), text.get_bbox_patch().get_window_extent()
    assert inside.x0 - 2 <= tag.x0 and tag.x1 <= inside.x1 + 2  # pixels: the frame's line
    box = axis.patches[0].get_window_extent()
    assert min(abs(tag.x0 - box.x0), abs(tag.x1 - box.x1)) < 4  # it begins or ends with its box
    assert inside.y0 - 2 <= tag.y0 and tag.y1 <= inside.y1 + 2


def test_images_of_any_shape_are_as_high_as_each_other():
    figure = detections_figure(make_images(), {"a": [[], []], "b": [[], []]}, [], height=2)
    figure.draw_without_rendering()
    boxes = [axis.get_window_extent() for axis in figure.axes]
    assert boxes[0].height == pytest.approx(boxes[1].height, rel=0.05)
    assert boxes[0].width == pytest.approx(4 * boxes[1].width, rel=0.05)
    assert boxes[0].height / figure.dpi == pytest.approx(2, rel=0.1)
