"""The operators of packed necks and heads: binary convolution, and features of regions.

Maps have their channels last, ``(B, H, W, C)``, and are contiguous so. All else is as in
:mod:`mmbivit.packed.operators`.
"""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import detection_reference as reference
from . import kernels
from .arguments import check_pair, check_positive, check_tensor, define, native_path, register
from .packing import LANES, num_blocks, num_words, padded

__all__ = ["ConvGeometry", "binary_conv2d", "roi_align"]

MOST_SAMPLES = 64  # along a side of a bin
FARTHEST = 1e6  # coordinate of a region, in pixels of an image

define(
    "binary_conv2d(Tensor x, Tensor threshold, Tensor weight, Tensor out_affine, int n, int[] geometry, "
    "Tensor? rprelu=None, Tensor? add=None, Tensor? factor=None) -> Tensor"
)
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
    """
    if x.ndim != 4 or len(geometry) != len(ConvGeometry._fields):
        raise ValueError(f"x has {x.ndim} axes, geometry {len(geometry)} numbers; expected 4 and 8")
    if (add is None) != (factor is None):
        raise ValueError("add and factor go together; give both, or neither")
    batch, height, width, channels = x.shape
    where = ConvGeometry(*geometry)
    check_positive(n=n, channels=channels, **{k: v for k, v in where._asdict().items() if not k.startswith("padding")})
    if min(where.padding_height, where.padding_width) < 0 or max(where) > 2**15:
        raise ValueError(f"geometry is {tuple(where)}; expected sizes up to {2**15}, and padding of 0 or more")
    out_height, out_width = where.out_size(height, width)
    if min(out_height, out_width) < 1:
        raise ValueError(f"a map of {height} x {width} is too small for the geometry {tuple(where)}")
    words = where.kernel_height * where.kernel_width * num_words(channels)
    args = (
        check_tensor("x", x, (batch, height, width, channels)),
        check_tensor("threshold", threshold, (padded(channels),)),
        check_tensor("weight", weight, (num_blocks(n), words, LANES), torch.int32),
        *check_pair("out_affine", out_affine, padded(n)),
        None if rprelu is None else check_tensor("rprelu", rprelu, (3, padded(n))),
        None if add is None else check_tensor("add", add, (batch, out_height, out_width, n)),
        None if factor is None else check_tensor("factor", factor, (padded(n),)),
    )
    if (path := native_path(x, args)) is None:
        return reference.binary_conv2d(x, threshold, weight, out_affine, n, geometry, rprelu, add, factor)
    out = x.new_empty(batch, out_height, out_width, n)
    sizes = batch, height, width, channels, n, *where, out_height, out_width, 0
    kernels.KERNELS.call("conv", path, kernels.ConvArgs(*args, out.data_ptr(), *sizes))
    return out


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
    arrays = (
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


def _fake_conv(x: Tensor, threshold, weight, out_affine, n: int, geometry, rprelu=None, add=None, factor=None):
    return x.new_empty(x.shape[0], *ConvGeometry(*geometry).out_size(*x.shape[1:3]), n)


def _fake_roi_align(maps: Sequence[Tensor], rois: Tensor, levels, scales, size, samples, aligned) -> Tensor:
    return maps[0].new_empty(len(rois), *size, maps[0].shape[3])


register((binary_conv2d, _fake_conv), (roi_align, _fake_roi_align))
