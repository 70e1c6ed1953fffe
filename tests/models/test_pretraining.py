"""Weights between classifiers and detectors, float and binary, ours and others'."""

import numpy as np
import pytest
import timm
import torch
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import CheckpointLoader, load_checkpoint
from torch import nn

from mmbivit import get_config
from mmbivit.apis import use_safe_loading
from mmbivit.engine.decoupled_training_hook import build_teacher
from mmbivit.models import BinarySwinTransformer, load_pretrained
from tests.swin_weights import ARCH, make_classifier, make_timm_swin, official_keys, randomise

BINARY = dict(recipe="sibivit", mlp_ratio=3, spatial_interaction=dict(ratio=1.0))


def equal(state, expected):
    """Whether all tensors of ``expected`` are in ``state``."""
    return all(torch.equal(state[key], value) for key, value in expected.items())


@pytest.fixture
def log(monkeypatch):
    """The lines that loading logs."""
    lines = []
    monkeypatch.setattr("mmbivit.checkpoints.fitting.print_log", lambda message, *args, **kwargs: lines.append(message))
    return lines


def mmpretrain_classifier():
    """A classifier with mmpretrain's names: mmdet's backbone and ``head.fc``; returns its logits' function too."""
    from mmdet.models.backbones import SwinTransformer

    backbone = SwinTransformer(**ARCH, strides=(4, 2), out_indices=(1,), drop_path_rate=0.0)
    model = nn.ModuleDict(dict(backbone=backbone, head=nn.ModuleDict(dict(fc=nn.Linear(16, 3)))))
    randomise(model)
    return model.state_dict(), lambda images: model.head.fc(backbone(images)[0].mean(dim=(2, 3)))


def foreign_classifier(source):
    """State dict of a float classifier under a foreign name, and a function that returns its logits."""
    if source == "mmpretrain":
        return mmpretrain_classifier()
    model = make_timm_swin()
    return model.state_dict() if source == "timm" else official_keys(model.state_dict()), model


@torch.no_grad()
@pytest.mark.parametrize("source", ["timm", "official", "mmpretrain"])
def test_whole_float_classifiers_of_others_give_their_logits(source, tmp_path, monkeypatch):
    state, logits = foreign_classifier(source)
    images = torch.randn(2, 3, 112, 112)
    model = make_classifier()
    model.load_state_dict(state, strict=True)
    torch.testing.assert_close(model(images), logits(images), rtol=1e-4, atol=1e-4)

    # As files: bare, and under 'model' like the official ones, both through MMEngine's loader.
    monkeypatch.setattr(CheckpointLoader, "_schemes", CheckpointLoader._schemes.copy())
    use_safe_loading()
    for content in (state, dict(model=state)):
        torch.save(content, tmp_path / "float.pth")
        loaded = make_classifier()
        load_checkpoint(loaded, str(tmp_path / "float.pth"), strict=True)
        assert equal(loaded.state_dict(), model.state_dict())


@torch.no_grad()
def test_the_real_swin_t_gives_timms_logits():
    reference = timm.create_model("swin_tiny_patch4_window7_224")
    for name, parameter in reference.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.05)
    model = make_classifier(1000, arch="tiny", out_indices=(3,), shift_single_window=False)
    model.load_state_dict(reference.state_dict(), strict=True)
    model.eval(), reference.eval()
    images = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(model(images), reference(images), rtol=1e-4, atol=1e-4)


def test_our_own_classifiers_and_backbones_load_with_their_stage():
    source = randomise(make_classifier(**BINARY))
    source.backbone.set_stage(1)
    model = make_classifier(**BINARY)
    model.load_state_dict(source.state_dict(), strict=True)
    assert model.backbone.stage == 1 and equal(model.state_dict(), source.state_dict())

    wrapped = nn.ModuleDict(dict(model=make_classifier(**BINARY)))  # such as EMA's copy
    wrapped.load_state_dict({f"model.{key}": value for key, value in source.state_dict().items()}, strict=True)
    assert equal(wrapped.model.state_dict(), source.state_dict())

    alone = make_classifier(**BINARY)
    result = alone.load_state_dict(source.backbone.state_dict(), strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["head.weight", "head.bias"], [])
    assert equal(alone.backbone.state_dict(), source.backbone.state_dict())


@pytest.mark.parametrize("source", ["timm", "official", "mmpretrain"])
def test_another_number_of_classes_is_an_error_that_says_what_to_do(source, tmp_path):
    state, _ = foreign_classifier(source)
    message = (
        r"the checkpoint's head has 3 classes, this model num_classes=5; give num_classes=3, "
        r"or load the backbone alone with model\.backbone\.init_cfg"
    )
    with pytest.raises(ValueError, match=message):
        make_classifier(5).load_state_dict(state, strict=False)

    torch.save(state, tmp_path / "float.pth")
    model = make_classifier(5, init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "float.pth")))
    head = model.head.weight.clone()
    model.init_weights()
    prefix = "backbone." if source == "mmpretrain" else ""
    value = state[f"{prefix}{'stages' if prefix else 'layers'}.0.blocks.0.norm1.weight"]
    assert torch.equal(model.backbone.stages[0].blocks[0].norm1.weight, value)
    assert torch.equal(model.head.weight, head)


def test_a_float_classifier_initialises_a_binary_one():
    reference = make_timm_swin()
    state = reference.state_dict()
    model = make_classifier(**BINARY)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert model.load_state_dict(state, strict=True)
    after, ours, theirs = model.state_dict(), "backbone.stages.1.blocks.0.", "layers.1.blocks.0."
    for own, other in ((ours + "norm1", theirs + "norm1"), ("backbone.norm1", "norm"), ("head", "head.fc")):
        assert torch.equal(after[own + ".weight"], state[other + ".weight"])
        assert torch.equal(after[own + ".bias"], state[other + ".bias"])
    fc1, fc2 = state[theirs + "mlp.fc1.weight"].numpy(), state[theirs + "mlp.fc2.weight"].numpy()
    strength = np.linalg.norm(fc1, axis=1) * np.linalg.norm(fc2, axis=0)
    keep = np.sort(np.argsort(-strength)[: len(fc1) * 3 // 4])
    assert np.array_equal(after[ours + "mlp.fc1.weight"].numpy(), fc1[keep])
    assert np.array_equal(after[ours + "mlp.fc2.weight"].numpy(), fc2[:, keep])
    for key in (ours + "mlp.si.fc1.weight", ours + "norm1.running_var", "backbone.norm1.running_mean"):
        assert torch.equal(after[key], before[key])


DETECTOR_ARCH = dict(embed_dims=8, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2))


def make_detector(name, **backbone):
    """A detector of ours with narrow layers."""
    cfg = get_config(name).model
    cfg.backbone.update(arch=DETECTOR_ARCH, init_cfg=None, **backbone)
    cfg.neck.in_channels = [8, 16, 32, 64]
    heads = cfg.roi_head.bbox_head
    for head in heads if isinstance(heads, list) else [heads]:
        head.fc_out_channels = 8
    with DefaultScope.overwrite_default_scope("mmdet"):
        return MODELS.build(cfg)


DETECTORS = ["mask_rcnn_sibivit_swin_t", "cascade_mask_rcnn_sibivit_swin_t"]


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", DETECTORS)
def test_a_classifiers_backbone_loads_into_a_detector_and_back(name, stage, tmp_path, log):
    classifier = randomise(make_classifier(**BINARY, arch=DETECTOR_ARCH, out_indices=(3,)))
    classifier.backbone.set_stage(stage)
    torch.save(dict(state_dict=classifier.state_dict()), tmp_path / "classifier.pth")
    detector = make_detector(name)
    norms = ("norm0.", "norm1.", "norm2.")
    fresh = {key: value.clone() for key, value in detector.backbone.state_dict().items() if key.startswith(norms)}

    checkpoint = torch.load(tmp_path / "classifier.pth", weights_only=True)
    assert load_pretrained(detector.backbone, checkpoint, prefix="backbone.") == ([], [])
    loaded = detector.backbone.state_dict()
    assert detector.backbone.stage == stage and loaded["training_stage"] == stage
    assert equal(loaded, classifier.backbone.state_dict())
    assert equal(loaded, fresh) and set(loaded) - set(fresh) == set(classifier.backbone.state_dict())
    assert log == ["The checkpoint has the last stage's norm only, as classifiers do: norm0, norm1, norm2 start fresh."]

    # The same by config, as the *_finetune.py configs do.
    init_cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "classifier.pth"), prefix="backbone.")
    backbone = BinarySwinTransformer(arch=DETECTOR_ARCH, **BINARY, init_cfg=init_cfg)
    backbone.init_weights()
    assert backbone.stage == stage and equal(backbone.state_dict(), classifier.backbone.state_dict())

    # And back: what the classifier does not return is left out.
    randomise(detector.backbone)
    target = make_classifier(**BINARY, arch=DETECTOR_ARCH, out_indices=(3,))
    state = {f"backbone.{key}": value for key, value in detector.backbone.state_dict().items()}
    result = target.load_state_dict(state, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["head.weight", "head.bias"], [])
    assert target.backbone.stage == stage
    assert equal(detector.backbone.state_dict(), target.backbone.state_dict())


@pytest.mark.parametrize("source", ["timm", "official"])
def test_a_float_classifier_initialises_a_binary_detector_backbone(source, log):
    state, _ = foreign_classifier(source)
    model = BinarySwinTransformer(arch=ARCH, **BINARY, out_indices=(0, 1))
    assert load_pretrained(model, state) == ([], [])
    assert torch.equal(model.norm1.weight, state["norm.weight"])
    assert torch.equal(model.norm0.weight, torch.ones(8)) and torch.equal(model.norm0.running_var, torch.ones(8))
    norms, weights = log
    assert "norm0 start fresh" in norms and "has to be trained" in weights


def test_only_the_last_norm_stands_for_the_others(log):
    source = BinarySwinTransformer(arch=ARCH, out_indices=(0,))
    result = BinarySwinTransformer(arch=ARCH, out_indices=(0, 1)).load_state_dict(source.state_dict(), strict=False)
    assert {key.partition(".")[0] for key in result.missing_keys} == {"norm1"}
    assert result.unexpected_keys == [] and log == []


def test_the_teacher_of_distillation_takes_timm_names(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    reference = make_timm_swin()
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: reference)
    teacher = build_teacher(
        dict(
            type="mmbivit.BinarySwinTransformer",
            arch=ARCH,
            recipe="float",
            out_indices=(1,),
            init_cfg=dict(type="Pretrained", checkpoint="timm://swin_tiny_patch4_window7_224.ms_in1k"),
        )
    ).eval()
    images = torch.randn(1, 3, 112, 112)
    expected = reference.forward_features(images).permute(0, 3, 1, 2)
    torch.testing.assert_close(teacher(images)[0], expected, rtol=1e-4, atol=1e-4)
