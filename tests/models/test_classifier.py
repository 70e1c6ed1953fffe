"""The image classifier against the formulas of its parts."""

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from torch.nn import functional as F

from mmbivit.models import ImageClassifier

ARCH = dict(embed_dims=8, depths=(1, 1), num_heads=(1, 2))


def make(num_classes=3, **kwargs) -> ImageClassifier:
    backbone = dict(type="mmbivit.BinarySwinTransformer", arch=ARCH, recipe="float", out_indices=(1,), drop_path_rate=0)
    return ImageClassifier(backbone, num_classes, **kwargs)


def test_logits_are_the_head_of_the_mean_of_the_last_feature_map():
    model = make().eval()
    images = torch.randn(2, 3, 56, 56)
    (features,) = model.backbone(images)

    expected = features.flatten(2).mean(-1) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_of_class_numbers_and_of_soft_targets(smoothing):
    model = make(label_smoothing=smoothing).eval()
    images, labels = torch.randn(4, 3, 28, 28), torch.tensor([0, 2, 1, 1])
    log_probabilities = model(images).log_softmax(1)

    soft = F.one_hot(labels, 3) * (1 - smoothing) + smoothing / 3
    expected = -(soft * log_probabilities).sum(1).mean()
    torch.testing.assert_close(model(images, labels, mode="loss")["loss_cls"], expected)
    shares = torch.tensor([[0.2, 0.5, 0.3]]).repeat(4, 1)
    expected = -(shares * log_probabilities).sum(1).mean()
    torch.testing.assert_close(model(images, shares, mode="loss")["loss_cls"], expected)


def test_predictions_are_ranked_and_named():
    model = make(topk=2).eval()
    images = torch.randn(2, 3, 28, 28)
    scores = model(images).softmax(1)

    first, second = model(images, torch.tensor([2, 0]), mode="predict", img_path=["a.png", "b.png"])
    assert (first["label"], first["img_path"], second["label"]) == (2, "a.png", 0)
    assert "pred_names" not in first
    assert first["pred_labels"].tolist() == scores[0].argsort(descending=True)[:2].tolist()
    torch.testing.assert_close(first["pred_scores"], scores[0].sort(descending=True).values[:2])

    model.dataset_meta = dict(classes=("cat", "dog", "eel"))
    (named,) = model(images[:1], mode="predict")
    assert named["pred_names"] == [("cat", "dog", "eel")[label] for label in named["pred_labels"]]
    assert set(named) == {"pred_labels", "pred_scores", "pred_names"}


def test_topk_is_at_most_the_number_of_classes():
    assert len(make(topk=5).eval()(torch.randn(1, 3, 28, 28), mode="predict")[0]["pred_labels"]) == 3


def test_half_precision_logits_give_a_float32_loss():
    model = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(torch.randn(2, 3, 28, 28), torch.tensor([0, 1]), mode="loss")["loss_cls"]
    assert loss.dtype == torch.float32


def test_any_mm_backbone_can_be_classified():
    swin = dict(type="mmdet.SwinTransformer", embed_dims=8, depths=(1, 1), num_heads=(1, 2), strides=(4, 2))
    cfg = dict(type="mmbivit.ImageClassifier", backbone=dict(swin, out_indices=(1,)), num_classes=3)
    with DefaultScope.overwrite_default_scope("mmengine"):
        model = MODELS.build(cfg)
    assert model(torch.randn(2, 3, 28, 28)).shape == (2, 3)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (dict(num_classes=1), "num_classes=1"),
        (dict(topk=0), "topk=0"),
        (dict(label_smoothing=1.0), "label_smoothing=1.0"),
    ],
)
def test_impossible_settings_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        make(**setting)
    with pytest.raises(ValueError, match="mode='logits'"):
        make()(torch.randn(1, 3, 28, 28), mode="logits")
