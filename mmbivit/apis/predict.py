"""Detections for image files."""

import glob
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import torch
from rich.progress import track

from mmbivit.deploy.serialization import SUFFIX
from mmbivit.models.checkpoint import checkpoint_path

from .checkpoints import use_safe_loading
from .config import is_classifier, load_config

__all__ = [
    "check_out_dir",
    "check_run_options",
    "find_images",
    "is_packed_file",
    "predict",
    "refuse_packed_file",
    "write_detections",
]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def find_images(inputs: Sequence[str | Path], unique_names: bool = True) -> list[Path]:
    """Expand files, folders (their images, not those of folders inside) and glob patterns to image files.

    Args:
        inputs: the files, folders and patterns.
        unique_names: refuse two files of the same name up to the suffix, which would write to the same output.

    Raises:
        FileNotFoundError: if a file does not exist, or a folder or pattern has no image.
        ValueError: if a file is no image, or a name is not unique.
    """
    found: list[Path] = []
    for item in map(str, inputs):
        if Path(item).is_dir():
            files = sorted(file for file in Path(item).iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
            if not files:
                raise FileNotFoundError(f"folder {item} has no image")
        elif Path(item).exists() or not glob.has_magic(item):
            files = [Path(item)]
        else:
            files = sorted(Path(file) for file in glob.glob(item, recursive=True) if Path(file).is_file())
            if not files:
                raise FileNotFoundError(f"no file matches {item}")
        found += files
    found = list(dict.fromkeys(found))
    for file in found:
        if not file.is_file():
            raise FileNotFoundError(f"image {file} does not exist")
        if not cv2.haveImageReader(str(file)):
            raise ValueError(f"{file} is no image that can be read")
    name, count = Counter(file.stem for file in found).most_common(1)[0] if found else ("", 0)
    if unique_names and count > 1:
        same = ", ".join(str(file) for file in found if file.stem == name)
        raise ValueError(f"{same}: outputs are named after the image, so give images of equal names in separate calls")
    return found


def is_packed_file(checkpoint: str | Path) -> bool:
    """Whether a checkpoint is meant to be a packed file, by its name."""
    return str(checkpoint).endswith(SUFFIX)


def refuse_packed_file(checkpoint: str | Path) -> None:
    """Refuse a packed file where a checkpoint of training is expected.

    Raises:
        ValueError: that says which tool takes packed files.
    """
    if is_packed_file(checkpoint):
        raise ValueError(
            f"{checkpoint} is a packed file, which needs no config: "
            f"python tools/deployment/predict_packed.py {checkpoint} IMAGES..."
        )


def check_run_options(device: str | None, batch_size: int) -> None:
    """Raise a ValueError for a batch size below 1, or a GPU where there is none."""
    if batch_size < 1:
        raise ValueError(f"--batch-size {batch_size}; allowed: 1 or more")
    if device and device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: PyTorch finds no CUDA device here; leave the option out, or take cpu")


def predict(
    config: str | Path,
    checkpoint: str | Path,
    images: Sequence[str | Path],
    out_dir: str | Path | None = None,
    score_thr: float = 0.3,
    device: str | None = None,
    batch_size: int = 1,
) -> list[Path]:
    """Detect objects with mmdet's ``DetInferencer`` and write pictures and JSON.

    Args:
        config: the config file.
        checkpoint: file or URL of the weights.
        images: files, folders and glob patterns.
        out_dir: needed; pictures go to ``out_dir/vis``, detections to ``out_dir/preds``: one JSON file per image with
            ``labels``, ``scores``, ``bboxes`` (x1, y1, x2, y2 in pixels) and, from a mask head, ``masks`` (RLE).
        score_thr: lowest score of a detection that is drawn; the JSON has all.
        device: such as ``cuda:0``; the best available by default.
        batch_size: images per forward pass.

    Returns:
        The JSON files, in the order of the images.

    Raises:
        FileNotFoundError: if config, checkpoint or an image does not exist.
        ValueError: if an image cannot be read, an option has no sense or the checkpoint is a packed file.
    """
    check_run_options(device, batch_size)
    refuse_packed_file(checkpoint)
    cfg = load_config(config)
    if is_classifier(cfg):
        raise ValueError(f"{config} is the config of a classifier; predict() needs one of a detector")
    check_out_dir(out_dir)
    files = find_images(images)
    # mmdet may only be imported once mmbivit has put the stand-in for mmcv's operators in place.
    from mmdet.apis import DetInferencer

    use_safe_loading()
    inferencer = DetInferencer(cfg, str(checkpoint_path(str(checkpoint))), device=device, show_progress=False)
    return write_detections(inferencer, files, out_dir, score_thr, batch_size)


def check_out_dir(out_dir: str | Path | None) -> None:
    """Raise a ValueError if there is no folder for the detections."""
    if out_dir is None:
        raise ValueError("--out-dir DIR is needed: pictures and detections are written there")


def write_detections(
    inferencer: Any, files: Sequence[Path], out_dir: str | Path, score_thr: float, batch_size: int
) -> list[Path]:
    """Detect objects with mmdet's ``DetInferencer`` as :func:`predict` does, and return the JSON files."""
    batches = [files[start : start + batch_size] for start in range(0, len(files), batch_size)]
    # One call per batch, because the inferencer keeps the pictures of a call in memory.
    for batch in track(batches, description="Detecting"):
        inferencer(
            [str(file) for file in batch],
            batch_size=batch_size,
            pred_score_thr=score_thr,
            out_dir=str(out_dir),
            no_save_pred=False,
        )
    return [Path(out_dir) / "preds" / f"{file.stem}.json" for file in files]
