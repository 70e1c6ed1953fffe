"""Plans of training stages: what is binary in each, what a network computes in between, and what checkpoints say."""

import pytest
import torch
from torch.nn import functional as F

from mmbivit.analysis import gradient_conflict, spatial_interaction
from mmbivit.binary import BinaryLinear, Quantizer
from mmbivit.deploy import pack
from mmbivit.deploy.onnx_export import write_onnx
from mmbivit.models import BinarySwinTransformer, TrainingStage

ARCH = dict(embed_dims=8, depths=(1, 1), num_heads=(1, 2))
# BiViT's cross-layer order: attention's weights first, then the MLP's, then all.
CROSS_LAYER = [dict(activations=True, weights=["attn"]), dict(activations=True, weights=["attn", "mlp"])]
BLOCKS = ("stages.0.blocks.0", "stages.1.blocks.0")
LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "mlp.si.fc1", "mlp.si.fc2")
MERGING = "stages.0.downsample.reduction"


def swin(training_stages=CROSS_LAYER, **options):
    torch.manual_seed(0)
    defaults = dict(mlp_ratio=3, spatial_interaction=dict(ratio=1.0, alpha_init=0.5), drop_path_rate=0.0)
    return BinarySwinTransformer(
        arch=ARCH, out_indices=(0, 1), training_stages=training_stages, **defaults | options
    ).eval()


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def on(network):
    """The names of the quantizers that are on, and of the branches that are awake."""
    named = dict(network.named_modules())
    quantizers = {name for name, module in named.items() if isinstance(module, Quantizer) and module.binarize}
    return quantizers, {name for name, module in named.items() if getattr(module, "active", False)}


def quantizers(layers, side):
    """The quantizers of layers in both blocks, and of patch merging if it is one of them."""
    part = dict(weights="weight_quantizer", activations="input_quantizer")[side]
    names = {f"{block}.{layer}.{part}" for block in BLOCKS for layer in layers if layer != MERGING}
    return names | ({f"{MERGING}.{part}"} if MERGING in layers else set())


ATTENTION = {f"{block}.attn.{part}" for block in BLOCKS for part in ("qkv_quantizer", "attention")}
ACTIVATIONS = quantizers((*LAYERS, MERGING), "activations") | ATTENTION
BRANCHES = {f"{block}.mlp.si" for block in BLOCKS}
ALL = ACTIVATIONS | quantizers((*LAYERS, MERGING), "weights")


def test_the_cross_layer_order_makes_exactly_these_parts_binary():
    network = swin()
    assert (network.stage, network.last_stage) == (3, 3) and on(network) == (ALL, BRANCHES)
    expected = {
        1: (ACTIVATIONS | quantizers(LAYERS[:2], "weights"), set(), (4, 0)),
        2: (ACTIVATIONS | quantizers(LAYERS, "weights"), set(), (12, 0)),
        3: (ALL, BRANCHES, (13, 2)),
    }
    for stage in (1, 3, 2, 2, 3):
        binary, awake, counts = expected[stage]
        assert network.set_stage(stage) == counts
        assert network.stage == stage and on(network) == (binary, awake)
    with pytest.raises(ValueError, match="stage=4 is unknown; allowed: 1, 2, 3$"):
        network.set_stage(4)


@pytest.mark.parametrize(
    ("stage", "binary", "awake"),
    [
        ({}, set(), set()),
        (dict(weights=True), quantizers((*LAYERS, MERGING), "weights"), set()),
        (dict(activations=["attn.attention"]), {f"{block}.attn.attention" for block in BLOCKS}, set()),
        (dict(activations=("attn.qkv",)), quantizers(["attn.qkv"], "activations"), set()),
        (dict(weights=["mlp.fc2", "downsample"]), quantizers(["mlp.fc2", MERGING], "weights"), set()),
        (dict(weights=["fc2"]), quantizers(["mlp.fc2", "mlp.si.fc2"], "weights"), set()),
        (dict(weights=["mlp.si"], branch=True), quantizers(LAYERS[4:], "weights"), BRANCHES),
        (
            dict(activations=["stages.1.blocks.0.mlp"]),
            {n for n in ACTIVATIONS if n.startswith("stages.1.blocks.0.mlp.")},
            set(),
        ),
        (dict(activations=True, weights=True, branch=True), ALL, BRANCHES),
    ],
)
def test_a_place_is_whole_parts_of_a_path(stage, binary, awake):
    network = swin([stage])
    network.set_stage(1)
    assert on(network) == (binary, awake)
    network.set_stage(2)
    assert on(network) == (ALL, BRANCHES)


@pytest.mark.parametrize("stage1", ["activations", "weights", "all", None])
def test_stage1_is_the_short_form_of_a_plan_of_two(stage1):
    long = dict(
        activations=dict(activations=True),
        weights=dict(weights=True),
        all=dict(activations=True, weights=True, branch=True),
    )[stage1 or "activations"]
    short, network = swin(None, stage1=stage1), swin([long])
    assert short.training_plan == network.training_plan == (TrainingStage(**long), TrainingStage(True, True, True))
    for stage in (1, 2):
        assert short.set_stage(stage) == network.set_stage(stage) and on(short) == on(network)
        assert all(map(torch.equal, short(images()), network(images())))


def by_hand(block, x):
    """A block of the first stage of the plan, one window: binary activations, binary weights in attention alone."""

    def norm(layer, x):
        return F.batch_norm(x.flatten(0, 1), layer.running_mean, layer.running_var, layer.weight, layer.bias).view_as(x)

    def sign(x, gamma):
        return torch.where(x >= gamma, 1.0, -1.0)

    def linear(layer, x, binary):
        weight = layer.weight
        if binary:
            scale = weight.abs().mean(1, keepdim=True)
            weight = scale * sign(weight, weight.mean(1, keepdim=True))
        return sign(x, layer.input_quantizer.gamma) @ weight.T + layer.bias

    attn, mlp = block.attn, block.mlp
    batch, tokens, channels = x.shape
    qkv = sign(linear(attn.qkv, norm(block.norm1, x), binary=True), attn.qkv_quantizer.gamma)
    query, key, value = qkv.view(batch, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    scores = query @ key.transpose(-2, -1) * (channels // attn.num_heads) ** -0.5 + attn.position_bias()
    probabilities = scores.softmax(-1)
    selected = (probabilities >= 0.25 * probabilities.amax(-1, keepdim=True)).float()
    heads = (selected / selected.sum(-1, keepdim=True)) @ value
    x = x + linear(attn.proj, heads.transpose(1, 2).reshape(batch, tokens, channels), binary=True)
    hidden = linear(mlp.fc1, norm(mlp.norm, x), binary=False) - mlp.act.gamma
    hidden = torch.where(hidden >= 0, hidden, mlp.act.slope * hidden) + mlp.act.zeta
    return x + linear(mlp.fc2, hidden, binary=False)


def test_a_mixed_stage_computes_what_the_formulas_say():
    network = swin()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    block = network.stages[0].blocks[0]
    x = torch.randn(2, 49, 8)
    outputs = {}
    with torch.no_grad():
        for stage in (1, 2, 3):
            network.set_stage(stage)
            outputs[stage] = block(x, (7, 7))
        torch.testing.assert_close(outputs[1], by_hand(block, x))
    assert not torch.allclose(outputs[1], outputs[2]) and not torch.allclose(outputs[2], outputs[3])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_reach_what_is_used_in_a_stage(stage):
    network = swin().train()
    network.set_stage(stage)
    sum(out.square().mean() for out in network(images())).backward()
    without = {name for name, parameter in network.named_parameters() if parameter.grad is None}
    assert without == ({n for n, _ in network.named_parameters() if ".si." in n} if stage < 3 else set())
    layers = {name: module for name, module in network.named_modules() if isinstance(module, BinaryLinear)}
    for name, layer in layers.items():
        binary = stage == 3 or (".attn." in name or (stage == 2 and ".mlp." in name))
        assert all((row.unique().numel() == 2) == binary for row in layer.effective_weight()), name


@pytest.fixture
def messages(monkeypatch):
    found = []
    monkeypatch.setattr("mmbivit.models.stage.print_log", lambda message, **_: found.append(message))
    return found


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (
            1,
            "stage 1: its weights outside attn are still float and its spatial interaction is idle. Train on to ",
        ),
        (2, "stage 2: its weights outside attn, mlp are still float and its spatial interaction is idle. Train on to "),
        (3, None),
    ],
)
def test_a_checkpoint_knows_its_stage_and_says_what_is_still_float(messages, stage, expected):
    network, other = swin(), swin()
    network.set_stage(stage)
    for _ in range(2):
        other.load_state_dict(network.state_dict())
        assert other.stage == stage and on(other) == on(network)
    assert all(map(torch.equal, network(images()), other(images())))
    assert len(messages) == (expected is not None)
    assert expected is None or expected in messages[0]


def test_what_is_still_float_is_said_of_each_side(messages):
    plan = [{}, dict(activations=["attn", "mlp.fc1"], branch=True)]
    network = swin(plan)
    for stage in (1, 2):
        network.set_stage(stage)
        swin(plan).load_state_dict(network.state_dict())
    expected = (
        "its weights are still float and its activations are still float and its spatial interaction is idle.",
        "its weights are still float and its activations outside attn, mlp.fc1 are still float.",
    )
    assert all(text in message for text, message in zip(expected, messages, strict=True))


def test_a_finished_network_is_finished_under_any_plan_and_no_other_is():
    """A checkpoint counts its stage from the end; plans of two, as of earlier releases, have 1 and 2."""
    two, three = swin(None), swin()
    assert int(two.training_stage) == int(three.training_stage) == 2
    for network, other in ((two, swin()), (three, swin(None))):
        other.load_state_dict(network.state_dict())
        assert other.stage == other.last_stage
        assert all(map(torch.equal, network(images()), other(images())))
    two.set_stage(1)
    assert int(two.training_stage) == 1
    three.set_stage(2)
    other = swin(None)
    other.load_state_dict(three.state_dict())
    assert other.stage == 1
    three.set_stage(1)
    with pytest.raises(ValueError, match="of a training stage that this BinarySwinTransformer, which has 2, does not "):
        other.load_state_dict(three.state_dict())


def test_nothing_but_the_last_stage_is_packed_exported_or_measured(tmp_path):
    network = swin()
    for stage in (1, 2):
        network.set_stage(stage)
        for refuse in (
            pack,
            lambda network: write_onnx(network, tmp_path / "x.onnx", size=(32, 32)),
            lambda network: spatial_interaction(network, (3, 32, 32)),
            lambda network: gradient_conflict(network, swin(None, recipe="float"), []),
        ):
            with pytest.raises(ValueError, match=f"in training stage {stage}.* stage 3"):
                refuse(network)
    network.set_stage(3)
    with torch.no_grad():
        assert all(map(torch.equal, pack(network)(images()), pack(swin(None))(images())))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(stage1="weights"), "stage1='weights' and training_stages are both given; expected one of the two"),
        (dict(training_stages={}), "training_stages={}; allowed: a list such as [dict(activations=True)]"),
        (dict(training_stages=dict(weights=True)), "training_stages={'weights': True}; allowed: a list"),
        (dict(training_stages=["attn"]), "training_stages[0]='attn'; allowed: dict(activations=, weights=, branch=)"),
        (
            dict(training_stages=[{}, dict(weight=True)]),
            "training_stages[1] has no key 'weight'; allowed: activations, weights, branch; did you mean 'weights'?",
        ),
        (
            dict(training_stages=[dict(weights="attn")]),
            "training_stages[0].weights='attn'; allowed: True, False, or a list of places such as ['attn', 'mlp.fc2']",
        ),
        (dict(training_stages=[dict(activations=[])]), "training_stages[0].activations=[]; allowed: True, False, or"),
        (dict(training_stages=[dict(activations=[1])]), "training_stages[0].activations=[1]; allowed: True, False"),
        (
            dict(training_stages=[dict(branch="yes")]),
            "training_stages[0].branch='yes' is unknown; allowed: True, False",
        ),
        (
            dict(training_stages=[{}, dict(weights=["attn", "ml"])]),
            "training_stages[1].weights names 'ml', where no weights are made binary; allowed: parts of attn.qkv, "
            "attn.proj, mlp.fc1, mlp.fc2, mlp.si, downsample.reduction",
        ),
        (dict(training_stages=[dict(weights=["attn.attention"])]), "weights names 'attn.attention', where no weights"),
        (
            dict(training_stages=[dict(activations=["attn."])]),
            "activations names 'attn.', where no activations are made binary; allowed: parts of attn.qkv, "
            "attn.qkv_quantizer, attn.attention, attn.proj, mlp.fc1",
        ),
    ],
)
def test_impossible_plans_are_one_line_that_says_what_is_allowed(options, message):
    with pytest.raises(ValueError) as error:
        swin(**options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_float_network_takes_any_plan():
    """As the float counterpart of a binary one, which has its other options."""
    network = swin(recipe="float", spatial_interaction=None)
    assert [network.set_stage(stage) for stage in (1, 2, 3)] == [(0, 0)] * 3
