"""The stand-in for mmcv's compiled ops, against slow references written from the definitions."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import mmbivit  # noqa: F401  (installs the stand-in)
from mmbivit.compat import mmcv_ops

pytestmark = pytest.mark.skipif(not mmcv_ops.is_standin(), reason="mmcv is installed with its compiled ops")

ROOT = Path(__file__).parents[2]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]


# ---------------------------------------------------------------------------------------------------- references


def reference_bilinear(image: np.ndarray, y: float, x: float) -> float:
    """RoIAlign's sample of one channel: 0 beyond a border of one pixel, clamped to the edge within it."""
    height, width = image.shape
    if y < -1 or y > height or x < -1 or x > width:
        return 0.0
    y, x = min(max(y, 0.0), height - 1), min(max(x, 0.0), width - 1)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
    top = image[y0, x0] * (1 - (x - x0)) + image[y0, x1] * (x - x0)
    bottom = image[y1, x0] * (1 - (x - x0)) + image[y1, x1] * (x - x0)
    return top * (1 - (y - y0)) + bottom * (y - y0)


def reference_roi_align(
    features: np.ndarray, rois: np.ndarray, size: tuple[int, int], scale: float, sampling_ratio: int, aligned: bool
) -> np.ndarray:
    """RoIAlign (Mask R-CNN, section 3): each bin is the mean of a grid of bilinear samples."""
    out = np.zeros((len(rois), features.shape[1], *size))
    for k, (batch, *box) in enumerate(rois):
        x1, y1, x2, y2 = (coordinate * scale - (0.5 if aligned else 0.0) for coordinate in box)
        width, height = x2 - x1, y2 - y1
        if not aligned:
            width, height = max(width, 1.0), max(height, 1.0)
        bin_h, bin_w = height / size[0], width / size[1]
        grid_h = sampling_ratio if sampling_ratio > 0 else math.ceil(bin_h)
        grid_w = sampling_ratio if sampling_ratio > 0 else math.ceil(bin_w)
        for c, image in enumerate(features[int(batch)]):
            for i in range(size[0]):
                for j in range(size[1]):
                    samples = [
                        reference_bilinear(
                            image, y1 + (i + (a + 0.5) / grid_h) * bin_h, x1 + (j + (b + 0.5) / grid_w) * bin_w
                        )
                        for a in range(grid_h)
                        for b in range(grid_w)
                    ]
                    out[k, c, i, j] = sum(samples) / max(len(samples), 1)
    return out


def reference_iou(a: np.ndarray, b: np.ndarray, offset: int) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + offset)
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + offset)
    area_a = (a[2] - a[0] + offset) * (a[3] - a[1] + offset)
    area_b = (b[2] - b[0] + offset) * (b[3] - b[1] + offset)
    return width * height / (area_a + area_b - width * height)


def reference_nms(boxes: np.ndarray, scores: np.ndarray, threshold: float, offset: int) -> list[int]:
    order = sorted(range(len(boxes)), key=lambda i: -scores[i])  # stable: ties stay in the order of input
    kept: list[int] = []
    for i in order:
        if all(reference_iou(boxes[i], boxes[j], offset) <= threshold for j in kept):
            kept.append(i)
    return kept


def reference_soft_nms(boxes, scores, threshold, sigma, min_score, method, offset):
    scores = {i: float(score) for i, score in enumerate(scores)}
    kept = []
    while scores:
        best = max(scores, key=lambda i: scores[i])
        kept.append((best, scores.pop(best)))
        for i in list(scores):
            iou = reference_iou(boxes[best], boxes[i], offset)
            if method == "gaussian":
                scores[i] *= math.exp(-(iou**2) / sigma)
            elif iou >= threshold:
                scores[i] *= 0.0 if method == "naive" else 1 - iou
            if scores[i] < min_score:
                del scores[i]
    return kept


def reference_focal_loss(logits: np.ndarray, target: np.ndarray, gamma: float, alpha: float) -> np.ndarray:
    out = np.zeros_like(logits)
    for n, row in enumerate(logits):
        for c, x in enumerate(row):
            p = 1 / (1 + math.exp(-x))
            if target[n] == c:
                out[n, c] = -alpha * (1 - p) ** gamma * math.log(p)
            else:
                out[n, c] = -(1 - alpha) * p**gamma * math.log(1 - p)
    return out


def numerical_gradient(function, x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Central differences of a scalar function, one element at a time."""
    gradient = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        shifted = [x.copy(), x.copy()]
        shifted[0][index] += step
        shifted[1][index] -= step
        gradient[index] = (function(shifted[0]) - function(shifted[1])) / (2 * step)
    return gradient


# ------------------------------------------------------------------------------------------------------ RoIAlign

ROIS = np.array(
    [
        [0, 0.0, 0.0, 14.0, 10.0],  # the whole image
        [1, 2.3, 3.1, 9.7, 8.2],  # fractional
        [1, -6.1, -4.2, 5.0, 3.0],  # partly outside; no sample falls on the jump one pixel beyond the border
        [0, 40.0, 40.0, 60.0, 50.0],  # wholly outside
        [0, 5.0, 5.0, 5.0, 5.0],  # empty box
        [1, 12.2, 8.3, 30.0, 9.9],  # beyond the far corner
    ]
)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_roi_align_equals_the_reference_with_its_gradient(aligned, sampling_ratio, scale, device):
    from mmcv.ops import roi_align

    rng = np.random.default_rng(0)
    features = rng.normal(size=(2, 2, 6, 7))
    upstream = rng.normal(size=(len(ROIS), 2, 2, 3))
    arguments = (scale, sampling_ratio, aligned)

    x = torch.tensor(features, device=device, requires_grad=True)
    rois = torch.tensor(ROIS, device=device)
    out = roi_align(x, rois, (2, 3), scale, sampling_ratio, "avg", aligned)
    # float64 on both sides: only the order of summation differs
    np.testing.assert_allclose(
        out.detach().cpu().numpy(), reference_roi_align(features, ROIS, (2, 3), *arguments), rtol=0, atol=1e-12
    )

    out.backward(torch.tensor(upstream, device=device))
    expected = numerical_gradient(
        lambda f: (reference_roi_align(f, ROIS, (2, 3), *arguments) * upstream).sum(), features
    )
    # the operation is linear in the features, so that differences are exact up to rounding / step
    np.testing.assert_allclose(x.grad.cpu().numpy(), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_roi_align_keeps_half_types(dtype):
    from mmcv.ops import roi_align

    features = torch.tensor(np.random.default_rng(1).normal(size=(1, 2, 6, 7)), dtype=dtype, requires_grad=True)
    rois = torch.tensor([[0, 1.0, 1.0, 5.0, 4.0]], dtype=dtype)
    out = roi_align(features, rois, (2, 2), 1.0, 2, "avg", True)
    assert out.dtype == dtype
    expected = reference_roi_align(features.detach().double().numpy(), rois.double().numpy(), (2, 2), 1.0, 2, True)
    # computed in float32 and rounded once
    torch.testing.assert_close(out.detach(), torch.tensor(expected).to(dtype))
    out.sum().backward()
    assert features.grad.dtype == dtype
    assert features.grad.float().sum().item() == pytest.approx(8, rel=1e-2)  # 2 channels x 4 bins, weights sum to 1


def test_roi_align_without_rois():
    from mmcv.ops import roi_align

    features = torch.ones(1, 2, 4, 4, requires_grad=True)
    out = roi_align(features, torch.zeros(0, 5), (3, 3), 1.0, 0, "avg", True)
    assert out.shape == (0, 2, 3, 3)
    out.sum().backward()
    assert torch.equal(features.grad, torch.zeros(1, 2, 4, 4))


def test_roi_align_refuses_maximum_pooling():
    from mmcv.ops import roi_align

    with pytest.raises(NotImplementedError, match=r"roi_align_forward.*max"):
        roi_align(torch.ones(1, 1, 4, 4), torch.zeros(1, 5), (2, 2), 1.0, 0, "max", True)


# ----------------------------------------------------------------------------------------------------------- NMS


def random_boxes(count: int, seed: int, size: float = 20.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, size, (count, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(1, size / 2, (count, 2))], axis=1)
    # one decimal: the scores have ties, and no IoU lands on a threshold by rounding
    return boxes.astype(np.float32), rng.uniform(size=count).round(1).astype(np.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.7])
@pytest.mark.parametrize("seed", [0, 1])
def test_nms_equals_the_reference_ties_included(offset, threshold, seed, device):
    from mmcv.ops import nms

    boxes, scores = random_boxes(60, seed)
    dets, kept = nms(torch.tensor(boxes, device=device), torch.tensor(scores, device=device), threshold, offset=offset)
    expected = reference_nms(boxes, scores, threshold, offset)
    assert len(expected) < 60
    assert kept.tolist() == expected
    np.testing.assert_array_equal(dets.cpu().numpy(), np.concatenate([boxes, scores[:, None]], axis=1)[expected])


def test_nms_offset_counts_pixels():
    from mmcv.ops import nms

    # IoU over corners 2/6 = .33; over pixels (3 wide instead of 2, 2 shared instead of 1) (2*3)/(9+9-6) = .5
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 0.0, 3.0, 2.0]])
    scores = torch.tensor([0.9, 0.8])
    assert nms(boxes, scores, 0.4, offset=0)[1].tolist() == [0, 1]
    assert nms(boxes, scores, 0.4, offset=1)[1].tolist() == [0]


def test_nms_keeps_a_box_whose_iou_is_the_threshold():
    from mmcv.ops import nms

    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 1.0, 2.0, 2.0]])  # IoU exactly 0.5
    assert nms(boxes, torch.tensor([0.9, 0.8]), 0.5)[1].tolist() == [0, 1]


def test_nms_of_nothing():
    from mmcv.ops import nms

    dets, kept = nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
    assert dets.shape == (0, 5)
    assert kept.shape == (0,) and kept.dtype == torch.int64


def test_nms_score_threshold_and_max_num():
    from mmcv.ops import nms

    boxes, scores = random_boxes(60, 2)
    kept = nms(torch.tensor(boxes), torch.tensor(scores), 0.5, score_threshold=0.35, max_num=4)[1]
    assert kept.tolist() == [i for i in reference_nms(boxes, scores, 0.5, 0) if scores[i] > 0.35][:4]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nms_takes_half_scores_as_under_autocast(dtype):
    from mmcv.ops import nms

    boxes, scores = random_boxes(40, 3)
    scores = torch.tensor(scores, dtype=dtype)
    kept = nms(torch.tensor(boxes), scores, 0.5)[1]
    assert kept.tolist() == reference_nms(boxes, scores.double().numpy(), 0.5, 0)


@pytest.mark.parametrize("split_thr", [10000, 10])
def test_batched_nms_suppresses_within_a_class_only(split_thr):
    from mmcv.ops import batched_nms

    boxes, _ = random_boxes(50, 4)
    rng = np.random.default_rng(4)
    scores = rng.permutation(50).astype(np.float32) / 50  # no ties: the two paths of mmcv order them differently
    classes = rng.integers(0, 3, 50)
    dets, kept = batched_nms(
        torch.tensor(boxes),
        torch.tensor(scores),
        torch.tensor(classes),
        dict(type="nms", iou_threshold=0.4, split_thr=split_thr),
    )
    expected = []
    for label in range(3):
        index = np.flatnonzero(classes == label)
        expected += index[reference_nms(boxes[index], scores[index], 0.4, 0)].tolist()
    expected.sort(key=lambda i: -scores[i])
    assert kept.tolist() == expected
    np.testing.assert_array_equal(dets[:, :4].numpy(), boxes[expected])


@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
@pytest.mark.parametrize("offset", [0, 1])
def test_soft_nms_equals_the_reference(method, offset):
    from mmcv.ops import soft_nms

    boxes, _ = random_boxes(40, 5)
    scores = np.random.default_rng(5).permutation(40).astype(np.float32) / 40 + 0.01
    dets, kept = soft_nms(
        torch.tensor(boxes), torch.tensor(scores), 0.3, sigma=0.5, min_score=0.05, method=method, offset=offset
    )
    expected = reference_soft_nms(boxes, scores, 0.3, 0.5, 0.05, method, offset)
    assert 0 < len(expected) < 40
    assert kept.tolist() == [i for i, _ in expected]
    np.testing.assert_array_equal(dets[:, :4].numpy(), boxes[kept.numpy()])
    # float32 products of up to 40 factors
    np.testing.assert_allclose(dets[:, 4].numpy(), [score for _, score in expected], rtol=1e-5)


def test_soft_nms_of_nothing():
    from mmcv.ops import soft_nms

    dets, kept = soft_nms(torch.zeros(0, 4), torch.zeros(0))
    assert dets.shape == (0, 5) and kept.shape == (0,)


# ---------------------------------------------------------------------------------------------------- focal loss


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("gamma", "alpha"), [(2.0, 0.25), (0.0, 0.5), (1.5, 0.8)])
def test_sigmoid_focal_loss_equals_the_reference_with_its_gradient(gamma, alpha, device):
    from mmcv.ops import sigmoid_focal_loss

    rng = np.random.default_rng(6)
    logits = rng.normal(scale=3, size=(6, 3))
    target = np.array([0, 1, 2, 3, 3, 0])  # 3 is background
    x = torch.tensor(logits, device=device, requires_grad=True)
    labels = torch.tensor(target, device=device)

    loss = sigmoid_focal_loss(x, labels, gamma, alpha, None, "none")
    expected = reference_focal_loss(logits, target, gamma, alpha)
    np.testing.assert_allclose(loss.detach().cpu().numpy(), expected, rtol=1e-10, atol=1e-14)

    mean = sigmoid_focal_loss(x, labels, gamma, alpha, None, "mean")
    assert mean.item() == pytest.approx(expected.sum() / 6)  # mmcv's mean is over rows
    mean.backward()
    gradient = numerical_gradient(lambda z: reference_focal_loss(z, target, gamma, alpha).sum() / 6, logits)
    np.testing.assert_allclose(x.grad.cpu().numpy(), gradient, rtol=1e-6, atol=1e-9)


def test_sigmoid_focal_loss_weighs_rows_by_their_class():
    from mmcv.ops import sigmoid_focal_loss

    logits = torch.tensor(np.random.default_rng(7).normal(size=(3, 2)), requires_grad=True)
    target = torch.tensor([1, 0, 2])  # the last is background, weight 1
    weight = torch.tensor([10.0, 3.0], dtype=torch.float64)
    rows = torch.tensor([[3.0], [10.0], [1.0]], dtype=torch.float64)

    plain = sigmoid_focal_loss(logits, target, 2.0, 0.25, None, "none")
    (plain_gradient,) = torch.autograd.grad(plain, logits, rows.expand(3, 2))
    weighted = sigmoid_focal_loss(logits, target, 2.0, 0.25, weight, "none")
    torch.testing.assert_close(weighted, plain * rows)
    (gradient,) = torch.autograd.grad(weighted.sum(), logits)
    torch.testing.assert_close(gradient, plain_gradient)


def test_sigmoid_focal_loss_is_finite_at_extreme_logits():
    from mmcv.ops import sigmoid_focal_loss

    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
    loss = sigmoid_focal_loss(logits, torch.tensor([0, 0]), 2.0, 0.25, None, "none")
    # row 0 is right; row 1 is wrong by 200: alpha * 200 and (1 - alpha) * 200
    torch.testing.assert_close(loss.detach(), torch.tensor([[0.0, 0.0], [50.0, 150.0]]))
    loss.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.0, 0.0], [-0.25, 0.75]]))


# ------------------------------------------------------------------------------------------ deformable attention


def deformable_inputs(device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """value (1, 10, 2, 3), shapes, starts, locations (1, 4, 2, 2, 2, 2), weights (1, 4, 2, 2, 2)."""
    generator = torch.Generator().manual_seed(8)
    shapes = torch.tensor([[2, 3], [2, 2]])
    value = torch.randn(1, 10, 2, 3, generator=generator, dtype=torch.float64)
    locations = torch.rand(1, 4, 2, 2, 2, 2, generator=generator, dtype=torch.float64)
    weights = torch.rand(1, 4, 2, 2, 2, generator=generator, dtype=torch.float64)
    return tuple(t.to(device) for t in (value, shapes, torch.tensor([0, 6]), locations, weights))


def test_mmcv_uses_its_own_deformable_attention_on_cpu(monkeypatch):
    from mmcv.ops import MultiScaleDeformableAttention
    from mmcv.ops import multi_scale_deform_attn as module

    monkeypatch.setattr(module, "ext_module", None)  # would fail if it were used
    torch.manual_seed(0)
    attention = MultiScaleDeformableAttention(
        embed_dims=8, num_heads=2, num_levels=2, num_points=2, batch_first=True, dropout=0.0
    )
    query = torch.randn(1, 4, 8)
    value = torch.randn(1, 10, 8, requires_grad=True)
    out = attention(
        query,
        value=value,
        reference_points=torch.full((1, 4, 2, 2), 0.5),
        spatial_shapes=torch.tensor([[2, 3], [2, 2]]),
        level_start_index=torch.tensor([0, 6]),
    )
    out.sum().backward()
    assert out.shape == (1, 4, 8)
    assert value.grad.abs().sum() > 0


@pytest.mark.parametrize("device", DEVICES)
def test_deformable_attention_op_equals_loops_with_its_gradients(device):
    """The op that mmcv calls on CUDA."""
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

    value, shapes, starts, locations, weights = deformable_inputs(device)

    def reference(value, locations, weights):
        out = np.zeros((1, 4, 2, 3))
        for query, head, level, point in np.ndindex(4, 2, 2, 2):
            height, width = shapes[level].tolist()
            start = int(starts[level])
            grid = value[0, start : start + height * width, head].reshape(height, width, 3)
            padded = np.pad(grid, ((1, 1), (1, 1), (0, 0)))  # zeros outside
            x, y = locations[0, query, head, level, point] * [width, height] - 0.5
            x0, y0 = math.floor(x), math.floor(y)
            for dy, dx in np.ndindex(2, 2):
                area = (1 - abs(y - y0 - dy)) * (1 - abs(x - x0 - dx))
                out[0, query, head] += weights[0, query, head, level, point] * area * padded[y0 + dy + 1, x0 + dx + 1]
        return out.reshape(1, 4, 6)

    inputs = [t.clone().requires_grad_() for t in (value, locations, weights)]
    out = MultiScaleDeformableAttnFunction.apply(inputs[0], shapes, starts, inputs[1], inputs[2], 64)
    arrays = [t.detach().cpu().numpy() for t in inputs]
    np.testing.assert_allclose(out.detach().cpu().numpy(), reference(*arrays), atol=1e-12)

    upstream = np.random.default_rng(9).normal(size=(1, 4, 6))
    out.backward(torch.tensor(upstream, device=device))
    for position, tensor in enumerate(inputs):
        expected = numerical_gradient(
            lambda a, p=position: (reference(*arrays[:p], a, *arrays[p + 1 :]) * upstream).sum(), arrays[position]
        )
        np.testing.assert_allclose(tensor.grad.cpu().numpy(), expected, atol=1e-7)


# -------------------------------------------------------------------------------------------- the module itself


def test_an_unknown_op_raises_when_called_and_says_which():
    from mmcv.ops import DeformConv2d

    layer = DeformConv2d(1, 1, 1)
    with pytest.raises(NotImplementedError, match=r"'deform_conv_forward'.*[\s\S]*pip install"):
        layer(torch.ones(1, 1, 4, 4), torch.zeros(1, 2, 4, 4))


def test_the_module_looks_like_one():
    import importlib.util

    import mmcv._ext
    from mmengine.utils.dl_utils import mmcv_full_available

    assert mmcv._ext is sys.modules["mmcv._ext"]
    assert importlib.util.find_spec("mmcv._ext").name == "mmcv._ext"
    assert mmcv_full_available()
    assert not hasattr(mmcv._ext, "__path__")
    assert hasattr(mmcv._ext, "no_such_op")


def test_mmcv_environment_report_works():
    from mmcv.utils import collect_env

    assert "stand-in" in collect_env()["MMCV Compiler"]


def run_python(code: str, *paths: Path) -> str:
    search_path = [*map(str, paths), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search_path))}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_install_imports_neither_mmcv_nor_torch_and_can_be_repeated():
    code = """
import sys
from mmbivit.compat import mmcv_ops
before = len(sys.meta_path)
assert mmcv_ops.install() and mmcv_ops.install() and mmcv_ops.is_standin()
assert len(sys.meta_path) == before
print(*sorted({"mmcv", "mmcv._ext", "mmengine", "torch", "torchvision"} & set(sys.modules)))
"""
    assert run_python(code) == ""


def test_the_extension_can_be_imported_after_mmcv():
    code = """
import mmcv
import mmbivit
import mmcv._ext
print(mmcv._ext.nms.__module__, mmbivit.compat.is_standin())
"""
    assert run_python(code) == "mmbivit.compat.mmcv_ops True"


def test_install_does_nothing_beside_a_compiled_extension(tmp_path):
    from importlib.machinery import EXTENSION_SUFFIXES

    (tmp_path / "mmcv").mkdir()
    (tmp_path / "mmcv" / "__init__.py").touch()
    (tmp_path / "mmcv" / f"_ext{EXTENSION_SUFFIXES[0]}").touch()
    code = """
import sys
before = list(sys.meta_path)
from mmbivit.compat import mmcv_ops
print(mmcv_ops.install(), mmcv_ops.is_standin(), any(type(f).__name__ == "_StandInFinder" for f in sys.meta_path))
try:
    import mmcv._ext
except ImportError:
    print("the compiled one was tried")
"""
    assert run_python(code, tmp_path).splitlines() == ["False False False", "the compiled one was tried"]


def test_install_does_nothing_without_mmcv():
    code = """
import sys
sys.modules["mmcv"] = None
from mmbivit.compat import mmcv_ops
print(mmcv_ops.install(), mmcv_ops.is_standin(), "mmcv._ext" in sys.modules)
"""
    assert run_python(code) == "False False False"


# ---------------------------------------------------------------------------------------- stock float detectors


def stock_losses(name: str, **changes) -> dict[str, torch.Tensor]:
    """Build mmdet's own config ``name``, changed, and return the losses of one 64 x 96 image after a backward pass."""
    from mmdet.apis import init_detector  # noqa: F401  (registers mmdet's modules)
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmengine.config import Config
    from mmengine.hub import get_config
    from mmengine.registry import DefaultScope
    from mmengine.structures import InstanceData

    config: Config = get_config(f"mmdet::{name}")
    config.merge_from_dict(changes)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(config.model)
        model.init_weights()  # mmdet's level_embed is uninitialised memory before
    size = (64, 96)
    sample = DetDataSample(
        metainfo=dict(img_shape=size, pad_shape=size, batch_input_shape=size, scale_factor=(1.0, 1.0))
    )
    sample.gt_instances = InstanceData(bboxes=torch.tensor([[8.0, 8.0, 50.0, 44.0]]), labels=torch.tensor([1]))
    images = torch.randn(1, 3, *size)
    losses = model(images, [sample], mode="loss")
    total, _ = model.parse_losses(losses)
    total.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert total.isfinite() and all(g.isfinite().all() for g in gradients)
    assert any(g.abs().sum() > 0 for g in gradients)

    with torch.no_grad():
        (prediction,) = model.eval()(images, [sample], mode="predict")
    assert len(prediction.pred_instances.bboxes) > 0
    return losses


RESNET18 = {"model.backbone.depth": 18, "model.backbone.init_cfg": None, "model.backbone.frozen_stages": -1}


def test_stock_retinanet_trains_and_predicts():
    losses = stock_losses(
        "retinanet/retinanet_r50_fpn_1x_coco.py",
        **RESNET18,
        **{
            "model.neck.in_channels": [64, 128, 256, 512],
            "model.neck.out_channels": 16,
            "model.bbox_head.in_channels": 16,
            "model.bbox_head.feat_channels": 16,
            "model.test_cfg.score_thr": 0.0,
        },
    )
    assert set(losses) == {"loss_cls", "loss_bbox"}


@pytest.mark.parametrize(
    "name", ["deformable_detr/deformable-detr_r50_16xb2-50e_coco.py", "dino/dino-4scale_r50_8xb2-12e_coco.py"]
)
def test_stock_deformable_attention_detectors_train_and_predict(name):
    from mmengine.hub import get_config

    changes = {
        **RESNET18,
        "model.neck.in_channels": [128, 256, 512],
        "model.num_queries": 20,
        "model.encoder.num_layers": 1,
        "model.decoder.num_layers": 2,
        "model.test_cfg.max_per_img": 5,
    }
    if "dino" in name:
        changes["model.dn_cfg.group_cfg.num_dn_queries"] = 4
    assert get_config(f"mmdet::{name}").model.encoder.num_layers == 6
    losses = stock_losses(name, **changes)
    assert {"loss_cls", "loss_bbox", "loss_iou", "d0.loss_cls"} <= set(losses)
