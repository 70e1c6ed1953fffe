"""Detections for image files, by mmdet's inferencer."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.visualization import Visualizer
from rich.progress import track
from torch import nn

from mmbivit.analysis.figures.style import without_formulas
from mmbivit.datasets.checked_pipeline import CheckedPipeline

from .images import load_usable, transforms_of

__all__ = ["detect", "detection_transform"]


@without_formulas()
def detect(
    model: nn.Module,
    cfg: Config,
    files: Sequence[Path],
    out_dir: str | Path,
    score_thr: float,
    batch_size: int,
    max_pixels: int,
) -> tuple[list[dict[str, Any]], dict[Path, str]]:
    """Detect objects in image files, and return the results and the problems; see :func:`mmbivit.apis.predict`.

    Args:
        model: the detector, in evaluation mode, with ``dataset_meta``.
        cfg: a config with its transforms of test images and its visualizer.
        files: the images.
        out_dir: where pictures and JSON are written.
        score_thr: lowest score of a detection that is drawn.
        batch_size: images per forward pass.
        max_pixels: an image of more pixels is not decoded.
    """
    problems: dict[Path, str] = {}
    inferencer = _make_inferencer(model, cfg, problems, max_pixels)
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
    results = [
        dict(img_path=str(file), json_file=Path(out_dir) / "preds" / f"{file.stem}.json")
        for file in files
        if file not in problems
    ]
    return results, problems


def detection_transform(cfg: Config) -> CheckedPipeline:
    """Build the transform of a detector's test data, without annotations; raises a ValueError if there is none."""
    steps = [step for step in transforms_of(cfg) if not step["type"].endswith("LoadAnnotations")]
    return CheckedPipeline(steps, annotated=False)


def _make_inferencer(model: nn.Module, cfg: Config, problems: dict[Path, str], max_pixels: int) -> Any:
    """Make mmdet's inferencer of a model that is built and loaded already.

    It takes the paths of one batch, leaves images out that it cannot use, and puts a line for each into ``problems``.
    """
    # mmdet may only be imported once mmbivit has put the stand-in for mmcv's operators in place.
    from mmdet.apis import DetInferencer

    class Inferencer(DetInferencer):
        """mmdet's, without building a model, and without ending at the first image that is damaged."""

        def _init_model(self, cfg: Config, weights: str | None, device: str = "cpu") -> nn.Module:
            return model

        def _init_pipeline(self, cfg: Config) -> CheckedPipeline:
            return detection_transform(cfg)

        def _init_collate(self, cfg: Config) -> Callable:
            return pseudo_collate  # MMEngine warns of mmdet, which has no registry of such functions

        def _init_visualizer(self, cfg: Config) -> Visualizer:
            cfg = cfg.copy()
            cfg.visualizer = dict(cfg.visualizer, vis_backends=None)  # training's, which warn that they have no folder
            return super()._init_visualizer(cfg)

        def preprocess(self, inputs: list[str], batch_size: int = 1, **kwargs: Any) -> Iterator[Any]:
            loaded = load_usable(map(Path, inputs), self._load, problems, max_pixels)
            if loaded:
                yield self.collate_fn([(str(file), item) for file, item in loaded])

        def _load(self, file: Path) -> dict[str, Any]:
            return self.pipeline(dict(img_path=str(file), img_id=0))

    model.dataset_meta = dict(palette="random") | (model.dataset_meta or {})
    return Inferencer(cfg, show_progress=False)
