"""The backbone: float equals mmdet, binary is binary, stages, options and errors."""

import copy
import re
from pathlib import Path

import pytest
import torch
from mmdet.models.backbones import SwinTransformer
from mmdet.registry import MODELS as MMDET_MODELS
from torch import nn
from torch.overrides import TorchFunctionMode

from mmbivit.binary import BinaryLinear
from mmbivit.models import BinarySwinTransformer, WindowLayout
from mmbivit.packed.modules import position_embedding

ARCH = dict(embed_dims=8, depths=(2, 2, 2, 1), num_heads=(1, 2, 4, 4))
SI = dict(ratio=1.0)


def binary(**kwargs):
    torch.manual_seed(0)
    kwargs = dict(arch=ARCH, mlp_ratio=3, spatial_interaction=SI, drop_path_rate=0.0) | kwargs
    return BinarySwinTransformer(**kwargs)


def randomise(module, std=0.3):
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=std)
    return module


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(0)
    model = SwinTransformer(**ARCH, drop_path_rate=0.0)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.2)
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table") or parameter.dim() == 1:
            nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.3)
    model.eval()  # returns None in mmdet
    return model


@pytest.mark.parametrize("hw", [(64, 64), (111, 157), (224, 224)])
def test_float_equals_mmdet_in_value_and_gradient(reference, hw):
    model = BinarySwinTransformer(arch=ARCH, recipe="float", drop_path_rate=0.0).eval()
    model.load_state_dict(reference.state_dict(), strict=True)
    reference.zero_grad()
    torch.manual_seed(1)
    images = [torch.randn(2, 3, *hw, requires_grad=True)]
    images.append(images[0].detach().clone().requires_grad_())
    outs = [reference(images[0]), model(images[1])]
    weights = [torch.randn_like(out) for out in outs[0]]
    for out in outs:
        sum((o * w).mean() for o, w in zip(out, weights, strict=True)).backward()
    for expected, actual in zip(*outs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    scale = images[0].grad.abs().max()
    torch.testing.assert_close(images[1].grad / scale, images[0].grad / scale, rtol=1e-5, atol=1e-5)
    # Gradients under mmdet's names, through the key mapping that a state dict takes.
    gradients = BinarySwinTransformer(arch=ARCH, recipe="float")
    gradients.load_state_dict({name: p.grad for name, p in reference.named_parameters()}, strict=True)
    for (name, parameter), expected in zip(model.named_parameters(), gradients.parameters(), strict=True):
        scale = expected.abs().max().clamp(min=1e-6)
        torch.testing.assert_close(parameter.grad / scale, expected.detach() / scale, rtol=1e-5, atol=1e-5, msg=name)


class FloatProducts(TorchFunctionMode):
    """Collects every matrix product whose operands are not both signs (times a scale per row)."""

    def __init__(self):
        super().__init__()
        self.kinds, self.binary = [], 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        if name in ("linear", "matmul", "__matmul__", "bmm", "mm", "addmm", "einsum", "conv2d", "conv_transpose2d"):
            operands = args[:2]
            if all(_is_bits(operand) for operand in operands):
                self.binary += 1
            else:
                self.kinds.append((name, tuple(tuple(operand.shape) for operand in operands)))
        return out


def _is_bits(x):
    """At most two values along the last two axes' rows: {-s, s} or {0, s}."""
    x = x.detach().reshape(-1, x.shape[-1])
    magnitude = x.abs().amax(1, keepdim=True)
    return bool(((x.abs() == magnitude) | (x == 0)).all()) and not (bool((x == 0).any()) and bool((x < 0).any()))


def test_patch_embedding_is_the_only_float_product_of_the_backbone():
    model = randomise(binary()).eval()
    nn.init.normal_(model.stages[0].blocks[0].mlp.si.alpha)
    with FloatProducts() as products, torch.no_grad():  # with gradients, native kernels multiply
        model(torch.randn(1, 3, 61, 75))
    assert [kind for kind, _ in products.kinds] == ["conv2d"]
    blocks = sum(ARCH["depths"])
    # qkv, proj, fc1, fc2, two token mixings, q k^T, p v in each block; three patch mergings
    assert products.binary == 8 * blocks + 3


def test_the_product_check_sees_a_float_product():
    model = binary(downsample="float").eval()
    with FloatProducts() as products:
        model(torch.randn(1, 3, 32, 32))
    assert [kind for kind, _ in products.kinds] == ["conv2d", "linear", "linear", "linear"]


def test_effective_weights_have_two_values_per_row_and_inputs_are_signs():
    model = randomise(binary()).eval()
    inputs = {}
    for name, module in model.named_modules():
        if isinstance(module, BinaryLinear):
            assert (module.weight_bits, module.input_bits) == (1, 1)
            weight = module.effective_weight()
            for row in weight:
                low, high = row.unique().tolist()
                assert low == -high
            module.input_quantizer.register_forward_hook(lambda m, a, out, name=name: inputs.update({name: out}))
    model(torch.randn(2, 3, 64, 64))
    assert len(inputs) == 6 * sum(ARCH["depths"]) + 3
    assert all(set(value.unique().tolist()) == {-1.0, 1.0} for value in inputs.values())


@pytest.mark.parametrize("hw", [(28, 28), (30, 61), (4, 4), (57, 33)])
def test_padding_and_wrapped_tokens_are_never_attended_to(hw, monkeypatch):
    """Whatever is written on padding, real tokens come out the same."""
    attention = randomise(binary()).eval().stages[0].blocks[1]
    hw_shape = (-(-hw[0] // 4), -(-hw[1] // 4))
    layout = WindowLayout(hw_shape, 7, 3)
    mask = layout.attention_mask(True)
    x = torch.randn(1, hw_shape[0] * hw_shape[1], 8)
    clean = layout.split(x)
    is_padding = layout.split(torch.ones_like(x))[..., 0] == 0
    dirty = torch.where(is_padding[..., None], torch.randn_like(clean) * 5, clean)
    expected, actual = (layout.merge(attention.attn(windows, mask)) for windows in (clean, dirty))
    assert torch.equal(actual, expected)


def test_binary_outputs_have_the_pyramid_shape_at_any_size():
    model = binary(out_indices=(1, 3)).eval()
    outs = model(torch.randn(2, 3, 50, 77))
    assert [tuple(out.shape) for out in outs] == [(2, 16, 7, 10), (2, 64, 2, 3)]


def test_stage_switches_weights_and_si_and_travels_in_the_state_dict():
    model = randomise(binary())
    layers = sum(isinstance(m, BinaryLinear) for m in model.modules())
    assert model.stage == 2
    assert model.set_stage(1) == (0, 0)
    assert model.stage == 1 and int(model.state_dict()["training_stage"]) == 1
    images = torch.randn(1, 3, 32, 32)
    model.eval()(images)[0].sum().backward()
    assert all(p.grad is None for n, p in model.named_parameters() if ".si." in n)
    assert all(p.requires_grad for p in model.parameters())

    fresh = binary().eval()
    fresh.load_state_dict(model.state_dict())
    assert fresh.stage == 1
    for expected, actual in zip(model(images), fresh(images), strict=True):
        assert torch.equal(expected, actual)
    assert fresh.set_stage(2) == (layers, sum(ARCH["depths"]))
    assert not torch.allclose(fresh(images)[0], model(images)[0])
    assert copy.deepcopy(fresh).stage == 2
    with pytest.raises(ValueError, match="stage=3 is unknown; allowed: 1, 2"):
        model.set_stage(3)


def test_stage1_weights_is_the_papers_baseline_order():
    model = binary(stage1="weights")
    layers = sum(isinstance(m, BinaryLinear) for m in model.modules())
    assert model.set_stage(1) == (layers, 0)
    layer = model.stages[0].blocks[0].attn.qkv
    assert (layer.weight_bits, layer.input_bits) == (1, 32)
    assert not model.stages[0].blocks[0].attn.attention.binarize
    with FloatProducts() as products:
        model.eval()(torch.randn(1, 3, 32, 32))
    assert products.binary == 0


def test_stage1_all_is_whole_in_both_stages():
    model = binary(stage1="all").eval()
    images = torch.randn(1, 3, 32, 32)
    counts, outputs = zip(*((model.set_stage(stage), model(images)[0]) for stage in (1, 2)), strict=True)
    assert counts[0] == counts[1] and min(counts[0]) > 0
    assert torch.equal(*outputs)


def test_loading_a_stage_1_checkpoint_says_so(monkeypatch):
    messages = []
    monkeypatch.setattr("mmbivit.models.stage.print_log", lambda message, **_: messages.append(message))
    model = binary()
    binary().load_state_dict(model.state_dict())
    assert messages == []
    model.set_stage(1)
    binary().load_state_dict(model.state_dict())
    assert len(messages) == 1 and "training stage 1: its weights are still float" in messages[0]


@pytest.mark.parametrize("recipe", ["sibivit", "float"])
def test_with_cp_changes_no_value_gradient_or_statistic(recipe):
    models = [randomise(binary(recipe=recipe, with_cp=with_cp)).train() for with_cp in (False, True)]
    models[1].load_state_dict(models[0].state_dict())
    torch.manual_seed(3)
    images = torch.randn(2, 3, 32, 40)
    losses = [sum(out.square().mean() for out in model(images)) for model in models]
    for loss in losses:
        loss.backward(retain_graph=True)
        loss.backward()  # as for two losses of one forward pass
    assert torch.equal(*losses)
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name)
    for (name, p), q in zip(models[0].named_buffers(), models[1].buffers(), strict=True):
        torch.testing.assert_close(q, p, msg=name)


def test_frozen_stages_stay_frozen_in_training():
    model = binary(frozen_stages=2, use_abs_pos_embed=True, pretrain_img_size=32).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    sum(out.square().mean() for out in model(torch.randn(2, 3, 32, 32))).backward()
    optimizer.step()
    frozen = ("patch_embed.", "absolute_pos_embed", "stages.0.", "stages.1.", "norm0.", "norm1.")
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert not [key for key in changed if key.startswith(frozen)]
    assert any(key.startswith("stages.2.") for key in changed)
    assert any(key.startswith("norm3.") for key in changed)


def test_norm_eval_keeps_running_statistics():
    model = binary(norm_eval=True).train()
    model(torch.randn(2, 3, 32, 32))
    assert all(float(m.running_mean.abs().sum()) == 0 for m in model.modules() if isinstance(m, nn.BatchNorm1d))


def test_position_embedding_is_interpolated_to_other_sizes():
    model = binary(use_abs_pos_embed=True, pretrain_img_size=(32, 48), recipe="float", spatial_interaction=None).eval()
    with torch.no_grad():
        model.absolute_pos_embed.copy_(torch.arange(8.0).expand(1, 96, 8))
    embedding, shape = model.absolute_pos_embed, model.pos_embed_shape
    assert shape == (8, 12) and position_embedding(embedding, shape, (8, 12)) is embedding
    assert torch.allclose(position_embedding(embedding, shape, (5, 9)), torch.arange(8.0).expand(1, 45, 8), atol=1e-5)
    assert model(torch.randn(1, 3, 20, 36))[0].shape == (1, 8, 5, 9)


def test_gradients_reach_every_parameter_in_stage_2():
    model = randomise(binary()).train()
    sum(out.square().mean() for out in model(torch.randn(2, 3, 64, 64))).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_sync_batchnorm_conversion_keeps_the_values():
    model = randomise(binary()).eval()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)).eval()
    assert any(isinstance(m, nn.SyncBatchNorm) for m in converted.modules())
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(images)[3], converted(images)[3])


def test_the_token_axis_grid_is_the_whole_map_at_the_pretraining_size_and_tiles_elsewhere():
    torch.manual_seed(0)
    options = dict(mlp_ratio=3, spatial_interaction=dict(ratio=1.0, axis="grid", alpha_init=0.5), drop_path_rate=0.0)
    model = BinarySwinTransformer(arch=ARCH, pretrain_img_size=112, **options).eval()
    blocks = [block.module for block in model.blocks()]
    sides = [{4: 28, 8: 14, 16: 7, 32: 4}[block.stride] for block in model.blocks()]
    assert [block.mlp.si.fc1.in_features for block in blocks] == [side**2 for side in sides]
    for side, block in zip(sides, blocks, strict=True):
        assert block.mixing_layout((side, side)).split(torch.zeros(1, side**2, 1)).shape == (1, side**2, 1)
        assert block.mixing_layout((side, side + 1)).split(torch.zeros(1, side**2 + side, 1)).shape[0] == 2

    # A tile is mixed as an image of its own, shifted windows or not; tokens of other tiles do not matter.
    block = blocks[1]
    x = torch.randn(1, 56 * 28, 8)
    alone = block.mlp(x[:, : 28 * 28], block.mixing_layout((28, 28)))
    torch.testing.assert_close(block.mlp(x, block.mixing_layout((56, 28)))[:, : 28 * 28], alone)

    detector = BinarySwinTransformer(arch=ARCH, pretrain_img_size=112, out_indices=(0, 1, 2, 3), **options).eval()
    detector.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        assert [tuple(out.shape[2:]) for out in detector(torch.randn(1, 3, 160, 224))] == [
            (40, 56),
            (20, 28),
            (10, 14),
            (5, 7),
        ]


def test_the_backbone_is_found_by_its_registry_name():
    backbone = MMDET_MODELS.build(dict(type="mmbivit.BinarySwinTransformer", arch=ARCH, recipe="float"))
    assert type(backbone) is BinarySwinTransformer


def test_named_architectures_have_the_published_sizes():
    # Swin paper, Table 1: 28 M, 50 M and 88 M parameters, of which the classifier is 0.8 to 1 M.
    for arch, millions in (("tiny", 27.5), ("small", 48.8), ("base", 86.7)):
        model = BinarySwinTransformer(arch=arch, recipe="float", out_indices=(3,))
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(arch="tyni"), "arch='tyni' is unknown; allowed: 'tiny', 'small', 'base'"),
        (dict(arch=dict(embed_dims=8)), "arch lacks the key 'depths'; expected dict(embed_dims=, depths=, num_heads=)"),
        (dict(arch=dict(embed_dims=8, depths=(1,), num_heads=(3,))), "arch.num_heads[0]=3 does not divide the 8"),
        (dict(arch=dict(embed_dims=8, depths=(1, 1), num_heads=(2,))), "need one entry each for 1 to 8 stages"),
        (dict(recipe="bivt"), "recipe='bivt' is unknown; allowed: 'sibivit', 'float'"),
        (dict(mlp_ratio=1.3), "mlp_ratio=1.3 times 8 channels is 10.4"),
        (dict(spatial_interaction=dict(rate=1)), "spatial_interaction has no key 'rate'; allowed: ratio"),
        (dict(spatial_interaction=dict(ratio=0)), "spatial_interaction.ratio=0; allowed: a number > 0"),
        (dict(spatial_interaction=dict(ratio=1, axis="rows")), "spatial_interaction.axis='rows' is unknown; allowed"),
        (dict(spatial_interaction=dict(ratio=1, per="head")), "spatial_interaction.per='head' is unknown; allowed"),
        (dict(spatial_interaction=dict(ratio=1, alpha_init="0")), "spatial_interaction.alpha_init='0'"),
        (
            dict(spatial_interaction=dict(ratio=1, axis="grid"), pretrain_img_size=(224, 192)),
            "pretrain_img_size=(224, 192); allowed: one number",
        ),
        (dict(stage1="both"), "stage1='both' is unknown; allowed: 'activations', 'weights', 'all'"),
        (dict(out_indices=(0, 4)), "out_indices[1]=4; allowed: an integer from 0 to 3"),
        (dict(frozen_stages=5), "frozen_stages=5; allowed: an integer from -1 to 4"),
    ],
)
def test_impossible_settings_name_the_key_and_what_is_allowed(kwargs, message):
    with pytest.raises(ValueError) as error:
        BinarySwinTransformer(**(dict(arch=ARCH) | kwargs))
    assert message in str(error.value)


def test_recipes_that_the_documentation_mixes_train():
    lines = re.findall(
        r"^recipe = (dict\(.*\))", (Path(__file__).parents[2] / "docs/methods.md").read_text(), flags=re.MULTILINE
    )
    assert len(lines) == 5
    for line in lines:
        network = BinarySwinTransformer(
            arch=dict(embed_dims=8, depths=(2,), num_heads=(2,)), recipe=eval(line), out_indices=(0,)
        )
        loss = network(torch.randn(2, 3, 32, 32))[0].square().mean()
        loss.backward()
        assert loss.isfinite() and all(parameter.grad.isfinite().all() for parameter in network.parameters()), line


@pytest.mark.parametrize(
    ("trained", "given", "message"),
    [
        ("sibivit", "bit", "it has stages.0.blocks.0.mlp.act.gamma, which this network has not"),
        ("bit", "sibivit", "it has stages.0.blocks.0.attn.attention.scale.started, which this network has not"),
        ("reactnet", "sibivit", "it has stages.0.blocks.0.attn.attention.scale.started, which this network has not"),
        ("sibivit", "bibert", "it has stages.0.blocks.0.attn.proj.input_quantizer.gamma, which this network has not"),
        ("bivit", "bi-vit", "it has stages.0.blocks.0.attn.proj.weight_quantizer.scale.started, which"),
    ],
)
def test_a_checkpoint_of_another_recipe_is_refused_in_one_line(trained, given, message):
    options = dict(arch=dict(embed_dims=8, depths=(1,), num_heads=(2,)), out_indices=(0,))
    state_dict = BinarySwinTransformer(recipe=trained, **options).state_dict()
    with pytest.raises(ValueError) as error:
        BinarySwinTransformer(recipe=given, **options).load_state_dict(state_dict)
    assert message in str(error.value) and "\n" not in str(error.value)
