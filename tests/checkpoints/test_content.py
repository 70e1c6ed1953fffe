"""What kind of network a checkpoint is of, whatever its parts call their tensors; and tensors that are none."""

import logging

import pytest
import torch
from torch import nn

from mmbivit.apis.checkpoints import load_classifier
from mmbivit.binary import ActivationQuantizer, Recipe, sign_ste
from mmbivit.checkpoints import load_pretrained
from mmbivit.checkpoints.content import binary_keys, is_float_for
from mmbivit.checkpoints.names.swin import BINARY_ONLY, to_own_keys
from mmbivit.deploy.conversion import convert_state_dict
from mmbivit.models import BinarySwinTransformer
from tests.swin_weights import ARCH, make_classifier, make_timm_swin

TABLE = "stages.0.blocks.0.attn.relative_position_bias_table"


class Scaled(ActivationQuantizer):
    """A quantizer whose parameter has another name."""

    def __init__(self, num_features: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(num_features))

    def forward(self, x):
        return self.scale * sign_ste(x) if self.binarize else x


class Bare(ActivationQuantizer):
    """A quantizer without parameters."""

    def __init__(self, num_features: int):
        super().__init__()

    def forward(self, x):
        return sign_ste(x) if self.binarize else x


RECIPES = {
    "sibivit": Recipe(),
    "scaled": Recipe(input_quantizer=Scaled),
    "scaled_alone": Recipe(input_quantizer=Scaled, act="gelu", norm="ln"),
    "bare": Recipe(input_quantizer=Bare),
}
KEYLESS = Recipe(input_quantizer=Bare, act="gelu", norm="ln")


def swin(recipe: str | Recipe, **kwargs) -> BinarySwinTransformer:
    return BinarySwinTransformer(arch=ARCH, recipe=recipe, out_indices=(1,), drop_path_rate=0.0, **kwargs)


@pytest.fixture
def warnings(monkeypatch):
    """What fitting logs as a warning."""
    lines = []

    def print_log(text, logger=None, level=logging.INFO):
        if level == logging.WARNING:
            lines.append(text)

    monkeypatch.setattr("mmbivit.checkpoints.fitting.print_log", print_log)
    return lines


@pytest.mark.parametrize("recipe", RECIPES)
def test_float_weights_start_every_binary_network_and_its_own_continue_it(recipe, warnings):
    network = swin(RECIPES[recipe], spatial_interaction=dict(ratio=1.0))
    timm_keys = to_own_keys(make_timm_swin().state_dict(), (1, 2))
    for keys in (swin("float").state_dict(), timm_keys):
        assert is_float_for(network, keys) and not is_float_for(swin("float"), keys)
    for other in RECIPES.values():
        if recipe == "bare" or other is not RECIPES["bare"]:  # which lacks the parameters that the others train
            assert not is_float_for(network, swin(other, spatial_interaction=dict(ratio=1.0)).state_dict())

    assert network.load_state_dict(swin("float").state_dict(), strict=True)
    assert len(warnings) == 1 and "weights are of a float network" in warnings[0]
    assert network.load_state_dict(network.state_dict(), strict=True)
    assert len(warnings) == 1
    missing, _ = load_pretrained(network, make_timm_swin().state_dict())
    assert len(warnings) == 2 and not missing


@pytest.mark.parametrize("recipe", RECIPES)
def test_evaluation_refuses_float_weights_whatever_the_recipe(recipe, tmp_path):
    binary = make_classifier(recipe=RECIPES[recipe])
    for model in (make_classifier(), make_timm_swin()):
        torch.save(model.state_dict(), tmp_path / "float.pth")
        with pytest.raises(ValueError, match="is of a float network, the config's is binary"):
            load_classifier(binary, tmp_path / "float.pth")
    torch.save(binary.state_dict(), tmp_path / "binary.pth")
    load_classifier(binary, tmp_path / "binary.pth")


def test_where_no_part_has_tensors_the_training_stage_tells():
    network = swin(KEYLESS)
    assert not binary_keys(network)
    assert not is_float_for(network, network.state_dict())
    assert is_float_for(network, to_own_keys(make_timm_swin().state_dict(), (1, 2)))


def test_parts_and_names_agree_on_what_only_binary_networks_have():
    for recipe in RECIPES.values():
        network = swin(recipe, spatial_interaction=dict(ratio=1.0), use_abs_pos_embed=True)
        assert binary_keys(network) == list(filter(BINARY_ONLY.search, network.state_dict()))
    assert not binary_keys(swin("float"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (TABLE, None),
        (TABLE, torch.ones(5)),
        (TABLE, torch.ones(0, 1)),
        (TABLE, torch.ones(8, 1)),
        (TABLE, torch.ones(25, 0)),
        (TABLE, torch.ones(25, 1, dtype=torch.int64)),
        (TABLE, torch.ones(25, 1).to_sparse()),
        ("stages.0.blocks.0.mlp.fc1.weight", torch.ones(())),
        ("stages.0.blocks.0.mlp.fc1.weight", torch.ones(32, 8, dtype=torch.int64)),
        ("stages.0.blocks.0.mlp.fc1.bias", [1.0]),
        ("stages.0.blocks.0.mlp.fc1.bias", torch.ones(3)),
        ("stages.0.blocks.0.mlp.fc2.weight", torch.ones(8, 3)),
        ("stages.0.blocks.0.mlp.fc2.weight", "x"),
        ("norm1.weight", {}),
    ],
)
def test_odd_tensors_are_refused_by_their_shape_or_kind(key, value):
    state = {**swin("float").state_dict(), key: value}
    with pytest.raises(ValueError, match=r"mlp\.fc|relative_position_bias_table|norm1\.weight") as error:
        load_pretrained(swin("sibivit", mlp_ratio=3), state)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["fc1.bias", "fc2.weight"])
def test_an_mlp_that_is_not_whole_is_not_cut(name):
    state = swin("float").state_dict()
    del state[f"stages.1.blocks.0.mlp.{name}"]
    with pytest.raises(ValueError, match=r"stages\.1\.blocks\.0\.mlp\.fc1\.weight has shape"):
        load_pretrained(swin("sibivit", mlp_ratio=3), state)


@pytest.mark.parametrize("value", [None, torch.ones(()), torch.ones(8, 30)], ids=["none", "scalar", "odd"])
def test_odd_patch_merging_of_mmdet_is_refused(value):
    state = {"patch_embed.projection.weight": torch.ones(8, 3, 4, 4), "stages.0.downsample.reduction.weight": value}
    with pytest.raises(ValueError, match=r"stages\.0\.downsample\.reduction\.weight"):
        load_pretrained(swin("float"), state)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("head.weight", ()),
        ("patch_embed.proj.weight", ()),
        ("stages.0.blocks.0.mlp.fc1.weight", (4, 0)),
        (TABLE, (169,)),
    ],
)
def test_conversion_refuses_odd_shapes(key, shape):
    with pytest.raises(ValueError, match=key):
        convert_state_dict({**swin("float").state_dict(), key: torch.ones(shape)}, "x.pth")


def test_conversion_needs_weights_of_blocks():
    with pytest.raises(ValueError, match="another architecture"):
        convert_state_dict({"layers.0.blocks.0.attn.relative_position_index": torch.ones(2)}, "x.pth")


@pytest.mark.parametrize("error", [KeyError, TypeError, RuntimeError])
def test_a_defect_of_ours_is_not_taken_for_a_checkpoint_that_does_not_fit(error, tmp_path, monkeypatch):
    def defect(*_):
        raise error("a defect")

    model = make_classifier()
    torch.save(model.state_dict(), tmp_path / "x.pth")
    monkeypatch.setattr("mmbivit.checkpoints.fitting._match_output_norms", defect)
    with pytest.raises(error, match="a defect"):
        load_classifier(model, tmp_path / "x.pth")
