"""How accurate the network of a run is: its evaluation, class by class."""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mmengine.config import Config

from mmbivit.apis.evaluate import evaluate, evaluation_config
from mmbivit.checks import UserError
from mmbivit.evaluation import ClassPrecision, precision_per_class

from .run import Run

__all__ = ["Accuracy", "ClassAccuracy", "evaluate_run"]


@dataclass(frozen=True)
class ClassAccuracy:
    """Accuracy of one class: its ``images``, and the share of them, in percent, whose first prediction is right."""

    name: str
    images: int
    top1: float


@dataclass(frozen=True)
class Accuracy:
    """What an evaluation found.

    Args:
        metrics: as MMEngine logs them, such as ``coco/bbox_mAP`` or ``accuracy/top1``.
        detection: AP of each class by kind, ``bbox`` and ``segm``; empty for a classifier.
        classification: accuracy of each class; empty for a detector.
    """

    metrics: dict[str, float]
    detection: dict[str, list[ClassPrecision]]
    classification: list[ClassAccuracy]


def evaluate_run(run: Run) -> Accuracy:
    """Evaluate a run's checkpoint on its test data; nothing is written into its work dir.

    Raises:
        FileNotFoundError: if the data are missing.
        ValueError: if a detector is not evaluated by one CocoMetric.
    """
    with TemporaryDirectory() as folder:
        # The data's folder may have been replaced, so the config that was loaded is written, not the run's own file.
        config = run.write_config(Path(folder))
        cfg = evaluation_config(config, run.checkpoint, work_dir=str(Path(folder) / "work_dir"))
        if run.is_classifier:
            out = Path(folder) / "predictions.pkl"
            metrics = evaluate(cfg, out)
            return Accuracy(metrics, {}, _accuracy_per_class(pickle.loads(out.read_bytes()), run))
        metric = _coco_metric(cfg)
        metric["outfile_prefix"] = str(Path(folder) / "results")
        metrics = evaluate(cfg)
        classes = (run.model.dataset_meta or {}).get("classes")
        precisions = {}
        for kind in ("bbox", "segm"):
            results = Path(folder) / f"results.{kind}.json"
            if results.is_file() and f"coco/{kind}_mAP" in metrics:
                precisions[kind] = precision_per_class(metric["ann_file"], results, kind, classes)
        return Accuracy(metrics, precisions, [])


def _coco_metric(cfg: Config) -> dict[str, Any]:
    evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, (list, tuple)) else [cfg.test_evaluator]
    found = [metric for metric in evaluators if metric["type"].split(".")[-1] == "CocoMetric" and "ann_file" in metric]
    if len(found) != 1:
        raise UserError("AP per class needs a test_evaluator with one CocoMetric and its ann_file")
    return found[0]


def _accuracy_per_class(predictions: Sequence[dict[str, Any]], run: Run) -> list[ClassAccuracy]:
    labels = sorted({prediction["label"] for prediction in predictions})
    names = (run.model.dataset_meta or {}).get("classes") or {label: str(label) for label in labels}
    accuracies = []
    for label in labels:
        right = [int(p["pred_labels"][0]) == label for p in predictions if p["label"] == label]
        accuracies.append(ClassAccuracy(names[label], len(right), 100 * sum(right) / len(right)))
    return accuracies
