"""BinaryViT against its equations in NumPy, binary and float, and in classifiers and detectors."""

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmbivit import get_config
from mmbivit.analysis import spatial_interaction
from mmbivit.analysis.attention import attention_map
from mmbivit.models import BinaryViT, ImageClassifier
from mmbivit.models.binaryvit import Affine
from tests.deploy.networks import randomise
from tests.test_detectors import sample

ARCH = dict(embed_dims=8, depths=(1, 1), num_heads=(2, 2), hidden_dims=(24, 16), reductions=(2, 1))
TINY = dict(arch=ARCH, pretrain_img_size=24, out_indices=(0, 1))


def network(recipe="reactnet", **options) -> BinaryViT:
    torch.manual_seed(0)
    built = randomise(BinaryViT(**TINY, recipe=recipe, **options))
    for module in built.modules():
        if isinstance(module, Affine):
            nn.init.normal_(module.scale, std=0.3)
            nn.init.normal_(module.shift, std=0.3)
    return built.double()


def array(tensor):
    return tensor.detach().numpy()


def norm(module, x):
    weight, bias = array(module.weight), array(module.bias)
    if isinstance(module, nn.LayerNorm):
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    else:
        mean, var = array(module.running_mean), array(module.running_var)
    return (x - mean) / np.sqrt(var + module.eps) * weight + bias


def rprelu(module, x):
    y = x - array(module.gamma)
    return np.where(y > 0, y, array(module.slope) * y) + array(module.zeta)


def signed(x):
    return np.where(x >= 0, 1.0, -1.0)


def product(layer, x, center=True):
    """Of 1-bit inputs and weights where the layer is binary (Eq. 1), in float else."""
    weight = array(layer.weight)
    if not hasattr(layer, "input_quantizer"):
        return x @ weight.T + (0 if layer.bias is None else array(layer.bias))
    mu = weight.mean(1, keepdims=True) if center else 0
    theta = np.abs(weight).mean(1, keepdims=True)
    return signed(x - array(layer.input_quantizer.gamma)) @ (theta * signed(weight - mu)).T


def layer(module, x):
    """A layer with its shortcut (Eq. 2 and 3), or a float one."""
    y = product(module, x)
    if not hasattr(module, "input_quantizer"):
        return y
    n, k = y.shape[-1], x.shape[-1]
    shortcut = np.tile(x, (1, 1, n // k)) if n >= k else x.reshape(*x.shape[:2], n, k // n).mean(-1)
    return rprelu(module.act, norm(module.norm, y) + shortcut)


def squares(x, hw, side):
    """Average of the real tokens of each square: ``(B, H, W, C) -> (B, H', W', C)``."""
    height, width = (-(-n // side) for n in hw)
    out = np.empty((len(x), height, width, x.shape[-1]))
    for i in range(height):
        for j in range(width):
            out[:, i, j] = x[:, side * i : side * (i + 1), side * j : side * (j + 1)].mean((1, 2))
    return out


def attention(attn, x, hw):
    batch, tokens, channels = x.shape
    side, heads = attn.side, attn.num_heads
    if side == 1:
        q, k, v = np.split(layer(attn.qkv, x), 3, axis=-1)
        keys = np.arange(tokens)
    else:
        q = layer(attn.qkv.query, x)
        small = squares(x.reshape(batch, *hw, channels), hw, side)
        shape = small.shape
        small = layer(attn.qkv.key_value, layer(attn.qkv.reduction, small.reshape(batch, -1, channels)))
        grid = small.reshape(*shape[:3], 2 * channels).repeat(side, 1).repeat(side, 2)[:, : hw[0], : hw[1]]
        k, v = np.split(grid.reshape(batch, tokens, 2 * channels), 2, axis=-1)
        keys = np.arange(tokens).reshape(hw)[::side, ::side].ravel()
    added = q + k + v
    binary = attn.head_shortcut is not None
    if binary:
        q, k, v = (signed(y - g) for y, g in zip((q, k, v), np.split(array(attn.qkv_quantizer.gamma), 3), strict=True))
    q, k, v = (y.reshape(batch, tokens, heads, -1).transpose(0, 2, 1, 3) for y in (q, k[:, :], v[:, :]))
    k, v = k[:, :, keys], v[:, :, keys]
    scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(channels // heads)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    if binary:
        alpha = max(float(attn.attention.scale.value), 1e-5)
        p = alpha * (p / alpha >= 0.5)
    out = (p @ v).transpose(0, 2, 1, 3).reshape(batch, tokens, channels)
    if binary:
        out = rprelu(attn.head_shortcut.act, norm(attn.head_shortcut.norm, out) + added)
    return layer(attn.proj, out)


def affine(module, x):
    return x * array(module.scale) + array(module.shift)


def pools(module, x, hw):
    out = 0
    grid = x.reshape(len(x), *hw, -1)
    for part, (high, wide) in zip(module.affines, ((1, 3), (3, 1), (1, 5), (5, 1)), strict=True):
        padded = np.pad(grid, ((0, 0), (high // 2,) * 2, (wide // 2,) * 2, (0, 0)))
        windows = [padded[:, i : i + hw[0], j : j + hw[1]] for i in range(high) for j in range(wide)]
        out = out + affine(part, np.mean(windows, 0).reshape(x.shape))
    return out


def gelu(x):
    return torch.nn.functional.gelu(torch.from_numpy(x)).numpy()


def block(module, x, hw):
    f = x + affine(module.affine1, attention(module.attn, norm(module.norm1, x), hw))
    normed = norm(module.norm2, f)
    hidden = layer(module.mlp.fc1, normed)
    hidden = gelu(hidden) if isinstance(module.mlp.act, nn.GELU) else hidden
    return f + affine(module.affine2, layer(module.mlp.fc2, hidden)) + pools(module.pools, normed, hw)


@pytest.mark.parametrize("recipe", ["reactnet", "float"])
@pytest.mark.parametrize("hw", [(6, 6), (5, 7)])
def test_blocks_are_those_of_the_equations(recipe, hw):
    built = network(recipe)
    x = torch.randn(2, hw[0] * hw[1], 8, dtype=torch.float64)
    with torch.no_grad():
        for stage, channels in zip(built.stages, (8, 16), strict=True):
            x = torch.randn(2, hw[0] * hw[1], channels, dtype=torch.float64)
            expected = block(stage.blocks[0], array(x), hw)
            np.testing.assert_allclose(array(stage.blocks[0](x, hw)), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("recipe", ["reactnet", "float"])
@pytest.mark.parametrize("hw", [(4, 6), (3, 5)])
def test_binary_downsampling_is_that_of_the_paper(recipe, hw):
    step = network(recipe).stages[0].downsample
    x = torch.randn(2, hw[0] * hw[1], 8, dtype=torch.float64)
    n = norm(step.norm, array(x)).reshape(2, *hw, 8)
    padded = np.pad(n, ((0, 0), (0, hw[0] % 2), (0, hw[1] % 2), (0, 0)))
    parts = [padded[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
    rows = np.concatenate(parts, -1).reshape(2, -1, 32)
    y = norm(step.norm_after, product(step.proj, rows, center=False))
    shortcut = np.tile(squares(n, hw, 2).reshape(2, -1, 8), (1, 1, 2))
    found, grid = step(x, hw)
    assert grid == (-(-hw[0] // 2), -(-hw[1] // 2))
    np.testing.assert_allclose(array(found), rprelu(step.act, y + shortcut), rtol=1e-9, atol=1e-9)


def test_stem_positions_and_float_downsampling():
    built = network(downsample="float")
    images = torch.randn(1, 3, 24, 24, dtype=torch.float64)
    with torch.no_grad():
        tokens, hw = built.embed(images)
        conv = built.patch_embed.proj(images).flatten(2).transpose(1, 2)
        np.testing.assert_allclose(array(tokens), norm(built.patch_embed.norm, array(conv)), rtol=1e-9, atol=1e-9)
        stage = built.stages[0]
        positions = array(tokens) + array(stage.pos_embed)
        np.testing.assert_allclose(
            array(stage(tokens, hw)), block(stage.blocks[0], positions, hw), rtol=1e-8, atol=1e-8
        )
        n = torch.from_numpy(norm(stage.downsample.norm, array(tokens)))
        grid = stage.downsample.conv(n.transpose(1, 2).unflatten(2, hw)).flatten(2).transpose(1, 2)
        expected = norm(stage.downsample.norm_after, array(grid))
        found, _ = stage.downsample(tokens, hw)
    np.testing.assert_allclose(array(found), expected, rtol=1e-9, atol=1e-9)


def test_attention_to_averages_is_drawn_and_counted():
    """A key's weight is shared by the tokens of its square; each token meets as many others as there are keys."""
    built = network("sibivit").float()
    image = torch.randn(1, 3, 20, 28)  # 5 x 7 tokens, 3 x 4 keys
    found = attention_map(built, image, "stages.0.blocks.0", query=(9, 5))
    weights = torch.tensor(found.weights)
    assert weights.shape == (2, 5, 7) and found.query == (1, 2)
    torch.testing.assert_close(weights.sum((1, 2)), torch.ones(2), rtol=1e-5, atol=1e-5)
    assert torch.equal(weights[:, 0, 0], weights[:, 1, 1])
    sic = spatial_interaction(built, (3, 20, 28))
    assert [row.sic for row in sic.rows if row.module == "attn"] == [2 * 35 * (12 - 1), 2 * 12 * (12 - 1)]


def test_branches_start_closed_and_scales_small():
    built = BinaryViT(**TINY)
    first = built.stages[0].blocks[0]
    assert all((part.scale == 0).all() and (part.shift == 0).all() for part in first.pools.affines)
    assert (first.affine1.scale == 0.1).all() and (first.affine2.scale == 0.1).all()
    plain = BinaryViT(**TINY, pool_branches=False, affine=False).stages[0].blocks[0]
    assert plain.pools is None and isinstance(plain.affine1, nn.Identity)


@pytest.mark.parametrize("stage", [1, 2])
def test_classification_trains_in_both_stages(stage):
    model = ImageClassifier(dict(type="mmbivit.BinaryViT", **TINY), num_classes=5).train()
    model.backbone.set_stage(stage)
    losses = model(torch.randn(4, 3, 24, 24), torch.tensor([0, 1, 2, 3]), mode="loss")
    sum(losses.values()).backward()
    first = model.backbone.stages[0].blocks[0]
    assert first.pools.affines[0].scale.grad.abs().sum() > 0 and first.affine1.scale.grad.abs().sum() > 0


@pytest.mark.parametrize("stage", [1, 2])
def test_a_mask_rcnn_trains_at_an_odd_size(stage):
    cfg = get_config("digits/mask_rcnn_sibivit").model
    cfg.backbone = dict(type="mmbivit.BinaryViT", **TINY)
    cfg.neck.in_channels = [8, 16]
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(cfg).train()
    model.backbone.set_stage(stage)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(2):
        losses = model(torch.randn(2, 3, 90, 106), [sample([(10, 10, 50, 60)]), sample([])], mode="loss")
        total, _ = model.parse_losses(losses)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert total.isfinite()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(arch="tiny"), "arch='tiny' is unknown; allowed: 'small'"),
        (dict(arch=dict(embed_dims=8, depths=(1,), num_heads=(1,))), "hidden_dims=, reductions="),
        (dict(arch=dict(ARCH, reductions=(2,))), r"arch.reductions=\(2,\); allowed: a number for each of 2 stages"),
        (dict(arch=dict(ARCH, hidden_dims=(0, 1))), "arch.hidden_dims"),
        (dict(spatial_interaction=dict(ratio=1.0)), "spatial_interaction=.*; allowed: None, as pool_branches"),
        (dict(downsample="conv"), "downsample='conv' is unknown; allowed: 'binary', 'float'"),
        (dict(affine=1), "affine=1 is unknown"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BinaryViT(**(TINY | options))
