"""ONNX files of tiny networks with random parameters, run in ONNX Runtime and compared with the torch model."""

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmbivit.apis.onnx_export import compare_with_torch, export_onnx, load_network, plain_copy
from mmbivit.binary import ActivationQuantizer, BinaryLinear, Quantizer, Recipe, RSign, sign_ste
from mmbivit.models import BinarySwinTransformer

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

TOOL = Path(__file__).parents[2] / "tools" / "deployment" / "export_onnx.py"

# Every second block has shifted windows.
CLASSIFIER = """
_base_ = "{base}"
model = dict(backbone=dict(arch=dict(depths=(2, 1))))
"""
DETECTOR = """
_base_ = "{base}"
model = dict(
    backbone=dict(
        arch=dict(depths=(2, 1)),
        spatial_interaction=dict(ratio=1.0),
        use_abs_pos_embed=True,
        pretrain_img_size=32,
    )
)
"""


def randomize(network: nn.Module) -> nn.Module:
    """Give every parameter and statistic a value that meets no threshold exactly."""
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point():
                tensor.normal_(0, 0.5)
    return network


@pytest.fixture
def trained(tmp_path, configs, classifier_configs):
    """Write a config and a checkpoint of random weights."""

    def write(kind: str, recipe: str = "sibivit", stage: int = 2) -> tuple[Path, Path, nn.Module]:
        bases, text = (classifier_configs, CLASSIFIER) if kind == "classifier" else (configs, DETECTOR)
        config, checkpoint = tmp_path / f"{kind}_{recipe}.py", tmp_path / f"{kind}_{recipe}.pth"
        config.write_text(text.format(base=bases["binary" if recipe == "sibivit" else "float"].as_posix()))
        with DefaultScope.overwrite_default_scope("mmengine" if kind == "classifier" else "mmdet"):
            model = randomize(MODELS.build(Config.fromfile(config).model)).eval()
        model.backbone.set_stage(stage)
        torch.save(dict(state_dict=model.state_dict(), meta={}), checkpoint)
        return config, checkpoint, model if kind == "classifier" else model.backbone

    return write


def run(path: Path, images: torch.Tensor) -> dict[str, torch.Tensor]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(names, {"images": images.numpy()})), strict=True))


def assert_equal_up_to_rounding(actual: torch.Tensor, expected: torch.Tensor) -> None:
    # Two runtimes add in different orders: about 1e-6. A flipped bit would change an output by 1e-2.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def standard_operators_only(path: Path) -> bool:
    graph = onnx.load(path)
    onnx.checker.check_model(graph, full_check=True)
    return {opset.domain for opset in graph.opset_import} == {""} and not graph.functions


def test_the_tool_exports_a_classifier_for_any_batch_size(trained, tmp_path, monkeypatch, capsys):
    config, checkpoint, network = trained("classifier")
    out = tmp_path / "made" / "classifier.onnx"
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, (config, checkpoint, out)), "--size", "32", "36"])
    runpy.run_path(str(TOOL), run_name="__main__")

    printed = capsys.readouterr().out
    assert "ONNX Runtime: outputs agree with torch, largest relative error" in printed
    assert f"Wrote {out}, {out.stat().st_size / 1e6:.1f} MB." in printed
    assert [file.name for file in out.parent.iterdir()] == ["classifier.onnx"]
    assert standard_operators_only(out)
    for batch in (1, 3):
        images = torch.randn(batch, 3, 32, 36)
        with torch.no_grad():
            logits = network(images)
        actual = run(out, images)
        assert list(actual) == ["logits"]
        assert_equal_up_to_rounding(actual["logits"], logits)

    # The file has the binarized weights as constants (some transposed), and nothing to binarize them from.
    constants = [torch.tensor(onnx.numpy_helper.to_array(t)) for t in onnx.load(out).graph.initializer]
    for layer in (module for module in network.modules() if isinstance(module, BinaryLinear)):
        both = [[torch.equal(w, c) or torch.equal(w.T, c) for c in constants] for w in weights_of(layer)]
        assert (any(both[0]), any(both[1])) == (False, True)


def weights_of(layer: BinaryLinear) -> tuple[torch.Tensor, torch.Tensor]:
    """Latent and binarized weights (Eq. 4), the latter by hand."""
    weight = layer.weight.detach()
    centred = weight - weight.mean(dim=1, keepdim=True)
    return weight, weight.abs().mean(dim=1, keepdim=True) * torch.where(centred >= 0, 1.0, -1.0)


def test_the_backbone_of_a_detector_at_a_size_that_needs_padding(trained, tmp_path):
    config, checkpoint, network = trained("detector")
    out = tmp_path / "backbone.onnx"
    # 8 x 12 tokens after padding of patches, 14 x 14 after padding of windows.
    comparison = export_onnx(config, checkpoint, out, size=(30, 45), batch_size=1)

    assert comparison.error < 1e-5 and comparison.flipped == 0
    assert standard_operators_only(out)
    images = torch.randn(1, 3, 30, 45)
    with torch.no_grad():
        expected = network(images)
    actual = run(out, images)
    assert list(actual) == ["stage0", "stage1"]
    for a, b in zip(actual.values(), expected, strict=True):
        assert_equal_up_to_rounding(a, b)


def test_a_float_network(trained, tmp_path):
    config, checkpoint, network = trained("classifier", "float")
    out = tmp_path / "float.onnx"
    assert export_onnx(config, checkpoint, out, size=(20, 32), batch_size=2, check=False) is None
    assert standard_operators_only(out)
    images = torch.randn(2, 3, 20, 32)
    with torch.no_grad():
        assert_equal_up_to_rounding(run(out, images)["logits"], network(images))


class Shifted(ActivationQuantizer):
    """A sign whose threshold has another name."""

    def __init__(self, num_features: int):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(num_features))

    def forward(self, x):
        return sign_ste(x, self.shift)

    def fold(self):
        return self.shift.detach().double()


class Doubled(RSign):
    """Twice the sign, which is no comparison alone."""

    def forward(self, x):
        return 2 * super().forward(x)

    def fold(self):
        raise self._refuse()


def swin(quantizer) -> nn.Module:
    arch = dict(embed_dims=8, depths=(2, 1), num_heads=(1, 2))
    recipe = Recipe(input_quantizer=quantizer)
    return randomize(BinarySwinTransformer(arch=arch, recipe=recipe, window_size=4, out_indices=(0, 1))).eval()


def test_the_plain_copy_takes_the_thresholds_that_quantizers_fold_to():
    torch.manual_seed(0)
    network, images = swin(Shifted), torch.randn(1, 3, 40, 36)
    plain = plain_copy(network)
    assert not any(isinstance(module, Quantizer) for module in plain.modules())
    with torch.inference_mode():
        for a, b in zip(plain(images), network(images), strict=True):
            assert torch.equal(a, b)


def test_a_quantizer_that_does_not_fold_is_refused_by_name():
    with pytest.raises(ValueError, match=r"stages\.0\.blocks\.0\.attn\S* cannot be exported: Doubled does not fold"):
        plain_copy(swin(Doubled))


def test_the_plain_copy_computes_the_same_and_leaves_the_network_alone(trained):
    network = trained("detector")[2]
    before = {key: value.clone() for key, value in network.state_dict().items()}
    images = torch.randn(2, 3, 45, 30)
    with torch.no_grad():
        for a, b in zip(plain_copy(network)(images), network(images), strict=True):
            assert torch.equal(a, b)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert any(isinstance(module, BinaryLinear) for module in network.modules())


def sign_graph(threshold: float, one: float = 1.0) -> "onnx.ModelProto":
    """``one`` where an image is at least the threshold, else -1; and the bits."""
    from onnx import TensorProto, helper

    shape = ["batch", 3]
    constants = [
        helper.make_tensor(name, TensorProto.FLOAT, (), [value])
        for name, value in (("threshold", threshold), ("one", one), ("minus_one", -1.0))
    ]
    nodes = [
        helper.make_node("GreaterOrEqual", ["images", "threshold"], ["bit"]),
        helper.make_node("Where", ["bit", "one", "minus_one"], ["sign"]),
    ]
    outputs = [
        helper.make_tensor_value_info("sign", TensorProto.FLOAT, shape),
        helper.make_tensor_value_info("bit", TensorProto.BOOL, shape),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)
    graph = helper.make_graph(nodes, "sign", [images], outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def test_bits_may_differ_at_ties_only():
    network = nn.Sequential(RSign(3)).eval()
    network[0].gamma.data.fill_(0.5)
    images = torch.tensor([[-2.0, 0.5, 0.51], [0.0, 1.0, 0.4]])

    def compare(graph):
        return compare_with_torch(graph, network, plain_copy(network), images)

    same = compare(sign_graph(0.5))
    assert (same.error, same.flipped, same.share) == (0, 0, 0)
    assert "largest relative error 0.0e+00" in str(same)
    # 0.5 is no longer at least the threshold, by less than rounding may cause: 1 of 6 values differs.
    tie = compare(sign_graph(0.500001))
    assert (tie.error, tie.bits, tie.flipped, tie.margin) == (0, 6, 1, 0)
    assert tie.share == pytest.approx(1 / 6)
    assert str(tie).startswith("1 of 6 bits differ from torch's, all at ties (at most 0.0e+00 from the threshold)")
    # 0.51 is 0.01 away, 0.005 of the largest magnitude.
    with pytest.raises(ValueError, match="ties do not explain it: 2 bits differ, up to 5.0e-03 .* Nothing was written"):
        compare(sign_graph(0.52))
    with pytest.raises(ValueError, match="0 bits differ.* with equal bits outputs differ by 1.0e-03"):
        compare(sign_graph(0.5, one=1.001))
    with pytest.raises(ValueError, match="1 bits differ.* with equal bits outputs differ by nan"):
        compare(sign_graph(0.500001, one=float("nan")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(out="x.pb"), "OUT x.pb: expected a name that ends in .onnx"),
        (dict(size=(0, 32)), "--size 0 32; expected height and width in pixels"),
        (dict(size=(32,)), "--size 32; expected height and width"),
        (dict(size=(32.0, 32)), "--size 32.0 32; expected height and width"),
        (dict(size=(3, 32)), "--size 3 32 is less than a patch of 4 x 4 pixels"),
        (dict(batch_size=0), "--batch-size=0; allowed"),
    ],
)
def test_options_without_sense(trained, tmp_path, change, message):
    config, checkpoint, _ = trained("classifier")
    options = dict(out=tmp_path / "x.onnx", size=(32, 32)) | change
    with pytest.raises(ValueError, match=f"^{message}"):
        export_onnx(config, checkpoint, **options)
    assert not list(tmp_path.glob("*.onnx*"))


def test_missing_packages_are_named_with_the_extra(monkeypatch, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else found(name))
    with pytest.raises(ValueError, match=r"needs onnx, onnxscript, onnxruntime: pip install 'mmbivit\[benchmark\]'"):
        export_onnx("c.py", "c.pth", tmp_path / "x.onnx", size=(32, 32))
    with pytest.raises(ValueError, match="needs onnx, onnxscript: "):
        export_onnx("c.py", "c.pth", tmp_path / "x.onnx", size=(32, 32), check=False)


@pytest.mark.parametrize("kind", ["classifier", "detector"])
def test_checkpoints_that_are_refused(trained, tmp_path, kind):
    config, checkpoint, _ = trained(kind, stage=1)
    with pytest.raises(ValueError, match="is of training stage 1, .* give a checkpoint of stage 2"):
        load_network(config, checkpoint)
    checkpoint = trained(kind, "float")[1]
    with pytest.raises(ValueError, match="is of a float network, the config's is binary"):
        load_network(config, checkpoint)
    with pytest.raises(FileNotFoundError, match="nowhere.pth does not exist"):
        load_network(config, tmp_path / "nowhere.pth")


def test_detectors_that_are_refused(trained, tmp_path):
    config, checkpoint, network = trained("detector")
    good = torch.load(checkpoint, weights_only=True)["state_dict"]

    def load(change):
        torch.save(change(dict(good)), tmp_path / "changed.pth")
        return load_network(config, tmp_path / "changed.pth")

    loaded = load(lambda keys: keys).state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in network.state_dict().items())
    with pytest.raises(ValueError, match="it has no backbone.norm0.weight"):
        load(lambda keys: {key: value for key, value in keys.items() if ".norm0." not in key})
    with pytest.raises(ValueError, match="1 tensors are missing in it, first backbone.patch_embed.norm.weight"):
        load(lambda keys: {key: value for key, value in keys.items() if key != "backbone.patch_embed.norm.weight"})
    with pytest.raises(ValueError, match="1 tensors of it have no place, first neck.weight"):
        load(lambda keys: keys | {"neck.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="does not fit the config's model: the checkpoint is of another arch"):
        load(lambda keys: keys | {"backbone.stages.0.blocks.0.mlp.fc1.bias": torch.ones(5)})
    config.write_text('model = dict(type="mmdet.RetinaNet", backbone=dict(type="mmdet.ResNet", depth=18))')
    with pytest.raises(ValueError, match="has the backbone mmdet.ResNet; only mmbivit.BinarySwinTransformer"):
        load_network(config, checkpoint)
    config.write_text("model = dict(type='mmdet.DETR')")
    with pytest.raises(ValueError, match="has no model.backbone"):
        load_network(config, checkpoint)
