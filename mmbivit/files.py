"""Writing files so that a crash leaves the old one or the new one, never a part."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["atomic_writer", "remove_parts"]


@contextmanager
def atomic_writer(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for writing that appears under its name when it is complete and on the disk; folders are made.

    The content goes to a temporary file beside it, which is flushed to the disk and renamed. After an error, such as a
    full disk, the temporary file is gone and a file that was there before is as it was.

    Args:
        path: the file; one that exists is replaced.

    Raises:
        OSError: if the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    _sync_folder(path.parent)


def remove_parts(folder: str | Path) -> list[Path]:
    """Remove the temporary files that killed processes left in a folder, and return their paths.

    Nobody else may be writing there.
    """
    parts = [path for path in Path(folder).glob("*.part") if re.search(r"\.\d+\.part$", path.name)]
    for path in parts:
        path.unlink(missing_ok=True)
    return parts


def _sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk, where that exists."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
