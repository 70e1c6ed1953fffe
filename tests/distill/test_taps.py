"""What taps take of Swin with shifted windows and of a plain ViT, against NumPy; which networks they refuse."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from mmdet.models.backbones import SwinTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmbivit.distill import AttentionRankingLoss, BlockMSELoss, DirectionMatchingLoss, Distiller, DistillTerm
from mmbivit.distill.taps import TAPS
from mmbivit.models import Backbone, BinarySwinTransformer, find_attention, find_blocks, observed
from tests.engine.toy import ARCH, ToyModel
from tests.models.test_backbone import ToyBackbone
from tests.models.test_backbone import ToyModel as AnyModel
from tests.models.toy_vit import ToyViT

LOSSES = (
    BlockMSELoss(),
    DirectionMatchingLoss(),
    DirectionMatchingLoss(of="blocks"),
    AttentionRankingLoss(),
    AttentionRankingLoss(maps="weights"),
)


def swin(recipe="sibivit", seed=0, **options):
    torch.manual_seed(seed)
    network = BinarySwinTransformer(**dict(arch=ARCH, recipe=recipe, out_indices=(1,), drop_path_rate=0.0) | options)
    return shaken(network)


def vit(recipe="sibivit", seed=0):
    torch.manual_seed(seed)
    return shaken(ToyViT(recipe))


def shaken(network: Backbone) -> Backbone:
    """Give biases, thresholds and tables values other than 0."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return network


def images(batch=2, hw=(36, 40)):
    return torch.randn(batch, 3, *hw, generator=torch.Generator().manual_seed(1))


def seen_in(network, batch, student=None):
    """What each tap takes of a network, by tap and block; and the tokens that attention gets."""
    found, watching, take = {}, {}, {}
    for tap in ("qkv", "attention_scores", "attention_weights", "blocks"):
        for name, place in TAPS[tap](None, student or network, network)[1].items():
            watching[tap, name], take[tap, name] = place.module, place.take
    for name, block in find_blocks(network).items():
        watching["attention", name] = find_attention(block.module)[0]
        take["attention", name] = lambda args, output: args[0]
    with (
        torch.no_grad(),
        observed(watching, lambda key, args, output: found.update({key: take[key](args, output)})),
    ):
        network(batch)
    return found


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def masked_keys(hw_shape, window, shift, mask_padding):
    """True where a query may not see a key, window by window: tokens that the shift brought together, and padding."""
    height, width = (-(-side // window) * window for side in hw_shape)
    regions = np.zeros((height, width), dtype=int)
    for y in range(height):
        for x in range(width):
            row, column = (y + shift) % height, (x + shift) % width
            padding = mask_padding and (row >= hw_shape[0] or column >= hw_shape[1])
            regions[y, x] = -1 if padding else 2 * (row < shift) + (column < shift)
    windows = [
        regions[y : y + window, x : x + window].reshape(-1)
        for y in range(0, height, window)
        for x in range(0, width, window)
    ]
    return np.stack([w[:, None] != w[None, :] for w in windows])


def sign(x):
    return np.where(x >= 0, 1.0, -1.0)


def linear(layer, x):
    """A float or binary linear layer (Eq. 3-5)."""
    weight = layer.weight.detach().numpy()
    if hasattr(layer, "input_quantizer"):
        x = sign(x - layer.input_quantizer.gamma.detach().numpy())
        weight = np.abs(weight).mean(1, keepdims=True) * sign(weight - weight.mean(1, keepdims=True))
    return x @ weight.T + layer.bias.detach().numpy()


@pytest.mark.parametrize(("make", "size"), [(swin, (36, 40)), (vit, (32, 32))])
@pytest.mark.parametrize("recipe", ["float", "sibivit"])
def test_queries_keys_values_scores_and_weights(make, size, recipe):
    binary = recipe == "sibivit"
    network = make(recipe).eval()
    found = seen_in(network, images(hw=size))
    shifts = []
    for name, block in find_blocks(network).items():
        attention, _ = find_attention(block.module)
        tokens = found["attention", name].numpy()
        groups, n, channels = tokens.shape
        d = channels // attention.num_heads
        qkv, scores, weights = (found[tap, name].numpy() for tap in ("qkv", "attention_scores", "attention_weights"))

        values = linear(attention.qkv, tokens)
        by_head = np.empty((3, groups, attention.num_heads, n, d))
        for part in range(3):
            for head in range(attention.num_heads):
                first = part * channels + head * d
                by_head[part, :, head] = values[..., first : first + d]
        np.testing.assert_allclose(qkv, by_head, rtol=1e-4, atol=1e-5)

        if binary:  # what is tapped is before this sign
            gamma = attention.qkv_quantizer.gamma.detach().numpy().reshape(3, 1, -1, 1, d)
            by_head = sign(by_head - gamma)
        expected = by_head[0] @ by_head[1].swapaxes(-1, -2) / np.sqrt(d)
        if make is swin:
            y, x = np.divmod(np.arange(49), 7)
            offsets = (y[:, None] - y + 6) * 13 + x[:, None] - x + 6
            expected += attention.relative_position_bias_table.detach().numpy()[offsets].transpose(2, 0, 1)
            masked = masked_keys(block.hw_shape(size), 7, block.module.shift, binary)
            shifts.append((block.module.shift, masked.any()))
            masked = np.broadcast_to(np.tile(masked, (2, 1, 1))[:, None], scores.shape)
            expected[masked] = -np.inf
            assert (weights[masked] == 0).all()
        np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)

        p = softmax(expected)
        if binary:
            selected = p >= p.max(-1, keepdims=True) / 4
            p = selected / selected.sum(-1, keepdims=True)
        np.testing.assert_allclose(weights, p, rtol=1e-3, atol=1e-6)
    assert shifts == ([] if make is vit else [(0, binary), (3, True), (0, binary)])


def losses_of(student, teacher, losses=LOSSES, batch=None):
    """Run a model around a backbone with all these losses; they are called by a number, as two share a name."""
    model = AnyModel(student)
    terms = [DistillTerm(Named(loss, str(i))) for i, loss in enumerate(losses)]
    distiller = Distiller(model, student, teacher, terms)
    found = model(images() if batch is None else batch, mode="loss")
    distiller.remove()
    assert not any(module._forward_hooks for module in [*model.modules(), *teacher.modules()])
    return [found[str(i)] for i in range(len(losses))]


class Named(nn.Module):
    def __init__(self, loss, name):
        super().__init__()
        self.loss, self.tap, self.log_name = loss, loss.tap, name

    def forward(self, student, teacher):
        return self.loss(student, teacher)


@pytest.mark.parametrize("make", [swin, vit])
def test_a_distiller_gives_a_loss_what_taps_took(make):
    student, teacher = make().train(), make("float", seed=1)
    batch = images(hw=(32, 32))
    values = losses_of(student, teacher, batch=batch)
    seen, targets = seen_in(student, batch), seen_in(teacher, batch, student)
    for value, loss in zip(values, LOSSES, strict=True):
        sides = ({name: x for (tap, name), x in found.items() if tap == loss.tap} for found in (seen, targets))
        torch.testing.assert_close(value, loss(*sides))
        assert value > 0
    sum(values).backward()
    for block in student.blocks():
        attention, _ = find_attention(block.module)
        assert attention.qkv.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_mmdets_swin_is_a_teacher_like_ours():
    student, ours = swin().train(), swin("float", seed=1)
    theirs = SwinTransformer(**ARCH, strides=(4, 2), out_indices=(1,))
    ours.load_state_dict(theirs.state_dict())
    for value, other in zip(losses_of(student, ours), losses_of(copy.deepcopy(student), theirs), strict=True):
        torch.testing.assert_close(value, other)  # theirs masks by -100, which exp makes 0


@pytest.mark.parametrize("autocast", [False, True])
def test_blocks_that_are_computed_again_get_the_same_gradient(autocast):
    gradients, teacher = [], swin("float", seed=1)
    for with_cp in (False, True):
        student = swin(with_cp=with_cp, spatial_interaction=dict(ratio=1.0), mlp_ratio=3).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            values = losses_of(student, teacher)
        assert all(value.dtype == torch.float32 for value in values)
        sum(values).backward()
        gradients.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


def test_reentrant_checkpointing_is_refused(monkeypatch):
    student = swin().train()
    block = student.stages[0].blocks[1]
    again = partial(checkpoint, block._forward, use_reentrant=True)
    monkeypatch.setattr(block, "_forward", again)
    for loss in (DirectionMatchingLoss(), AttentionRankingLoss()):
        with pytest.raises(
            RuntimeError, match=r"^the output of stages\.0\.blocks\.1 has no gradient, so it cannot be dis"
        ):
            losses_of(student, swin("float"), [loss])


def test_frozen_blocks_are_left_out():
    student = swin(frozen_stages=1).train()
    for tap in ("blocks", "qkv", "attention_scores", "attention_weights"):
        assert [list(places) for places in TAPS[tap](None, student, swin("float"))] == [["stages.1.blocks.0"]] * 2
    with pytest.raises(ValueError, match="all blocks of the backbone are frozen, so distillation has nothing to train"):
        losses_of(swin(frozen_stages=2).train(), swin("float"))


def without_attention(network):
    network.stages[0].blocks[1].attn = nn.Identity()
    return network


@pytest.mark.parametrize(
    "loss", [DirectionMatchingLoss(), AttentionRankingLoss(), AttentionRankingLoss(maps="weights")]
)
@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (
            swin,
            lambda: without_attention(swin("float")),
            r"^stages\.0\.blocks\.1 of the teacher is a SwinBlock, whose att",
        ),
        (
            ToyBackbone,
            lambda: ToyBackbone("float"),
            r"^stages\.0\.blocks\.0 of the model is a ToyBlock, whose attention",
        ),
        (
            swin,
            lambda: swin("float", arch=ARCH | dict(num_heads=(2, 2))),
            r"stages\.0\.blocks\.0 has 2 heads in the teach",
        ),
        (swin, lambda: swin("float", window_size=4), r"tokens of stages\.0\.blocks\.0 attend to others in the teacher"),
        (
            lambda: swin(window_size=14, patch_size=16),  # one window at 224
            lambda: swin("float", window_size=14, patch_size=16, shift_single_window=False),
            r"tokens of stages\.0\.blocks\.1 attend to others in the teacher .* shift_single_window\)$",
        ),
    ],
)
def test_attention_that_does_not_correspond_is_refused(student, teacher, message, loss):
    student = student()
    with pytest.raises(ValueError, match=message):
        Distiller(ToyModel(), student, teacher(), [DistillTerm(loss)])
    assert not any(module._forward_hooks for module in student.modules())
