"""Brings Tiny-ImageNet into class folders that timm and torchvision label rightly.

The archive has the training images in ``train/<wnid>/images`` and all validation images in ``val/images``. Both readers
of image folders go wrong there: timm takes the innermost folder for the class, so that every image is an ``images``.
"""

from __future__ import annotations

import filecmp
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from timm.data import create_reader

from mmbivit.checks import UserError

OFFICIAL_COUNTS = {"train": 500, "val": 50}  # images per class
NUM_CLASSES = 200
TREE = """\
  ├── train/
  │   └── <wnid>/
  │       └── images/
  │           └── *.JPEG
  ├── val/
  │   ├── images/
  │   │   └── *.JPEG
  │   └── val_annotations.txt
  ├── wnids.txt
  └── words.txt"""

Moves = list[tuple[Path, Path]]


def convert_tiny_imagenet(
    root: str | os.PathLike,
    out: str | os.PathLike | None = None,
    *,
    num_classes: int = NUM_CLASSES,
    counts: dict[str, int] | None = None,
    progress: Callable[[Moves], Iterable[tuple[Path, Path]]] = iter,
) -> Path:
    """Put the training images into ``train/<wnid>/`` and the validation images into ``val/<wnid>/``.

    Nothing is touched unless every class has its images. One file after the other is moved, in one step each, and what
    is found decides what is left to do: after an interruption at any point, run it again. Files are never overwritten
    by others. Boxes, annotations and the unlabelled test images stay where they are.

    Args:
        root: The folder ``tiny-imagenet-200`` that the official archive extracts to, or one that is already converted.
        out: Make the class folders here and leave ``root`` as it is; images are hard links where the file system has
            them, else copies. ``wnids.txt`` and ``words.txt`` go with them.
        num_classes: Classes that there must be.
        counts: Images that each class must have, ``{'train': 500, 'val': 50}`` by default.
        progress: Wraps the list of files as they are worked on, as ``rich.progress.track`` does.

    Returns:
        The folder with the class folders.

    Raises:
        FileNotFoundError: ``root`` is not that folder; the message has the expected tree.
        ValueError: Classes or images are missing, unknown, or twice there and different; the message names them.
    """
    root = Path(root)
    in_place = out is None or (root.exists() and Path(out).exists() and root.samefile(out))
    out = root if in_place else Path(out)
    counts = counts or OFFICIAL_COUNTS
    wnids = _read_wnids(root, num_classes)
    moves = [move for split in counts for move in _plan(root / split, out / split, wnids)]
    for split, count in counts.items():
        targets = {target for _, target in moves if target.parent.parent == out / split}
        _check_counts(root / split, Counter(target.parent.name for target in targets), wnids, count)
    _check_conflicts(moves)
    moves = [(source, target) for source, target in moves if source != target]
    if in_place:
        _check_links(moves)
    for folder in {target.parent for _, target in moves}:
        folder.mkdir(parents=True, exist_ok=True)
    place = os.replace if in_place else _link
    for source, target in progress(moves):
        place(source, target)
    if in_place:
        _remove_empty(root, wnids, counts)
    else:
        for path in (root / "wnids.txt", root / "words.txt"):
            if path.is_file():
                _link(path, out / path.name)
    for split, count in counts.items():
        _check_counts(out / split, _count_as_timm(out / split), wnids, count)
    return out


# Reading


def _read_wnids(root: Path, num_classes: int) -> list[str]:
    needed = ["wnids.txt", "train", "val"]
    missing = [name for name in needed if not (root / name).exists()]
    if missing:
        raise FileNotFoundError(_explain(root, missing))
    wnids = (root / "wnids.txt").read_text().split()
    if len(set(wnids)) != num_classes:
        raise UserError(f"{root / 'wnids.txt'} names {len(set(wnids))} classes instead of {num_classes}")
    return list(dict.fromkeys(wnids))


def _explain(root: Path, missing: list[str]) -> str:
    lines = [f"{root} is not the folder of Tiny-ImageNet: it has no {', '.join(missing)}. Expected:"]
    lines += [f"  {root}/", TREE]
    inner = root / "tiny-imagenet-200"
    if inner.is_dir():
        lines.append(f"It is probably {inner}")
    elif root.suffix == ".zip":
        lines.append(f"Extract the archive first: unzip -q {root}")
    return "\n".join(lines)


def _plan(source: Path, target: Path, wnids: list[str]) -> Moves:
    """Where each image of a split is and where it belongs, whatever has been done before."""
    moves = []
    for wnid in wnids:
        for folder in (source / wnid / "images", source / wnid):
            moves += [(image, target / wnid / image.name) for image in _images(folder)]
    flat = _images(source / "images")
    classes = _read_annotations(source / "val_annotations.txt") if flat else {}
    for image in flat:
        if classes.get(image.name) not in wnids:
            raise UserError(f"{source / 'val_annotations.txt'} names no class of wnids.txt for {image}")
        moves.append((image, target / classes[image.name] / image.name))
    return moves


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() == ".jpeg")


def _read_annotations(path: Path) -> dict[str, str]:
    """The class of each validation image; the columns after it are its box."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, which has the classes of the images in {path.parent / 'images'}")
    rows = [line.split("\t") for line in path.read_text().splitlines() if line.strip()]
    wrong = [row for row in rows if len(row) < 2]
    if wrong:
        raise UserError(f"{path} has a line without tabs: {wrong[0][0]!r}; expected: file, wnid, x, y, w, h")
    return {row[0]: row[1] for row in rows}


# Checking


def _check_counts(folder: Path, found: Counter[str], wnids: list[str], count: int) -> None:
    unknown = sorted(set(found) - set(wnids))
    if unknown:
        raise UserError(f"{folder} has images in folders that are no classes of wnids.txt: {', '.join(unknown[:5])}")
    wrong = [wnid for wnid in wnids if found[wnid] != count]
    if wrong:
        more = f", and {len(wrong) - 1} more classes are wrong" if len(wrong) > 1 else ""
        raise UserError(
            f"{folder}: class {wrong[0]} has {found[wrong[0]]} images instead of {count}{more}. "
            "Extract the archive again"
        )


def _check_conflicts(moves: Moves) -> None:
    """Raise a ValueError if different files belong to one place; the same file twice is an archive extracted twice."""
    sources: dict[Path, Path] = {}
    for source, target in moves:
        for other in (sources.setdefault(target, source), target):
            if other != source and other.exists() and not filecmp.cmp(source, other, shallow=False):
                raise UserError(f"{source} and {other} are different, but both belong to {target}: remove one of them")


def _check_links(moves: Moves) -> None:
    links = [source for source, _ in moves if source.is_symlink()]
    if links:
        raise UserError(f"{links[0]} is a link, which would break when it is moved: convert to another folder (--out)")


def _count_as_timm(folder: Path) -> Counter[str]:
    """Images by class, as the reader of the training run will see them."""
    reader = create_reader("", str(folder))
    names = {label: name for name, label in reader.class_to_idx.items()}
    return Counter(names[label] for _, label in reader.samples)


# Doing


def _link(source: Path, target: Path) -> None:
    """Hard link, or copy under another name first, so that an interruption leaves no half file."""
    if target.exists():
        return
    with suppress(OSError):  # another file system, or one without hard links
        if not source.is_symlink():  # its link would be relative to another folder
            os.link(source, target)
            return
    part = target.with_name(f"{target.name}.part")
    shutil.copy2(source, part)
    os.replace(part, target)


def _remove_empty(root: Path, wnids: list[str], splits: Iterable[str]) -> None:
    """Remove folders that are empty now, which torchvision would take for classes without images."""
    for split in splits:
        for folder in (root / split / "images", *(root / split / wnid / "images" for wnid in wnids)):
            with suppress(OSError):  # not there, or not empty
                folder.rmdir()
