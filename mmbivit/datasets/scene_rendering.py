"""Renders one digit scene: a crop of a photograph with handwritten digits pasted on it."""

from __future__ import annotations

import colorsys
import math
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
from PIL import Image

# Only files that are inside the wheels: skimage.data and fetch_* would download the others.
PHOTOS = {
    "train": (
        "skimage/data/astronaut.png",
        "skimage/data/brick.png",
        "skimage/data/camera.png",
        "skimage/data/coffee.png",
        "skimage/data/grass.png",
        "skimage/data/hubble_deep_field.jpg",
        "skimage/data/rocket.jpg",
        "sklearn/datasets/images/china.jpg",
    ),
    "val": (
        "skimage/data/chelsea.png",
        "skimage/data/coins.png",
        "skimage/data/gravel.png",
        "sklearn/datasets/images/flower.jpg",
    ),
}
# One cut, not a shuffle: neighbouring samples are often by one hand, and a shuffle would put it on both sides.
TRAIN_DIGITS = 1397

INK_THRESHOLD = 0.45  # of full ink: thinner strokes break up, thicker ones close the loops of 6, 8 and 9
MIN_HEIGHT, MAX_HEIGHT = 18 / 112, 48 / 112  # height of a digit, relative to the shorter side of the scene
MIN_CONTRAST = 100.0  # of 255, between the luminance of the ink and of what is around it
MIN_VISIBLE = 0.75  # of a digit's own mask, after later digits have covered it
MAX_TRIES = 20
LUMINANCE = np.array([0.299, 0.587, 0.114])


@cache
def digit_samples() -> tuple[np.ndarray, np.ndarray]:
    """Ink ``(1797, 8, 8)`` in [0, 1] and classes ``(1797,)``."""
    _require_demo_packages()
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images / 16.0, digits.target


@cache
def _load_photo(name: str) -> Image.Image:
    package, path = name.split("/", 1)
    _require_demo_packages()
    file = resources.files(package) / path
    if not file.is_file():
        raise FileNotFoundError(
            f"{name} is not in the installed {package} package; reinstall it, for example with "
            "`pip install --force-reinstall scikit-image scikit-learn`."
        )
    with file.open("rb") as stream:
        return Image.open(stream).convert("RGB")


def _require_demo_packages() -> None:
    try:
        import skimage  # noqa: F401
        import sklearn  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"Digit scenes need scikit-learn and scikit-image, {error.name} is missing: pip install 'mmbivit[demo]'",
            name=error.name,
        ) from error


def digit_indices(split: str, digit: int) -> np.ndarray:
    """Indices of the samples of one class that belong to ``split``."""
    targets = digit_samples()[1]
    in_train = np.arange(len(targets)) < TRAIN_DIGITS
    return np.flatnonzero((targets == digit) & (in_train == (split == "train")))


def crop_photo(rng: np.random.Generator, split: str, size: list[int]) -> tuple[np.ndarray, str, list[int]]:
    """A random crop with the shape of a scene: pixels ``(H, W, 3)``, name of the photo, box ``[x, y, w, h]`` in it."""
    height, width = size
    name = PHOTOS[split][rng.integers(len(PHOTOS[split]))]
    photo = _load_photo(name)
    scale = min(photo.width / width, photo.height / height) * rng.uniform(0.35, 1.0)
    box_width, box_height = max(1, int(scale * width)), max(1, int(scale * height))
    x = int(rng.integers(photo.width - box_width + 1))
    y = int(rng.integers(photo.height - box_height + 1))
    crop = photo.crop((x, y, x + box_width, y + box_height)).resize((width, height), Image.Resampling.BILINEAR)
    return np.array(crop), name, [x, y, box_width, box_height]


def render_digit(pixels: np.ndarray, height: float, aspect: float, angle: float, room: float = 2.25) -> np.ndarray:
    """Enlarge a digit of ``(8, 8)`` smoothly to about ``height`` pixels, turned by ``angle`` (radians).

    ``room`` is the side of the canvas, relative to ``height``: 2.25 is enough for any angle, 1.5 for small ones.

    Returns:
        Ink in [0, 1], cut to the tight box of the mask ``ink > INK_THRESHOLD``.
    """
    from scipy import ndimage

    padded = np.pad(pixels, 2)
    scale = height / 8
    side = math.ceil(room * height)
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    centre = (len(padded) - 1) / 2
    rows = (math.cos(angle) * y + math.sin(angle) * x) / scale + centre
    columns = (math.cos(angle) * x - math.sin(angle) * y) / (scale * aspect) + centre
    ink = ndimage.map_coordinates(padded, [rows, columns], order=3).clip(0, 1)
    inside_rows, inside_columns = np.nonzero(ink > INK_THRESHOLD)
    return ink[
        inside_rows.min() : inside_rows.max() + 1,
        inside_columns.min() : inside_columns.max() + 1,
    ]


def _pick_color(rng: np.random.Generator, surroundings: list[float]) -> np.ndarray:
    """A random colour whose luminance is ``MIN_CONTRAST`` away from all ``surroundings``, or as far as possible."""
    candidates = np.arange(256.0)
    contrast = np.abs(candidates[:, None] - surroundings).min(axis=1)
    return color_of(rng, rng.choice(candidates[contrast >= min(MIN_CONTRAST, contrast.max())]))


def color_of(rng: np.random.Generator, luminance: float) -> np.ndarray:
    """A random colour of the given luminance in [0, 255]."""
    color = 255 * np.array(colorsys.hsv_to_rgb(rng.uniform(0, 1), rng.uniform(0.3, 1), 1.0))
    full = float(color @ LUMINANCE)
    if luminance <= full:
        return color * luminance / full
    return color + (255 - color) * (luminance - full) / (255 - full)


def place_digit(
    rng: np.random.Generator, shape: np.ndarray, digits: list[dict[str, Any]], scene_shape: tuple[int, ...]
) -> np.ndarray | None:
    """Find a place where no earlier digit loses too much; the mask in the scene ``(H, W)``, or None."""
    for _ in range(MAX_TRIES):
        y = int(rng.integers(scene_shape[0] - shape.shape[0] + 1))
        x = int(rng.integers(scene_shape[1] - shape.shape[1] + 1))
        mask = np.zeros(scene_shape, bool)
        mask[y : y + shape.shape[0], x : x + shape.shape[1]] = shape
        # The newcomer is turned away: dropping the digit it hides would leave unlabelled ink in the picture.
        if all((item["mask"] & ~mask).sum() >= MIN_VISIBLE * item["area"] for item in digits):
            return mask
    return None


def _grow(mask: np.ndarray) -> np.ndarray:
    """The mask and the pixels next to it."""
    from scipy import ndimage

    return ndimage.binary_dilation(mask, iterations=2)


def paint(scene: np.ndarray, mask: np.ndarray, ink: np.ndarray, color: np.ndarray) -> None:
    """Paint ``ink`` into ``scene``, where ``mask`` is the place that was found for ``ink > INK_THRESHOLD``."""
    # Strokes stay a little fainter at their edges, as they were written; nothing outside the mask changes.
    strength = np.interp(ink[ink > INK_THRESHOLD], [INK_THRESHOLD, 1], [0.75, 1])[:, None]
    scene[mask] = np.rint(strength * color + (1 - strength) * scene[mask])


def make_scene(rng: np.random.Generator, split: str, options: dict[str, Any]) -> tuple[np.ndarray, dict, list[dict]]:
    """Pixels ``(H, W, 3)``, the provenance of the photo, and what is known of each digit, visible mask included."""
    scene, photo, photo_box = crop_photo(rng, split, options["size"])
    background = scene @ LUMINANCE
    digits: list[dict[str, Any]] = []
    for _ in range(rng.integers(1, options["max_digits"] + 1)):
        digit = int(rng.integers(10))
        index = int(rng.choice(digit_indices(split, digit)))
        height = min(options["size"]) * rng.uniform(MIN_HEIGHT, MAX_HEIGHT)
        ink = render_digit(digit_samples()[0][index], height, rng.uniform(0.85, 1.15), rng.uniform(-0.25, 0.25))
        mask = place_digit(rng, ink > INK_THRESHOLD, digits, background.shape)
        if mask is None:
            continue
        near = _grow(mask)
        touched = [item["luminance"] for item in digits if (item["mask"] & near).any()]
        color = _pick_color(rng, [float(background[mask].mean()), *touched])
        paint(scene, mask, ink, color)
        for item in digits:
            item["mask"] = item["mask"] & ~mask
        digits.append(
            {"digit": digit, "index": index, "mask": mask, "area": int(mask.sum()), "luminance": color @ LUMINANCE}
        )
    return scene, {"photo": photo, "photo_box": photo_box}, digits
