"""Detections for image files."""

import glob
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.device import get_device
from mmengine.visualization import Visualizer
from rich.progress import track
from torch import nn

from mmbivit.analysis.figures.style import without_formulas
from mmbivit.checkpoints import use_safe_loading
from mmbivit.checks import UserError, check_integer, check_number
from mmbivit.datasets.checked_pipeline import CheckedPipeline
from mmbivit.datasets.wrappers import inner_dataset
from mmbivit.deploy.header import SUFFIX
from mmbivit.engine.quiet import quiet
from mmbivit.files import check_writable

from .checkpoints import load_trained_model
from .config import is_classifier, load_config
from .errors import UnusableImagesError
from .images import MAX_PIXELS, load_usable

__all__ = [
    "check_out_dir",
    "check_run_options",
    "check_score_thr",
    "detection_transform",
    "find_images",
    "is_packed_file",
    "make_inferencer",
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
        ValueError: if a name is not unique.
    """
    found: list[Path] = []
    for item in map(str, inputs):
        if Path(item).is_dir():
            names = (file for file in Path(item).iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
            files = sorted(file for file in names if not file.is_dir())
            if not files:
                raise FileNotFoundError(f"folder {item} has no image")
        elif Path(item).exists():
            files = [Path(item)]
        elif not glob.has_magic(item):
            raise FileNotFoundError(f"image {item} does not exist")
        else:
            files = sorted(Path(file) for file in glob.glob(item, recursive=True) if not Path(file).is_dir())
            if not files:
                raise FileNotFoundError(f"no file matches {item}")
        found += files
    found = list(dict.fromkeys(found))
    name, count = Counter(file.stem for file in found).most_common(1)[0] if found else ("", 0)
    if unique_names and count > 1:
        same = ", ".join(str(file) for file in found if file.stem == name)
        raise UserError(f"{same}: outputs are named after the image, so give images of equal names in separate calls")
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
        raise UserError(
            f"{checkpoint} is a packed file, which needs no config: "
            f"python tools/deployment/predict_packed.py {checkpoint} IMAGES..."
        )


def check_run_options(device: str | None, batch_size: int, max_pixels: int) -> None:
    """Raise a ValueError for a batch size or a number of pixels below 1, or a device that cannot be used here."""
    for name, number in (("batch-size", batch_size), ("max-pixels", max_pixels)):
        check_integer(f"--{name}", number, 1)
    if not device:
        return
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: PyTorch finds no CUDA device here; leave the option out, or take cpu")
    try:
        torch.zeros(1, device=device).cpu()
    except Exception as error:  # unknown, not there or without data as "meta"; each kind raises its own errors
        raise UserError(
            f"--device {device} cannot be used here; leave the option out, or take one such as cpu or cuda:0"
        ) from error


@quiet()
def predict(
    config: str | Path,
    checkpoint: str | Path,
    images: Sequence[str | Path],
    out_dir: str | Path | None = None,
    score_thr: float = 0.3,
    device: str | None = None,
    batch_size: int = 1,
    max_pixels: int = MAX_PIXELS,
) -> list[Path]:
    """Detect objects with mmdet's ``DetInferencer`` and write pictures and JSON.

    Args:
        config: the config file.
        checkpoint: file or URL of the weights.
        images: files, folders and glob patterns.
        out_dir: needed; pictures go to ``out_dir/vis``, detections to ``out_dir/preds``: one JSON file per image with
            ``labels``, ``scores``, ``bboxes`` (x1, y1, x2, y2 in pixels) and, from a mask head, ``masks`` (RLE).
        score_thr: lowest score of a detection that is drawn, from 0 to 1; the JSON has all.
        device: such as ``cuda:0``; the best available by default.
        batch_size: images per forward pass.
        max_pixels: an image of more pixels is not decoded.

    Returns:
        The JSON files, in the order of the images.

    Raises:
        FileNotFoundError: if config, checkpoint or an image does not exist.
        UnusableImagesError: after all others were predicted, if images cannot be read or have too many pixels.
        ValueError: if the checkpoint does not fit the config or is a packed file, or an option has no sense.
    """
    check_run_options(device, batch_size, max_pixels)
    check_score_thr(score_thr)
    refuse_packed_file(checkpoint)
    cfg = load_config(config)
    if is_classifier(cfg):
        raise UserError(f"{config} is the config of a classifier; predict() needs one of a detector")
    check_out_dir(out_dir)
    files = find_images(images)
    use_safe_loading()
    inferencer = make_inferencer(load_trained_model(cfg, checkpoint), cfg, device or get_device(), max_pixels)
    return write_detections(inferencer, files, out_dir, score_thr, batch_size)


def check_out_dir(out_dir: str | Path | None) -> None:
    """Raise a ValueError if there is no folder for the detections, an OSError if nothing can be written into it."""
    if out_dir is None:
        raise UserError("--out-dir DIR is needed: pictures and detections are written there")
    check_writable("--out-dir", out_dir, folder=True)


def check_score_thr(score_thr: float) -> None:
    """Raise a ValueError for what is no score."""
    check_number("--score-thr", score_thr, 0, 1)


def detection_transform(cfg: Config) -> CheckedPipeline:
    """Build the transform of a detector's test data, without annotations; raises a ValueError if there is none."""
    loader = cfg.get("test_dataloader") or cfg.get("val_dataloader")
    pipeline = inner_dataset(loader["dataset"]).get("pipeline") if loader else None
    if not pipeline:
        raise UserError(f"{cfg.filename} has no test_dataloader with a pipeline, whose transforms images need")
    steps = [step for step in pipeline if not step["type"].endswith("LoadAnnotations")]
    return CheckedPipeline(steps, annotated=False)


def make_inferencer(model: nn.Module, cfg: Config, device: str, max_pixels: int) -> Any:
    """Make mmdet's inferencer of a model that is built and loaded already.

    Args:
        model: the detector, with ``dataset_meta``.
        cfg: a config with its transforms of test images and its visualizer.
        device: where it runs.
        max_pixels: an image of more pixels is not decoded.

    Returns:
        An inferencer that takes the paths of one batch. It leaves images out that it cannot use, and puts a line for
        each into its ``problems``, by file.
    """
    # mmdet may only be imported once mmbivit has put the stand-in for mmcv's operators in place.
    from mmdet.apis import DetInferencer

    class Inferencer(DetInferencer):
        """mmdet's, without building a model, and without ending at the first image that is damaged."""

        def _init_model(self, cfg: Config, weights: str | None, device: str = "cpu") -> nn.Module:
            return model.to(device)

        def _init_pipeline(self, cfg: Config) -> CheckedPipeline:
            return detection_transform(cfg)

        def _init_collate(self, cfg: Config) -> Callable:
            return pseudo_collate  # MMEngine warns of mmdet, which has no registry of such functions

        def _init_visualizer(self, cfg: Config) -> Visualizer:
            cfg = cfg.copy()
            cfg.visualizer = dict(cfg.visualizer, vis_backends=None)  # training's, which warn that they have no folder
            return super()._init_visualizer(cfg)

        def preprocess(self, inputs: list[str], batch_size: int = 1, **kwargs: Any) -> Iterator[Any]:
            loaded = load_usable(map(Path, inputs), self._load, self.problems, max_pixels)
            if loaded:
                yield self.collate_fn([(str(file), item) for file, item in loaded])

        def _load(self, file: Path) -> dict[str, Any]:
            return self.pipeline(dict(img_path=str(file), img_id=0))

    model.dataset_meta = dict(palette="random") | (model.dataset_meta or {})
    inferencer = Inferencer(cfg, device=device, show_progress=False)
    inferencer.problems = {}
    return inferencer


@without_formulas()
def write_detections(
    inferencer: Any, files: Sequence[Path], out_dir: str | Path, score_thr: float, batch_size: int
) -> list[Path]:
    """Detect objects with what :func:`make_inferencer` returns, as :func:`predict` does, and return the JSON files."""
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
    problems = inferencer.problems
    results = [Path(out_dir) / "preds" / f"{file.stem}.json" for file in files if file not in problems]
    if problems:
        raise UnusableImagesError(results, problems)
    return results
