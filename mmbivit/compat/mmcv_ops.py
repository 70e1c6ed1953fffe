"""Stand-in for ``mmcv._ext``, mmcv's compiled extension, for environments where mmcv was installed without it.

Importing ``mmcv.ops`` fails without that extension, and compiling it takes a compiler and half an hour. Most detectors
need two of its ops, which torchvision ships for CPU and CUDA. :func:`install` offers a module with those ops under the
name ``mmcv._ext``; every other op exists too, and raises when it is *called*.

The module is offered by an import finder at the very end of ``sys.meta_path`` rather than put into ``sys.modules``: a
real extension, wherever it is, is found first and wins, ``import mmcv._ext`` sets the attribute on ``mmcv`` as usual,
the module has a ``__spec__`` (mmengine's ``mmcv_full_available()`` needs one), and nothing is imported in advance.

Each op takes the arguments of its namesake in mmcv's ``csrc/pytorch/pybind.cpp`` and writes its outputs in place,
because mmcv's ``autograd.Function`` classes call it instead of the compiled one.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from torch import Tensor

EXTENSION = "mmcv._ext"

_HOW_TO_COMPILE = (
    "To use it, build mmcv with its ops (needs a C++ compiler, and patience):\n"
    "  pip install --force-reinstall --no-deps --no-cache-dir --no-build-isolation --no-binary onedl-mmcv onedl-mmcv\n"
    "or, for OpenMMLab's mmcv:\n"
    '  MMCV_WITH_OPS=1 pip install --force-reinstall --no-deps --no-cache-dir --no-build-isolation "mmcv==2.1.0"'
)


# ---------------------------------------------------------------------------------------------------- installation


def find_compiled() -> str | None:
    """Path of mmcv's own compiled extension, or None where it (or mmcv itself) is not installed.

    Looks at the file system only: neither mmcv nor torch is imported. A file built for another Python does not count.
    """
    spec = PathFinder.find_spec(EXTENSION, _mmcv_folders())
    return spec.origin if spec is not None else None


def install() -> bool:
    """Make ``mmcv._ext`` importable where mmcv is installed without it; harmless and cheap to call again.

    Returns:
        True if ``import mmcv._ext`` gives the stand-in; False if mmcv is not installed or has its own extension.
    """
    if EXTENSION not in sys.modules and _finder() is None and _mmcv_folders() and find_compiled() is None:
        sys.meta_path.append(_StandInFinder())
    return is_standin()


def is_standin() -> bool:
    """Whether ``mmcv._ext`` is the stand-in: as imported, or, if it was not imported yet, as it would be."""
    if EXTENSION in sys.modules:
        return isinstance(getattr(sys.modules[EXTENSION], "__loader__", None), _StandInLoader)
    return _finder() is not None and find_compiled() is None


def _mmcv_folders() -> list[str]:
    """Where mmcv is installed; empty if it is not."""
    try:
        spec = importlib.util.find_spec("mmcv")
    except ValueError:  # in sys.modules without a spec: someone's substitute, which has no folder
        return []
    return list(spec.submodule_search_locations or []) if spec is not None else []


def _finder() -> _StandInFinder | None:
    return next((finder for finder in sys.meta_path if isinstance(finder, _StandInFinder)), None)


class _StandInFinder(MetaPathFinder):
    """Answers for ``mmcv._ext`` when no finder before it did."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != EXTENSION:
            return None
        return ModuleSpec(fullname, _StandInLoader(), origin=__name__)


class _StandInLoader(Loader):
    """Fills the module object that the import system made."""

    def exec_module(self, module: ModuleType) -> None:
        for op in OPS:
            setattr(module, op.__name__, op)
        module.__getattr__ = _unsupported  # type: ignore[method-assign]  # of this one module
        module.__doc__ = __doc__


def _unsupported(name: str) -> Callable[..., NoReturn]:
    """An op that raises when called, so that importing ``mmcv.ops`` needs no list of mmcv's op names."""
    if name.startswith("_"):  # no op is called so; Python itself asks for such names and must learn they are absent
        raise AttributeError(f"module '{EXTENSION}' (mmbivit's stand-in) has no attribute '{name}'")

    def unsupported(*args: Any, **kwargs: Any) -> NoReturn:
        available = ", ".join(op.__name__ for op in OPS)
        raise NotImplementedError(
            f"mmcv's op '{name}' is not available: mmcv is installed without its compiled extension, and mmbivit's "
            f"stand-in for it has only these: {available}.\n{_HOW_TO_COMPILE}"
        )

    unsupported.__name__ = name
    return unsupported


# ------------------------------------------------------------------------------------------------------------- ops


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Greedy non-maximum suppression: on the CPU by a kernel of ours, elsewhere through ``torchvision.ops.nms``.

    Args:
        boxes: ``(N, 4)`` as ``x1, y1, x2, y2``.
        scores: ``(N,)``.
        iou_threshold: a box is dropped if its IoU with a better one is greater than this.
        offset: 0, or 1 where coordinates count pixels, so that a side is ``x2 - x1 + 1``.

    Returns:
        Indices of the boxes kept, int64, by falling score; equal scores in the order of input.
    """
    import torch

    dtype = _compute_dtype(boxes)
    # With x2 + 1 and y2 + 1 every side, and every overlap, is that of `offset`: IoU over corners cannot tell.
    boxes = boxes.to(dtype) + boxes.new_tensor([0, 0, offset, offset], dtype=dtype)
    kernel = getattr(torch.ops.mmbivit, "nms", None)  # registered by mmbivit.packed, which MM's users have imported
    if kernel is not None and boxes.device.type == "cpu" and dtype == torch.float32:
        return kernel(boxes.detach().contiguous(), scores.detach().to(dtype).contiguous(), iou_threshold)
    from torchvision.ops import nms as torchvision_nms

    return torchvision_nms(boxes, scores.to(dtype), iou_threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS: instead of dropping the boxes that overlap a better one, lower their scores (arXiv:1704.04503).

    Args:
        boxes: ``(N, 4)`` as ``x1, y1, x2, y2``.
        scores: ``(N,)``.
        dets: ``(N, 5)``, output: its first K rows become the boxes kept and their new scores.
        iou_threshold: methods 0 and 1 lower the scores of boxes with at least this IoU.
        sigma: width of method 2.
        min_score: boxes whose score falls below are dropped.
        method: 0 naive (score 0), 1 linear (``1 - iou``), 2 Gaussian (``exp(-iou ** 2 / sigma)``).
        offset: as in :func:`nms`.

    Returns:
        Indices ``(K,)`` of the boxes kept, int64, in the order of selection.
    """
    import torch

    corners = boxes + boxes.new_tensor([0, 0, offset, offset])
    areas = (corners[:, 2:] - corners[:, :2]).prod(dim=1)
    scores = scores.clone()
    remaining = torch.arange(len(boxes), device=boxes.device)
    kept: list[int] = []
    while len(remaining) > 0:
        best = remaining[scores[remaining].argmax()]
        dets[len(kept), :4] = boxes[best]
        dets[len(kept), 4] = scores[best]
        kept.append(int(best))
        remaining = remaining[remaining != best]

        top_left = torch.maximum(corners[best, :2], corners[remaining, :2])
        bottom_right = torch.minimum(corners[best, 2:], corners[remaining, 2:])
        overlap = (bottom_right - top_left).clamp(min=0).prod(dim=1)
        iou = overlap / (areas[best] + areas[remaining] - overlap)
        if method == 2:
            decay = torch.exp(-(iou**2) / sigma)
        else:
            lowered = 1 - iou if method == 1 else torch.zeros_like(iou)
            decay = torch.where(iou >= iou_threshold, lowered, torch.ones_like(iou))
        scores[remaining] *= decay
        remaining = remaining[scores[remaining] >= min_score]
    return torch.tensor(kept, dtype=torch.long, device=boxes.device)


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign with average pooling, through torchvision.

    Args:
        input: feature map ``(B, C, H, W)``.
        rois: ``(K, 5)``: index into the batch, then ``x1, y1, x2, y2`` in image pixels.
        output: ``(K, C, aligned_height, aligned_width)``, written in place.
        argmax_y, argmax_x: unused, they belong to maximum pooling.
        aligned_height, aligned_width: bins of the output.
        spatial_scale: feature pixels per image pixel.
        sampling_ratio: samples per bin and axis; 0 for as many as there are pixels.
        pool_mode: 1, average.
        aligned: shift by half a pixel (Detectron2); False is the first Detectron's alignment.

    Raises:
        NotImplementedError: for ``pool_mode`` 0, maximum pooling, which torchvision does not have.
    """
    import torch
    import torchvision  # noqa: F401  (registers torch.ops.torchvision)

    _require_average("roi_align_forward", pool_mode)
    dtype = _compute_dtype(input)
    pooled = torch.ops.torchvision.roi_align(
        input.to(dtype), rois.to(dtype), spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned
    )
    output.copy_(pooled)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Gradient of :func:`roi_align_forward` with respect to the feature map.

    Args:
        grad_output: ``(K, C, aligned_height, aligned_width)``.
        grad_input: ``(B, C, H, W)``, written in place.
        rois, argmax_y, argmax_x, aligned_height, aligned_width, spatial_scale, sampling_ratio, pool_mode, aligned:
            as given to :func:`roi_align_forward`.

    Raises:
        NotImplementedError: for maximum pooling.
    """
    import torch
    import torchvision  # noqa: F401  (registers torch.ops.torchvision)

    _require_average("roi_align_backward", pool_mode)
    dtype = _compute_dtype(grad_output)
    grad = torch.ops.torchvision._roi_align_backward(
        grad_output.to(dtype),
        rois.to(dtype),
        spatial_scale,
        aligned_height,
        aligned_width,
        *grad_input.shape,
        sampling_ratio,
        aligned,
    )
    grad_input.copy_(grad)


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Focal loss of C independent classifiers (arXiv:1708.02002, Eq. 5), per element.

    ``-alpha * (1 - p) ** gamma * log(p)`` at the target's class, ``-(1 - alpha) * p ** gamma * log(1 - p)`` elsewhere,
    ``p = sigmoid(input)``.

    Args:
        input: logits ``(N, C)``.
        target: class of each row, int64 ``(N,)``; C means background, so that all of the row's classes are negative.
        weight: ``(C,)``, weight of a row by its target's class; empty for none. Background rows, for which mmcv's
            kernel reads beyond the end of ``weight``, count with weight 1.
        output: ``(N, C)``, written in place.
        gamma: focusing exponent.
        alpha: weight of positives.
    """
    import torch
    from torch.nn.functional import logsigmoid

    logits = input.to(_compute_dtype(input))
    p = logits.sigmoid()
    # logsigmoid(-x) is log(1 - p) without its cancellation.
    positive = -alpha * (1 - p) ** gamma * logsigmoid(logits)
    negative = -(1 - alpha) * p**gamma * logsigmoid(-logits)
    loss = torch.where(_is_target(logits, target), positive, negative)
    output.copy_(loss * _row_weight(target, weight))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Derivative of :func:`sigmoid_focal_loss_forward` with respect to its logits, element by element.

    Args:
        grad_input: ``(N, C)``, written in place; mmcv multiplies it with the gradient that arrives from above.
        input, target, weight, gamma, alpha: as given to :func:`sigmoid_focal_loss_forward`.
    """
    import torch
    from torch.nn.functional import logsigmoid

    logits = input.to(_compute_dtype(input))
    p = logits.sigmoid()
    positive = -alpha * (1 - p) ** gamma * (1 - p - gamma * p * logsigmoid(logits))
    negative = -(1 - alpha) * p**gamma * (gamma * (1 - p) * logsigmoid(-logits) - p)
    grad = torch.where(_is_target(logits, target), positive, negative)
    grad_input.copy_(grad * _row_weight(target, weight))


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Multi-scale deformable attention, through mmcv's own torch version, which mmcv uses by itself on CPU only.

    Args:
        value: ``(B, sum of H * W, heads, channels)``.
        value_spatial_shapes: ``(levels, 2)`` as ``H, W``.
        value_level_start_index: unused, it follows from the shapes.
        sampling_locations: ``(B, queries, heads, levels, points, 2)`` as ``x, y`` in 0..1.
        attention_weights: ``(B, queries, heads, levels, points)``.
        im2col_step: unused, a detail of the compiled op.

    Returns:
        ``(B, queries, heads * channels)``.
    """
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    return multi_scale_deformable_attn_pytorch(value, value_spatial_shapes, sampling_locations, attention_weights)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Gradients of :func:`ms_deform_attn_forward`: the forward again, under autograd.

    Args:
        grad_output: ``(B, queries, heads * channels)``.
        grad_value, grad_sampling_loc, grad_attn_weight: shaped as ``value``, ``sampling_locations`` and
            ``attention_weights``, written in place.
        value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights, im2col_step:
            as given to :func:`ms_deform_attn_forward`.
    """
    import torch

    inputs = [tensor.detach().requires_grad_() for tensor in (value, sampling_locations, attention_weights)]
    with torch.enable_grad():
        output = ms_deform_attn_forward(
            inputs[0], value_spatial_shapes, value_level_start_index, inputs[1], inputs[2], im2col_step
        )
    gradients = torch.autograd.grad(output, inputs, grad_output)
    for out, gradient in zip((grad_value, grad_sampling_loc, grad_attn_weight), gradients, strict=True):
        out.copy_(gradient)


def get_compiler_version() -> str:
    """What mmcv's environment report prints as its compiler."""
    return "none (mmbivit's stand-in for the compiled ops)"


def get_compiling_cuda_version() -> str:
    """What mmcv's environment report prints as the CUDA version of its ops."""
    return "none (mmbivit's stand-in for the compiled ops)"


OPS: tuple[Callable[..., Any], ...] = (
    nms,
    softnms,
    roi_align_forward,
    roi_align_backward,
    sigmoid_focal_loss_forward,
    sigmoid_focal_loss_backward,
    ms_deform_attn_forward,
    ms_deform_attn_backward,
    get_compiler_version,
    get_compiling_cuda_version,
)


def _compute_dtype(tensor: Tensor) -> Any:
    """Float32 at least: torchvision has no half or bfloat16 on every device."""
    import torch

    return torch.promote_types(tensor.dtype, torch.float32)


def _require_average(op: str, pool_mode: int) -> None:
    if pool_mode != 1:
        raise NotImplementedError(
            f"mmcv's op '{op}' with pool_mode='max' is not available in mmbivit's stand-in for the compiled ops, which "
            f"has pool_mode='avg'.\n{_HOW_TO_COMPILE}"
        )


def _is_target(logits: Tensor, target: Tensor) -> Tensor:
    """``(N, C)``, True at each row's target class; nowhere in background rows."""
    import torch

    return target[:, None] == torch.arange(logits.shape[1], device=logits.device)


def _row_weight(target: Tensor, weight: Tensor) -> Tensor | float:
    """``(N, 1)`` weights of the rows, or 1 if there are none."""
    import torch

    if weight.numel() == 0:
        return 1.0
    foreground = (target >= 0) & (target < len(weight))
    return torch.where(foreground, weight[target.clamp(0, len(weight) - 1)], torch.ones_like(weight[:1]))[:, None]
