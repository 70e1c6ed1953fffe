"""What all backbones share, by Swin and by a toy of another kind: a class token beside one fixed grid, no attention."""

from types import SimpleNamespace

import pytest
import torch
from mmdet.models.backbones import SwinTransformer
from torch import nn

from mmbivit.analysis import spatial_interaction
from mmbivit.analysis.attention import attention_map
from mmbivit.analysis.balancing import balancing_factors
from mmbivit.binary import BinaryLinear, get_recipe
from mmbivit.deploy import pack
from mmbivit.distill import BlockMSELoss, Distiller, DistillTerm
from mmbivit.models import Backbone, BinarySwinTransformer, WindowLayout, find_block, find_blocks
from mmbivit.models.layout import norm_tokens
from mmbivit.models.observation import observed
from mmbivit.models.patch import PatchEmbed
from mmbivit.models.recomputation import RecomputableBlock

ARCH = dict(embed_dims=8, depths=(2, 1), num_heads=(1, 2))


class ToyBlock(RecomputableBlock):
    def __init__(self, recipe, with_cp):
        super().__init__(with_cp)
        self.norm = recipe.norm_layer(8)
        self.fc = recipe.build_linear(8, 8)

    def layout(self, hw_shape):
        return WindowLayout(hw_shape, hw_shape[0])

    def _forward(self, x, hw_shape):
        return x + self.fc(norm_tokens(self.norm, x))


class ToyBackbone(Backbone):
    def __init__(self, recipe="sibivit", frozen_stages=-1, with_cp=False):
        super().__init__(1, (0,), "activations", frozen_stages, norm_eval=False, convert_weights=True, init_cfg=None)
        recipe = get_recipe(recipe)
        self.num_features, self.strides = [8], [4]
        self.patch_embed = PatchEmbed(3, 8, 4, None)
        self._add_position_embedding((8, 8), 8)
        self.class_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.drop_after_pos = nn.Dropout(0.0)
        self.stages = nn.ModuleList([nn.Module()])
        self.stages[0].blocks = nn.ModuleList(ToyBlock(recipe, with_cp) for _ in range(2))
        self.norm0 = recipe.norm_layer(8)
        self._finish_init()

    def forward(self, images):
        x, hw_shape = self.embed(images)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks():
            x = block.module(x, hw_shape)
        return (self.feature_map(x[:, 1:], hw_shape, 0),)


class ToyModel(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, inputs, data_samples=None, mode="tensor"):
        return dict(loss_task=self.backbone(inputs)[0].square().mean())


def toy(**kwargs):
    torch.manual_seed(0)
    return ToyBackbone(**kwargs)


@pytest.mark.parametrize("hw", [(32, 32), (37, 50)])
@pytest.mark.parametrize("kind", ["ours", "mmdet"])
def test_blocks_are_named_in_order_and_say_where_their_tokens_lie(kind, hw):
    if kind == "ours":
        network = BinarySwinTransformer(arch=ARCH, patch_size=2, out_indices=(1,)).eval()
    else:
        network = SwinTransformer(**ARCH, patch_size=2, strides=(2, 2), out_indices=(1,))
        network.eval()  # returns None
    blocks = find_blocks(network)
    modules = dict(network.named_modules())
    calls = {}
    watching = observed(
        {name: block.module for name, block in blocks.items()}, lambda name, *call: calls.update({name: call})
    )
    with torch.no_grad(), watching:
        network(torch.randn(1, 3, *hw))

    assert list(blocks) == ["stages.0.blocks.0", "stages.0.blocks.1", "stages.1.blocks.0"] == list(calls)
    assert [(block.channels, block.stride) for block in blocks.values()] == [(8, 2), (8, 2), (16, 4)]
    for name, block in blocks.items():
        (_, hw_shape), output = calls[name]
        assert block.name == name and block.module is modules[name]
        assert block.hw_shape(hw) == hw_shape
        assert output.shape == (1, hw_shape[0] * hw_shape[1], block.channels)
    assert [block.layout((20, 20)).shift for block in blocks.values()] == [0, 3, 0]


def test_networks_without_blocks_that_are_known_have_none():
    assert find_blocks(nn.Conv2d(3, 8, 1)) == {}
    with pytest.raises(ValueError, match="Conv2d has no transformer blocks"):
        find_block(nn.Conv2d(3, 8, 1))
    with pytest.raises(ValueError, match="Conv2d has no blocks"):
        Distiller(ToyModel(toy()), toy(), nn.Conv2d(3, 8, 1), [DistillTerm(BlockMSELoss())])


def test_find_block():
    network = BinarySwinTransformer(arch=ARCH, out_indices=(1,))
    assert find_block(network).module is network.stages[0].blocks[1]
    assert find_block(network, "stages.1.blocks.0").module is network.stages[1].blocks[0]
    with pytest.raises(ValueError, match="'stage.1.block.0'; allowed: the 3 .*; did you mean 'stages.1.blocks.0'"):
        find_block(network, "stage.1.block.0")


def test_a_backbone_of_another_kind_has_stages_freezing_and_a_state_that_goes_round():
    network = toy(frozen_stages=0).train()
    assert network(torch.randn(2, 3, 30, 41))[0].shape == (2, 8, 8, 11)  # the position embedding is interpolated
    assert not network.patch_embed.training and network.stages[0].training
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert frozen == {"absolute_pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}

    assert network.set_stage(1) == (0, 0)
    other = toy()
    other.load_state_dict(network.state_dict())
    assert other.stage == 1
    assert not any(module.binarize_weight for module in other.modules() if isinstance(module, BinaryLinear))
    assert other.set_stage(2) == (2, 0)


def test_a_backbone_of_another_kind_has_its_own_names_of_foreign_weights(monkeypatch):
    """A block's ``norm2`` is one of the marks of a foreign Swin, and took every checkpoint of such a backbone apart."""
    network, other = toy(), toy()
    for backbone in (network, other):
        backbone.stages[0].blocks[0].norm2 = nn.LayerNorm(8)
    nn.init.constant_(network.stages[0].blocks[0].norm2.weight, 3.0)
    assert other.load_state_dict(network.state_dict()) == ([], [])
    assert (other.stages[0].blocks[0].norm2.weight == 3).all()

    names = SimpleNamespace(
        is_foreign=lambda keys: "cls_token" in keys,
        to_own_keys=lambda state, stages: {key.replace("cls_token", "class_token"): state[key] for key in state},
        fit_tensor=lambda name, value, expected: 3 * value if name == "class_token" else value,
    )
    foreign = toy().state_dict()
    foreign["cls_token"] = foreign.pop("class_token") + 2
    with pytest.raises(RuntimeError, match="cls_token"):
        toy().load_state_dict(foreign)
    monkeypatch.setattr(ToyBackbone, "weight_names", names)
    renamed = toy()
    renamed.load_state_dict(foreign)
    assert (renamed.class_token == 6).all()


def test_a_checkpoint_of_a_deeper_backbone_of_another_kind_is_refused():
    state = toy().state_dict()
    with pytest.raises(ValueError, match="another arch: it has stages.0.blocks.2.fc.weight"):
        toy().load_state_dict(state | {"stages.0.blocks.2.fc.weight": torch.ones(8, 8)}, strict=False)
    known = {"stages.0.blocks.2.fc.weight_quantizer.scale": torch.ones(1)}  # a binary layer's, which a float one skips
    assert toy().load_state_dict(state | known, strict=False).unexpected_keys == list(known)


def test_recomputation_in_a_backbone_of_another_kind_changes_nothing():
    images = torch.randn(2, 3, 32, 32)
    gradients = []
    for with_cp in (False, True):
        network = toy(with_cp=with_cp).train()
        network(images)[0].square().mean().backward()
        assert all(int(m.num_batches_tracked) == 1 for m in network.modules() if isinstance(m, nn.BatchNorm1d))
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_a_backbone_of_another_kind_is_distilled():
    student, teacher = toy(), toy(recipe="float")
    with torch.no_grad():
        teacher.class_token.fill_(3.0)
    student.set_stage(1)
    model = ToyModel(student)
    distiller = Distiller(model, student, teacher, [DistillTerm(BlockMSELoss())])
    loss = model(torch.randn(2, 3, 32, 32), mode="loss")["loss_distill"]
    loss.backward()
    assert loss > 0 and student.class_token.grad.abs().sum() > 0
    distiller.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*model.modules(), *teacher.modules()])


@pytest.mark.parametrize(
    ("run", "name"),
    [
        (lambda network: spatial_interaction(network, (3, 32, 32)), "ToyBackbone"),
        (lambda network: attention_map(network, torch.zeros(1, 3, 32, 32)), "ToyBlock"),
        (balancing_factors, "ToyBackbone"),
        (pack, "ToyBackbone"),
    ],
)
def test_what_a_backbone_of_another_kind_has_not_is_refused_by_name(run, name):
    with pytest.raises(ValueError, match=name):
        run(toy())


def test_a_forward_that_failed_leaves_no_hook_once_distillation_ends():
    class Failing(ToyModel):
        def forward(self, inputs, data_samples=None, mode="tensor"):
            super().forward(inputs)
            raise KeyError

    model = Failing(toy())
    distiller = Distiller(model, model.backbone, toy(recipe="float"), [DistillTerm(BlockMSELoss())])
    for _ in range(2):
        with pytest.raises(KeyError):
            model(torch.randn(1, 3, 32, 32), mode="loss")
        assert all(len(block.module._forward_hooks) == 1 for block in model.backbone.blocks())
    distiller.remove()
    assert not any(module._forward_hooks for module in model.modules())
