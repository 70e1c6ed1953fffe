"""Folders that a generator makes: they appear when they are complete, are found again, and replace nothing foreign.

A marker file (JSON) in the folder says what made it, and with which options.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("numpy", "pillow", "pycocotools", "scikit-image", "scikit-learn", "scipy")
ADVICE = "Choose another folder, or pass overwrite (--overwrite) to make it again."


def package_versions() -> dict[str, str]:
    """Versions of the packages whose work is in the pixels."""
    return {name: metadata.version(name) for name in PACKAGES}


def read_marker(root: Path, marker: str, keys: Sequence[str], what: str, tool: str) -> list[Any]:
    """Values in the marker file of a made folder.

    Raises:
        FileNotFoundError: if there is no such file or a key is missing; it says ``what`` was expected and the ``tool``
            command that makes it.
    """
    try:
        content = json.loads((root / marker).read_text())
        return [content[key] for key in keys]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileNotFoundError(
            f"{root} is not a {what}: it has no valid {marker}. Make one with `{tool} --out {root}`."
        ) from error


def is_foreign(out: Path, marker: str) -> bool:
    """Whether ``out`` is a file, or a folder with something in it but without ``marker``."""
    if not out.is_dir():
        return out.exists()
    return any(out.iterdir()) and not (out / marker).is_file()


def check_not_foreign(out: Path, marker: str, maker: str) -> None:
    """Raise FileExistsError if ``out`` holds something that the function ``maker`` has not made."""
    if is_foreign(out, marker):
        raise FileExistsError(
            f"{out} exists and was not made by {maker} (it has no {marker}). Choose another folder, or pass "
            f"overwrite (--overwrite) to move it to {_backup_path(out)}."
        )


def check_same_options(out: Path, what: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise FileExistsError if the data in ``out`` (``what`` it is, for the message) have other options than asked."""
    different = [key for key in sorted(found.keys() | wanted.keys()) if found.get(key) != wanted.get(key)]
    if different:
        listed = ", ".join(f"{key}={found.get(key)} (asked for: {wanted.get(key)})" for key in different)
        raise FileExistsError(f"{out} holds {what} made with other options: {listed}. {ADVICE}")


def check_complete(out: Path, missing: list[Path]) -> None:
    """Raise FileExistsError if files are missing."""
    if missing:
        raise FileExistsError(f"{out} is damaged: {len(missing)} files are missing, such as {missing[0]}. {ADVICE}")


@contextmanager
def new_folder(out: Path, marker: str, overwrite: bool) -> Iterator[Path]:
    """An empty folder to work in, which becomes ``out`` when the block ends well and is removed when it does not.

    Args:
        out: The folder to make. What is there with the ``marker`` is deleted, anything else is kept beside it.
        marker: File name by which folders of this kind are known.
        overwrite: Whether something may be in the way. Then it is found out first that it can be moved.
    """
    if overwrite and is_foreign(out, marker) and _backup_path(out).exists():
        raise FileExistsError(f"{out} cannot be moved to {_backup_path(out)}, because that exists too: remove one.")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = _sibling(out, "making")
    work.mkdir()
    try:
        yield work
        _install(work, out, marker)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # of a full disk
            raise OSError(error.errno, error.strerror, str(out)) from error
        raise
    finally:  # also on Ctrl-C; after a success there is nothing left to remove
        shutil.rmtree(work, ignore_errors=True)


def _sibling(out: Path, purpose: str) -> Path:
    """A new hidden name beside ``out``, on the same file system, so that renaming it is atomic."""
    return out.with_name(f".{out.name}.{purpose}-{secrets.token_hex(4)}")


def _backup_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.old")


def _install(work: Path, out: Path, marker: str) -> None:
    if not out.exists():
        work.rename(out)
        return
    foreign = is_foreign(out, marker)
    old = _backup_path(out) if foreign else _sibling(out, "old")
    out.rename(old)
    try:
        work.rename(out)
    except BaseException:
        old.rename(out)
        raise
    if not foreign:
        shutil.rmtree(old)
