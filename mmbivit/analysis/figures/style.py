"""What all figures share: their size, shades that differ in greyscale too, and files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mmbivit.checks import UserError
from mmbivit.files import atomic_writer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    *("ACCENT", "DARK", "FORMATS", "GREY", "LIGHT"),
    *("check_format", "new_figure", "plain", "save_figure", "without_formulas"),
]

FORMATS = (".png", ".svg")

# Their luminance falls from 0.75 over 0.45 to 0.1, so they stay apart without colour.
LIGHT, ACCENT, DARK, GREY = "#9fc9e8", "#d9731a", "#12304f", "#8a8a8a"


def new_figure(width: float, height: float) -> "Figure":
    """Make an empty figure of ``width`` x ``height`` inches whose parts do not overlap; no window is opened."""
    from matplotlib.figure import Figure  # slow to import, and only needed to draw

    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def plain(name: object) -> str:
    """Return a name of the user's as a text of figures, where ``$`` would begin a formula.

    A replacement character stands for what cannot be shown: control characters and bytes that are no UTF-8.
    """
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(name)).replace("$", r"\$")


@contextmanager
def without_formulas() -> Iterator[None]:
    """Let matplotlib write texts as they are, for what MMDetection draws with names of the user's."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}):
        yield


def check_format(path: str | Path) -> None:
    """Raise a ValueError unless a file's name ends in ``.png`` or ``.svg``."""
    if Path(path).suffix.lower() not in FORMATS:
        raise UserError(f"{path}: a picture is written as its name ends; allowed: {', '.join(FORMATS)}")


def save_figure(figure: "Figure", path: str | Path) -> None:
    """Write a figure as PNG or SVG, whole or not at all; missing folders are made.

    Args:
        figure: the figure.
        path: the file, ending in ``.png`` or ``.svg``.

    Raises:
        ValueError: for another ending.
        OSError: if the file cannot be written.
    """
    check_format(path)
    path = Path(path)
    with atomic_writer(path) as file:
        figure.savefig(file, format=path.suffix[1:].lower())
