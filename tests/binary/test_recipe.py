"""Recipes: names, changes and errors."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from mmbivit.binary import RECIPES, BinaryLinear, ElasticAttention, Recipe, RPReLU, RSign, WeightSign, get_recipe


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
        (dict(activations="lsq"), "recipe.activations='lsq' is unknown; allowed: 'sign', 'scaled', 'elastic'"),
        (dict(activations="scaled", sign_ste="poly"), "recipe.sign_ste='poly' is of activations='sign'"),
        (
            dict(weight_scale="learned", weight_quantizer=WeightSign),
            "recipe.weight_scale='learned' is of the quantizer",
        ),
        (dict(attention="sparsemax"), "recipe.attention='sparsemax' is unknown; allowed: 'softmax_threshold', "),
        (dict(layer_shortcut=1), "recipe.layer_shortcut=1"),
        (dict(places=dict(fc3={})), "recipe.places has no key 'fc3'; allowed: qkv, proj, fc1, fc2, heads"),
        (dict(places=dict(fc2=dict(norm="ln"))), "recipe.places.fc2 has no key 'norm'; allowed: linear, "),
        (dict(places=dict(fc2=dict(attention="elastic"))), "recipe.places.fc2 has no key 'attention'; allowed: "),
        (dict(places=dict(heads=dict(weight_ste="plain"))), "recipe.places.heads has no key 'weight_ste'; allowed: "),
        (dict(places=dict(fc2=dict(activations="x"))), "recipe.activations='x' is unknown"),
    ],
)
def test_unknown_recipes_name_the_key_and_what_is_allowed(recipe, message):
    with pytest.raises(ValueError) as error:
        get_recipe(recipe)
    assert message in str(error.value)


def test_every_named_recipe_is_a_recipe():
    assert all(isinstance(recipe, Recipe) for recipe in RECIPES.values())


# What each method's network is made of: inputs of qkv and of fc2, weights of qkv and of fc1, quantizer of queries, keys
# and values, attention, activation function.
PARTS = {
    "sibivit": ("RSign", "RSign", "WeightSign", "WeightSign", "RSign", "SoftmaxThreshold", "RPReLU"),
    "bireal": ("RSign", "RSign", "WeightSign", "WeightSign", "RSign", "ScoreSign", "GELU"),
    "reactnet": ("RSign", "RSign", "WeightSign", "WeightSign", "RSign", "ElasticAttention", "Identity"),
    "bibert": ("RSign", "RSign", "WeightSign", "WeightSign", "RSign", "ScoreSign", "GELU"),
    "bivit": ("RSign", "RSign", "LearnedScaleWeightSign", "WeightSign", "RSign", "SoftmaxThreshold", "GELU"),
    "bit": ("ScaledSign", "ElasticBinary", "WeightSign", "WeightSign", "ScaledSign", "ElasticAttention", "ReLU"),
    "bi-vit": ("RSign", "RSign", "WeightSign", "WeightSign", "ScaledSign", "ElasticAttention", "GELU"),
}


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "float"])
def test_methods_are_made_of_their_parts(name):
    recipe = get_recipe(name)
    sizes = dict(qkv=(8, 24), fc1=(8, 16), fc2=(16, 8))
    qkv, fc1, fc2 = (recipe.build_linear(*size, place=place) for place, size in sizes.items())
    heads, attention = recipe.build_qkv_quantizer(24, num_heads=2), recipe.build_attention(2)
    parts = (qkv.input_quantizer, fc2.input_quantizer, qkv.weight_quantizer, fc1.weight_quantizer, heads, attention)
    assert tuple(type(part).__name__ for part in (*parts, recipe.build_act(16))) == PARTS[name]
    scales = [len(part.scale.value) for part in (heads, attention) if hasattr(part, "scale")]
    assert scales == {"bit": [3, 1], "bi-vit": [6, 2], "reactnet": [1]}.get(name, [])
    # The gradient of inputs is Bi-Real Net's where the method has it, that of queries, keys and values its own.
    stes = [getattr(part, "ste", None) for part in (qkv.input_quantizer, heads)]
    expected = {"bireal": ["poly", "clip"], "reactnet": ["poly", "poly"], "bit": [None, None], "bi-vit": ["poly", None]}
    assert stes == expected.get(name, ["clip", "clip"])
    assert (recipe.build_head_shortcut(8) is not None) == (name == "reactnet")


def test_places_change_what_they_name_alone():
    recipe = get_recipe(dict(places=dict(fc2=dict(activations="elastic", weight_ste="plain"))))
    fc1, fc2 = (recipe.build_linear(4, 4, place=place) for place in ("fc1", "fc2"))
    assert [type(layer.input_quantizer).__name__ for layer in (fc1, fc2)] == ["RSign", "ElasticBinary"]
    assert [layer.weight_quantizer.ste for layer in (fc1, fc2)] == ["theta", "plain"]
    assert recipe.at("fc1") is recipe.at(None) is recipe


def test_attention_may_be_made_by_a_function_of_the_heads():
    recipe = get_recipe(dict(attention=lambda heads: ElasticAttention(heads, start=0.5)))
    assert recipe.build_attention(3).scale.value.tolist() == [0.5] * 3


def test_binary_imports_only_torch():
    code = (
        "import sys, mmbivit.binary; "
        "print([m for m in ('mmengine', 'mmcv', 'mmdet', 'timm', 'torchvision', 'matplotlib') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
