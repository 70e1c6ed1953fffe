"""COCO's average precision of each class."""

from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mmbivit.checks import UserError

__all__ = ["ClassPrecision", "precision_per_class"]


@dataclass(frozen=True)
class ClassPrecision:
    """Average precision of one class, from 0 to 1; ``None`` for a class without annotated objects.

    Args:
        name: of the class.
        objects: annotated objects that count, which excludes crowds.
        ap: mean over IoU thresholds 0.50 to 0.95.
        ap50: at IoU 0.50.
    """

    name: str
    objects: int
    ap: float | None
    ap50: float | None


def precision_per_class(
    annotations: str | Path, detections: str | Path, kind: str, classes: Sequence[str] | None = None
) -> list[ClassPrecision]:
    """Evaluate COCO detections class by class, with pycocotools; the mean over classes is COCO's AP.

    Args:
        annotations: COCO annotation file.
        detections: file of COCO results, at least one.
        kind: ``'bbox'`` or ``'segm'``.
        classes: names of the classes, in the order that they are returned in; all of the file by default.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: if a class is not in the annotation file.
    """
    for file in (annotations, detections):
        if not Path(file).is_file():
            raise FileNotFoundError(f"{file} does not exist")
    with redirect_stdout(StringIO()):  # pycocotools prints its progress
        truth = COCO(str(annotations))
        ids = {category["name"]: category["id"] for category in truth.dataset["categories"]}
        names = list(ids) if classes is None else list(classes)
        if missing := [name for name in names if name not in ids]:
            raise UserError(f"class {missing[0]} is not in {annotations}, which has {', '.join(ids)}")
        evaluation = COCOeval(truth, truth.loadRes(str(detections)), kind)
        evaluation.params.catIds = [ids[name] for name in names]
        evaluation.evaluate()
        evaluation.accumulate()
    # (IoU thresholds, recalls, classes, areas, numbers of detections): all areas, most detections; -1 is "no object"
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    results = []
    for name in names:
        found = precision[:, :, evaluation.params.catIds.index(ids[name])]  # pycocotools has sorted them
        objects = len(truth.getAnnIds(catIds=[ids[name]], iscrowd=False))
        has_objects = bool((found > -1).all())
        ap, ap50 = (float(found.mean()), float(found[0].mean())) if has_objects else (None, None)
        results.append(ClassPrecision(name, objects, ap, ap50))
    return results
