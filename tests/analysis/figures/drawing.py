"""Whether the texts of a figure can be read where they are."""

import io
from itertools import combinations

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure, SubFigure
from matplotlib.text import Text

__all__ = ["assert_texts_readable"]


def assert_texts_readable(figure: Figure) -> None:
    """Assert that every text of a figure lies inside it, and none over another."""
    figure.savefig(io.BytesIO(), format="png")  # lays everything out
    texts = [text for text in _texts(figure) if text.get_visible() and text.get_text().strip()]
    assert texts
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    for name, box in boxes:
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert inside, f"{name!r} is clipped"
    for (one, a), (other, b) in combinations(boxes, 2):
        assert not a.overlaps(b), f"{one!r} lies over {other!r}"


def _texts(figure: Figure | SubFigure) -> list[Text]:
    found = [text for text in (figure._suptitle, figure._supxlabel) if text is not None]
    for part in figure.subfigs:
        found += _texts(part)
    for legend in figure.legends:
        found += legend.get_texts()
    own = [axes for axes in figure.axes if axes.figure is figure]
    return found + [text for axes in own for text in _texts_of_axes(axes)]


def _texts_of_axes(axes: Axes) -> list[Text]:
    found = [axes.title, *axes.texts]
    for axis in (axes.xaxis, axes.yaxis):
        found += [axis.label, *_shown_tick_labels(axis)]
    return found


def _shown_tick_labels(axis: Axis) -> list[Text]:
    low, high = sorted(axis.get_view_interval())
    return [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
