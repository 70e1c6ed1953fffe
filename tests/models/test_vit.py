"""ViT and DeiT: against timm, in classification with a class token, and in detection with windows."""

import pytest
import timm
import torch
from mmengine.registry import MODELS, DefaultScope
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mmbivit import get_config
from mmbivit.checkpoints import load_pretrained
from mmbivit.distill import BlockMSELoss, Distiller, DistillTerm
from mmbivit.models import BinaryVisionTransformer, ImageClassifier, SimpleFeaturePyramid, find_blocks
from tests.test_detectors import sample

ARCH = dict(embed_dims=16, depths=(2,), num_heads=(2,))
TINY = dict(arch=ARCH, patch_size=8, pretrain_img_size=32, drop_path_rate=0.0)
SI = dict(mlp_ratio=3, spatial_interaction=dict(ratio=1.0))


def timm_network(cls=VisionTransformer):
    torch.manual_seed(0)
    network = cls(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


def classifier(**options):
    torch.manual_seed(1)
    backbone = dict(type="mmbivit.BinaryVisionTransformer", out_type="cls_token", **TINY) | options
    return ImageClassifier(backbone, num_classes=5).eval()


@pytest.mark.parametrize(
    ("cls", "options"),
    [(VisionTransformer, {}), (VisionTransformerDistilled, dict(distillation_token=True))],
    ids=["vit", "distilled"],
)
def test_the_float_network_is_timms(cls, options):
    network, ours = timm_network(cls), classifier(recipe="float", **options)
    assert ours.load_state_dict(network.state_dict()) == ([], [])
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), network(images), rtol=1e-4, atol=1e-4)
        ours.backbone.out_type = "featmap"
        (feature_map,) = ours.backbone(images)
        tokens = network.forward_features(images)[:, network.num_prefix_tokens :]
    torch.testing.assert_close(feature_map.flatten(2).transpose(1, 2), tokens, rtol=1e-4, atol=1e-4)
    assert feature_map.shape == (2, 16, 4, 4)


def test_architectures_are_timms():
    for arch in ("tiny", "small", "base"):
        with torch.device("meta"):
            ours = BinaryVisionTransformer(arch, "float", out_type="cls_token")
            network = timm.create_model(f"deit_{arch}_patch16_224", num_classes=0)
        counts = [sum(p.numel() for p in module.parameters()) for module in (ours, network)]
        assert counts[0] == counts[1] - ours.num_features[0]  # our class token has its position in it


def test_a_student_starts_from_float_weights_and_keeps_the_largest_units():
    network, student = timm_network(), classifier(recipe="sibivit", **SI)
    missing, unexpected = student.load_state_dict(network.state_dict(), strict=False)
    assert missing == unexpected == []
    block, source = student.backbone.stages[0].blocks[1], network.blocks[1]
    assert torch.equal(block.attn.qkv.weight, source.attn.qkv.weight)
    assert block.mlp.fc1.weight.shape == (48, 16) and source.mlp.fc1.weight.shape == (64, 16)
    rows = {tuple(row.tolist()) for row in source.mlp.fc1.weight}
    assert all(tuple(row.tolist()) in rows for row in block.mlp.fc1.weight)
    assert torch.equal(student.head.weight, network.head.weight)


def test_a_position_embedding_is_interpolated_for_other_sizes():
    (feature_map,) = BinaryVisionTransformer(recipe="float", **TINY).eval()(torch.randn(1, 3, 45, 61))
    assert feature_map.shape == (1, 16, 6, 8)
    other = BinaryVisionTransformer(recipe="float", **(TINY | dict(pretrain_img_size=64)))
    missing, _ = load_pretrained(other, dict(state_dict=BinaryVisionTransformer(recipe="float", **TINY).state_dict()))
    assert missing == [] and other.absolute_pos_embed.shape == (1, 64, 16)


def test_windows_attend_and_mix_by_themselves():
    torch.manual_seed(0)
    network = BinaryVisionTransformer(window_size=2, global_blocks=(), **TINY, **SI).eval()
    nn.init.normal_(network.stages[0].blocks[0].mlp.si.alpha)
    whole = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        (before,) = network(whole)
        changed = whole.clone()
        changed[..., 16:, 16:] = torch.randn(1, 3, 16, 16)  # the last window of 2 x 2 tokens
        (after,) = network(changed)
    same = (before == after).all(dim=1)[0]
    assert same[:2].all() and same[:, :2].all() and not same[2:, 2:].any()

    reference = BinaryVisionTransformer(window_size=4, **TINY, **SI).eval()  # one window is the whole grid
    everywhere = BinaryVisionTransformer(class_token=False, **TINY, **SI).eval()
    everywhere.load_state_dict(reference.state_dict())
    with torch.no_grad():
        assert torch.equal(reference(whole)[0], everywhere(whole)[0])


def test_some_blocks_attend_to_the_whole_map():
    network = BinaryVisionTransformer("tiny", window_size=14)
    windows = [block.window_size for block in network.stages[0].blocks]
    assert [i for i, window in enumerate(windows) if window is None] == [2, 5, 8, 11] and set(windows) == {None, 14}
    assert all(block.mixing_window == 14 for block in network.stages[0].blocks)
    layouts = [block.layout((9, 9)) for block in find_blocks(network).values()]
    assert layouts[2].grid_tokens().shape == (1, 81) and layouts[0].grid_tokens().shape == (1, 196)


def test_a_detector_starts_from_a_classifiers_backbone():
    """Its token mixing loses the class token, where windows have as many tokens as the grid had."""
    pretrained = classifier(**SI).backbone
    for block in pretrained.stages[0].blocks:
        nn.init.normal_(block.mlp.si.fc2.input_quantizer.gamma)
    detector = BinaryVisionTransformer(window_size=4, **TINY, **SI)
    state = {f"backbone.{key}": value for key, value in pretrained.state_dict().items()}
    missing, unexpected = load_pretrained(detector, dict(state_dict=state))
    assert missing == [] and unexpected == ["extra_embed"]
    for name in ("fc1.weight", "fc2.weight"):
        mixing, source = (net.stages[0].blocks[0].mlp.si.get_parameter(name) for net in (detector, pretrained))
        assert torch.equal(mixing, source[1:, 1:])
    gammas = [net.stages[0].blocks[0].mlp.si.fc2.input_quantizer.gamma for net in (detector, pretrained)]
    assert torch.equal(gammas[0], gammas[1][1:])


@pytest.mark.parametrize("stage", [1, 2])
def test_classification_trains_in_both_stages(stage):
    model = classifier(**SI).train()
    teacher = classifier(recipe="float")
    model.backbone.set_stage(stage)
    distiller = Distiller(model, model.backbone, teacher, [DistillTerm(BlockMSELoss())])
    losses = model(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]), mode="loss")
    distiller.remove()
    sum(losses.values()).backward()
    assert losses["loss_distill"] > 0 and model.backbone.extra_embed.grad.abs().sum() > 0


@pytest.mark.parametrize("stage", [1, 2])
def test_a_mask_rcnn_with_a_simple_feature_pyramid_trains_at_an_odd_size(stage):
    cfg = get_config("digits/mask_rcnn_sibivit").model
    backbone = dict(type="mmbivit.BinaryVisionTransformer", window_size=3, **TINY, **SI)
    neck = dict(type="mmbivit.SimpleFeaturePyramid", in_channels=[16], out_channels=cfg.neck.out_channels)
    neck["num_outs"] = max(4, cfg.neck.num_outs)
    cfg.backbone, cfg.neck = backbone, neck
    strides = [2, 4, 8, 16, 32][: neck["num_outs"]]
    cfg.rpn_head.anchor_generator.strides = strides
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(cfg).train()
    model.backbone.set_stage(stage)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    images = torch.randn(2, 3, 88, 104)
    for _ in range(2):
        losses = model(images, [sample([(10, 10, 50, 60)]), sample([])], mode="loss")
        total, _ = model.parse_losses(losses)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert total.isfinite()
    outputs = model.extract_feat(images)
    assert [tuple(out.shape[2:]) for out in outputs[:3]] == [(44, 52), (22, 26), (11, 13)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(arch="huge"), "arch='huge' is unknown; allowed: 'tiny', 'small', 'base', or dict"),
        (dict(arch=dict(embed_dims=8, depths=(1, 1), num_heads=(1, 2))), r"arch.depths=\(1, 1\); allowed: one number"),
        (dict(out_type="cls"), "out_type='cls' is unknown"),
        (dict(window_size=2, class_token=True), "class_token=True and window_size=2; allowed: no class token"),
        (dict(window_size=2, out_type="cls_token"), "out_type='cls_token' needs a class token"),
        (dict(class_token=False, distillation_token=True), "distillation_token=True needs a class token"),
        (dict(global_blocks=(0,)), r"global_blocks=\(0,\); allowed: None"),
        (dict(window_size=2, global_blocks=(5,)), "global_blocks"),
        (dict(window_size=2, spatial_interaction=dict(ratio=1.0, axis="grid")), "axis='grid'; allowed: 'window'"),
        (dict(out_indices=(1,)), "out_indices"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BinaryVisionTransformer(**(TINY | options))


def test_images_that_the_token_axis_cannot_take_are_refused():
    network = BinaryVisionTransformer(**TINY, **SI)
    with pytest.raises(
        ValueError, match="images make 5 x 4 tokens; .* mixes the 4 x 4 of pretrain_img_size: .* 32 x 32"
    ):
        network(torch.randn(1, 3, 40, 32))


def test_a_feature_pyramid_takes_one_map():
    pyramid = SimpleFeaturePyramid([16], 8, num_outs=6)
    outputs = pyramid([torch.randn(1, 16, 6, 8)])
    assert [tuple(out.shape) for out in outputs[:4]] == [(1, 8, 24, 32), (1, 8, 12, 16), (1, 8, 6, 8), (1, 8, 3, 4)]
    assert [tuple(out.shape[2:]) for out in outputs[4:]] == [(2, 2), (1, 1)]
    with pytest.raises(ValueError, match="got 2 feature maps; allowed: one"):
        pyramid([torch.randn(1, 16, 6, 8)] * 2)
