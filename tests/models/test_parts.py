"""A backbone asks its parts what they are: a recipe from outside trains in both stages, and options are its own."""

import numpy as np
import pytest
import torch
from torch import nn

from mmbivit.analysis import complexity, model_size
from mmbivit.binary import RECIPES, ActivationQuantizer, BinaryLinear, Recipe, WeightQuantizer, get_recipe, sign_ste
from mmbivit.checkpoints import load_pretrained
from mmbivit.deploy import pack
from mmbivit.models import BinarySwinTransformer, BinaryVisionTransformer, MultiHeadAttention
from mmbivit.models.stage import StagedModule, training_plan

ARCH = dict(embed_dims=8, depths=(2, 1), num_heads=(1, 2))


class ScaledSign(ActivationQuantizer):
    """``alpha * Sign(x)`` with one learnable ``alpha`` and no threshold."""

    def __init__(self, num_features):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.alpha * sign_ste(x) if self.binarize else x


class ScaledTanh(WeightQuantizer):
    """Two values a row in the limit, but no sign times a scale."""

    def forward(self, weight):
        return weight.tanh() if self.binarize else weight


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(RECIPES, "toy", Recipe(input_quantizer=ScaledSign))
    options = dict(arch=ARCH, recipe="toy", mlp_ratio=3, spatial_interaction=dict(ratio=1.0), drop_path_rate=0.0)

    def build(**changes):
        torch.manual_seed(0)
        return BinarySwinTransformer(out_indices=(0, 1), **options | changes)

    return build


@pytest.mark.parametrize("stage1", ["activations", "weights"])
def test_a_recipe_from_outside_trains_in_both_stages(toy, stage1):
    network = toy(stage1=stage1)
    layers = {name: module for name, module in network.named_modules() if isinstance(module, BinaryLinear)}
    scales = {name: p for name, p in network.named_parameters() if name.endswith("quantizer.alpha")}
    assert len(scales) == len(layers) + sum(ARCH["depths"])  # one for queries, keys and values of each block
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    images = torch.randn(2, 3, 32, 40)
    idle = {name for name in scales if ".si." in name} if stage1 == "activations" else set(scales)
    for stage, still in ((1, idle), (2, set())):
        expected = (len(layers) if (stage, stage1) != (1, "activations") else 0, 3 if stage == 2 else 0)
        assert network.set_stage(stage) == expected
        before = {name: scale.detach().clone() for name, scale in scales.items()}
        for _ in range(2):  # in the first, the balancing factors of 0 let no gradient into the mixing
            optimizer.zero_grad()
            sum(out.square().mean() for out in network(images)).backward()
            assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)
            optimizer.step()
        assert {name for name, scale in scales.items() if torch.equal(scale, before[name])} == still
    assert all(len(row.unique()) == 2 for layer in layers.values() for row in layer.effective_weight())
    assert all((layer.weight_bits, layer.input_bits) == (1, 1) for layer in layers.values())

    copy = toy()
    copy.load_state_dict(network.state_dict())
    assert all(map(torch.equal, copy.eval()(images), network.eval()(images)))
    assert complexity(network, (3, 32, 40)).bops == complexity(toy(recipe="sibivit"), (3, 32, 40)).bops > 0
    rows = sum(layer.out_features for layer in layers.values())
    size = model_size(network)
    weights = sum(-(-layer.weight.numel() // 8) for layer in layers.values())
    assert size.packed_bytes == size.float_bytes - 4 * size.binary_weights + weights + 4 * rows


def test_what_does_not_fold_is_refused_by_name(toy, monkeypatch):
    with pytest.raises(ValueError, match=r"stages.0.blocks.0.attn.qkv.input_quantizer ScaledSign does not fold"):
        pack(toy())
    monkeypatch.setitem(RECIPES, "tanh", Recipe(weight_quantizer=ScaledTanh))
    with pytest.raises(ValueError, match=r"stages.0.blocks.0.attn.qkv ScaledTanh does not fold"):
        pack(toy(recipe="tanh"))


def test_a_stage_switches_what_says_so_and_nothing_else():
    class Branch(nn.Module):
        active = True

    class Network(StagedModule):
        def __init__(self):
            super().__init__()
            self.branch, self.sign, self.other = Branch(), ScaledSign(4), nn.Identity()
            self._init_stage(training_plan("weights", None))

    network = Network()
    assert network.set_stage(1) == (0, 0) and not network.branch.active and not network.sign.binarize
    assert network.set_stage(2) == (0, 1) and network.branch.active and network.sign.binarize
    assert not hasattr(network.other, "active")


@pytest.mark.parametrize(
    ("recipe", "mask_padding", "downsample"),
    [
        ("sibivit", True, "binary"),
        ("float", False, "float"),
        (dict(base="float", norm="bn", linear="binary"), False, "float"),
        (dict(linear="float"), True, "binary"),
        (RECIPES["float"], False, "float"),
        (dict(mask_padding=False), False, "binary"),
        (dict(base="float", mask_padding=True, downsample="binary"), True, "binary"),
    ],
)
def test_padding_and_merging_are_options_of_the_backbone(recipe, mask_padding, downsample):
    """Earlier releases had them in the recipe, whose dict may still hold them."""
    network = BinarySwinTransformer(ARCH, recipe=recipe, out_indices=(1,))
    assert all(block.mask_padding is mask_padding for stage in network.stages for block in stage.blocks)
    assert type(network.stages[0].downsample.reduction) is (BinaryLinear if downsample == "binary" else nn.Linear)
    changed = BinarySwinTransformer(
        ARCH,
        recipe="sibivit" if isinstance(recipe, dict) else recipe,
        out_indices=(1,),
        mask_padding=not mask_padding,
        downsample="float" if downsample == "binary" else "binary",
    )
    assert changed.stages[0].blocks[0].mask_padding is not mask_padding
    assert type(changed.stages[0].downsample.reduction) is not type(network.stages[0].downsample.reduction)


def test_an_option_is_given_once():
    with pytest.raises(ValueError, match=r"recipe.downsample and downsample are both given"):
        BinarySwinTransformer(ARCH, recipe=dict(downsample="float"), out_indices=(1,), downsample="float")


def test_queries_and_keys_are_normalised_by_heads():
    torch.manual_seed(0)
    attn = MultiHeadAttention(12, 3, get_recipe(dict(base="bi-vit", head_norm=True)))
    for norm in (attn.query_norm, attn.key_norm):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    qkv = torch.randn(2, 5, 36)
    parts = qkv.numpy().reshape(2, 5, 3, 3, 4)
    expected = parts.copy()
    for i, norm in enumerate((attn.query_norm, attn.key_norm)):
        part = parts[:, :, i]
        centred = part - part.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        expected[:, :, i] = scaled * norm.weight.detach().numpy() + norm.bias.detach().numpy()
    with torch.no_grad():
        np.testing.assert_allclose(attn.norm_heads(qkv).numpy(), expected.reshape(2, 5, 36), rtol=1e-5, atol=1e-5)


def test_a_network_with_normed_heads_starts_from_float_weights_and_is_not_packed():
    options = dict(arch=dict(embed_dims=8, depths=(1,), num_heads=(2,)), patch_size=8, pretrain_img_size=32)
    network = BinaryVisionTransformer(recipe=dict(base="bi-vit", head_norm=True), **options)
    full = BinaryVisionTransformer(recipe="float", **options)
    assert load_pretrained(network, dict(state_dict=full.state_dict())) == ([], [])
    with pytest.raises(ValueError, match="stages.0.blocks.0.attn.query_norm is HeadNorm, which pack.. does not know"):
        pack(network)
