"""What every backbone that is registered does with every recipe: one set of tests for those of today and to come.

A backbone or a recipe of your own needs no more than an entry in ``NETWORKS`` or ``RECIPES`` here to be held to it.
"""

import math

import pytest
import torch
from torch import nn

from mmbivit.analysis import complexity, gradient_conflict, spatial_interaction
from mmbivit.analysis.attention import attention_map
from mmbivit.analysis.balancing import balancing_factors
from mmbivit.binary import RECIPES, BinaryLinear, Quantizer, Recipe
from mmbivit.checkpoints import load_pretrained
from mmbivit.deploy import pack
from mmbivit.distill import AttentionRankingLoss, BlockMSELoss, DirectionMatchingLoss, Distiller, DistillTerm
from mmbivit.models import (
    Attention,
    Backbone,
    BinaryNesT,
    BinarySwinTransformer,
    BinaryVisionTransformer,
    BinaryViT,
    find_blocks,
)
from mmbivit.registry import MODELS

from .test_backbone import ToyBackbone, ToyModel
from .test_parts import ScaledSign
from .toy_vit import ToyViT

# Tiny options of each backbone, by class; one that is registered and has none here fails a test.
NETWORKS = {
    BinarySwinTransformer: dict(
        arch=dict(embed_dims=8, depths=(1, 1), num_heads=(1, 2)), out_indices=(0, 1), drop_path_rate=0.0
    ),
    BinaryVisionTransformer: dict(
        arch=dict(embed_dims=8, depths=(2,), num_heads=(2,)), patch_size=8, pretrain_img_size=32, drop_path_rate=0.0
    ),
    BinaryNesT: dict(
        arch=dict(embed_dims=8, depths=(1, 1), num_heads=(1, 2)),
        pretrain_img_size=24,  # blocks of 3 x 3, of which 32 pixels fill some in part
        out_indices=(0, 1),
        drop_path_rate=0.0,
    ),
    BinaryViT: dict(
        arch=dict(embed_dims=8, depths=(1, 1), num_heads=(1, 2), hidden_dims=(16, 48), reductions=(4, 1)),
        out_indices=(0, 1),
    ),
    ToyBackbone: {},
    ToyViT: {},
}
TOY = Recipe(input_quantizer=ScaledSign)  # thresholds with a learnable scale
SIZES = ((32, 32), (45, 39))
MIXES = (BinarySwinTransformer, BinaryVisionTransformer, BinaryNesT)  # which take spatial_interaction
ODD = dict.fromkeys((ToyViT, BinaryVisionTransformer), (27, 30))  # whose token mixing knows one grid


def contract(test):
    """Run a test for every backbone with every recipe."""
    test = pytest.mark.parametrize("recipe", [*RECIPES, "toy"])(test)
    return pytest.mark.parametrize("cls", NETWORKS, ids=lambda cls: cls.__name__)(test)


@pytest.fixture(autouse=True)
def _toy_recipe(monkeypatch):
    monkeypatch.setitem(RECIPES, "toy", TOY)


def build(cls, recipe) -> Backbone:
    torch.manual_seed(0)
    options = dict(NETWORKS[cls])
    if cls in MIXES and recipe != "float":
        options |= dict(mlp_ratio=3, spatial_interaction=dict(ratio=1.0))
    return cls(recipe=recipe, **options)


def images(hw=SIZES[0], batch=2):
    return torch.randn(batch, 3, *hw, generator=torch.Generator().manual_seed(1))


def layers_of(network):
    return [module for module in network.modules() if isinstance(module, BinaryLinear)]


def test_every_backbone_that_is_registered_is_here():
    MODELS.import_from_location()
    registered = {cls for cls in MODELS.module_dict.values() if isinstance(cls, type) and issubclass(cls, Backbone)}
    assert registered <= NETWORKS.keys()


@contract
@pytest.mark.parametrize("hw", SIZES)
def test_channels_and_strides_are_as_declared(cls, recipe, hw):
    network = build(cls, recipe).eval()
    hw = hw if hw == SIZES[0] else ODD.get(cls, hw)
    with torch.no_grad():
        outputs = network(images(hw))
    assert len(outputs) == len(network.out_indices)
    for i, output in zip(network.out_indices, outputs, strict=True):
        stride = network.strides[i]
        assert output.shape == (2, network.num_features[i], *(math.ceil(side / stride) for side in hw))
        assert output.isfinite().all()


@contract
@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_reach_what_is_trained_and_are_finite(cls, recipe, stage):
    network = build(cls, recipe).train()
    network.set_stage(stage)
    sum(output.square().mean() for output in network(images())).backward()
    idle = tuple(
        f"{name}."
        for name, module in network.named_modules()
        if not getattr(module, "active", True) or (isinstance(module, Quantizer) and not module.binarize)
    )
    for name, parameter in network.named_parameters():
        if name.startswith(idle):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@contract
def test_weights_are_a_sign_times_a_scale_in_stage_2_and_float_in_stage_1(cls, recipe):
    network = build(cls, recipe)
    layers = layers_of(network)
    assert bool(layers) == (recipe != "float")
    assert any(isinstance(module, Quantizer) for module in network.modules()) == (recipe != "float")
    for stage in (1, 2):
        network.set_stage(stage)
        for layer in layers:
            weight = layer.effective_weight()
            values = [row.unique().numel() for row in weight]
            if stage == 1:
                assert all(count > 2 for count in values)
            elif layer.weight_quantizer.center == "row":
                assert all(count == 2 for count in values)  # both signs occur in each row
            else:
                assert all(row.abs().unique().numel() == 1 for row in weight) and weight.sign().unique().numel() == 2


@contract
@pytest.mark.parametrize("stage", [1, 2])
def test_a_checkpoint_goes_round(cls, recipe, stage):
    network, other = build(cls, recipe).eval(), build(cls, recipe).eval()
    network.set_stage(stage)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape))
        assert other.load_state_dict(network.state_dict()) == ([], [])
        assert other.stage == stage
        assert all(map(torch.equal, network(images()), other(images())))


@contract
def test_it_starts_from_a_float_network_of_its_kind(cls, recipe):
    network, full = build(cls, recipe), build(cls, "float")
    weights = {name: weight for name, weight in full.state_dict().items() if name.endswith("weight")}
    missing, _ = load_pretrained(network, dict(state_dict=full.state_dict()))
    assert missing == []
    taken = [name for name, weight in network.state_dict().items() if torch.equal(weight, weights.get(name, weight))]
    assert all(name in taken for name in weights if "mlp" not in name)  # whose units are cut to the MLP's width


@contract
def test_autocast(cls, recipe):
    network = build(cls, recipe).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = sum(output.float().square().mean() for output in network(images()))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


@contract
def test_complexity_counts_it(cls, recipe):
    counted = complexity(build(cls, recipe), (3, *SIZES[0]))
    assert counted.params == sum(parameter.numel() for parameter in build(cls, recipe).parameters())
    assert counted.flops > 0 and (counted.bops > 0) == (recipe != "float")


@contract
def test_its_blocks_are_distilled_from_a_float_one_of_its_kind(cls, recipe):
    model, teacher = ToyModel(build(cls, recipe)), build(cls, "float")
    blocks = find_blocks(model.backbone)
    assert blocks and all(dict(model.backbone.named_modules())[name] is block.module for name, block in blocks.items())
    distiller = Distiller(model, model.backbone, teacher, [DistillTerm(BlockMSELoss())])
    try:
        losses = model(images(), mode="loss")
    finally:
        distiller.remove()
    assert losses["loss_distill"].isfinite()
    assert (losses["loss_distill"] == 0) == (recipe == "float")
    assert set(model(images(), mode="loss")) == {"loss_task"}


@contract
def test_its_attention_is_distilled_or_refused_by_name(cls, recipe):
    model, teacher = ToyModel(build(cls, recipe)), build(cls, "float")
    attends = any(isinstance(module, Attention) for module in teacher.modules())
    for loss in (DirectionMatchingLoss(), AttentionRankingLoss(), AttentionRankingLoss(maps="weights")):
        try:
            distiller = Distiller(model, model.backbone, teacher, [DistillTerm(loss)])
        except ValueError as error:
            assert not attends and "attention cannot be looked at" in str(error)
            continue
        value = model(images(), mode="loss")[loss.log_name]
        distiller.remove()
        assert attends and value.isfinite() and (value == 0) == (recipe == "float")


@contract
def test_spatial_interaction_and_packing_work_or_refuse_by_name(cls, recipe):
    network = build(cls, recipe).eval()
    for function in (lambda: spatial_interaction(network, (3, *SIZES[0])), lambda: pack(network)):
        try:
            result = function()
        except ValueError as error:
            names = [name for name, _ in network.named_modules() if name]
            known = [*names, cls.__name__, "ScaledSign", "float"]
            assert any(word in str(error) for word in known), str(error)
        else:
            assert result is not None
    if cls is BinarySwinTransformer and recipe == "sibivit":
        packed = pack(network)
        assert isinstance(packed, nn.Module)
        with torch.no_grad():
            assert packed(images())[0].shape == network(images())[0].shape


@pytest.mark.parametrize("cls", [*MIXES, ToyViT], ids=lambda cls: cls.__name__)
def test_attention_and_token_mixing_are_measured_without_knowing_the_backbone(cls):
    network, teacher = build(cls, "sibivit"), build(cls, "float")
    names = list(find_blocks(network))
    nn.init.constant_(network.get_submodule(names[0]).mlp.si.alpha, 0.5)
    assert {name: set(alpha) for name, alpha in balancing_factors(network).items()} == {
        name: {0.5 if name == names[0] else 0.0} for name in names
    }

    sic = spatial_interaction(network, (3, *SIZES[0]))
    assert sic.times == pytest.approx(3)  # both layers of the mixing meet as many tokens as attention
    assert {f"{row.block}.{row.module}" for row in sic.rows} <= dict(network.named_modules()).keys()
    assert all(mixing == 2 * attention > 0 for attention, mixing in sic.by_block().values())
    if cls is ToyViT:
        assert sic.attention == 2 * 2 * 17 * 16

    for network_, binary in ((network, True), (teacher, False)):
        found = attention_map(network_, images(batch=1), names[0], query=(20, 12))
        stride = network_.strides[0]
        assert (found.binary, found.query, found.stride) == (binary, (12 // stride, 20 // stride), stride)
        weights = torch.nansum(torch.tensor(found.weights).flatten(1), dim=1) + torch.tensor(found.padding)
        if cls in (ToyViT, BinaryVisionTransformer):
            assert found.visible.all() and found.weights.shape == (2, 4, 4) and not found.padding.any()
            assert (found.beside > 0).all() or binary  # the share of the class token
            weights += torch.tensor(found.beside)
        else:
            assert found.beside is None
        torch.testing.assert_close(weights, torch.ones(len(weights)))

    model = ToyModel(network)
    model.parse_losses = lambda losses: (sum(losses.values()), losses)
    conflict = gradient_conflict(model, teacher, [dict(inputs=images())])
    assert [row.block for row in conflict.rows][::2] == names and 0 < conflict.share < 1
