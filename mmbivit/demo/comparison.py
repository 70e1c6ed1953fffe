"""What the demo shows at its end: a table, and detections of both detectors side by side."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmengine.registry import MODELS, DefaultScope
from rich.table import Table

from mmbivit import config_path
from mmbivit.analysis import ModelSize, model_size
from mmbivit.analysis.figures.detections import detections_figure
from mmbivit.apis.config import load_config
from mmbivit.apis.predict import predict
from mmbivit.datasets import DigitScenes
from mmbivit.deploy import load
from mmbivit.report.plots.detections import read_annotations, read_detections, read_images

from .speed import Speed
from .steps import DemoPlan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_comparison", "predict_scenes", "read_metrics", "report_table"]

METRICS = {"box AP": "bbox_mAP", "box AP50": "bbox_mAP_50", "mask AP": "segm_mAP", "mask AP50": "segm_mAP_50"}


def read_metrics(work_dir: Path) -> dict[str, float]:
    """Read the COCO metrics of the newest evaluation in a work dir, as MMEngine wrote them."""
    newest = max(work_dir.glob("*/*.json"), key=lambda file: file.parent.name)
    metrics = json.loads(newest.read_text())
    return {name: metrics[f"coco/{key}"] for name, key in METRICS.items()}


def detector_sizes(config: str) -> tuple[ModelSize, ModelSize]:
    """Return the sizes of the backbone and of the whole detector of a config."""
    cfg = load_config(config_path(config))
    with DefaultScope.overwrite_default_scope("mmdet"):
        detector = MODELS.build(cfg.model)
    return model_size(detector.backbone), model_size(detector)


def report_table(plan: DemoPlan, out: Path, seconds: dict[str, float], speed: Speed) -> Table:
    """Make the table of the detectors: AP, sizes and times."""
    caption = (
        "sizes: backbone / whole detector\n"
        "ms per image: from a decoded image to boxes and masks, one at a time,\n"
        f"the detectors in turn; median of {speed.images} images, threads: {speed.threads}\n"
        "(SI-BiViT simulates bits with floats, SI-BiViT packed computes with bits)"
    )
    table = Table(title=f"Digit scenes, {plan.val} validation images", caption=caption)
    for column in ("", "float Mask R-CNN", "SI-BiViT", "SI-BiViT packed"):
        table.add_column(column, justify="right" if column else "left")
    metrics = [read_metrics(out / f"{name}_eval") for name in ("float", "sibivit", "packed")]
    for name in METRICS:
        table.add_row(name, *(f"{metric[name]:.3f}" for metric in metrics))
    sizes = [detector_sizes(config) for config in (plan.float_config, plan.binary_config)]
    table.add_section()
    table.add_row("parameters", *(_pair(pair, "params", 1e6, "M") for pair in sizes))
    table.add_row("of them binary", *(_pair(pair, "binary_weights", 1e6, "M") for pair in sizes))
    table.add_row("as float32", *(_pair(pair, "float_bytes", 1e6, "MB") for pair in sizes))
    table.add_row("with 1-bit weights (counted)", "-", _pair(sizes[1], "packed_bytes", 1e6, "MB"))
    packed = load(out / "sibivit.safetensors")
    stored = (sum(tensor.nbytes for tensor in m.state_dict().values()) / 1e6 for m in (packed.backbone, packed))
    table.add_row("in the packed file", "-", "-", " / ".join(f"{size:.2f}" for size in stored) + " MB")
    table.add_section()
    alone, further = (
        load_config(config_path(config)).train_cfg.max_iters for config in (plan.float_config, plan.binary_config)
    )
    table.add_row("training iterations", f"{alone}", f"{alone} float + {further}")
    for name, kinds in (("train", ("float", "binary")), ("test", ("float", "binary", "packed"))):
        times = (seconds[f"{name}_{kind}"] for kind in kinds)
        table.add_row(f"{name} time", *(f"{time // 60:.0f} min {time % 60:.0f} s" for time in times))
    table.add_row("ms per image", *(f"{speed.milliseconds[kind]:.1f}" for kind in ("float", "binary", "packed")))
    return table


def _pair(sizes: tuple[ModelSize, ModelSize], field: str, unit: float, name: str) -> str:
    return " / ".join(f"{getattr(size, field) / unit:.2f}" for size in sizes) + f" {name}"


def predict_scenes(plan: DemoPlan, out: Path, count: int) -> dict[str, list[Path]]:
    """Detect digits in the first validation scenes with both detectors; returns the JSON files by detector."""
    data = DigitScenes.load(out / "data")
    images = sorted(data.image_dir("val").iterdir())[:count]
    runs = {"float Mask R-CNN": ("float", plan.float_config), "SI-BiViT": ("sibivit", plan.binary_config)}
    found = {}
    for title, (name, config) in runs.items():
        weights, folder = out / name / "last.pth", out / "predictions" / name
        results = predict(config_path(config), weights, images, folder, batch_size=8)
        found[title] = [result["json_file"] for result in results]
    return found


def draw_comparison(data: Path, predictions: dict[str, Sequence[Path]], score_thr: float = 0.5) -> "Figure":
    """Draw scenes in columns: the annotation, then the detections of each detector.

    Args:
        data: folder of the digit scenes.
        predictions: JSON files of :func:`mmbivit.apis.predict` for the first validation scenes, by detector.
        score_thr: lowest score of a detection that is drawn.
    """
    scenes = DigitScenes.load(data)
    count = min(len(files) for files in predictions.values())
    images = read_images(sorted(scenes.image_dir("val").iterdir())[:count])
    classes, annotated = read_annotations(scenes.ann_file("val"), images)
    detected = {
        title: [read_detections(file, classes, score_thr) for file in files[:count]]
        for title, files in predictions.items()
    }
    return detections_figure(list(images.values()), {"annotation": annotated, **detected}, classes)
