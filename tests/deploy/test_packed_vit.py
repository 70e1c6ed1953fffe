"""Packed ViT against the simulated one: outputs within 1e-4, on every code path and any number of threads."""

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmbivit import get_config
from mmbivit.deploy import PackedVisionTransformer, load, pack, save
from mmbivit.models import BinaryVisionTransformer, ImageClassifier
from mmbivit.packed import kernels
from tests.deploy.networks import randomise
from tests.deploy.test_packed_swin import assert_equal_outputs

TINY = dict(arch=dict(embed_dims=24, depths=(2,), num_heads=(2,)), patch_size=8, pretrain_img_size=40, mlp_ratio=3)
SI = dict(spatial_interaction=dict(ratio=1.0))


def binary_vit(**options) -> BinaryVisionTransformer:
    torch.manual_seed(0)
    network = randomise(BinaryVisionTransformer(**(TINY | options)))
    if network.extra_embed is not None:
        nn.init.normal_(network.extra_embed)
    return network


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        dict(out_type="cls_token", **SI),
        dict(out_type="cls_token", distillation_token=True, **SI),
        dict(out_type="featmap", spatial_interaction=None, mlp_ratio=4),
        dict(spatial_interaction=dict(ratio=2.0), pretrain_img_size=96),  # 145 tokens, more than threads take at once
        dict(class_token=False, **SI),
        dict(window_size=3, **SI),
        dict(window_size=2, global_blocks=(), mask_padding=False, **SI),
        dict(recipe="reactnet", mlp_ratio=4, **SI),
        dict(recipe="reactnet", out_type="cls_token", mlp_ratio=3, pretrain_img_size=96, **SI),
        dict(recipe="bivit", out_type="cls_token", **SI),
        dict(recipe="bit", **SI),
        # heads of 16 channels, whose scores are sums of 0.25 and so exactly 0 in float, too
        dict(
            recipe="bibert",
            spatial_interaction=None,
            arch=dict(embed_dims=32, depths=(2,), num_heads=(2,)),
        ),
        dict(qk_scale=0.3, qkv_bias=False),
        dict(recipe=dict(base="bi-vit", threshold="channel"), **SI),
        dict(arch=dict(embed_dims=64, depths=(1,), num_heads=(1,)), in_channels=4, **SI),
    ],
    ids=lambda options: ", ".join(f"{key}={value}" for key, value in options.items()),
)
def test_outputs_equal_with_every_option(options, threads):
    network = binary_vit(**options)
    side = options.get("pretrain_img_size", 40)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert_equal_outputs(network, torch.randn(2, options.get("in_channels", 3), side, side))
    finally:
        torch.set_num_threads(before)


def test_a_feature_map_of_any_size():
    assert_equal_outputs(binary_vit(window_size=3, **SI), torch.randn(1, 3, 61, 90))
    assert_equal_outputs(binary_vit(spatial_interaction=None), torch.randn(1, 3, 61, 90))


def test_more_tokens_than_a_window_of_swin_has():
    """The feature maps of detectors: 35 x 34 tokens that attend to each other."""
    assert_equal_outputs(binary_vit(window_size=7, global_blocks=(1,), **SI), torch.randn(1, 3, 280, 270))


def test_a_classifier_goes_through_a_file(tmp_path):
    torch.manual_seed(0)
    model = ImageClassifier(dict(type="mmbivit.BinaryVisionTransformer", out_type="cls_token", **TINY, **SI), 5)
    randomise(model.backbone)
    images = torch.randn(2, 3, 40, 40)
    packed = pack(model.eval())
    save(packed.backbone, tmp_path / "vit.safetensors")
    save(packed, tmp_path / "whole.safetensors")  # whose token mixing takes images of 40 x 40 alone
    again, whole = load(tmp_path / "vit.safetensors"), load(tmp_path / "whole.safetensors")
    assert type(again) is PackedVisionTransformer
    with torch.no_grad():
        torch.testing.assert_close(packed(images), model(images), rtol=1e-4, atol=1e-4)
        assert torch.equal(again(images)[0], packed.backbone(images)[0])
        assert torch.equal(whole(images), packed(images))


def test_images_that_the_token_axis_cannot_take_are_refused():
    packed = pack(binary_vit(**SI))
    with pytest.raises(ValueError, match=r"images make \(6, 5\) tokens; spatial interaction mixes .* grid of \(5, 5\)"):
        packed(torch.randn(1, 3, 48, 40))
    with pytest.raises(ValueError, match="images are torch.float64"):
        packed(torch.randn(1, 3, 40, 40).double())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(embed_dims=0), "embed_dims=0"),
        (dict(num_heads=5), "num_heads=5 of 24 channels"),
        (dict(depth="2"), "depth='2'"),
        (dict(pos_embed_shape=[3]), "expected height and width"),
        (dict(scale=float("nan")), "scale=nan"),
        (dict(extra_tokens=3), "extra_tokens=3"),
        (dict(window_size=7), "extra_tokens=1 and window_size=7"),
        (dict(out_type="cls"), "out_type='cls' is unknown"),
        (dict(out_type="cls_token", extra_tokens=0), "needs a class token"),
        (dict(global_blocks=[9]), "global_blocks"),
        (dict(si_hidden=0), "si_hidden=0"),
        (dict(pos_embed_shape=[200, 200]), "mixes 40001 tokens"),
        (dict(select_ratio=0), "select_ratio=0"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        PackedVisionTransformer(**(pack(binary_vit(**SI)).options | change))


def test_threads_share_what_they_compute():
    """Bit for bit the same, whether each has windows of its own or all share one."""
    packed, images = pack(binary_vit(pretrain_img_size=96, **SI)), torch.randn(1, 3, 96, 96)
    before = torch.get_num_threads()
    try:
        for path in kernels.available_paths()[:-1]:  # torch sums in another order
            with kernels.use_path(path):
                outputs = []
                for threads in (1, 2, 5):
                    torch.set_num_threads(threads)
                    outputs.append(packed(images)[0])
                assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    finally:
        torch.set_num_threads(before)


def test_a_detector_with_a_simple_feature_pyramid_goes_through_a_file(tmp_path):
    cfg = get_config("digits/mask_rcnn_sibivit")
    neck = dict(type="mmbivit.SimpleFeaturePyramid", in_channels=24, out_channels=64, num_outs=4)
    cfg.model.backbone, cfg.model.neck = dict(type="mmbivit.BinaryVisionTransformer", window_size=3, **TINY, **SI), neck
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(cfg.model).eval()
    randomise(model.backbone)
    packed = pack(model)
    save(packed, tmp_path / "detector.safetensors", cfg)
    again, images = load(tmp_path / "detector.safetensors"), torch.randn(1, 3, 88, 104)
    with torch.no_grad():
        for ours, simulated in zip(again.extract_feat(images), model.extract_feat(images), strict=True):
            torch.testing.assert_close(ours, simulated, rtol=1e-3, atol=1e-3)
