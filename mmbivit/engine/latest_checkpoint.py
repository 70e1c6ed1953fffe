"""Finding what a run can go on from."""

import logging
import re
from pathlib import Path

from mmengine.logging import print_log

from mmbivit.checkpoints import load_checkpoint_file
from mmbivit.checks import UserError

from .checkpoint_fields import why_not_resumable

__all__ = ["POINTER", "find_resumable_checkpoint", "pointed_checkpoint"]

POINTER = "last_checkpoint"


def find_resumable_checkpoint(work_dir: str | Path) -> Path | str | None:
    """Return the newest checkpoint of a work directory that a run can go on from.

    That is the one that the file ``last_checkpoint`` points to. If it does not load, others beside it are tried, the
    newest first, and a warning says which was taken and why.

    Args:
        work_dir: the work directory of a run; it may not exist.

    Returns:
        The checkpoint (a URL, if checkpoints are kept on remote storage); None if there is none at all.

    Raises:
        ValueError: if there are checkpoints, but none of them loads; the message has the reason of each.
    """
    work_dir = Path(work_dir)
    pointer = work_dir / POINTER
    first = pointed_checkpoint(work_dir)
    if isinstance(first, str):
        return first
    folder = first.parent if first is not None and first.parent.is_dir() else work_dir
    others = sorted(folder.glob("*.pth"), key=_age, reverse=True)
    reasons = [] if first is None or first.is_file() else [f"{first} does not exist"]
    for path in dict.fromkeys([*([first] if first is not None and first.is_file() else []), *others]):
        if (reason := _why_not(path)) is None:
            if reasons or first is None:
                skipped = "; ".join(reasons) or f"{pointer} is missing or empty"
                print_log(f"Going on from {path}, the newest checkpoint that can be resumed: {skipped}.",
                          "current", logging.WARNING)  # fmt: skip
            return path
        reasons.append(reason)
    if reasons:
        raise UserError(f"nothing in {work_dir} can be resumed: {'; '.join(reasons)}")
    return None


def pointed_checkpoint(work_dir: str | Path) -> Path | str | None:
    """Return what the file ``last_checkpoint`` of a work directory names, which may not exist, or None.

    MMEngine's names are absolute, or relative to where training was started; a URL stays one.
    """
    work_dir = Path(work_dir)
    pointer = work_dir / POINTER
    target = pointer.read_text(errors="replace").strip() if pointer.is_file() else ""
    if "://" in target:
        return target
    if not target or "\0" in target:
        return None
    inside = work_dir / target
    if inside.is_file() or not Path(target).is_file():
        moved = work_dir / Path(target).name  # of a work directory that has been moved since
        return inside if inside.is_file() or not moved.is_file() else moved
    return Path(target)


def _age(path: Path) -> tuple[int, int]:
    """The number in the name of a checkpoint, its epoch or iteration, then the time of writing."""
    numbers = re.findall(r"\d+", path.stem)
    return int(numbers[-1]) if numbers else -1, path.stat().st_mtime_ns


def _why_not(path: Path) -> str | None:
    """Why a run cannot go on from a file, or None."""
    try:
        checkpoint = load_checkpoint_file(str(path))
    except (OSError, ValueError) as error:
        return str(error)
    reason = why_not_resumable(checkpoint)
    return f"{path}: {reason}" if reason else None
