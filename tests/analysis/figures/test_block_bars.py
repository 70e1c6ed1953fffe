"""Figures with a bar for each block: spatial interaction and gradient conflict."""

import io

import pytest

from mmbivit.analysis.figures.blocks import block_label
from mmbivit.analysis.figures.conflict import conflict_figure
from mmbivit.analysis.figures.interaction import interaction_figure
from mmbivit.analysis.gradient_conflict import ConflictRow, GradientConflict
from mmbivit.analysis.spatial_interaction import InteractionRow, SpatialInteractionCapability

NAMES = ("stages.0.blocks.0", "stages.1.blocks.10")


def make_capability(names=NAMES):
    rows = []
    for i, name in enumerate(names, 1):
        rows += [
            InteractionRow(name, "attn", 4, None, 1, 1000 * i),
            InteractionRow(name, "mlp", 4, None, 1, 0),
            InteractionRow(name, "mlp.si.fc1", 4, 4, 1, 300 * i),
            InteractionRow(name, "mlp.si.fc2", 4, 4, 1, 400 * i),
        ]
    return SpatialInteractionCapability(tuple(rows), (3, 32, 64))


def make_conflict(names=NAMES, batches=2):
    rows = []
    for i, name in enumerate(names, 1):
        rows += [ConflictRow(name, "fc1.weight", 0.02 * i, 0.0), ConflictRow(name, "fc2.weight", 0.01 * i, 0.01)]
    return GradientConflict(tuple(rows), batches)


def heights(bars):
    return [bar.get_height() for bar in bars]


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_block_label():
    assert block_label("stages.2.blocks.17") == "2.17"


def test_interaction():
    (axes,) = interaction_figure(make_capability()).axes
    attention, mixing = axes.containers
    assert heights(attention) == [1000, 2000]
    assert heights(mixing) == [700, 1400]
    assert [bar.get_y() for bar in mixing] == [1000, 2000]  # on top
    assert texts(axes) == ["1.7k", "3.4k"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.0", "1.10"]
    assert axes.get_title() == "SIC 5,100 at 64 x 32 pixels, 1.7 times attention alone"
    (legend,) = axes.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["attention", "token mixing"]
    assert [bar.get_hatch() for bar in (attention[0], mixing[0])] == [None, "//"]  # apart without colour too


def test_conflict():
    (axes,) = conflict_figure(make_conflict()).axes
    up, down = axes.containers
    assert heights(up) == pytest.approx([10, 10])  # g- in thousandths
    assert heights(down) == pytest.approx([-30, -60])  # g+
    assert texts(axes) == ["10", "10", "30", "60"]
    assert r"$10^{-3}$" in axes.get_ylabel()
    assert (
        axes.get_title() == "18% of the gradient of distillation is against the task\n"
        "$g^-$ = 0.02, $g^+$ = 0.09, batches averaged: 2"
    )
    (legend,) = axes.figure.legends
    assert ["g^-" in legend.get_texts()[0].get_text(), "g^+" in legend.get_texts()[1].get_text()] == [True, True]
    assert [bar.get_hatch() for bar in (up[0], down[0])] == ["//", None]
    assert axes.yaxis.get_major_formatter()(-20, 0) == "20"  # below zero is no negative size


def test_conflict_of_other_sizes():
    rows = (ConflictRow(NAMES[0], "fc1.weight", 2.45, 1.97), ConflictRow(NAMES[1], "fc1.weight", 0.0004, 0.0))
    (axes,) = conflict_figure(GradientConflict(rows, 1)).axes
    assert "10^" not in axes.get_ylabel()
    assert texts(axes) == ["1.97", "0", "2.45", "<0.01"]
    assert axes.get_title().endswith("batches averaged: 1")


def wide_numbers(kind, names):
    """Return a figure of numbers that take as much room as any."""
    if kind == "interaction":
        rows = [InteractionRow(name, "attn", 49, None, 72, 888_800) for name in names]
        return interaction_figure(SpatialInteractionCapability(tuple(rows), (3, 800, 1344)))
    rows = [ConflictRow(name, "fc1.weight", 0.888, 1e-9) for name in names]
    return conflict_figure(GradientConflict((ConflictRow(names[0], "fc1.weight", 1.0, 1.0), *rows[1:]), 4))


@pytest.mark.parametrize("kind", ["interaction", "conflict"])
def test_nothing_overlaps_with_24_blocks(kind):
    names = [f"stages.{i}.blocks.{j}" for i, depth in enumerate((2, 2, 18, 2)) for j in range(depth)]
    figure = wide_numbers(kind, names)
    figure.savefig(io.BytesIO(), format="png")
    (axes,) = figure.axes
    rows = [axes.texts[: len(names)], axes.texts[len(names) :], axes.get_xticklabels()]
    for boxes in ([text.get_window_extent() for text in row] for row in rows):
        assert all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:], strict=False))
    outside = [axes.title, axes.xaxis.label, axes.yaxis.label, figure.legends[0]]
    boxes = [part.get_window_extent() for part in outside]
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
