import pytest
import torch
from torch import nn

from mmbivit.analysis.spatial_interaction import InteractionRow, spatial_interaction
from mmbivit.models import BinarySwinTransformer
from tests.engine.toy import ToyModel


def network(**kwargs):
    default = dict(
        arch=dict(embed_dims=4, depths=(2, 1), num_heads=(1, 2)),
        spatial_interaction=dict(ratio=1.0),
        out_indices=(1,),
        window_size=4,
    )
    return BinarySwinTransformer(**default | kwargs)


def test_rows_worked_by_hand():
    # 20 x 28 pixels are 5 x 7 tokens, 3 x 4 windows of 2 x 2; the next stage has 3 x 4 tokens, 2 x 2 windows.
    capability = spatial_interaction(network(window_size=2, spatial_interaction=dict(ratio=1.5)), (3, 20, 28))
    # n = 4, n' = 6: attention 2 * 4 * 3 = 24 a window, each layer of the token mixing 2 * 6 * 3 = 36.
    expected = []
    for block, windows, attention, mixing in (
        ("stages.0.blocks.0", 12, 288, 432),
        ("stages.0.blocks.1", 12, 288, 432),
        ("stages.1.blocks.0", 4, 96, 144),
    ):
        expected += [
            InteractionRow(block, "attn", 4, None, windows, attention),
            InteractionRow(block, "mlp", 4, None, windows, 0),
            InteractionRow(block, "mlp.si.fc1", 4, 6, windows, mixing),
            InteractionRow(block, "mlp.si.fc2", 4, 6, windows, mixing),
        ]
    assert list(capability.rows) == expected
    assert capability.attention == 288 + 288 + 96
    assert capability.total == 672 + 2 * (432 + 432 + 144)
    assert capability.times == 4
    assert capability.by_block() == {
        "stages.0.blocks.0": (288, 864),
        "stages.0.blocks.1": (288, 864),
        "stages.1.blocks.0": (96, 288),
    }
    assert capability.input_shape == (3, 20, 28)


def test_token_mixing_counts_in_its_own_groups():
    # 5 x 7 tokens, then 3 x 4, in windows of 2 x 2; tiles of 4 x 4, then 2 x 2, the maps of an image of 16 pixels.
    options = dict(window_size=2, pretrain_img_size=16, spatial_interaction=dict(ratio=0.5, axis="grid"))
    capability = spatial_interaction(network(**options), (3, 20, 28))
    counted = [(row.module, row.tokens, row.hidden_tokens, row.windows, row.sic) for row in capability.rows]
    first = [("attn", 4, None, 12, 288), ("mlp", 4, None, 12, 0)]
    first += [(f"mlp.si.{fc}", 16, 8, 4, 4 * 2 * 8 * 15) for fc in ("fc1", "fc2")]
    last = [("attn", 4, None, 4, 96), ("mlp", 4, None, 4, 0)]
    last += [(f"mlp.si.{fc}", 4, 2, 4, 4 * 2 * 2 * 3) for fc in ("fc1", "fc2")]
    assert counted == [*first, *first, *last]


@pytest.mark.parametrize(
    ("ratio", "times"),
    [
        (None, 1),  # Table 7: without spatial interaction
        (0.5, 2),  # Table 8: token-Linear-a
        (1.0, 3),  # Tables 7 and 8, and supplement, Table 2, at expansion ratio 3
        (2.0, 5),  # Table 8: token-Linear-c, and supplement, Table 2, at expansion ratio 2
        (3.0, 7),  # supplement, Table 2, at expansion ratio 1
    ],
)
def test_times_are_the_papers(ratio, times):
    si = None if ratio is None else dict(ratio=ratio)
    capability = spatial_interaction(network(spatial_interaction=si), (3, 64, 64))
    assert capability.times == times
    assert all(mixing == (times - 1) * attention for attention, mixing in capability.by_block().values())


def test_swin_t_at_224():
    arch = dict(embed_dims=4, depths=(2, 2, 6, 2), num_heads=(1, 1, 1, 1))
    capability = spatial_interaction(network(arch=arch, window_size=7, out_indices=(3,)), (3, 224, 224))
    windows = 2 * 64 + 2 * 16 + 6 * 4 + 2 * 1  # 56, 28, 14 and 7 tokens a side
    assert capability.attention == windows * 2 * 49 * 48 == 874_944
    assert capability.total == 3 * 874_944


def test_pairs_of_tokens_agree_with_the_attention_weights():
    model, pairs = network(), 0

    def count(module, args, output):  # (windows, heads, n, n), the heads look at the same tokens
        nonlocal pairs
        pairs += output[:, 0].numel() - output[:, 0].diagonal(dim1=1, dim2=2).numel()

    for block in (block for stage in model.stages for block in stage.blocks):
        block.attn.attention.register_forward_hook(count)
    model.eval()(torch.zeros(1, 3, 40, 24))
    counted, pairs = pairs, 0
    assert spatial_interaction(model, (3, 40, 24)).attention == 2 * counted


def test_windows_of_one_token_have_nothing_to_interact_with():
    capability = spatial_interaction(network(window_size=1), (3, 8, 8))
    assert capability.total == 0
    assert capability.times != capability.times  # NaN


def test_a_model_counts_as_its_backbone():
    model = ToyModel()
    assert spatial_interaction(model, (3, 32, 32)) == spatial_interaction(model.backbone, (3, 32, 32))


@pytest.mark.parametrize("shape", [(3, 32, 32), (5, 32, 32)])
def test_the_model_is_left_as_it_was(shape):
    model = network(drop_path_rate=0.5).train()
    model.stages[0].blocks[1].eval()
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        spatial_interaction(model, shape)
    except ValueError:
        assert shape[0] == 5
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def stage_1(**kwargs):
    model = network(**kwargs)
    model.set_stage(1)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: network(recipe="float", spatial_interaction=None), "the attention of stages.0.blocks.0 is float"),
        (lambda: network(recipe=dict(attention="softmax")), "the attention of stages.0.blocks.0 is float"),
        (lambda: network(recipe=dict(linear="float")), "the token mixing of stages.0.blocks.0 is float"),
        (stage_1, "the network is in training stage 1"),
        (lambda: stage_1(stage1="weights"), "the network is in training stage 1"),
        (lambda: nn.Conv2d(3, 8, 1), "Conv2d has no spatial interaction capability"),
    ],
)
def test_a_network_without_capability_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        spatial_interaction(make(), (3, 32, 32))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((32, 32), r"input_shape=\(32, 32\); allowed: \(channels, height, width\)"),
        ((3, 0, 32), r"input_shape\[1\]=0; allowed: an integer"),
        ((3, 32.5, 32), r"input_shape\[1\]=32.5; allowed: an integer"),
        ((5, 32, 32), r"input_shape=\(5, 32, 32\) does not pass through the network: .*3 channels"),
    ],
)
def test_a_wrong_shape_is_refused_in_one_line(shape, message):
    with pytest.raises(ValueError, match=message) as error:
        spatial_interaction(network(), shape)
    assert "\n" not in str(error.value)
