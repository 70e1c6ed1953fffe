"""Top-k accuracy of a classifier."""

from collections.abc import Sequence
from typing import Any

from mmengine.evaluator import BaseMetric

from mmbivit.checks import UserError, check_choice, check_integers
from mmbivit.registry import METRICS

__all__ = ["TopKAccuracy"]


@METRICS.register_module()
class TopKAccuracy(BaseMetric):
    """Share of images, in percent, whose class is among the ``k`` predictions with the highest scores.

    Takes the predictions of :class:`mmbivit.models.ImageClassifier` and reports ``accuracy/top1``, ``accuracy/top5``.

    Args:
        topk: the values of ``k``.
        collect_device: where the ranks of a distributed run meet, ``'cpu'`` or ``'gpu'``.
        prefix: of the names of the metrics.

    Raises:
        ValueError: for a ``k`` below 1 or above the number of predictions, or predictions without label.
    """

    default_prefix = "accuracy"

    def __init__(self, topk: Sequence[int] = (1, 5), collect_device: str = "cpu", prefix: str | None = None):
        check_choice("collect_device", collect_device, ("cpu", "gpu"))
        check_integers("topk", topk, 1, 10**7)
        super().__init__(collect_device=collect_device, prefix=prefix)
        self.topk = tuple(topk)

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Keep the rank of the true class of each image."""
        for sample in data_samples:
            predicted = sample["pred_labels"].tolist()
            if max(self.topk) > len(predicted):
                raise UserError(
                    f"topk={self.topk} needs more than the {len(predicted)} predictions of the model; raise its topk"
                )
            if "label" not in sample:
                raise UserError("accuracy needs data with labels")
            label = sample["label"]
            self.results.append(predicted.index(label) if label in predicted else len(predicted))

    def compute_metrics(self, results: list[int]) -> dict[str, float]:
        """Count the ranks below each ``k``."""
        return {f"top{k}": 100 * sum(rank < k for rank in results) / len(results) for k in self.topk}
