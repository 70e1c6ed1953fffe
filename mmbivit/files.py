"""Writing files so that a crash leaves the old one or the new one, never a part."""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["atomic_writer", "check_writable", "remove_parts"]


@contextmanager
def atomic_writer(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for writing that appears under its name when it is complete and on the disk; folders are made.

    The content goes to a temporary file beside it, which is flushed to the disk and renamed. After an error, such as a
    full disk, the temporary file is gone and a file that was there before is as it was.

    Args:
        path: the file; one that exists is replaced.

    Raises:
        OSError: if the file cannot be written; it names the file.
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
    except OSError as error:
        # What fails after a file is opened, on a full disk for example, knows no name.
        if error.errno is not None and error.filename in (None, str(part)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        part.unlink(missing_ok=True)
    _sync_folder(path.parent)


def check_writable(option: str, path: str | Path, folder: bool = False) -> None:
    """Find out whether a file can be written, before the work whose result it gets; nothing is made or changed.

    Args:
        option: the option or argument that names the path, for the message.
        path: a file to make or to replace. Folders above it that do not exist are taken for those to be made.
        folder: whether the path is a folder for files instead.

    Raises:
        OSError: if it cannot be written; the message names option and path.
    """
    path = Path(path)
    place = path if folder else path.parent
    try:
        if path.exists() and not (path.is_dir() if folder else path.is_file()):
            raise FileExistsError(f"{option} {path} is {'no folder' if folder else 'a folder, or no regular file'}")
        if path.is_file():
            path.open("ab").close()
        while not place.exists():
            place = place.parent
        if not place.is_dir():
            raise NotADirectoryError(f"{option} {path}: {place} is a file, so that nothing can be put below it")
        tempfile.TemporaryFile(dir=place).close()  # os.access() does not know read-only disks
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(f"{option} {path} cannot be written: {error.strerror}: {place}") from error


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
