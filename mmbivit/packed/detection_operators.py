"""The operators of packed necks and heads: binary convolution, and features of regions.

Maps have their channels last, ``(B, H, W, C)``, and are contiguous so. All else is as in
:mod:`mmbivit.packed.operators`.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmbivit.binary import unpack_bits

from . import detection_reference as reference
from . import kernels
from .arguments import check_pair, check_positive, check_tensor, define, fake_in_place, native_path, register
from .packing import LANES, num_blocks, num_words, pad_channels, padded

__all__ = ["ConvGeometry", "binary_conv2d", "binary_conv2d_", "nms", "roi_align", "upsample_add_"]

MOST_SAMPLES = 64  # along a side of a bin
FARTHEST = 1e6  # coordinate of a region, in pixels of an image

define(
    "binary_conv2d(Tensor x, Tensor threshold, Tensor weight, Tensor out_affine, int n, int[] geometry, "
    "Tensor? rprelu=None, Tensor? add=None, Tensor? factor=None, Tensor? predictor=None, Tensor? predictor_bias=None, "
    "int outputs=0) -> Tensor"
)
define(
    "binary_conv2d_(Tensor(a!) x, Tensor threshold, Tensor weight, Tensor out_affine, int[] geometry, Tensor? rprelu, "
    "Tensor factor) -> ()"
)
define("upsample_add_(Tensor(a!) x, Tensor y) -> ()")
define("nms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
define(
    "roi_align(Tensor[] maps, Tensor rois, Tensor levels, float[] scales, int[] size, int samples, bool aligned)"
    " -> Tensor"
)


class ConvGeometry(NamedTuple):
    """Where a convolution looks; its fields are the numbers that the operator takes, in their order."""

    kernel_height: int
    kernel_width: int
    stride_height: int
    stride_width: int
    padding_height: int
    padding_width: int
    dilation_height: int
    dilation_width: int

    def out_size(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of the output."""
        return (
            (height + 2 * self.padding_height - self.dilation_height * (self.kernel_height - 1) - 1)
            // self.stride_height
            + 1,
            (width + 2 * self.padding_width - self.dilation_width * (self.kernel_width - 1) - 1) // self.stride_width
            + 1,
        )


def binary_conv2d(
    x: Tensor,
    threshold: Tensor,
    weight: Tensor,
    out_affine: Tensor,
    n: int,
    geometry: Sequence[int],
    rprelu: Tensor | None = None,
    add: Tensor | None = None,
    factor: Tensor | None = None,
    predictor: Tensor | None = None,
    predictor_bias: Tensor | None = None,
    outputs: int = 0,
) -> Tensor:
    """Binary convolution with everything around it: float32 ``(B, H, W, C) -> (B, H', W', n)``.

    ``RPReLU(scale * conv(Sign(pad(x) - threshold), W) + bias + factor * add)``, padded with 0 before the sign.

    Args:
        threshold: of each channel, ``(C padded)``.
        weight: ``(blocks, kernel_height * kernel_width * ceil(C / 32), 16)``: the words of each tap, from left to right
            and from top to bottom.
        out_affine: scale and bias, ``(2, n padded)``.
        n: channels of the output.
        geometry: the numbers of a :class:`ConvGeometry`.
        rprelu: ``(3, n padded)``: gamma, slope, zeta.
        add: ``(B, H', W', n)``, together with ``factor (n padded)``.
        predictor: ``(n, outputs padded)`` of a float product that follows, whose result ``(B, H', W', outputs)`` is
            returned; together with ``predictor_bias (outputs padded)``.
        outputs: of the predictor.
    """
    if (add is None) != (factor is None):
        raise ValueError("add and factor go together; give both, or neither")
    if len({predictor is None, predictor_bias is None, outputs == 0}) > 1 or outputs < 0:
        raise ValueError("predictor, predictor_bias and outputs go together; give all, or none")
    layer = threshold, weight, out_affine, rprelu
    args, sizes, shape = _check_conv(x, n, geometry, *layer, add, factor, predictor, predictor_bias, outputs)
    if (path := native_path(x, args)) is None:
        y = reference.binary_conv2d(x, threshold, weight, out_affine, n, geometry, rprelu, add, factor)
        return y if predictor is None else (y @ predictor + predictor_bias)[..., :outputs].contiguous()  # type: ignore[operator]  # they come together
    out = x.new_empty(*shape[:3], outputs or n)
    kernels.KERNELS.call("conv", path, kernels.ConvArgs(*args, out.data_ptr(), *sizes))
    return out


def binary_conv2d_(
    x: Tensor,
    threshold: Tensor,
    weight: Tensor,
    out_affine: Tensor,
    geometry: Sequence[int],
    rprelu: Tensor | None,
    factor: Tensor,
) -> None:
    """The same with ``add`` and the output being ``x``: a layer with a shortcut that keeps shapes, in place."""
    n, layer = x.shape[-1], (threshold, weight, out_affine, rprelu)
    args, sizes, _ = _check_conv(x, n, geometry, *layer, x, factor)
    if (path := native_path(x, args)) is None:
        x.copy_(reference.binary_conv2d(x, threshold, weight, out_affine, n, geometry, rprelu, x, factor))
        return
    kernels.KERNELS.call("conv", path, kernels.ConvArgs(*args, x.data_ptr(), *sizes))


def _check_conv(
    x: Tensor,
    n: int,
    geometry: Sequence[int],
    threshold: Tensor,
    weight: Tensor,
    out_affine: Tensor,
    rprelu: Tensor | None,
    add: Tensor | None,
    factor: Tensor | None,
    predictor: Tensor | None = None,
    predictor_bias: Any = None,
    outputs: int = 0,
) -> tuple[tuple[int | None, ...], tuple[int, ...], tuple[int, ...]]:
    """Check the arguments of a convolution; returns addresses, sizes, and the shape of its output."""
    if x.ndim != 4 or len(geometry) != len(ConvGeometry._fields):
        raise ValueError(f"x has {x.ndim} axes, geometry {len(geometry)} numbers; expected 4 and 8")
    batch, height, width, channels = x.shape
    where = ConvGeometry(*geometry)
    check_positive(n=n, channels=channels, **{k: v for k, v in where._asdict().items() if not k.startswith("padding")})
    if min(where.padding_height, where.padding_width) < 0 or max(where) > 2**15:
        raise ValueError(f"geometry is {tuple(where)}; expected sizes up to {2**15}, and padding of 0 or more")
    shape = batch, *where.out_size(height, width), n
    if min(shape[1:3]) < 1:
        raise ValueError(f"a map of {height} x {width} is too small for the geometry {tuple(where)}")
    words = where.kernel_height * where.kernel_width * num_words(channels)
    args = (
        check_tensor("x", x, (batch, height, width, channels)),
        check_tensor("threshold", threshold, (padded(channels),)),
        check_tensor("weight", weight, (num_blocks(n), words, LANES), torch.int32),
        *check_pair("out_affine", out_affine, padded(n)),
        None if rprelu is None else check_tensor("rprelu", rprelu, (3, padded(n))),
        None if add is None else check_tensor("add", add, shape),
        None if factor is None else check_tensor("factor", factor, (padded(n),)),
        None if predictor is None else check_tensor("predictor", predictor, (n, padded(outputs))),
        None if predictor is None else check_tensor("predictor_bias", predictor_bias, (padded(outputs),)),
    )
    return args, (batch, height, width, channels, n, outputs, *where, *shape[1:3]), shape


def roi_align(
    maps: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    size: Sequence[int],
    samples: int,
    aligned: bool,
) -> Tensor:
    """RoIAlign with average pooling, each region on its own level: ``(K, height, width, C)`` float32.

    Args:
        maps: of each level, ``(B, H_i, W_i, C)``.
        rois: ``(K, 5)``: image of the batch, then ``x1, y1, x2, y2`` in pixels of the image, float32.
        levels: of each region, int64 ``(K,)``.
        scales: of each level, pixels of the map per pixel of the image.
        size: height and width of the output, in bins.
        samples: of a bin along each side; 0 for as many as it has pixels.
        aligned: whether positions are those of pixels' centres.
    """
    if not maps or len(maps) != len(scales) or len(size) != 2:
        raise ValueError(f"{len(maps)} maps, {len(scales)} scales and {len(size)} sizes; expected one each, and 2")
    check_positive(height=size[0], width=size[1])
    if not 0 <= samples <= MOST_SAMPLES or max(size) > 2**10:
        raise ValueError(f"samples={samples}, size={tuple(size)}; allowed: 0 to {MOST_SAMPLES}, and up to {2**10}")
    first = maps[0]
    if first.ndim != 4:
        raise ValueError(f"maps have {first.ndim} axes; expected 4")
    batch, channels = first.shape[0], first.shape[3]
    addresses = [check_tensor(f"map {i}", x, (batch, *x.shape[1:3], channels)) for i, x in enumerate(maps)]
    sides = [side for x in maps for side in x.shape[1:3]]
    check_positive(channels=channels, side=min(sides))
    args = (
        check_tensor("rois", rois, (len(rois), 5)),
        check_tensor("levels", levels, (len(rois),), torch.int64),
    )
    if (path := native_path(first, (*addresses, *args))) is None:
        return reference.roi_align(maps, rois, levels, scales, size, samples, aligned)
    _check_regions(rois, levels, batch, len(maps))
    out = first.new_empty(len(rois), *size, channels)
    arrays: tuple[Any, ...] = (
        (ctypes.c_void_p * len(maps))(*addresses),
        (ctypes.c_int64 * len(sides))(*sides),
        (ctypes.c_float * len(scales))(*scales),
    )
    pointers = *map(ctypes.addressof, arrays), *args, out.data_ptr()
    sizes = len(rois), channels, *size, max(sides), samples, aligned
    kernels.KERNELS.call("roi_align", path, kernels.RoiAlignArgs(*pointers, *sizes))
    return out


def _check_regions(rois: Tensor, levels: Tensor, batch: int, number: int) -> None:
    """Raise unless all regions are in the batch, on a level that there is, and not absurdly far away."""
    if not len(rois):
        return
    images = rois[:, 0]
    if not (rois.abs() <= FARTHEST).all() or not ((images >= 0) & (images < batch)).all():
        raise ValueError(f"rois are not all of an image of {batch} and within {FARTHEST:g} pixels")
    if not ((levels >= 0) & (levels < number)).all():
        raise ValueError(f"levels are not all in 0 to {number - 1}")


def upsample_add_(x: Tensor, y: Tensor) -> None:
    """Add ``y (B, h, w, C)`` to ``x (B, H, W, C)`` in place, enlarged by taking the nearest."""
    if x.ndim != 4 or y.ndim != 4:
        raise ValueError(f"x has {x.ndim} axes, y {y.ndim}; expected 4")
    batch, height, width, channels = x.shape
    sizes = batch, height, width, *y.shape[1:3], channels
    check_positive(height=height, width=width, y_height=y.shape[1], y_width=y.shape[2])
    args = check_tensor("x", x, tuple(x.shape)), check_tensor("y", y, (batch, *y.shape[1:3], channels))
    if (path := native_path(x, args)) is None:
        reference.upsample_add_(x, y)
        return
    kernels.KERNELS.call("upsample_add", path, kernels.UpsampleArgs(*args, *sizes))


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Greedy non-maximum suppression: the positions of the boxes that are kept, by falling score, int64.

    Args:
        boxes: ``(N, 4)``: x1, y1, x2, y2.
        scores: ``(N,)``; of equal ones the first counts more.
        threshold: a box is dropped if its intersection over union with a better one is greater.
    """
    number = len(boxes)
    args = check_tensor("boxes", boxes, (number, 4)), check_tensor("scores", scores, (number,))
    if (path := native_path(boxes, args)) is None:
        return reference.nms(boxes, scores, threshold)
    order = scores.sort(stable=True, descending=True).indices
    sides = pad_channels(boxes[order].T).contiguous()
    # A float is greater than the threshold if it is this one or more.
    limit = torch.tensor([threshold], dtype=torch.float32)
    limit = limit if limit.item() > threshold else limit.nextafter(torch.tensor(torch.inf))
    suppressed = torch.zeros(num_blocks(number), dtype=torch.int16)
    tensors = sides, limit, torch.empty_like(sides[0]), suppressed
    pointers = (tensor.data_ptr() for tensor in tensors)
    kernels.KERNELS.call("nms", path, kernels.NmsArgs(*pointers, number, padded(number)))
    return order[~unpack_bits(suppressed.view(torch.uint8), number)]


def _fake_conv(
    x: Tensor, threshold, weight, out_affine, n: int, geometry, rprelu=None, add=None, factor=None, predictor=None,
    predictor_bias=None, outputs: int = 0,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], *ConvGeometry(*geometry).out_size(*x.shape[1:3]), outputs or n)


def _fake_nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


def _fake_roi_align(maps: Sequence[Tensor], rois: Tensor, levels, scales, size, samples, aligned) -> Tensor:
    return maps[0].new_empty(len(rois), *size, maps[0].shape[3])


register(
    (binary_conv2d, _fake_conv),
    (binary_conv2d_, fake_in_place),
    (roi_align, _fake_roi_align),
    (upsample_add_, fake_in_place),
    (nms, _fake_nms),
)
