"""The operators of :mod:`mmbivit.packed.detection_operators` in plain torch: the specification of their kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .packing import LANES, WORD_BITS, num_words, unpack_signs
from .residual_reference import rprelu as apply_rprelu

__all__ = ["binary_conv2d", "nms", "roi_align", "upsample_add_"]


def binary_conv2d(
    x: Tensor,
    threshold: Tensor,
    weight: Tensor,
    out_affine: Tensor,
    n: int,
    geometry: Sequence[int],
    rprelu: Tensor | None,
    add: Tensor | None,
    factor: Tensor | None,
) -> Tensor:
    """Pad, sign, convolve, scale, shortcut and RPReLU."""
    high, wide, *strides = geometry[:4]
    padding, dilation = geometry[4:6], geometry[6:]
    channels = x.shape[3]
    x = F.pad(x, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    signs = (x >= threshold[:channels]).float() * 2 - 1
    words = num_words(channels)
    bits = weight.transpose(1, 2).reshape(len(weight) * LANES, high, wide, words)[:n]
    kernel = unpack_signs(bits, words * WORD_BITS)[..., :channels].float() * 2 - 1
    # Sums of -1 and +1 are exact in float32 up to 2^24.
    y = F.conv2d(signs.permute(0, 3, 1, 2), kernel.permute(0, 3, 1, 2), None, strides, 0, dilation)
    scale, bias = out_affine[:, :n]
    y = y.permute(0, 2, 3, 1) * scale + bias
    if add is not None:
        y = y + factor[:n] * add  # type: ignore[index]  # they come together
    return (y if rprelu is None else apply_rprelu(y, *rprelu[:, :n])).contiguous()


def roi_align(
    maps: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    size: Sequence[int],
    samples: int,
    aligned: bool,
) -> Tensor:
    """Pool each level's regions."""
    import torchvision  # noqa: F401  it registers the operator

    out = maps[0].new_zeros(len(rois), *size, maps[0].shape[3])
    for level, (x, scale) in enumerate(zip(maps, scales, strict=True)):
        found = levels == level
        pooled = torch.ops.torchvision.roi_align(x.permute(0, 3, 1, 2), rois[found], scale, *size, samples, aligned)
        out[found] = pooled.permute(0, 2, 3, 1)
    return out


def upsample_add_(x: Tensor, y: Tensor) -> None:
    """Enlarge and add."""
    x += F.interpolate(y.permute(0, 3, 1, 2), size=x.shape[1:3]).permute(0, 2, 3, 1)


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Suppress by torchvision."""
    import torchvision

    return torchvision.ops.nms(boxes, scores, threshold)
