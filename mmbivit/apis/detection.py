"""Detections for image files, by mmdet's inferencer."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.dist import utils as dist_utils
from mmengine.registry import DefaultScope
from mmengine.visualization import Visualizer
from torch import nn

from mmbivit.analysis.figures.style import without_formulas
from mmbivit.datasets.checked_pipeline import CheckedPipeline

from .images import load_usable, progress, transforms_of

__all__ = ["detect", "detection_transform"]


@without_formulas()
def detect(
    model: nn.Module,
    cfg: Config,
    batches: Sequence[Sequence[Path]],
    out_dir: str | Path,
    score_thr: float,
    max_pixels: int,
) -> tuple[list[dict[str, Any]], dict[Path, str]]:
    """Detect objects in image files, and return the results and the problems; see :func:`mmbivit.apis.predict`.

    Args:
        model: the detector, in evaluation mode, with ``dataset_meta``.
        cfg: a config with its transforms of test images and its visualizer.
        batches: the images, as they go through the network.
        out_dir: where pictures and JSON are written.
        score_thr: lowest score of a detection that is drawn.
        max_pixels: an image of more pixels is not decoded.
    """
    results: list[dict[str, Any]] = []
    problems: dict[Path, str] = {}
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "mmdet"):
        transform = detection_transform(cfg)

    def load(file: Path) -> dict[str, Any] | None:
        return transform(dict(img_path=str(file), img_id=0))

    usable = progress("Detecting", load_usable(batches, load, problems, max_pixels), len(batches))
    with _drawn_by_this_process():
        inferencer = _make_inferencer(model, cfg)
        # One call per batch, because the inferencer keeps the pictures of a call in memory.
        for loaded in usable:
            if loaded:
                inferencer(loaded, pred_score_thr=score_thr, out_dir=str(out_dir), no_save_pred=False)
            for file, _ in loaded:
                results.append(dict(img_path=str(file), json_file=Path(out_dir) / "preds" / f"{file.stem}.json"))
    return results, problems


@contextmanager
def _drawn_by_this_process() -> Iterator[None]:
    """Let MMEngine take this process for the only one, as it lets the first of several alone draw pictures."""
    before, dist_utils.is_distributed = dist_utils.is_distributed, lambda: False
    try:
        yield
    finally:
        dist_utils.is_distributed = before


def detection_transform(cfg: Config) -> CheckedPipeline:
    """Build the transform of a detector's test data, without annotations; raises a ValueError if there is none."""
    steps = [step for step in transforms_of(cfg) if not step["type"].endswith("LoadAnnotations")]
    return CheckedPipeline(steps, annotated=False)


def _make_inferencer(model: nn.Module, cfg: Config) -> Any:
    """Make mmdet's inferencer of a model that is built and loaded already; it takes a batch of transformed images."""
    # mmdet may only be imported once mmbivit has put the stand-in for mmcv's operators in place.
    from mmdet.apis import DetInferencer

    class Inferencer(DetInferencer):
        """mmdet's, without building a model, for images that are loaded already, with their files."""

        def _init_model(self, cfg: Config, weights: str | None, device: str = "cpu") -> nn.Module:
            return model

        def _init_pipeline(self, cfg: Config) -> None:
            return None

        def _init_collate(self, cfg: Config) -> Callable:
            return pseudo_collate  # MMEngine warns of mmdet, which has no registry of such functions

        def _init_visualizer(self, cfg: Config) -> Visualizer:
            cfg = cfg.copy()
            cfg.visualizer = dict(cfg.visualizer, vis_backends=None)  # training's, which warn that they have no folder
            return super()._init_visualizer(cfg)

        def preprocess(self, inputs: list[tuple[Path, Any]], batch_size: int = 1, **kwargs: Any) -> Iterator[Any]:
            yield self.collate_fn([(str(file), item) for file, item in inputs])

    model.dataset_meta = dict(palette="random") | (model.dataset_meta or {})
    return Inferencer(cfg, show_progress=False)
