"""Classes of image files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DefaultScope
from PIL import Image
from rich.console import Console
from torch import Tensor

from mmbivit.checks import UserError
from mmbivit.datasets.timm_dataset import to_rgb
from mmbivit.models import ImageClassifier

from .images import load_usable, progress, transforms_of

__all__ = ["classification_transform", "classify", "load_image"]

MAX_RATIO = 1000  # of the sides of an image; with 256 rows it has 256000 columns then


def classify(
    model: ImageClassifier,
    cfg: Config,
    batches: Sequence[Sequence[Path]],
    out_dir: str | Path | None,
    max_pixels: int,
) -> tuple[list[dict[str, Any]], dict[Path, str]]:
    """Classify image files, and return the results and the problems; see :func:`mmbivit.apis.predict`.

    Args:
        model: the classifier, in evaluation mode.
        cfg: a config with its transforms of test images.
        batches: the images, as they go through the network.
        out_dir: where the results are written, if anywhere.
        max_pixels: an image of more pixels is not decoded.
    """
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "mmengine"):
        transform = classification_transform(cfg)
    results: list[dict[str, Any]] = []
    problems: dict[Path, str] = {}
    usable = load_usable(batches, lambda file: load_image(file, transform), problems, max_pixels)
    for loaded in progress("Classifying", usable, len(batches), Console(stderr=True)):
        if loaded:
            inputs = torch.stack([image for _, image in loaded])
            with torch.no_grad():
                predictions = model.test_step(dict(inputs=inputs, img_path=[str(file) for file, _ in loaded]))
            results += map(_result, predictions)
    if out_dir is not None:
        _write(results, Path(out_dir) / "preds")
    return results, problems


def classification_transform(cfg: Config) -> Compose:
    """Build the transform of a classifier's test data; raises a ValueError if the config has none."""
    return Compose(transforms_of(cfg))


def load_image(file: Path, transform: Compose) -> Tensor:
    """Load and transform an image for a classifier, ``(3, H, W)``.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it cannot be decoded, or is so thin that it would be huge once its short side is resized.
    """
    try:
        with Image.open(file) as image:
            rgb = to_rgb(image)
    except Exception as error:  # Pillow's decoders raise almost anything
        if isinstance(error, OSError) and error.filename is not None:
            raise  # missing or not readable, and named
        raise UserError(f"image {file} cannot be decoded: {error}") from error
    if max(rgb.size) > MAX_RATIO * min(rgb.size):
        raise UserError(f"{file} has {rgb.width} x {rgb.height} pixels, too thin to be resized")
    return transform(dict(img=rgb))["inputs"]


def _result(prediction: dict[str, Any]) -> dict[str, Any]:
    labels = prediction["pred_labels"].tolist()
    return dict(
        img_path=prediction["img_path"],
        labels=labels,
        scores=prediction["pred_scores"].tolist(),
        names=prediction.get("pred_names") or list(map(str, labels)),
    )


def _write(results: Sequence[dict[str, Any]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for result in results:
        (folder / f"{Path(result['img_path']).stem}.json").write_text(json.dumps(result))
