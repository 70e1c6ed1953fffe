"""Classes of image files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.device import get_device
from mmengine.registry import MODELS, DefaultScope
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text
from torch import Tensor

from mmbivit.checks import UserError, check_integer
from mmbivit.datasets.timm_dataset import to_rgb
from mmbivit.datasets.wrappers import inner_dataset
from mmbivit.engine.quiet import quiet
from mmbivit.models.classifier import ImageClassifier

from .checkpoints import load_classifier
from .config import is_classifier, load_config
from .errors import UnusableImagesError
from .images import MAX_PIXELS, load_usable
from .predict import check_out_dir, check_run_options, find_images, refuse_packed_file

__all__ = ["build_transform", "classify", "classify_files", "load_image", "predictions_table"]

MAX_RATIO = 1000  # of the sides of an image; with 256 rows it has 256000 columns then


@quiet()
def classify(
    config: str | Path,
    checkpoint: str | Path,
    images: Sequence[str | Path],
    out_dir: str | Path | None = None,
    topk: int = 5,
    device: str | None = None,
    batch_size: int = 1,
    max_pixels: int = MAX_PIXELS,
) -> list[dict[str, Any]]:
    """Classify images with the transform of the config's test data (validation data if it has none).

    Args:
        config: the config file.
        checkpoint: file, URL or name of a timm model.
        images: files, folders and glob patterns.
        out_dir: what is returned goes to ``out_dir/preds`` as well, one JSON file per image.
        topk: classes per image; all of them, if there are fewer.
        device: such as ``cuda:0``; the best available by default.
        batch_size: images per forward pass.
        max_pixels: an image of more pixels is not decoded.

    Returns:
        For each image a dict of ``img_path``, and best first ``labels``, ``scores`` (probabilities) and ``names``.
        Names are those in the checkpoint, or the labels where it has none.

    Raises:
        FileNotFoundError: if config, checkpoint or an image does not exist.
        UnusableImagesError: after all others were classified, if images cannot be read or have too many pixels.
        ValueError: if the checkpoint is of another model or packed, or an option has no sense.
    """
    check_integer("--topk", topk, 1)
    check_run_options(device, batch_size, max_pixels)
    refuse_packed_file(checkpoint)
    cfg = load_config(config)
    if not is_classifier(cfg):
        raise UserError(f"{config} is the config of a detector; classify() needs one of a classifier")
    if out_dir is not None:
        check_out_dir(out_dir)
    files = find_images(images, unique_names=out_dir is not None)
    cfg.model.topk = topk
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope", "mmengine")):
        transform = build_transform(cfg)
        model = MODELS.build(cfg.model)
    load_classifier(model, checkpoint)
    return classify_files(model.to(device or get_device()), transform, files, out_dir, batch_size, max_pixels)


def classify_files(
    model: ImageClassifier,
    transform: Compose,
    files: Sequence[Path],
    out_dir: str | Path | None,
    batch_size: int,
    max_pixels: int,
) -> list[dict[str, Any]]:
    """Classify image files with a classifier and return, or raise, what :func:`classify` does."""
    model.eval()
    results, problems = [], {}
    batches = [files[start : start + batch_size] for start in range(0, len(files), batch_size)]
    for batch in track(batches, description="Classifying", console=Console(stderr=True)):
        loaded = load_usable(batch, lambda file: load_image(file, transform), problems, max_pixels)
        if loaded:
            inputs = torch.stack([image for _, image in loaded])
            with torch.no_grad():
                predictions = model.test_step(dict(inputs=inputs, img_path=[str(file) for file, _ in loaded]))
            results += map(_result, predictions)
    if out_dir is not None:
        _write(results, Path(out_dir) / "preds")
    if problems:
        raise UnusableImagesError(results, problems)
    return results


def predictions_table(results: Sequence[dict[str, Any]]) -> Table:
    """Make a table of what :func:`classify` returns, a row for each class of each image."""
    table = Table("image", "rank", "class", "%")
    for column, justify in zip(table.columns, ("left", "right", "left", "right"), strict=True):
        column.justify, column.overflow = justify, "fold"
    for result in results:
        for rank, (name, score) in enumerate(zip(result["names"], result["scores"], strict=True), start=1):
            table.add_row(Text(result["img_path"]), str(rank), Text(name), f"{100 * score:.2f}")
    return table


def build_transform(cfg: Config) -> Compose:
    """Build the transform of a classifier's test data; raises a ValueError if the config has none."""
    name = "test_dataloader" if cfg.get("test_dataloader") else "val_dataloader"
    if not cfg.get(name):
        raise UserError(f"{cfg.filename} has neither test_dataloader nor val_dataloader, whose transform images need")
    pipeline = inner_dataset(cfg[name].dataset).get("pipeline")
    if not pipeline:
        raise UserError(f"{cfg.filename}: the data set of {name} has no pipeline, whose transform images need")
    return Compose(pipeline)


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
