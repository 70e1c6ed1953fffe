"""The classifiers in timm's registry: built, trained by timm's own parts, saved and loaded in its file layout."""

import pytest
import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, NativeScaler

import mmbivit.timm as networks

TINY = dict(arch=dict(embed_dims=16, depths=(2,), num_heads=(2,)), patch_size=8, img_size=32, num_classes=5)


def test_all_are_known_to_timm():
    names = timm.list_models(["sibivit_*", "binaryvit_*"])
    assert len(names) == len(networks._NETWORKS) and "sibivit_deit_small" in names
    for name in names:
        assert timm.data.resolve_data_config({}, model=timm.create_model(name, **small(name)))["input_size"][1:] == (
            224,
            224,
        )


def small(name):
    if "swin" in name:
        return dict(arch=dict(embed_dims=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)))
    if name.startswith("binaryvit"):
        sizes = dict(embed_dims=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
        return dict(arch=dict(sizes, hidden_dims=(8, 16, 32, 64), reductions=(8, 4, 1, 1)))
    return dict(arch=dict(embed_dims=8, depths=(1, 1, 1), num_heads=(1, 1, 1))) if "nest" in name else TINY


@pytest.mark.parametrize("name", ["sibivit_deit_small", "sibivit_swin_tiny"])
def test_sizes_are_those_of_the_names(name):
    model = timm.create_model(name, pretrained=False, num_classes=7, drop_path_rate=0.2)
    assert model.backbone.num_features == ([384] if "deit" in name else [96, 192, 384, 768])
    assert model.pretrained_cfg["mean"] == (0.485, 0.456, 0.406) and model.num_classes == 7
    assert model.backbone.stages[-1].blocks[-1].drop_path.drop_prob == pytest.approx(0.2)


def test_timms_own_training_step_moves_every_parameter():
    torch.manual_seed(0)
    model = timm.create_model("sibivit_deit_small", **TINY).train()
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-2, weight_decay=0.05, layer_decay=0.9)
    scheduler, _ = create_scheduler_v2(optimizer, num_epochs=3, warmup_epochs=1)
    ema, scaler, loss = ModelEmaV3(model, decay=0.5), NativeScaler(device="cpu"), LabelSmoothingCrossEntropy()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
    for epoch in range(2):
        model.set_grad_checkpointing(epoch == 1)
        scaler(loss(model(images), labels), optimizer, clip_grad=1.0, parameters=model.parameters())
        optimizer.zero_grad()
        ema.update(model)
        scheduler.step(epoch + 1)
    still = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert still == []
    groups = {
        id(parameter) for group in optimizer.param_groups if group["weight_decay"] == 0 for parameter in group["params"]
    }
    assert id(model.backbone.absolute_pos_embed) in groups and id(model.backbone.extra_embed) in groups
    assert ema.module(images).isfinite().all()


def test_a_model_goes_through_timms_file_layout(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("sibivit_deit_small", **TINY).eval()
    save_for_hf(model, tmp_path, model_args=TINY, safe_serialization=True)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(images), model(images))


def test_features_heads_and_other_recipes():
    model = timm.create_model("sibivit_vit_tiny", recipe="bivit", **TINY).eval()
    assert model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    images = torch.randn(2, 3, 32, 32)
    features = model.forward_features(images)
    assert features.shape == (2, 16, 1, 1) and model.forward_head(features, pre_logits=True).shape == (2, 16)
    torch.testing.assert_close(model.forward_head(features), model(images))
    model.reset_classifier(9)
    assert model.get_classifier().out_features == 9 and model(images).shape == (2, 9)
