"""Digit folders: cluttered digits for classification, made from real pixels as class folders, without a download.

Each image has one whole handwritten digit (scikit-learn), whose class is the label, on a crop of a photograph, and
fragments of other digits in other colours around and partly over it. Fragments are what a network has to see through:
they have the strokes, the contrast and the colours of digits, so that only the arrangement tells them apart. The task
follows the cluttered MNIST of Mnih et al., Recurrent Models of Visual Attention (2014).

Digits and fragments are light, and photographs are dimmed to half their brightness: a transformer of a few thousand
weights has to learn the task in minutes on a CPU, which it does not where either may be the lighter one.

Digit samples and photographs of ``val`` are never used in ``train``; see :mod:`.digit_scenes` for writers and credits.
A mirrored 2 is not a 2: leave flips out of the training pipeline.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mmbivit.checks import UserError, check_integer

from .digit_scenes import CREDITS, DIGIT_CLASSES, SPLITS
from .made_folders import (
    ADVICE,
    check_complete,
    check_not_foreign,
    check_same_options,
    new_folder,
    package_versions,
    read_marker,
)
from .scene_rendering import (
    INK_THRESHOLD,
    color_of,
    crop_photo,
    digit_indices,
    digit_samples,
    paint,
    place_digit,
    render_digit,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKER = "digit_folders.json"
GENERATOR_VERSION = 1  # raise it when the same options would give other images

TARGET_HEIGHT = 0.6, 0.85  # of the side of the image
LIGHT = 190.0, 255.0  # luminance of digits and fragments; that of a dimmed photograph is below 128
FRAGMENT_SHARE = 0.25, 0.4  # of the ink of the digit it is cut from: never so much that it could be the whole one


@dataclass(frozen=True)
class DigitFolders:
    """A digit folders data set on disk: ``<root>/<split>/<digit>/<i>.png``, and ``<root>/<split>.json``.

    Args:
        root: Its folder.
        options: What it was made with: train, val, size, seed, clutter ``[least, most]``, generator.
        versions: Versions of the packages it was made with. Other versions may give other pixels.
        images: Number of images per split and digit.
        reused: True if :func:`make_digit_folders` found it ready.
    """

    root: Path
    options: dict[str, Any]
    versions: dict[str, str]
    images: dict[str, dict[str, int]]
    reused: bool = field(default=False, compare=False)

    @classmethod
    def load(cls, root: str | os.PathLike, reused: bool = False) -> DigitFolders:
        """Read the description of the data set in ``root``.

        Raises:
            FileNotFoundError: ``root`` is not a digit folders data set.
        """
        root = Path(root)
        keys = ("options", "versions", "images")
        tool = "python tools/make_digit_scenes.py --layout folders"
        return cls(root, *read_marker(root, MARKER, keys, "digit folders data set", tool), reused)

    def records(self, split: str) -> list[dict[str, Any]]:
        """What is in each image of ``split`` ('train' or 'val'), in the order of their numbers.

        Each has ``file`` (relative to ``root``), ``digit`` (the label), ``index`` of the sample, ``box``
        ``[x, y, w, h]`` of the visible part, ``visible`` (its share of the digit's ink), ``photo``, ``photo_box``, and
        ``clutter``: a list of fragments with ``digit``, ``index`` and ``share`` of that digit's ink.
        """
        return json.loads((self.root / f"{split}.json").read_text())


def make_digit_folders(
    out_dir: str | os.PathLike,
    *,
    train: int = 8000,
    val: int = 1000,
    size: int = 32,
    seed: int = 0,
    clutter: tuple[int, int] = (1, 2),
    overwrite: bool = False,
    progress: Callable[[], None] | None = None,
) -> DigitFolders:
    """Make the data set in ``out_dir``, or reuse the one that is there if it was made with the same options.

    The same options and package versions give the same bytes. Image ``i`` of a split depends on ``seed`` and ``i``
    only and has the label ``i % 10``, so a smaller data set is the beginning of a larger one and the classes are
    balanced. The folder appears when it is complete, never before.

    Args:
        out_dir: Folder to make. A link to a folder is followed.
        train: Number of training images, at least 10.
        val: Number of validation images, at least 10.
        size: Side of an image in pixels, at least 32. Digits are 60 to 85 % of it high, where that fits.
        seed: Of all random choices.
        clutter: Least and most fragments of other digits in an image (fewer where they would hide the digit).
        overwrite: Replace a digit folders data set; move anything else that is in the way to ``<out_dir>.old``.
        progress: Called after each image.

    Raises:
        ValueError: An option makes no sense.
        FileExistsError: ``out_dir`` holds something else, and ``overwrite`` is off.
        ModuleNotFoundError: scikit-learn or scikit-image is not installed.
    """
    options = _check_options(train, val, size, seed, clutter)
    out = Path(out_dir).expanduser().resolve()
    ready = None if overwrite else _find_ready(out, options)
    if ready is not None:
        return ready
    with new_folder(out, MARKER, overwrite) as work:
        images = {split: _write_split(work, split, options, progress) for split in SPLITS}
        content = {"options": options, "versions": package_versions(), "images": images, "credits": CREDITS}
        (work / MARKER).write_text(json.dumps(content, indent=2) + "\n")
    return DigitFolders.load(out)


def _check_options(train: int, val: int, size: int, seed: int, clutter: tuple[int, int]) -> dict[str, Any]:
    """The options as they are stored, or a ValueError that names the wrong one."""
    for name, value, minimum in (("train", train, 10), ("val", val, 10), ("size", size, 32), ("seed", seed, 0)):
        check_integer(name, value, minimum)
    if not isinstance(clutter, (tuple, list)) or len(clutter) != 2:
        raise UserError(f"clutter must be a (least, most) pair of numbers of fragments, got {clutter!r}")
    check_integer("clutter[0]", clutter[0], 0)
    check_integer("clutter[1]", clutter[1], clutter[0])
    return {
        "train": int(train),  # JSON knows no NumPy integers
        "val": int(val),
        "size": int(size),
        "seed": int(seed),
        "clutter": [int(bound) for bound in clutter],
        "generator": GENERATOR_VERSION,
    }


def _find_ready(out: Path, options: dict[str, Any]) -> DigitFolders | None:
    """The complete data set in ``out`` if it has the same options, None if ``out`` is free."""
    check_not_foreign(out, MARKER, "make_digit_folders")
    if not (out / MARKER).is_file():
        return None
    try:
        folders = DigitFolders.load(out, reused=True)
    except FileNotFoundError:
        raise FileExistsError(f"{out / MARKER} cannot be read. {ADVICE}") from None
    check_same_options(out, "digit folders", folders.options, options)
    paths = [out / f"{split}.json" for split in SPLITS]
    paths += [out / _file_name(split, index) for split in SPLITS for index in range(options[split])]
    check_complete(out, [path for path in paths if not path.is_file()])
    return folders


def _file_name(split: str, index: int) -> str:
    return f"{split}/{DIGIT_CLASSES[index % 10]}/{index:06d}.png"


def _write_split(
    root: Path, split: str, options: dict[str, Any], progress: Callable[[], None] | None
) -> dict[str, int]:
    """Write the images and the records of one split; returns the number of images per digit."""
    for name in DIGIT_CLASSES:
        (root / split / name).mkdir(parents=True)
    records = []
    for index in range(options[split]):
        # The last number keeps these images apart from digit scenes of the same seed.
        rng = np.random.default_rng([options["seed"], SPLITS.index(split), index, 1])
        image, _, record = make_cluttered_digit(rng, split, index % 10, options["size"], options["clutter"])
        file_name = _file_name(split, index)
        Image.fromarray(image).save(root / file_name)
        records.append({"file": file_name, **record})
        if progress is not None:
            progress()
    lines = ",\n".join(json.dumps(record) for record in records)
    (root / f"{split}.json").write_text(f"[\n{lines}\n]\n")
    return {name: len(range(digit, options[split], 10)) for digit, name in enumerate(DIGIT_CLASSES)}


def draw_digit_folders(root: str | os.PathLike, split: str = "val", per_class: int = 6) -> Figure:
    """Draw the first ``per_class`` images of each class in two halves: classes 0 to 4, and 5 to 9, with their labels.

    Args:
        root: A folder made by :func:`make_digit_folders`.
        split: ``'train'`` or ``'val'``.
        per_class: Number of images in a row; fewer are drawn if there are not that many.

    Returns:
        The figure; ``figure.savefig(path)`` writes it.

    Raises:
        ValueError: ``split`` is unknown, or ``per_class`` is below 1.
        FileNotFoundError: ``root`` is not a digit folders data set.
    """
    from matplotlib.figure import Figure

    if split not in SPLITS:
        raise UserError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    check_integer("per_class", per_class, 1)
    folders = DigitFolders.load(root)
    figure = Figure(figsize=(2 * (0.7 * per_class + 0.3), 5 * 0.7), dpi=100)
    for digit, name in enumerate(DIGIT_CLASSES):
        half, row = divmod(digit, 5)
        files = [folders.root / _file_name(split, index) for index in range(digit, folders.options[split], 10)]
        for column, file in enumerate(files[:per_class]):
            left = (0.3 * (half + 1) + 0.7 * (half * per_class + column)) / figure.get_figwidth()
            box = (left, 1 - (row + 1) / 5, 0.67 / figure.get_figwidth(), 0.67 / figure.get_figheight())
            axes = figure.add_axes(box)
            axes.axis("off")
            with Image.open(file) as pixels:
                axes.imshow(np.asarray(pixels), interpolation="nearest")
            if column == 0:
                axes.text(-0.2, 0.5, name, transform=axes.transAxes, va="center", ha="center", fontweight="bold")
    return figure


# Pixels


def make_cluttered_digit(
    rng: np.random.Generator, split: str, digit: int, size: int, clutter: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Render one image.

    Args:
        rng: Source of all random choices.
        split: Whose samples and photographs are used, 'train' or 'val'.
        digit: The label.
        size: Side of the image in pixels.
        clutter: Least and most fragments.

    Returns:
        Pixels ``(size, size, 3)`` uint8; layers ``(size, size)`` uint8: 0 the photograph, 1 the visible digit, 2 and
        up the fragments in the order of their painting; and the record, as in :meth:`DigitFolders.records`.
    """
    image, photo, photo_box = crop_photo(rng, split, [size, size])
    image //= 2
    layers = np.zeros((size, size), np.uint8)

    index, ink = _draw_digit(rng, split, digit, size)
    mask = place_digit(rng, ink > INK_THRESHOLD, [], layers.shape)
    paint(image, mask, ink, _pick_light_color(rng))
    layers[mask] = 1
    target = {"mask": mask, "area": int(mask.sum())}

    fragments = []
    for _ in range(rng.integers(clutter[0], clutter[1] + 1)):
        other = int(rng.integers(10))
        other_index, whole = _draw_digit(rng, split, other, size)
        ink = _cut(rng, whole)
        mask = place_digit(rng, ink > INK_THRESHOLD, [target], layers.shape)
        if mask is None:
            continue
        paint(image, mask, ink, _pick_light_color(rng))
        layers[mask] = 2 + len(fragments)
        target["mask"] = target["mask"] & ~mask
        share = mask.sum() / (whole > INK_THRESHOLD).sum()
        fragments.append({"digit": other, "index": other_index, "share": round(float(share), 3)})

    rows, columns = np.flatnonzero((layers == 1).any(axis=1)), np.flatnonzero((layers == 1).any(axis=0))
    record = {
        "digit": digit,
        "index": index,
        "box": [int(columns[0]), int(rows[0]), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1],
        "visible": round(float((layers == 1).sum() / target["area"]), 3),
        "photo": photo,
        "photo_box": photo_box,
        "clutter": fragments,
    }
    return image, layers, record


def _draw_digit(rng: np.random.Generator, split: str, digit: int, size: int) -> tuple[int, np.ndarray]:
    """A sample of the class ``digit``: its index, and its ink at a random size and angle that fits into the image."""
    index = int(rng.choice(digit_indices(split, digit)))
    height = size * rng.uniform(*TARGET_HEIGHT)
    aspect, angle = rng.uniform(0.85, 1.15), rng.uniform(-0.25, 0.25)
    while True:
        ink = render_digit(digit_samples()[0][index], height, aspect, angle, room=1.5)
        if max(ink.shape) <= size:
            return index, ink
        height *= 0.9  # a wide digit that is turned


def _pick_light_color(rng: np.random.Generator) -> np.ndarray:
    return color_of(rng, rng.uniform(*LIGHT))


def _cut(rng: np.random.Generator, ink: np.ndarray) -> np.ndarray:
    """Cut a digit along a straight line in a random direction; the ink of the smaller part, in its tight box."""
    rows, columns = np.nonzero(ink > INK_THRESHOLD)
    angle = rng.uniform(0, 2 * math.pi)
    along = math.cos(angle) * rows + math.sin(angle) * columns
    inside = along < np.sort(along)[int(rng.uniform(*FRAGMENT_SHARE) * len(along))]
    rows, columns = rows[inside], columns[inside]
    part = np.zeros_like(ink)
    part[rows, columns] = ink[rows, columns]
    return part[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
