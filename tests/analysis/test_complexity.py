"""Operations and bytes against sums worked out by hand, and against the papers'."""

import pytest
import timm
import torch
from mmdet.models import SwinTransformer
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from mmbivit.analysis import LayerComplexity, complexity, model_size
from mmbivit.binary import BinaryLinear, RSign, SoftmaxThreshold
from mmbivit.deploy import pack
from mmbivit.models import BinarySwinTransformer, ImageClassifier
from mmbivit.registry import MODELS


class BinaryViTAttention(nn.Module):
    """Binary attention of a ViT, as small as can be."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = BinaryLinear(dim, 3 * dim), BinaryLinear(dim, dim)
        self.sign, self.select = RSign(3 * dim), SoftmaxThreshold()

    @property
    def product_bits(self) -> tuple[tuple[int, int], ...]:
        return (self.sign.bits, self.sign.bits), (self.select.bits, self.sign.bits)

    def forward(self, x: Tensor, **_) -> Tensor:
        batch, tokens, channels = x.shape
        qkv = self.sign(self.qkv(x)).view(batch, tokens, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        x = self.select(query @ key.mT) @ value
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, channels))


def binary_deit(name: str) -> nn.Module:
    """A DeiT whose blocks are binary, with the average of the 196 tokens instead of a class token."""
    model = timm.create_model(name, class_token=False, global_pool="avg")
    for block in model.blocks:
        block.attn = BinaryViTAttention(model.embed_dim, block.attn.num_heads)
        block.mlp.fc1, block.mlp.fc2 = map(BinaryLinear.from_float, (block.mlp.fc1, block.mlp.fc2))
    return model


@pytest.mark.parametrize(
    ("name", "dim", "paper"),  # BOPs / 1e9, FLOPs / 1e8 and OPs / 1e8, each with one unit of its last place
    [
        ("vit_small_patch16_224", 384, ((4.51, 0.01), (0.57, 0.01), (1.29, 0.01))),
        pytest.param("vit_base_patch16_224", 768, ((17.4, 0.1), (1.15, 0.01), (3.86, 0.01)), marks=pytest.mark.slow),
    ],
)
def test_binary_deit_is_that_of_binaryvit_table_4(name, dim, paper):
    found = complexity(binary_deit(name), (3, 224, 224))
    # per block: qkv, proj (4 dim^2) and the MLP (8 dim^2) on 14 x 14 tokens, q k^T and p v
    bops = 12 * (12 * dim**2 * 196 + 2 * 196**2 * dim)
    patches, head = 196 * 3 * 16**2 * dim, 1000 * dim
    assert (found.bops, found.flops) == (bops, patches + head)
    assert found.part("patch_embed").flops == patches and found.part("blocks").flops == 0
    assert found.ops == bops / 64 + patches + head
    # The table leaves the head out, and cuts some numbers off where it rounds others.
    for number, (printed, last_place) in zip(
        (bops / 1e9, patches / 1e8, (bops / 64 + patches) / 1e8), paper, strict=True
    ):
        assert number == pytest.approx(printed, abs=last_place)


def test_swin_t_that_mixes_the_grid_has_the_operations_of_the_paper():
    """SI-BiViT, Table 2: 8.04 G BOPs; patch merging is float there, see docs/fidelity.md."""
    network = BinarySwinTransformer(
        mlp_ratio=3, spatial_interaction=dict(ratio=1.0, axis="grid"), downsample="float", out_indices=(3,)
    )
    counted = complexity(network, (3, 224, 224))
    by_hand = sum(
        depth * (10 * c**2 * n + 2 * 49 * n * c + 2 * n**2 * c)
        for depth, c, n in zip((2, 2, 6, 2), (96, 192, 384, 768), (3136, 784, 196, 49), strict=True)
    )
    assert counted.bops == by_hand
    assert round(counted.bops / 1e9, 2) == 8.04


def test_float_swin_t_is_the_same_of_timm_mmdet_and_ours():
    by_hand, tokens, dim = 56**2 * 3 * 4**2 * 96, 56**2, 96
    for depth in (2, 2, 6, 2):
        by_hand += depth * (12 * dim**2 * tokens + 2 * 49 * dim * tokens)
        if tokens > 49:  # patch merging
            tokens //= 4
            by_hand += 4 * dim * 2 * dim * tokens
            dim *= 2
    assert 4.4e9 < by_hand < 4.5e9
    timm_swin = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0)
    for model in (timm_swin, SwinTransformer(), BinarySwinTransformer(recipe="float")):
        found = complexity(model, (3, 224, 224))
        assert (found.flops, found.bops) == (by_hand, 0)
        assert found.params == sum(p.numel() for p in model.parameters()) and found.size_bytes == 4 * found.params


def tiny_swin(**options) -> BinarySwinTransformer:
    """One block and one shifted block on 3 x 3 tokens of 4 channels, so 4 windows of 4 tokens with padding."""
    arch = dict(embed_dims=4, depths=(2,), num_heads=(2,))
    options = dict(arch=arch, window_size=2, mlp_ratio=3, out_indices=(0,), pretrain_img_size=12) | options
    return BinarySwinTransformer(**options)


SHAPE = (3, 12, 12)
# MACs of a block of tiny_swin: attention on 16 tokens with padding (its two products have 4 windows, 2 heads and
# 4 x 4 x 2 each), the MLP 4 -> 12 -> 4 on 9, SI 4 -> 2 -> 4 tokens for 4 channels of 4 windows
BLOCK = {
    "attn": 2 * 4 * 2 * 4 * 4 * 2,
    "attn.qkv": 16 * 4 * 12,
    "attn.proj": 16 * 4 * 4,
    "mlp.fc1": 9 * 4 * 12,
    "mlp.fc2": 9 * 12 * 4,
    "mlp.si.fc1": 4 * 4 * 4 * 2,
    "mlp.si.fc2": 4 * 4 * 2 * 4,
}
PATCHES = 9 * 3 * 4**2 * 4


def macs(found, kind: str) -> dict[str, int]:
    return {row.name: getattr(row, kind) for row in found.rows if getattr(row, kind)}


def test_a_padded_and_shifted_block_by_hand():
    found = complexity(tiny_swin(spatial_interaction=dict(ratio=0.5)), SHAPE)
    both = {f"stages.0.blocks.{i}.{name}": count for i in (0, 1) for name, count in BLOCK.items()}
    assert macs(found, "bops") == both and macs(found, "flops") == {"patch_embed.proj": PATCHES}
    assert found.ops == 2 * sum(BLOCK.values()) / 64 + PATCHES
    rows = {row.name.removeprefix("stages.0.blocks.1."): row for row in found.rows}
    # 4 x 12 bits in 6 bytes, 12 scales and 12 biases; relative positions are 3 x 3 for 2 heads; BN has 2 statistics
    qkv = LayerComplexity("stages.0.blocks.1.attn.qkv", "BinaryLinear", ((1, 1),), 1, (4, 4, 12), 0, 768, 60, 102)
    assert rows["attn.qkv"] == qkv and qkv.ops == 12
    attention = rows["attn"]
    assert (attention.bits, attention.output_shape, attention.size_bytes) == (((1, 1),), (4, 4, 4), 4 * 18)
    assert (rows["norm1"].bits, rows["norm1"].params, rows["norm1"].size_bytes) == ((), 8, 4 * 16)
    assert (rows["mlp.si.fc1"].params, rows["mlp.si.fc1"].size_bytes) == (4 * 2 + 2, 1 + 4 * 2 + 4 * 2)


def test_without_spatial_interaction_only_its_rows_are_gone():
    found = complexity(tiny_swin(), SHAPE)
    rest = {name: count for name, count in BLOCK.items() if ".si." not in name}
    assert macs(found.part("stages.0.blocks.0"), "bops") == {f"stages.0.blocks.0.{k}": v for k, v in rest.items()}


@pytest.mark.parametrize("stage1", ["activations", "weights"])
def test_stage_1_counts_as_float_with_an_idle_branch(stage1):
    model = tiny_swin(spatial_interaction=dict(ratio=0.5), stage1=stage1)
    model.set_stage(1)
    found = complexity(model, SHAPE)
    linear = sum(count for name, count in BLOCK.items() if ".si." not in name and name != "attn")
    binary_attention = BLOCK["attn"] if stage1 == "activations" else 0
    assert found.bops == 2 * binary_attention
    assert found.flops == PATCHES + 2 * (linear + BLOCK["attn"] - binary_attention)
    rows = {row.name: row for row in found.rows}
    idle = rows["stages.0.blocks.0.mlp.si.fc1"]
    assert (idle.calls, idle.bits, idle.output_shape, idle.params) == (0, (), (), 10)
    pair = (1, 32) if stage1 == "activations" else (32, 1)
    assert rows["stages.0.blocks.0.attn.qkv"].bits == (pair,)
    assert idle.size_bytes == (40 if stage1 == "activations" else 17)


def test_a_recipe_with_float_attention_weights_has_both_kinds():
    row = complexity(tiny_swin(recipe=dict(attention="softmax")), SHAPE).part("stages.0.blocks.0.attn").rows[0]
    assert row.bits == ((1, 1), (32, 1)) and (row.flops, row.bops) == (BLOCK["attn"] // 2, BLOCK["attn"] // 2)


def test_convolutions_by_hand():
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.Conv2d(6, 6, (3, 1), dilation=2, padding=(2, 0), groups=6)
    )
    model.append(nn.ConvTranspose2d(6, 5, 2, stride=2))
    found = complexity(model, (4, 7, 5))  # 4 x 3 after the first
    assert [row.flops for row in found.rows] == [12 * 6 * 2 * 9, 12 * 6 * 3, 12 * 6 * 5 * 4]
    assert [row.output_shape for row in found.rows] == [(1, 6, 4, 3), (1, 6, 4, 3), (1, 5, 8, 6)]


def test_a_shared_head_counts_at_each_call_but_is_held_once():
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Conv2d(3, 2, 3, padding=1)
            self.same_head = self.head

        def forward(self, x):
            return {"levels": [self.head(x[..., :size, :size]) for size in (16, 8, 4, 2, 1)]}

    (row,) = complexity(Pyramid(), (3, 16, 16)).rows
    assert (row.calls, row.flops) == (5, (256 + 64 + 16 + 4 + 1) * 3 * 2 * 9)
    assert (row.output_shape, row.params, row.size_bytes) == ((1, 2, 16, 16), 56, 224)


@pytest.mark.parametrize("fast", [True, False])
def test_attention_of_torch_is_counted_also_where_it_is_one_operation(fast, monkeypatch):
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", fast)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    found = complexity(layer, (5, 8))
    # 5 tokens; the attention computes with its projection's weights, which are those of a module inside
    attention = 5 * 8 * 24 + 2 * 5 * 5 * 8 + 5 * 8 * 8
    assert macs(found, "flops") == {"self_attn": attention, "linear1": 640, "linear2": 640}
    assert next(row for row in found.rows if row.name == "self_attn.out_proj").params == 72
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_fused_attention_has_two_products_with_bits_of_their_own():
    class Fused(nn.Module):
        product_bits = ((1, 1), (32, 1))

        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x, x)

    (row,) = complexity(Fused(), (2, 5, 4)).rows
    assert (row.bops, row.flops) == (2 * 5 * 5 * 4, 2 * 5 * 5 * 4)


def test_any_module_of_one_tensor_and_products_with_a_vector():
    class Vector(nn.Linear):
        def forward(self, x):
            return torch.addmv(self.bias, self.weight, x[0]) + self.weight @ x[0] + x[0] @ x[0]

    found = complexity(Vector(7, 3, dtype=torch.float64), (7,))
    assert found.flops == 7 * 3 + 7 * 3 + 7 and found.rows[0].name == "" and found.rows[0].output_shape == (3,)
    assert complexity(nn.ReLU(), (2, 2)).rows == ()


def test_parts_sum_to_the_whole():
    backbone = dict(type="mmbivit.BinarySwinTransformer", arch=dict(embed_dims=4, depths=(1, 1), num_heads=(1, 2)))
    with DefaultScope.overwrite_default_scope("mmengine"):
        model = ImageClassifier(dict(**backbone, out_indices=(1,)), num_classes=3)
    found, parts = complexity(model, (3, 32, 32)), []
    parts = [found.part(name) for name in ("backbone", "head")]
    for name in ("flops", "bops", "ops", "params", "size_bytes"):
        assert getattr(found, name) == sum(getattr(part, name) for part in parts) > 0
    assert found.part("head").flops == 8 * 3
    size = model_size(model)
    assert (found.params, found.size_bytes) == (size.params, size.packed_bytes)
    with pytest.raises(ValueError, match="no module 'back' that computes or holds anything"):
        found.part("back")


def detector(base: str, **changes) -> nn.Module:
    """A detector of MMDetection with its heads as they are, but with few channels and regions."""
    cfg = Config.fromfile(base)
    cfg.merge_from_dict({f"model.{key}": value for key, value in changes.items()})
    with DefaultScope.overwrite_default_scope("mmdet"):
        return MODELS.build(cfg.model)


BACKBONE = dict(
    _delete_=True,
    type="mmbivit.BinarySwinTransformer",
    arch=dict(embed_dims=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)),
)


@pytest.fixture(scope="module")
def base_configs(tmp_path_factory):
    """Configs that only name MMDetection's."""
    folder = tmp_path_factory.mktemp("base")
    paths = {}
    for name in ("mask-rcnn", "cascade-mask-rcnn", "retinanet"):
        paths[name] = folder / f"{name}.py"
        paths[name].write_text(f'_base_ = "mmdet::_base_/models/{name}_r50_fpn.py"\nmodel = dict(backbone={BACKBONE})')
    return paths


@pytest.mark.parametrize("name", ["mask-rcnn", "cascade-mask-rcnn"])
def test_two_stage_detectors_take_the_regions_and_detections_of_inference(base_configs, name):
    changes = {"neck.in_channels": [8, 16, 32, 64], "neck.out_channels": 8}
    changes |= {"rpn_head.in_channels": 8, "rpn_head.feat_channels": 8}
    changes |= {"roi_head.bbox_roi_extractor.out_channels": 8, "roi_head.mask_roi_extractor.out_channels": 8}
    changes |= {"roi_head.mask_head.in_channels": 8, "roi_head.mask_head.conv_out_channels": 8}
    changes |= {"test_cfg.rpn.max_per_img": 30, "test_cfg.rcnn.max_per_img": 7}
    for i in range(3 if name.startswith("cascade") else 0):
        changes |= {f"roi_head.bbox_head.{i}.in_channels": 8, f"roi_head.bbox_head.{i}.fc_out_channels": 16}
    if not name.startswith("cascade"):
        changes |= {"roi_head.bbox_head.in_channels": 8, "roi_head.bbox_head.fc_out_channels": 16}
    model = detector(base_configs[name], **changes)
    found = complexity(model, (3, 64, 64))
    assert found.assumption == "for 30 regions and the masks of 7 detections"
    pixels = 16**2 + 8**2 + 4**2 + 2**2 + 1  # of the levels, the last is that before, subsampled
    assert found.part("rpn_head").flops == pixels * 8 * (8 * 9 + 3 + 12)
    laterals = (256 * 8 + 64 * 16 + 16 * 32 + 4 * 64) * 8
    assert found.part("neck").flops == laterals + (pixels - 1) * 8 * 8 * 9
    outputs = 81 + (4 if name.startswith("cascade") else 320)
    box = 30 * (8 * 49 * 16 + 16 * 16 + 16 * outputs)
    mask = 7 * (4 * 14**2 * 8 * 8 * 9 + 14**2 * 8 * 8 * 4 + 28**2 * 8 * 80)
    stages = 3 if name.startswith("cascade") else 1
    assert found.part("roi_head").flops == stages * (box + mask)
    assert found.bops == found.part("backbone").bops > 0
    assert "predict" not in vars(model.rpn_head) and "predict_bbox" not in vars(model.roi_head)


def test_a_one_stage_detector_by_hand(base_configs):
    changes = {"neck.in_channels": [8, 16, 32, 64], "neck.out_channels": 8, "bbox_head.in_channels": 8}
    model = detector(base_configs["retinanet"], **changes, **{"bbox_head.feat_channels": 8, "bbox_head.num_classes": 2})
    found = complexity(model, (3, 64, 64))
    pixels = 8**2 + 4**2 + 2**2 + 1 + 1
    # each branch has four convolutions and one for 9 anchors a pixel: 2 classes, 4 coordinates
    assert found.part("bbox_head").flops == pixels * 9 * 8 * (8 * 8 + 9 * 2 + 9 * 4)
    assert found.part("bbox_head.retina_cls").rows[0].calls == 5 and found.assumption == ""


def test_nothing_is_left_on_the_network():
    model = tiny_swin(spatial_interaction=dict(ratio=0.5)).train()
    model.stages[0].blocks[0].eval()
    modes = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    complexity(model, SHAPE)
    with pytest.raises(ValueError):
        complexity(model, (4, 12, 12))
    assert [module.training for module in model.modules()] == modes and not all(modes)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    hooks = [module._forward_hooks or module._forward_pre_hooks for module in model.modules()]
    assert not any(hooks) and all(p.requires_grad and p.grad is None for p in model.parameters())


class Broken(nn.Module):
    def forward(self, x):
        raise RuntimeError("what is wrong\nand more")


def test_what_cannot_be_counted_is_one_clear_line():
    lying = nn.Sequential(nn.Linear(4, 4))
    lying[0].product_bits = ((1, 1), (1, 1))
    packed = pack(tiny_swin())
    for model, shape, message in (
        (lying, (4,), r"0 \(Linear\) computes 1 product\(s\), but its product_bits has the bits of 2"),
        (packed, SHAPE, "a packed network computes outside PyTorch and cannot be counted"),
        (nn.Linear(4, 4), (5,), "Linear does not run on an input of 1 x 5: .*mat1 and mat2 shapes cannot"),
        (Broken(), (4,), "Broken does not run on an input of 1 x 4: what is wrong$"),
        (nn.Linear(4, 4), (0,), r"input_shape\[0\]=0"),
        (nn.Linear(4, 4), 4, "input_shape=4"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            complexity(model, shape)
        assert "\n" not in str(raised.value)
