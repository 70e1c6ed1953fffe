"""Distillation of necks and heads: the same places, the same regions, by hand."""

import copy

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from torch.nn import functional as F

from mmbivit import get_config
from mmbivit.distill import BlockMSELoss, DetectorMSELoss, Distiller, DistillTerm
from mmbivit.models.observation import observed

from ..test_detectors import sample

PARTS = ("neck", "dense_head", "box_head", "mask_head")


def build(cfg):
    with DefaultScope.overwrite_default_scope("mmdet"):
        torch.manual_seed(0)
        return MODELS.build(copy.deepcopy(cfg))


@pytest.fixture(scope="module")
def configs():
    cfg = get_config("digits/mask_rcnn_sibivit_full")
    teacher = cfg.custom_hooks[0].teacher
    teacher.pop("init_cfg")
    return cfg.model, teacher


def batch():
    samples = [sample([(10, 10, 50, 60), (60, 50, 100, 90)]), sample([(20, 30, 70, 90)])]
    return torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(1)), samples


def distilled(model, teacher, *losses):
    distiller = Distiller(model, model.backbone, teacher, [DistillTerm(loss) for loss in losses])
    images, samples = batch()
    try:
        return model(images, samples, mode="loss")
    finally:
        distiller.remove()


def test_terms_are_the_errors_of_what_the_parts_compute(configs):
    model, teacher = map(build, configs)
    model.train()
    seen = {}
    heads = model.roi_head
    watched = dict(
        neck=model.neck,
        rpn=model.rpn_head,
        box=heads.bbox_head,
        mask=heads.mask_head,
        box_regions=heads.bbox_roi_extractor,
        mask_regions=heads.mask_roi_extractor,
    )
    with observed(watched, lambda name, args, output: seen.update({name: (args, output)})):
        losses = distilled(model, teacher, BlockMSELoss(), *(DetectorMSELoss(part) for part in PARTS))

    teacher.eval()
    with torch.no_grad():
        maps = teacher.extract_feat(batch()[0])
        scores = teacher.rpn_head(maps)
        features = teacher.roi_head.bbox_roi_extractor(maps[:4], seen["box_regions"][0][1]).flatten(1)
        for layer in teacher.roi_head.bbox_head.shared_fcs:
            features = F.relu(layer(features))
        boxes = teacher.roi_head.bbox_head.fc_cls(features), teacher.roi_head.bbox_head.fc_reg(features)
        masks = teacher.roi_head.mask_head(teacher.roi_head.mask_roi_extractor(maps[:4], seen["mask_regions"][0][1]))

    def error(pairs):
        return torch.stack([F.mse_loss(ours, theirs) / theirs.var() for ours, theirs in pairs]).mean()

    student = {name: output for name, (_, output) in seen.items()}
    expected = dict(
        neck=error(zip(student["neck"], maps, strict=True)),
        dense_head=error(zip(sum(student["rpn"], []), sum(scores, []), strict=True)),
        box_head=error(zip(student["box"], boxes, strict=True)),
        mask_head=error([(student["mask"], masks)]),
    )
    for part, value in expected.items():
        torch.testing.assert_close(losses[f"loss_distill_{part}"], value)
    assert losses["loss_distill"] > 0


def test_the_gradient_reaches_the_part_and_the_teacher_is_left_alone(configs):
    model, teacher = map(build, configs)
    before = copy.deepcopy(teacher.state_dict())
    loss = distilled(model.train(), teacher, DetectorMSELoss("neck"))["loss_distill_neck"]
    loss.backward()
    assert model.neck.fpn_convs[0].conv.weight.grad.abs().sum() > 0
    assert model.rpn_head.rpn_conv.weight.grad is None
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_stages_of_a_cascade_and_a_dense_head_are_distilled():
    cascade = get_config("digits/cascade_mask_rcnn_sibivit_full").model
    teacher = copy.deepcopy(cascade)
    for head in teacher.roi_head.bbox_head:
        head.binary = None
    teacher.roi_head.mask_head.binary = None
    model = build(cascade).train()
    losses = distilled(model, build(teacher), DetectorMSELoss("box_head"), DetectorMSELoss("mask_head"))
    assert losses["loss_distill_box_head"] > 0 and losses["loss_distill_mask_head"] > 0

    dense = get_config("digits/retinanet_sibivit_full").model
    teacher = copy.deepcopy(dense)
    teacher.bbox_head.binary = None
    assert distilled(build(dense).train(), build(teacher), DetectorMSELoss("dense_head"))["loss_distill_dense_head"] > 0


@pytest.mark.parametrize(
    ("part", "change", "reason"),
    [
        ("neck", None, "the teacher is a BinarySwinTransformer without neck, so there is nothing to distil there"),
        ("neck", lambda t: t.neck.update(num_outs=5), "necks do not match: maps and channels of the student are"),
        ("box_head", lambda t: t.roi_head.bbox_head.update(num_classes=8), "box heads do not match: outputs"),
        ("mask_head", lambda t: t.roi_head.pop("mask_head"), "roi_head of the teacher is a .* without mask_head"),
    ],
)
def test_a_teacher_that_does_not_match_is_refused(configs, part, change, reason):
    model, teacher = build(configs[0]), copy.deepcopy(configs[1])
    if change is not None:
        change(teacher)
    teacher = build(teacher).backbone if change is None else build(teacher)
    with pytest.raises(ValueError, match=reason):
        Distiller(model, model.backbone, teacher, [DistillTerm(DetectorMSELoss(part))])


def test_of_is_checked():
    with pytest.raises(ValueError, match="of='necks' is unknown; allowed: 'neck'"):
        DetectorMSELoss("necks")
