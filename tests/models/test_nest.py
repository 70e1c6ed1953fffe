"""NesT: against timm, in classification, and in detectors of any size."""

import pytest
import timm
import torch
from mmengine.registry import MODELS, DefaultScope
from timm.models.nest import Nest, resize_pos_embed
from torch import nn
from torch.nn import functional as F

from mmbivit import get_config
from mmbivit.checkpoints import load_pretrained
from mmbivit.distill import BlockMSELoss, Distiller, DistillTerm
from mmbivit.models import BinaryNesT, ImageClassifier
from mmbivit.packed.nest import pool_map
from tests.test_detectors import sample

TINY = dict(
    arch=dict(embed_dims=16, depths=(1, 2), num_heads=(1, 2)),
    pretrain_img_size=48,
    out_indices=(0, 1),
    drop_path_rate=0.0,
)
SI = dict(mlp_ratio=3, spatial_interaction=dict(ratio=1.0))


def timm_network():
    torch.manual_seed(0)
    options = dict(num_levels=2, embed_dims=(16, 32), num_heads=(1, 2), depths=(1, 2), num_classes=5)
    network = Nest(img_size=48, pad_type="same", drop_path_rate=0.0, **options).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


def classifier(**options):
    torch.manual_seed(1)
    return ImageClassifier(dict(type="mmbivit.BinaryNesT", **TINY) | options, num_classes=5).eval()


def test_the_float_network_is_timms():
    network, ours = timm_network(), classifier(recipe="float", out_indices=(1,))
    assert ours.load_state_dict(network.state_dict()) == ([], [])
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), network(images), rtol=1e-4, atol=1e-4)
        both = BinaryNesT(recipe="float", **TINY).eval()
        load_pretrained(both, dict(state_dict=network.state_dict()))
        first, last = both(images)
        torch.testing.assert_close(last, network.forward_features(images), rtol=1e-4, atol=1e-4)
        level = network.levels[0](network.patch_embed(images))
    normed = F.layer_norm(level.permute(0, 2, 3, 1), (16,), eps=1e-6).permute(0, 3, 1, 2)
    torch.testing.assert_close(first, normed, rtol=1e-4, atol=1e-4)


def test_architectures_are_timms():
    for arch in ("tiny", "small", "base"):
        with torch.device("meta"):
            ours = BinaryNesT(arch, "float", out_indices=(2,))
            network = timm.create_model(f"nest_{arch}_jx", num_classes=0)
        counts = [sum(p.numel() for p in module.parameters()) for module in (ours, network)]
        assert counts[0] == counts[1]


@pytest.mark.parametrize("size", [(8, 6), (7, 5), (7, 8), (1, 1)])
def test_pooling_is_that_of_tensorflow(size):
    x = torch.randn(2, 3, *size)
    pool = timm.layers.create_pool2d("max", kernel_size=3, stride=2, padding="same")
    tokens, grid = pool_map(x)
    assert torch.equal(tokens.transpose(1, 2).unflatten(2, grid), pool(x))


def test_a_student_starts_from_float_weights():
    network, student = timm_network(), classifier(**SI, out_indices=(1,))
    missing, unexpected = student.load_state_dict(network.state_dict(), strict=False)
    assert missing == unexpected == []
    stage, level = student.backbone.stages[1], network.levels[1]
    assert torch.equal(stage.blocks[1].attn.qkv.weight, level.transformer_encoder[1].attn.qkv.weight)
    # Channels of heads that lie side by side there follow each other here.
    order = torch.arange(32).view(16, 2).T.flatten()
    assert torch.equal(stage.blocks[1].attn.proj.weight, level.transformer_encoder[1].attn.proj.weight[:, order])
    assert torch.equal(stage.pool.conv.weight, level.pool.conv.weight)
    assert stage.blocks[0].mlp.fc1.weight.shape == (96, 32)


def test_positions_are_interpolated_to_another_size_as_timm_does():
    network = timm_network()
    larger = BinaryNesT(**(TINY | dict(pretrain_img_size=96)), **SI)
    assert load_pretrained(larger, dict(state_dict=network.state_dict())) == ([], [])
    for i, (level, blocks, side) in enumerate(zip(network.levels, (4, 1), (24, 12), strict=True)):
        expected = resize_pos_embed(level.pos_embed, torch.empty(1, blocks, 144, 16 * 2**i))  # in blocks of 12 x 12
        across = side // 12
        expected = expected.view(1, across, across, 12, 12, -1).transpose(2, 3).reshape(1, side**2, -1)
        torch.testing.assert_close(larger.stages[i].pos_embed, expected)


def test_tokens_of_a_block_that_the_image_fills_in_part_attend_to_each_other_alone():
    """By timm's layers, on all tokens of an image of 4 x 6 patches, which are less than a block of 6 x 6."""
    network, ours = timm_network(), BinaryNesT(recipe="float", **TINY | dict(out_indices=(1,))).eval()
    load_pretrained(ours, dict(state_dict=network.state_dict()))
    images = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        x = network.patch_embed.proj(images)
        for level, stage in zip(network.levels, ours.stages, strict=True):
            x = level.pool(x)
            positions = stage.pos_embed.transpose(1, 2).unflatten(2, stage.grid)
            x = x + F.interpolate(positions, size=x.shape[2:], mode="bicubic")
            tokens = level.transformer_encoder(x.flatten(2).transpose(1, 2).unsqueeze(1))
            x = tokens.squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:])
        expected = network.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        torch.testing.assert_close(ours(images)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stage", [1, 2])
def test_classification_trains_in_both_stages(stage):
    model, teacher = classifier(**SI).train(), classifier(recipe="float")
    model.backbone.set_stage(stage)
    distiller = Distiller(model, model.backbone, teacher, [DistillTerm(BlockMSELoss())])
    losses = model(torch.randn(4, 3, 48, 48), torch.tensor([0, 1, 2, 3]), mode="loss")
    distiller.remove()
    sum(losses.values()).backward()
    assert losses["loss_distill"] > 0 and model.backbone.stages[1].pool.conv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("stage", [1, 2])
def test_a_mask_rcnn_trains_at_an_odd_size(stage):
    cfg = get_config("digits/mask_rcnn_sibivit").model
    cfg.backbone = dict(type="mmbivit.BinaryNesT", **TINY, **SI)
    cfg.neck.in_channels = [16, 32]
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(cfg).train()
    model.backbone.set_stage(stage)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(2):
        losses = model(torch.randn(2, 3, 90, 106), [sample([(10, 10, 50, 60)]), sample([])], mode="loss")
        total, _ = model.parse_losses(losses)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert total.isfinite()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(arch="large"), "arch='large' is unknown; allowed: 'tiny', 'small', 'base', or dict"),
        (dict(pretrain_img_size=50), r"pretrain_img_size=\(50, 50\); allowed: one number, a multiple of 8"),
        (dict(pretrain_img_size=(48, 96)), r"pretrain_img_size=\(48, 96\); allowed: one number"),
        (dict(spatial_interaction=dict(ratio=1.0, axis="grid")), "axis='grid'; allowed: 'window', the blocks"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BinaryNesT(**(TINY | options))
