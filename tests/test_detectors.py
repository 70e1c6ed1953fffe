"""Whole detectors: batches without annotations in both stages, inference through mmdet's own interface."""

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData

from mmbivit import config_path, get_config


def build_detector():
    with DefaultScope.overwrite_default_scope("mmdet"):
        return MODELS.build(get_config("digits/mask_rcnn_sibivit").model)


def sample(boxes):
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    data = DetDataSample(metainfo=dict(img_shape=(112, 112), batch_input_shape=(112, 112), pad_shape=(112, 112)))
    masks = np.zeros((len(boxes), 112, 112), np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = 1
    data.gt_instances = InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        labels=torch.arange(len(boxes)),
        masks=BitmapMasks(masks, 112, 112),
    )
    return data


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("boxes", [[[], []], [[(10, 10, 50, 60)], []]], ids=["no_annotation", "one_image_without"])
def test_images_without_annotations_train_in_both_stages(stage, boxes):
    model = build_detector().train()
    model.backbone.set_stage(stage)
    losses = model(torch.randn(2, 3, 112, 112), [sample(image) for image in boxes], mode="loss")
    total, _ = model.parse_losses(losses)
    total.backward()
    assert torch.isfinite(total) and total > 0
    gradients = [p.grad for p in model.backbone.parameters() if p.grad is not None]
    assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients)
    assert any(gradient.abs().sum() > 0 for gradient in gradients)


def test_det_inferencer_takes_config_and_checkpoint(tmp_path):
    from mmdet.apis import DetInferencer

    model = build_detector()
    weights = tmp_path / "weights.pth"
    meta = dict(dataset_meta=dict(classes=tuple("0123456789"), palette="random"))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), weights)
    inferencer = DetInferencer(
        model=str(config_path("digits/mask_rcnn_sibivit")), weights=str(weights), device="cpu", show_progress=False
    )
    image = np.random.default_rng(0).integers(0, 255, (90, 130, 3), dtype=np.uint8)
    predictions = inferencer(image, no_save_vis=True)["predictions"][0]
    assert set(predictions) == {"labels", "scores", "bboxes", "masks"}
    assert inferencer.model.backbone.stage == 2
    own, loaded = model.state_dict(), inferencer.model.state_dict()
    assert all(torch.equal(own[key], loaded[key]) for key in own)
