"""A page of sections as one HTML file that needs nothing else: styles and pictures are inside."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Fact", "Page", "Picture", "Section", "Table", "render"]


@dataclass(frozen=True)
class Fact:
    """A number at the top of the page.

    Args:
        name: what it is.
        value: the number with its unit.
        note: what to compare it with.
    """

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table; columns of numbers stand right, but for the first, which says what a row is."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    @property
    def alignment(self) -> list[str]:
        """``number`` or ``text`` for each column; a dash stands for a number that there is not."""
        _, *columns = zip(*self.rows, strict=True)
        are_numbers = [all(cell[:1] in "0123456789.-–" for cell in column) for column in columns]
        return ["text", *("number" if numbers else "text" for numbers in are_numbers)]


@dataclass(frozen=True)
class Picture:
    """A picture as a ``data:`` address, and its description for those who do not see it."""

    address: str
    description: str

    @classmethod
    def of(cls, figure: "Figure", description: str, photo: bool = False) -> "Picture":
        """Draw a figure as SVG, or with ``photo`` as PNG, which is smaller where there are images in it."""
        buffer = io.BytesIO()
        kind, mime = ("png", "image/png") if photo else ("svg", "image/svg+xml")
        figure.savefig(buffer, format=kind)
        return cls(f"data:{mime};base64,{base64.b64encode(buffer.getvalue()).decode()}", description)


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Args:
        title: its heading.
        text: what is to be seen, in a sentence or two.
        pictures: shown below each other.
        tables: below them.
        problem: why something is missing.
        details: long text behind a heading that opens it, by heading; shown in full in print.
        facts: its numbers that belong to the top of the page.
    """

    title: str
    text: str = ""
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    problem: str = ""
    details: dict[str, str] = field(default_factory=dict)
    facts: Sequence[Fact] = ()

    @property
    def anchor(self) -> str:
        """The name that links within the page lead to."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.title.lower())


@dataclass(frozen=True)
class Page:
    """A whole page.

    Args:
        title: what it is about.
        subtitle: one line below it.
        sections: in order.
        footer: where the page comes from.
    """

    title: str
    subtitle: str
    sections: Sequence[Section]
    footer: str

    @property
    def facts(self) -> list[Fact]:
        """The numbers that matter most."""
        return [fact for section in self.sections for fact in section.facts]


def render(page: Page) -> str:
    """Return a page as HTML; all text in it is escaped, and characters that UTF-8 has not are replaced."""
    environment = Environment(
        loader=PackageLoader("mmbivit.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(page=page).encode(errors="replace").decode()
