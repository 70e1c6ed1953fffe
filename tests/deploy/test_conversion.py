"""Converting files: outputs stay, every key is accounted for, what does not fit is refused."""

import io

import pytest
import timm
import torch
from rich.console import Console
from torch import nn

from mmbivit.deploy.conversion import convert_checkpoint, convert_state_dict
from mmbivit.models import BinarySwinTransformer, load_checkpoint_file, load_pretrained
from tests.swin_weights import ARCH, make_classifier, make_timm_swin, official_keys, randomise

SIZES = ARCH | dict(window_size=7, mlp_ratio=4.0, patch_size=4)


def mmdet_swin(out_indices=(0, 1)):
    from mmdet.models.backbones import SwinTransformer

    return randomise(SwinTransformer(**ARCH, strides=(4, 2), out_indices=out_indices, drop_path_rate=0.0))


def text(conversion, verbose=False):
    """What a wide terminal shows."""
    screen = io.StringIO()
    Console(width=200, file=screen).print(conversion.report(verbose))
    return screen.getvalue()


@torch.no_grad()
@pytest.mark.parametrize("family", ["timm", "official"])
def test_a_converted_classifier_gives_timms_logits_and_goes_back(family, tmp_path):
    reference = make_timm_swin()
    state = reference.state_dict() if family == "timm" else official_keys(reference.state_dict())
    torch.save(state if family == "timm" else dict(model=state), tmp_path / "float.pth")
    conversion = convert_checkpoint(str(tmp_path / "float.pth"))
    conversion.save(tmp_path / "own.pth")

    content = load_checkpoint_file(str(tmp_path / "own.pth"))
    assert content["meta"] == dict(source="float.pth", family=family, arch=SIZES)
    model = make_classifier()
    model.load_state_dict(content["state_dict"], strict=True)
    assert set(content["state_dict"]) == set(model.state_dict())
    images = torch.randn(2, 3, 112, 112)
    torch.testing.assert_close(model(images), reference(images), rtol=1e-4, atol=1e-4)
    assert load_pretrained(BinarySwinTransformer(arch=ARCH, out_indices=(0, 1)), content) == ([], [])

    # And back, from the file and from our model's own: timm loads it strictly.
    torch.save(dict(state_dict=model.state_dict(), meta=dict(epoch=1)), tmp_path / "trained.pth")
    for source in ("own.pth", "trained.pth", "float.pth"):
        convert_checkpoint(str(tmp_path / source), to="timm").save(tmp_path / "timm.pth", overwrite=True)
        back = make_timm_swin()
        back.load_state_dict(torch.load(tmp_path / "timm.pth", weights_only=True), strict=True)
        assert torch.equal(back(images), reference(images))


def test_our_weights_load_into_the_real_swin_t_of_timm(tmp_path):
    model = make_classifier(1000, arch="tiny", out_indices=(3,))
    torch.save(model.state_dict(), tmp_path / "own.pth")
    conversion = convert_checkpoint(str(tmp_path / "own.pth"), to="timm")
    assert conversion.arch["num_heads"] == (3, 6, 12, 24) and conversion.arch["depths"] == (2, 2, 6, 2)
    reference = timm.create_model("swin_tiny_patch4_window7_224")
    reference.load_state_dict(conversion.state_dict, strict=True)
    merging = model.backbone.stages[1].downsample.reduction.weight
    assert torch.equal(reference.layers[2].downsample.reduction.weight, merging)
    assert torch.equal(reference.norm.weight, model.backbone.norm3.weight)


@torch.no_grad()
def test_mmdets_detectors_and_backbones(tmp_path):
    backbone = mmdet_swin()
    detector = nn.ModuleDict(dict(backbone=backbone, neck=nn.Linear(2, 2), roi_head=nn.Linear(2, 2)))
    images = torch.randn(1, 3, 40, 52)
    expected = backbone(images)
    for name, module, prefix in (("backbone", backbone, ""), ("detector", detector, "backbone.")):
        torch.save(dict(state_dict=module.state_dict(), meta={}), tmp_path / f"{name}.pth")
        conversion = convert_checkpoint(str(tmp_path / f"{name}.pth"))
        assert (conversion.family, conversion.arch, conversion.num_classes) == ("mmdet", SIZES, None)
        assert (conversion.unplaced, conversion.missing) == ([], [])
        model = BinarySwinTransformer(arch=ARCH, recipe="float", out_indices=(0, 1)).eval()
        assert load_pretrained(model, dict(state_dict=conversion.state_dict), prefix="backbone.") == ([], [])
        for output, reference in zip(model(images), expected, strict=True):
            torch.testing.assert_close(output, reference, rtol=1e-5, atol=1e-5)
        indices = {key for key in module.state_dict() if key.endswith("relative_position_index")}
        others = {key for key in module.state_dict() if key.startswith(("neck.", "roi_head."))}
        assert conversion.skipped == dict.fromkeys(indices, "the network computes it") | dict.fromkeys(
            others, "not of the backbone"
        )
        assert len(indices) == 4 and len(others) == (4 if prefix else 0)

    timm_state = convert_checkpoint(str(tmp_path / "detector.pth"), to="timm")
    reference = timm.models.swin_transformer.SwinTransformer(
        img_size=112, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=7, num_classes=0
    ).eval()
    reference.load_state_dict(timm_state.state_dict, strict=True)
    images = torch.randn(1, 3, 112, 112)
    features = reference.forward_features(images).permute(0, 3, 1, 2)
    torch.testing.assert_close(features, backbone(images)[1], rtol=1e-5, atol=1e-5)
    assert {"backbone.norm0.weight", "backbone.norm0.bias"} <= {
        key for key, why in timm_state.skipped.items() if why == "timm has the last stage's norm only"
    }


def test_every_key_is_accounted_for():
    state = official_keys(make_timm_swin().state_dict())
    conversion = convert_state_dict(state, "official.pth")
    assert set(conversion.mapped) | set(conversion.skipped) == set(state)
    assert not set(conversion.mapped) & set(conversion.skipped)
    for old, new in conversion.mapped.items():
        assert conversion.state_dict[new] is state[old]  # the official layout is ours
    assert set(conversion.state_dict) == {*conversion.mapped.values(), "backbone.training_stage"}
    assert conversion.mapped["layers.0.downsample.norm.bias"] == "backbone.stages.0.downsample.norm.bias"
    assert conversion.mapped["layers.1.blocks.0.norm2.bias"] == "backbone.stages.1.blocks.0.mlp.norm.bias"
    assert conversion.mapped["norm.bias"] == "backbone.norm1.bias"
    assert conversion.mapped["head.bias"] == "head.bias"

    short, full = text(conversion), text(conversion, verbose=True)
    counts = (
        f"{len(conversion.mapped)} keys mapped, 2 skipped (2 the network computes it), 0 without a place, 0 missing"
    )
    assert counts in short and counts in full
    assert "official.pth: Swin with official's names, head of 3 classes; embed_dims=8, depths=(2, 2)" in short
    assert "downsample" not in short
    for key in state:
        assert key in full
    assert "backbone.stages.1.blocks.0.mlp.norm.bias" in full


def test_binary_checkpoints_stay_whole_and_are_not_for_timm(tmp_path):
    model = make_classifier(recipe="sibivit", mlp_ratio=3, spatial_interaction=dict(ratio=1.0))
    model.backbone.set_stage(1)
    meta = dict(dataset_meta=dict(classes=("a", "b", "c")), epoch=3)
    torch.save(dict(state_dict=model.state_dict(), meta=meta, optimizer={}), tmp_path / "binary.pth")
    conversion = convert_checkpoint(str(tmp_path / "binary.pth"))
    conversion.save(tmp_path / "out.pth")
    content = load_checkpoint_file(str(tmp_path / "out.pth"))
    assert set(content) == {"meta", "state_dict"} and content["meta"]["family"] == "mmbivit"
    assert content["meta"]["dataset_meta"] == dict(classes=("a", "b", "c"))
    assert content["meta"]["arch"] == SIZES | dict(mlp_ratio=3.0)
    assert set(content["state_dict"]) == set(model.state_dict())
    assert all(torch.equal(content["state_dict"][key], value) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="binary.pth is of a binary network, which timm has not"):
        convert_checkpoint(str(tmp_path / "binary.pth"), to="timm")


def test_keys_without_a_place_are_refused_unless_allowed(tmp_path):
    state = make_timm_swin().state_dict() | {"layers.1.blocks.0.attn.logit_scale": torch.ones(2, 1, 1)}
    conversion = convert_state_dict(state, "v2.pth")
    assert conversion.unplaced == ["layers.1.blocks.0.attn.logit_scale"]
    assert "without a place: layers.1.blocks.0.attn.logit_scale" in text(conversion)
    with pytest.raises(ValueError, match=r"1 keys of v2.pth .* first layers.1.blocks.0.attn.logit_scale: .*Swin v2"):
        conversion.save(tmp_path / "out.pth")
    conversion.save(tmp_path / "out.pth", allow_unplaced=True)
    assert make_classifier().load_state_dict(load_checkpoint_file(str(tmp_path / "out.pth"))["state_dict"])

    own = make_classifier(use_abs_pos_embed=True, pretrain_img_size=112).state_dict()
    assert convert_state_dict(own, "ape.pth").unplaced == []
    torch.save(own, tmp_path / "ape.pth")
    assert convert_checkpoint(str(tmp_path / "ape.pth"), to="timm").unplaced == ["backbone.absolute_pos_embed"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("swinv2_cr_tiny_224", None),
        ("vit_tiny_patch16_224", "is of another architecture: no key of a Swin's blocks"),
        ("resnet18", "is of another architecture: no key of a Swin's blocks"),
    ],
)
def test_other_architectures_are_refused(name, message, tmp_path):
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    if message:
        with pytest.raises(ValueError, match=f"{name} {message}.* keys, such as {next(iter(state))}"):
            convert_state_dict(state, name)
        return
    conversion = convert_state_dict(state, name)
    assert {key for key in state if ".logit_scale" in key or ".meta_mlp." in key} <= set(conversion.unplaced)
    with pytest.raises(ValueError, match=f"keys of {name} have no place in a Swin network"):
        conversion.save(tmp_path / "out.pth")


@pytest.mark.parametrize("number", ["1000", "9" * 9, "9" * 5000])
@pytest.mark.parametrize("key", ["stages.0.blocks.{}.norm.weight", "stages.{}.blocks.0.attn.relative_position_index"])
def test_numbers_in_names_are_not_trusted(key, number, tmp_path):
    key = key.format(number)
    conversion = convert_state_dict(make_classifier().state_dict() | {f"backbone.{key}": torch.ones(1)}, "x.pth")
    assert conversion.arch["depths"] == ARCH["depths"]
    with pytest.raises(ValueError, match=f"1 keys of x.pth .* first backbone.{key}"):
        conversion.save(tmp_path / "out.pth")


def test_impossible_conversions_are_named(tmp_path):
    state = make_timm_swin().state_dict()
    torch.save(state, tmp_path / "float.pth")
    source = str(tmp_path / "float.pth")
    with pytest.raises(ValueError, match="to='mmdet' is unknown; allowed: 'mmbivit', 'timm'"):
        convert_checkpoint(source, to="mmdet")
    with pytest.raises(ValueError, match=r"no key that starts with prefix='encoder\.'; its keys are such as patch_emb"):
        convert_checkpoint(source, prefix="encoder")
    with pytest.raises(FileNotFoundError, match="no.pth does not exist"):
        convert_checkpoint(str(tmp_path / "no.pth"))
    with pytest.raises(ValueError, match="x holds no state dict: expected tensors by name"):
        convert_state_dict(dict(epoch=1, optimizer={}), "x")
    torch.save({key: value for key, value in state.items() if not key.startswith("norm.")}, tmp_path / "no_norm.pth")
    assert convert_checkpoint(str(tmp_path / "no_norm.pth")).missing == ["norm1.bias", "norm1.weight"]
    with pytest.raises(ValueError, match="no_norm.pth lacks 2 tensors of timm's Swin, first norm1.bias"):
        convert_checkpoint(str(tmp_path / "no_norm.pth"), to="timm")

    conversion = convert_checkpoint(source)
    with pytest.raises(ValueError, match="float.pth exists already; give another name, or --overwrite"):
        conversion.save(source)
    with pytest.raises(ValueError, match="exists already; give a file name"):
        conversion.save(tmp_path, overwrite=True)
    conversion.save(source, overwrite=True)
    assert set(load_checkpoint_file(source)) == {"meta", "state_dict"}


def test_a_prefix_of_ones_own(tmp_path):
    state = {f"encoder.{key}": value for key, value in make_timm_swin().state_dict().items()} | {"mask": torch.ones(1)}
    conversion = convert_state_dict(state, "simmim.pth", prefix="encoder")
    assert conversion.skipped == {"mask": "not of the backbone"} and conversion.num_classes == 3
    make_classifier().load_state_dict(conversion.state_dict, strict=True)
