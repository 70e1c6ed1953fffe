"""Recipes: names, changes and errors."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from mmbivit.binary import RECIPES, BinaryLinear, Recipe, RPReLU, RSign, WeightSign, get_recipe


def test_recipes_build_what_they_name():
    binary, full = get_recipe("sibivit"), get_recipe("float")
    assert isinstance(binary.build_linear(4, 4), BinaryLinear)
    assert type(full.build_linear(4, 4)) is nn.Linear
    assert isinstance(binary.build_act(4), RPReLU) and isinstance(full.build_act(4), nn.GELU)
    assert isinstance(binary.norm_layer(4), nn.BatchNorm1d) and isinstance(full.norm_layer(4), nn.LayerNorm)
    assert binary.build_linear(8, 4, bias=False).bias is None


def test_a_recipe_can_be_changed():
    recipe = get_recipe(dict(base="sibivit", norm="ln"))
    assert recipe.norm == "ln" and recipe.linear == "binary"
    assert get_recipe(recipe) is recipe
    layer = get_recipe(dict(input_quantizer=lambda features: RSign(2 * features))).build_linear(4, 3)
    assert layer.input_quantizer.gamma.shape == (8,)


def test_fields_reach_the_quantizers():
    fields = dict(sign_ste="poly", threshold="none", weight_ste="identity", weight_center="none", weight_scale="tensor")
    layer = get_recipe(fields).build_linear(4, 3)
    assert (layer.input_quantizer.ste, layer.input_quantizer.gamma) == ("poly", None)
    quantizer = layer.weight_quantizer
    assert (quantizer.ste, quantizer.center, quantizer.scale) == ("identity", "none", "tensor")
    assert quantizer.extra_numbers(layer.weight) == 1  # one scale of the tensor
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]


def test_gradients_of_weights_go_with_or_without_theta():
    layers = [get_recipe(dict(weight_ste=ste)).build_linear(4, 3) for ste in ("theta", "plain")]
    layers[1].load_state_dict(layers[0].state_dict())
    for layer in layers:
        layer.effective_weight().sin().sum().backward()
    theta = layers[0].weight.detach().abs().mean(dim=1, keepdim=True)
    torch.testing.assert_close(layers[0].weight.grad, theta * layers[1].weight.grad)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("sibvit", "recipe='sibvit' is unknown; allowed: 'sibivit', 'float'"),
        (dict(base="x"), "recipe.base='x' is unknown"),
        (dict(normm="ln"), "recipe has no key 'normm'; allowed: base, linear"),
        (dict(norm="gn"), "recipe.norm='gn' is unknown; allowed: 'bn', 'ln'"),
        (dict(weight_ste="clip"), "recipe.weight_ste='clip' is unknown; allowed: 'theta', 'plain', 'identity'"),
        (dict(weight_ste="plain", weight_quantizer=WeightSign), "recipe.weight_ste='plain' is of the quantizer that"),
        (dict(threshold="none", input_quantizer=RSign), "recipe.threshold='none' is of the quantizer that"),
        (dict(weight_scale="column"), "recipe.weight_scale='column' is unknown; allowed: 'row', 'tensor'"),
        (dict(input_quantizer="rsign"), "recipe.input_quantizer='rsign'; allowed: a class or function"),
    ],
)
def test_unknown_recipes_name_the_key_and_what_is_allowed(recipe, message):
    with pytest.raises(ValueError) as error:
        get_recipe(recipe)
    assert message in str(error.value)


def test_every_named_recipe_is_a_recipe():
    assert all(isinstance(recipe, Recipe) for recipe in RECIPES.values())


def test_binary_imports_only_torch():
    code = (
        "import sys, mmbivit.binary; "
        "print([m for m in ('mmengine', 'mmcv', 'mmdet', 'timm', 'torchvision', 'matplotlib') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
