"""The option that says which parts of a detector are binary."""

import pytest
from mmengine.registry import MODELS, DefaultScope

from mmbivit import config_path, get_config
from mmbivit.apis import train_config
from mmbivit.apis.binary_parts import set_binary_parts
from mmbivit.models.stage import staged_modules

NAMES = dict(neck="neck", rpn="rpn_head", box="roi_head.bbox_head", mask="roi_head.mask_head")


def staged(cfg):
    with DefaultScope.overwrite_default_scope("mmdet"):
        return set(staged_modules(MODELS.build(cfg.model)))


@pytest.mark.parametrize("name", ["digits/mask_rcnn_sibivit", "digits/mask_rcnn_sibivit_full"])
@pytest.mark.parametrize("parts", [[], ["neck"], ["rpn", "mask"], ["neck", "rpn", "box", "mask"]])
def test_these_parts_are_binary_and_no_others(tmp_path, name, parts):
    cfg = train_config(config_path(name), work_dir=str(tmp_path), float_checkpoint="none", binary_parts=parts)
    assert staged(cfg) == {"backbone", *(NAMES[part] for part in parts)}


def test_all_stages_of_a_cascade_and_the_dense_head_are_meant():
    cascade = get_config("cascade_mask_rcnn_sibivit_swin_t")
    set_binary_parts(cascade, ["box"])
    assert staged(cascade) == {"backbone", *(f"roi_head.bbox_head.{i}" for i in range(3))}
    dense = get_config("retinanet_sibivit_swin_t")
    set_binary_parts(dense, ["neck", "box"])
    assert staged(dense) == {"backbone", "neck", "bbox_head"}


def test_parts_take_the_training_stages_of_the_backbone_and_keep_their_settings():
    cfg = get_config("digits/mask_rcnn_sibivit_full")
    cfg.model.neck.binary = dict(recipe="bireal")
    cfg.model.rpn_head.binary = None
    cfg.model.backbone.training_stages = []
    set_binary_parts(cfg, ["neck", "rpn"])
    assert cfg.model.neck.binary == dict(recipe="bireal")
    assert cfg.model.rpn_head.binary == dict(training_stages=[])


def test_float_parts_have_the_learning_rate_of_the_others():
    cfg = get_config("digits/mask_rcnn_sibivit_full")
    assert set(cfg.optim_wrapper.paramwise_cfg.custom_keys) == {"fpn_convs", "rpn_conv", ".convs."}
    set_binary_parts(cfg, ["neck", "box"])
    assert set(cfg.optim_wrapper.paramwise_cfg.custom_keys) == {"fpn_convs"}
    cfg = get_config("digits/retinanet_sibivit_full")
    set_binary_parts(cfg, [])
    assert not cfg.optim_wrapper.paramwise_cfg.custom_keys


@pytest.mark.parametrize(
    ("name", "parts", "reason"),
    [
        ("digits/mask_rcnn_sibivit", ["heads"], "--binary-parts='heads' is unknown; allowed: 'neck', 'rpn'"),
        ("digits/mask_rcnn_sibivit", ["nec"], "did you mean 'neck'"),
        ("retinanet_sibivit_swin_t", ["mask"], "--binary-parts mask: the config's RetinaNet has no such part"),
        ("mask_rcnn_sibivit_vit_s", ["neck"], "a SimpleFeaturePyramid has no binary form; those that have: FPN"),
    ],
)
def test_wrong_parts_are_refused(name, parts, reason):
    with pytest.raises(ValueError, match=reason):
        set_binary_parts(get_config(name), parts)
