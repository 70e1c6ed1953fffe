"""What the benchmarks' tools share: sizes of images as options, and tables on the screen and in a file."""

import argparse
import re
from pathlib import Path

from rich.console import Console, RenderableType

__all__ = ["print_tables", "size"]

WIDTH = 132  # of tables, also in a pipe


def size(text: str) -> tuple[int, ...]:
    """Read ``8x224x224``.

    Raises:
        argparse.ArgumentTypeError: for anything but three positive numbers.
    """
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"expected batch x height x width, such as 1x224x224, got {text!r}")
    return tuple(map(int, text.split("x")))


def print_tables(tables: RenderableType, out: Path | None) -> None:
    """Print tables, and write them to a file, too."""
    Console(width=WIDTH, markup=False, highlight=False).print(tables)
    if out:
        with out.open("w") as file:
            Console(file=file, width=WIDTH, markup=False, highlight=False).print(tables)
