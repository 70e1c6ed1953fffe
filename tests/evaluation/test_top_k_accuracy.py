"""Top-k accuracy against counts made by hand."""

import pytest
import torch
from mmengine.evaluator import Evaluator

from mmbivit.evaluation import TopKAccuracy


def prediction(ranked: list[int], label: int) -> dict:
    return dict(pred_labels=torch.tensor(ranked), pred_scores=torch.linspace(0.5, 0.1, len(ranked)), label=label)


def test_counts_and_names():
    # Ranks of the true class: 0, 1, 2 and none of the three.
    samples = [prediction([4, 2, 0], 4), prediction([4, 2, 0], 2), prediction([1, 3, 2], 2), prediction([1, 3, 2], 0)]
    evaluator = Evaluator([dict(type="mmbivit.TopKAccuracy", topk=(1, 2, 3))])
    evaluator.process(data_samples=samples[:3])
    evaluator.process(data_samples=samples[3:])
    assert evaluator.evaluate(size=4) == {"accuracy/top1": 25.0, "accuracy/top2": 50.0, "accuracy/top3": 75.0}


def test_what_it_refuses():
    with pytest.raises(ValueError, match=r"topk\[0\]=0"):
        TopKAccuracy(topk=(0,))
    with pytest.raises(ValueError, match=r"topk=\(1, 5\) needs more than the 3 predictions"):
        TopKAccuracy().process({}, [prediction([4, 2, 0], 4)])
    unlabelled = prediction([4, 2, 0], 4)
    del unlabelled["label"]
    with pytest.raises(ValueError, match="labels"):
        TopKAccuracy(topk=(1,)).process({}, [unlabelled])
