"""ONNX files of tiny networks with random parameters, run in ONNX Runtime and compared with the torch model."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from mmbivit.binary import ActivationQuantizer, BinaryLinear, Quantizer, Recipe, RSign, sign_ste
from mmbivit.deploy.onnx_export import compare_with_torch, plain_copy, write_onnx
from mmbivit.models import BinarySwinTransformer, ImageClassifier
from tests.models.test_backbone import toy

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

# Every second block has shifted windows.
SWIN = dict(arch=dict(embed_dims=8, depths=(2, 1), num_heads=(1, 2)), window_size=4)
POSITIONS = dict(spatial_interaction=dict(ratio=1.0), use_abs_pos_embed=True, pretrain_img_size=32)


def randomize(network: nn.Module) -> nn.Module:
    """Give every parameter and statistic a value that meets no threshold exactly."""
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point():
                tensor.normal_(0, 0.5)
    return network


def swin(**kwargs) -> BinarySwinTransformer:
    return randomize(BinarySwinTransformer(**SWIN, out_indices=(0, 1), **kwargs)).eval()


def classifier(recipe: str = "sibivit") -> ImageClassifier:
    backbone = dict(type="mmbivit.BinarySwinTransformer", **SWIN, out_indices=(1,), recipe=recipe)
    return randomize(ImageClassifier(backbone, 3)).eval()


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


def test_a_classifier_for_any_batch_size(tmp_path):
    out, network = tmp_path / "classifier.onnx", classifier()
    comparison = write_onnx(network, out, size=(32, 36))

    assert "outputs agree with torch, largest relative error" in str(comparison)
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


@pytest.mark.parametrize(
    ("make", "size", "names"),
    [
        # 8 x 12 tokens after padding of patches, 14 x 14 after padding of windows.
        (lambda: swin(**POSITIONS), (30, 45), ["stage0", "stage1"]),
        (lambda: randomize(toy()).eval(), (30, 45), ["stage0"]),
        (lambda: classifier("float"), (20, 32), ["logits"]),
    ],
    ids=["swin", "toy", "float"],
)
def test_networks_of_all_kinds_at_a_size_that_needs_padding(make, size, names, tmp_path):
    out, network = tmp_path / "x.onnx", make()
    assert write_onnx(network, out, size=size, batch_size=1, check=False) is None
    assert standard_operators_only(out)
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        expected = network(images)
    actual = run(out, images)
    assert list(actual) == names
    for a, b in zip(actual.values(), [expected] if names == ["logits"] else expected, strict=True):
        assert_equal_up_to_rounding(a, b)


def test_a_network_that_takes_the_batch_size_for_a_constant_is_told_to_fix_it(tmp_path):
    with pytest.raises(ValueError, match="--batch-size"):  # the toy asks for len(x)
        write_onnx(toy().eval(), tmp_path / "x.onnx", size=(32, 32))
    assert not list(tmp_path.iterdir())


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


@pytest.mark.parametrize(
    "settings", [dict(POSITIONS), dict(recipe=Recipe(input_quantizer=Shifted))], ids=["sibivit", "shifted"]
)
def test_the_plain_copy_computes_the_same_and_leaves_the_network_alone(settings):
    network, images = swin(**settings), torch.randn(2, 3, 45, 30)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    plain = plain_copy(network)
    assert not any(isinstance(module, (Quantizer, BinaryLinear)) for module in plain.modules())
    with torch.inference_mode():
        for a, b in zip(plain(images), network(images), strict=True):
            assert torch.equal(a, b)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert any(isinstance(module, BinaryLinear) for module in network.modules())


def test_networks_that_cannot_be_exported_are_named(tmp_path):
    def refuse(message, network):
        with pytest.raises(ValueError, match=message):
            write_onnx(network, tmp_path / "x.onnx", size=(32, 32))
        assert not list(tmp_path.iterdir())

    refuse(r"stages\.0\.blocks\.0\.attn\S* .* Doubled does not fold", swin(recipe=Recipe(input_quantizer=Doubled)))
    refuse("Conv2d", nn.Conv2d(3, 8, 1))
    network = swin()
    network.set_stage(1)
    refuse("BinarySwinTransformer is in training stage 1", network)


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
    ("change", "option"),
    [
        (dict(out="x.pb"), "OUT x.pb"),
        (dict(size=(0, 32)), "--size 0 32"),
        (dict(size=(32,)), "--size 32"),
        (dict(size=(32.0, 32)), "--size 32.0 32"),
        (dict(size=(3, 32)), "--size 3 32"),
        (dict(batch_size=0), "--batch-size=0"),
    ],
)
def test_options_without_sense(tmp_path, change, option):
    options = dict(out=tmp_path / "x.onnx", size=(32, 32)) | change
    with pytest.raises(ValueError, match=f"^{option}"):
        write_onnx(swin(), **options)
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named_with_the_extra(monkeypatch, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else found(name))
    with pytest.raises(ValueError, match=r"needs onnx, onnxscript, onnxruntime: pip install 'mmbivit\[benchmark\]'"):
        write_onnx(swin(), tmp_path / "x.onnx", size=(32, 32))
    with pytest.raises(ValueError, match="needs onnx, onnxscript: "):
        write_onnx(swin(), tmp_path / "x.onnx", size=(32, 32), check=False)


@pytest.mark.parametrize(
    "backbone",
    [
        dict(
            type="mmbivit.BinaryVisionTransformer", arch=dict(embed_dims=16, depths=(2,), num_heads=(2,)), patch_size=8
        )
        | dict(pretrain_img_size=32, out_type="cls_token", spatial_interaction=dict(ratio=1.0)),
        dict(type="mmbivit.BinaryNesT", arch=dict(embed_dims=8, depths=(1, 1), num_heads=(1, 2)), out_indices=(1,))
        | dict(pretrain_img_size=32, spatial_interaction=dict(ratio=1.0)),
        dict(type="mmbivit.BinaryViT", recipe="sibivit", out_indices=(1,))
        | dict(arch=dict(embed_dims=8, depths=(1, 1), num_heads=(1, 2), hidden_dims=(16, 48), reductions=(4, 1))),
    ],
    ids=lambda backbone: backbone["type"],
)
def test_other_backbones_are_written_for_any_batch_size(tmp_path, backbone):
    network = randomize(ImageClassifier(backbone, 3)).eval()
    write_onnx(network, tmp_path / "network.onnx", size=(32, 32))
    images = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        assert_equal_up_to_rounding(run(tmp_path / "network.onnx", images)["logits"], network(images))
