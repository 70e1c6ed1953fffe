"""Binary necks and heads: what they compute, how they start, and that whole detectors are made of bits."""

import copy

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmbivit import get_config
from mmbivit.analysis import complexity
from mmbivit.binary import RECIPES, BinaryConv2d, BinaryLayer, ResidualBinaryLinear
from mmbivit.models.observation import observed
from mmbivit.models.stage import staged_modules

from ..test_detectors import sample

FULL = "digits/mask_rcnn_sibivit_full"
DETECTORS = (FULL, "digits/cascade_mask_rcnn_sibivit_full", "digits/retinanet_sibivit_full")


def build(name_or_model):
    model = get_config(name_or_model).model if isinstance(name_or_model, str) else copy.deepcopy(name_or_model)
    with DefaultScope.overwrite_default_scope("mmdet"):
        torch.manual_seed(0)
        return MODELS.build(model)


def neck(**options):
    options = dict(in_channels=[4, 8], out_channels=8, num_outs=3) | options
    return build(dict(type="mmbivit.BinaryFPN", **options))


def box_head(**options):
    options = dict(in_channels=4, roi_feat_size=3, fc_out_channels=8, num_classes=2) | options
    return build(dict(type="mmbivit.BinaryConvFCBBoxHead", **options))


def losses_of(model):
    samples = [sample([(10, 10, 50, 60), (60, 50, 100, 90)]), sample([])]
    images = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(1))
    return model.parse_losses(model(images, samples, mode="loss"))[0]


def images():
    return torch.randn(1, 3, 96, 112, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", DETECTORS)
def test_every_product_that_is_called_binary_has_signs_and_two_weight_values(name):
    """The walk over the backbone, extended to the detector: inputs of -1 and +1, padding included."""
    model = build(name).eval()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BinaryLayer)}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    described = sample([])
    described.set_metainfo(dict(img_shape=(96, 112), ori_shape=(96, 112), scale_factor=(1.0, 1.0)))
    inputs = {}
    quantizers = {name: layer.input_quantizer for name, layer in layers.items()}
    with torch.no_grad(), observed(quantizers, lambda name, args, output: inputs.update({name: output})):
        model(images(), [described], mode="predict")
    outside = [name for name in layers if not name.startswith("backbone.")]
    assert len(outside) >= 7 and inputs.keys() == layers.keys()
    for layer_name, layer in layers.items():
        assert inputs[layer_name].abs().unique().tolist() == [1.0], layer_name
        rows = layer.effective_weight()
        rows = rows.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else rows
        assert all(len(row.unique()) == 2 for row in rows), layer_name
        if isinstance(layer, BinaryConv2d) and any(layer.padding):
            assert inputs[layer_name].shape[1] > 2 * layer.padding[0]  # the quantizer sees the padded map
    counted = {row.name: row for row in complexity(model, (3, 96, 112)).rows}
    assert all(counted[name].bops > 0 and counted[name].flops == 0 for name in layers)


def test_the_options_make_every_product_of_neck_and_heads_binary():
    model = get_config(FULL).model
    model.neck.binary = dict(laterals=True)
    model.rpn_head.binary = dict(predictor=True)
    model.roi_head.bbox_head.binary = dict(hidden=True, predictor=True)
    model.roi_head.mask_head.binary = dict(predictor=True, upsample=True)
    counted = complexity(build(model).eval(), (3, 96, 112))
    float_layers = {row.name for row in counted.rows if row.flops}
    assert float_layers == {"backbone.patch_embed.proj"}


def test_fpn_computes_norm_and_shortcut_after_signs():
    fpn = neck(binary={}).eval()
    maps = [torch.randn(2, 4, 6, 8), torch.randn(2, 8, 3, 4)]
    lateral = fpn.lateral_convs[0](maps[0])
    lateral = lateral + nn.functional.interpolate(fpn.lateral_convs[1](maps[1]), scale_factor=2)
    padded = torch.where(nn.functional.pad(lateral, (1, 1, 1, 1)) >= 0, 1.0, -1.0)
    weight = fpn.fpn_convs[0].conv.weight
    mean, theta = weight.mean((1, 2, 3), keepdim=True), weight.abs().mean((1, 2, 3), keepdim=True)
    product = nn.functional.conv2d(padded, theta * torch.where(weight >= mean, 1.0, -1.0))
    nn.init.constant_(fpn.fpn_convs[0].conv.shortcut_scale, 0.5)
    outputs = fpn(maps)
    torch.testing.assert_close(outputs[0], product / (1 + 1e-5) ** 0.5 + 0.5 * lateral)
    assert [tuple(output.shape[2:]) for output in outputs] == [(6, 8), (3, 4), (2, 2)]


def test_the_box_head_computes_a_norm_after_the_product_of_signs():
    head = box_head(num_shared_fcs=2, binary={}).eval()
    fc = head.shared_fcs[0]
    features = torch.randn(5, 4, 3, 3)
    signs = torch.where(features.flatten(1) >= 0, 1.0, -1.0)
    weight = fc.weight
    binary = weight.abs().mean(1, keepdim=True) * torch.where(weight >= weight.mean(1, keepdim=True), 1.0, -1.0)
    hidden = (signs @ binary.T / (1 + 1e-5) ** 0.5).relu()
    hidden = head.shared_fcs[1](hidden).relu()
    for ours, expected in zip(head(features), (head.fc_cls(hidden), head.fc_reg(hidden)), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("options", [dict(shortcut=False), dict(norm=False), dict(shortcut=False, norm=False)])
def test_shortcut_and_norm_can_be_left_out(options):
    fpn, head = neck(binary=options), box_head(num_shared_fcs=1, num_shared_convs=1, binary=options)
    for layer in (fpn.fpn_convs[0].conv, head.shared_convs[0].conv, head.shared_fcs[0]):
        assert layer.shortcut is (options.get("shortcut", True) and layer is not head.shared_fcs[0])
        assert (layer.norm is None) is (layer.bias is not None) is ("norm" in options)


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_reach_all_parts_in_both_stages(name, stage):
    model = build(name).train()
    parts = staged_modules(model)
    assert {"backbone", "neck"} < set(parts)
    for part in parts.values():
        part.set_stage(stage)
        assert part.stage == stage
    loss = losses_of(model)
    loss.backward()
    assert loss.isfinite()
    for name, layer in model.named_modules():
        if isinstance(layer, BinaryLayer):
            assert (layer.input_bits, layer.weight_bits) == (1, 1 if stage == 2 else 32)
            assert layer.weight.grad is not None or not getattr(layer, "active", True) or ".si." in name


@pytest.mark.parametrize("recipe", ["sibivit", "bit"])  # with and without learned scales
def test_images_without_annotations_start_nothing(recipe):
    model = get_config(FULL).model
    model.roi_head.mask_head.binary = dict(recipe=recipe)
    model = build(model).train()
    images = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(1))
    model.parse_losses(model(images, [sample([]), sample([])], mode="loss"))[0].backward()
    layers = [module.conv for module in model.roi_head.mask_head.convs]
    assert not any(layer.first_batch.started or layer.input_scale.started for layer in layers)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert losses_of(model).isfinite()
    assert all(layer.first_batch.started and layer.input_scale.started for layer in layers)
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(dtype):
    model = build(FULL).train()
    with torch.autocast("cpu", dtype):
        loss = losses_of(model)
    loss.float().backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.neck.parameters() if p.grad is not None)


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "float"])
def test_every_recipe_gives_neck_and_heads_their_quantizers(recipe):
    fpn = neck(binary=dict(recipe=recipe)).train()
    head = box_head(num_shared_fcs=2, binary=dict(recipe=recipe)).train()
    outputs = fpn([torch.randn(2, 4, 6, 8), torch.randn(2, 8, 3, 4)])
    scores, boxes = head(torch.randn(4, 4, 3, 3))
    (sum(output.square().mean() for output in outputs) + scores.square().mean() + boxes.square().mean()).backward()
    for parameter in (*fpn.parameters(), *head.parameters()):
        assert parameter.grad.isfinite().all() if parameter.requires_grad else parameter.grad is None


def test_float_parts_are_mmdetections_own():
    options = dict(in_channels=[4, 8], out_channels=8, num_outs=3)
    ours, theirs = neck(), build(dict(type="mmdet.FPN", **options))
    assert staged_modules(ours) == {} and ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    maps = [torch.randn(2, 4, 6, 8), torch.randn(2, 8, 3, 4)]
    assert all(map(torch.equal, ours(maps), theirs(maps)))


@pytest.mark.parametrize("name", DETECTORS)
def test_weights_of_a_float_detector_are_taken_and_nothing_is_missing(name):
    cfg = get_config(name).model
    cfg.backbone.update(recipe="float", spatial_interaction=None, mlp_ratio=4)
    full = copy.deepcopy(cfg)
    heads = full.roi_head.bbox_head if "roi_head" in full else [full.bbox_head]
    parts = [full.neck, full.get("rpn_head"), *(heads if isinstance(heads, list) else [heads])]
    parts.append(full.roi_head.mask_head if "roi_head" in full else None)
    for part in parts:
        for config in part if isinstance(part, list) else [part]:
            if config is not None:
                config.binary = None
    start = build(full).state_dict()
    model = build(cfg)
    missing, unexpected = model.load_state_dict(start, strict=False)
    assert missing == [] and all(key.endswith("bias") for key in unexpected)
    own = model.state_dict()
    cut = ("fc_cls.weight", "fc_reg.weight", "shared_fcs.1.weight")  # of the last linear layer, which is narrower
    shared = [key for key in start if key in own and key.endswith(".weight") and not key.endswith(cut)]
    assert len(shared) > 20 and all(torch.equal(own[key], start[key]) for key in shared)


def test_the_box_head_takes_the_units_of_largest_norm_of_a_wider_float_head():
    full = box_head(num_shared_fcs=2, fc_out_channels=6)
    head = box_head(num_shared_fcs=2, fc_out_channels=6, binary=dict(last_fc_channels=2))
    weights = full.state_dict()
    last = torch.cat([weights["fc_cls.weight"], weights["fc_reg.weight"]])
    norms = weights["shared_fcs.1.weight"].norm(dim=1) * last.norm(dim=0)
    keep = sorted(norms.argsort(descending=True)[:2].tolist())
    assert head.load_state_dict(weights, strict=False).unexpected_keys == []
    own = head.state_dict()
    assert torch.equal(own["shared_fcs.1.weight"], weights["shared_fcs.1.weight"][keep])
    assert torch.equal(own["fc_reg.weight"], weights["fc_reg.weight"][:, keep])
    assert torch.equal(own["shared_fcs.0.norm.bias"], weights["shared_fcs.0.bias"])


@pytest.mark.parametrize("norm", [True, False])
def test_a_binary_layer_starts_with_the_mean_and_deviation_of_its_float_one(norm):
    fpn = neck(binary=dict(norm=norm)).train()
    full = neck()
    full.load_state_dict(
        {key: value for key, value in fpn.state_dict().items() if key in full.state_dict()}, strict=False
    )
    maps = [5 * torch.randn(8, 4, 12, 12), torch.randn(8, 8, 6, 6)]
    laterals = full.lateral_convs[0](maps[0]) + nn.functional.interpolate(
        full.lateral_convs[1](maps[1]), scale_factor=2
    )
    expected = full.fpn_convs[0](laterals) - (0 if norm else fpn.fpn_convs[0].conv.bias.view(-1, 1, 1))
    output = fpn(maps)[0]
    layer = fpn.fpn_convs[0].conv
    torch.testing.assert_close(layer.input_scale.value, laterals.square().mean().sqrt().view(1))
    assert not layer.shortcut_scale.any()
    if norm:
        torch.testing.assert_close(output.mean((0, 2, 3)), expected.mean((0, 2, 3)), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(output.std((0, 2, 3)), expected.std((0, 2, 3)), rtol=1e-2, atol=1e-3)
    else:
        ratio = output.std() / expected.std()
        assert 0.5 < ratio < 1.5
    before = layer.norm.weight.clone() if norm else layer.input_scale.value.clone()
    fpn([100 * x for x in maps])
    assert torch.equal(before, layer.norm.weight if norm else layer.input_scale.value)  # the first batch alone


def test_hidden_layers_of_the_box_head_stay_float_unless_told():
    for hidden in (False, True):
        head = box_head(num_shared_fcs=3, binary=dict(hidden=hidden))
        kinds = [isinstance(fc, ResidualBinaryLinear) for fc in head.shared_fcs]
        assert kinds == [True, hidden, hidden] and isinstance(head.relu, nn.Identity if hidden else nn.ReLU)


def test_norms_of_a_float_head_give_the_binary_ones_their_affine():
    options = dict(num_shared_convs=2, num_shared_fcs=1, conv_out_channels=4, norm_cfg=dict(type="BN"))
    full, head = box_head(**options), box_head(**options, binary={})
    nn.init.normal_(full.shared_convs[1].bn.weight)
    full.shared_convs[1].bn.running_mean.fill_(7)
    missing, unexpected = head.load_state_dict(full.state_dict(), strict=False)
    assert missing == [] and unexpected == []
    norm = head.shared_convs[1].conv.norm
    assert torch.equal(norm.weight, full.shared_convs[1].bn.weight) and not norm.running_mean.any()


@pytest.mark.parametrize("stage", [1, 2])
def test_a_checkpoint_says_its_stage(stage):
    model, other = build(FULL), build(FULL)
    for part in staged_modules(model).values():
        part.set_stage(stage)
    other.load_state_dict(model.state_dict())
    assert {part.stage for part in staged_modules(other).values()} == {stage}


def test_conv_cfg_makes_any_neck_or_head_binary():
    convolution = dict(type="mmbivit.BinaryConv2d", recipe="bireal", norm=True, shortcut=True)
    options = dict(in_channels=[4, 8], out_channels=8, num_outs=2, act_cfg=None, conv_cfg=convolution)
    for kind in ("FPN", "PAFPN"):
        part = build(dict(type=f"mmdet.{kind}", **options))
        layers = [module for module in part.modules() if isinstance(module, nn.Conv2d)]
        assert layers and all(isinstance(layer, BinaryConv2d) and layer.norm is not None for layer in layers)
        assert set(staged_modules(part).values()) == set(layers)
        part.init_weights()
        outputs = part([torch.randn(1, 4, 6, 8), torch.randn(1, 8, 3, 4)])
        assert all(output.isfinite().all() for output in outputs)
    head = build(dict(type="mmdet.FCNMaskHead", num_convs=2, in_channels=4, conv_out_channels=4, conv_cfg=convolution))
    assert head(torch.randn(2, 4, 6, 6)).shape == (2, 80, 12, 12)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: neck(binary=dict(shortcuts=True)), r"neck\.binary has no key 'shortcuts'.*did you mean 'shortcut'"),
        (lambda: box_head(num_shared_fcs=1, binary=dict(last_fc_channels=4)), "last_fc_channels needs num_shared_fcs"),
        (lambda: box_head(num_shared_fcs=2, binary=dict(last_fc_channels=0)), "last_fc_channels=0; allowed"),
        (lambda: neck(binary=dict(norm="BN")), r"neck\.binary\.norm='BN' is unknown; allowed: True, False"),
        (lambda: neck(binary=dict(recipe="float")), r"neck\.binary\.recipe has float layers; give neck\.binary=None"),
        (lambda: neck(binary=dict(stage1="heads")), "stage1='heads' is unknown"),
        (lambda: neck(conv_cfg=dict(type="mmbivit.BinaryConv2d", recipe="float")), "recipe with float layers"),
        (
            lambda: build(
                dict(type="mmbivit.BinaryFCNMaskHead", upsample_cfg=dict(type="nearest"), binary=dict(upsample=True))
            ),
            "needs upsample_cfg.type='deconv'",
        ),
        (
            lambda: build(dict(type="mmbivit.BinaryConv2d", in_channels=4, out_channels=4, kernel_size=3, groups=2)),
            "groups=2; a binary convolution can only have groups=1",
        ),
    ],
)
def test_impossible_settings_are_refused_in_one_line(make, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_float_head_of_another_width_is_refused():
    head = box_head(num_shared_fcs=2, binary={})
    other = box_head(num_shared_fcs=2, fc_out_channels=16).state_dict()
    with pytest.raises(ValueError, match=r"shared_fcs\.0\.weight has shape \(16, 36\), this model's .* \(8, 36\)"):
        head.load_state_dict(other, strict=False)
    fewer_classes = box_head(num_shared_fcs=2, num_classes=5).state_dict()
    missing = [key for key in fewer_classes if key.startswith("fc_")]
    assert head.load_state_dict({k: v for k, v in fewer_classes.items() if k not in missing}, strict=False)
