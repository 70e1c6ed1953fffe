"""What MMDetection computes in float around binary layers, by kernels of ours: for inference on the CPU."""

import contextlib
import math
import mmap
from collections.abc import Sequence
from typing import Any

import torch
from mmcv.cnn import ConvModule
from mmcv.cnn.bricks import wrappers
from mmcv.ops import RoIAlign
from mmdet.models.necks import FPN
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmengine.config import ConfigDict
from torch import Tensor, nn
from torch.nn import functional as F

from mmbivit.packed import detection_operators  # noqa: F401  it registers torch.ops.mmbivit.roi_align and others

__all__ = [
    "NativeFPN",
    "NativeLinear",
    "NativeMaskHead",
    "NativeMasks",
    "NativeRoIExtractor",
    "PointwiseConv2d",
    "UpsamplingConv2d",
    "can_be_native",
    "linear",
    "native_pyramid",
    "use_native",
]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute ``torch.nn.functional.linear``, where it pays by oneDNN: MKL, which torch takes, is slow on AMD CPUs."""
    # oneDNN orders the weight each time, and torch gives it convolutions of single pixels with several threads only.
    if x.numel() < 256 * x.shape[-1] or torch.get_num_threads() == 1:
        return F.linear(x, weight, bias)
    y = F.conv2d(x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2), weight[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))


class NativeLinear(nn.Linear):
    """Linear layer of many rows by :func:`linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute ``(*, in_features) -> (*, out_features)``."""
        return linear(x, self.weight, self.bias)


class PointwiseConv2d(nn.Conv2d):
    """Convolution of single pixels as a matrix product over maps in channels-last memory."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute ``(B, in_channels, H, W) -> (B, out_channels, H, W)``."""
        return linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class UpsamplingConv2d(nn.ConvTranspose2d):
    """Transposed convolution whose kernels do not overlap, as a matrix product over maps in channels-last memory."""

    def product(self) -> tuple[Tensor, Tensor | None]:
        """Return weights ``(stride * stride * out_channels, in_channels)`` and biases for the pixels of a map."""
        weight = self.weight.permute(2, 3, 1, 0).flatten(0, 2)
        return weight, None if self.bias is None else self.bias.repeat(len(weight) // self.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Compute ``(B, in_channels, H, W) -> (B, out_channels, H * stride, W * stride)``."""
        y = linear(x.permute(0, 2, 3, 1), *self.product()).unflatten(-1, (*self.kernel_size, -1))
        return y.transpose(2, 3).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


class NativeFPN(FPN):
    """MMDetection's ``FPN`` whose top-down path runs in place, for inference on the CPU.

    Shape: as of ``mmdet.FPN``.
    """

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Make the levels of the pyramid."""
        return native_pyramid(self, inputs) if can_be_native(self, inputs) else super().forward(inputs)


def can_be_native(fpn: FPN, inputs: Sequence[Tensor]) -> bool:
    """Whether :func:`native_pyramid` computes what an FPN does; not in training."""
    return (
        not fpn.training
        and not torch.is_grad_enabled()
        and inputs[0].device.type == "cpu"
        and inputs[0].dtype == torch.float32
        and not fpn.add_extra_convs
        and fpn.upsample_cfg == dict(mode="nearest")
    )


def native_pyramid(fpn: FPN, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Compute an FPN that has no convolutions of further levels; its laterals are changed in place."""
    laterals = [conv(inputs[fpn.start_level + i]) for i, conv in enumerate(fpn.lateral_convs)]
    rows = [x.permute(0, 2, 3, 1).contiguous() for x in laterals]
    for lower, upper in zip(rows[-2::-1], rows[:0:-1], strict=True):
        torch.ops.mmbivit.upsample_add_(lower, upper)
    levels = [_apply_(conv, x.permute(0, 3, 1, 2)) for conv, x in zip(fpn.fpn_convs, rows, strict=True)]
    for _ in range(fpn.num_outs - len(levels)):
        levels.append(levels[-1][:, :, ::2, ::2].contiguous(memory_format=torch.channels_last))
    return tuple(levels)


def _apply_(module: ConvModule, x: Tensor) -> Tensor:
    """Apply mmcv's bundle, in place where it is a packed layer alone."""
    if hasattr(module.conv, "apply_") and not module.with_norm and not module.with_activation:
        return module.conv.apply_(x)
    return module(x)


class NativeMasks:
    """Mixin of ``mmdet.FCNMaskHead``, before it: enlarges few regions at a time, for inference on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Predict masks of regions: ``(N, C, h, w) -> (N, classes, h * stride, w * stride)``."""
        layers = type(self.upsample) is UpsamplingConv2d and type(self.conv_logits) is PointwiseConv2d
        if not layers or x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_grad_enabled():
            return super().forward(x)
        for i, conv in enumerate(self.convs):
            x = _apply_(conv, x) if i else conv(x)
        (high, wide), predictor = self.upsample.kernel_size, self.conv_logits
        weight, bias = self.upsample.product()
        masks = x.new_empty(len(x), predictor.out_channels, x.shape[2] * high, x.shape[3] * wide)
        # What is enlarged stays in the cache.
        for rows, out in zip(x.permute(0, 2, 3, 1).split(8), masks.split(8), strict=True):
            hidden = linear(rows, weight, bias).relu_().unflatten(-1, (high, wide, -1))
            logits = linear(hidden, predictor.weight.flatten(1), predictor.bias)  # (n, h, w, high, wide, classes)
            out.copy_(logits.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3))
        return masks

    def _predict_by_feat_single(
        self,
        mask_preds: Tensor,
        bboxes: Tensor,
        labels: Tensor,
        img_meta: dict[str, Any],
        rcnn_test_cfg: ConfigDict,
        rescale: bool = False,
        activate_map: bool = False,
    ) -> Tensor:
        """Paste masks into an image: booleans ``(N, height, width)``, in memory that is only used below the boxes."""
        arguments = mask_preds, bboxes, labels, img_meta, rcnn_test_cfg, rescale, activate_map
        if type(self.conv_logits) is not PointwiseConv2d or bboxes.device.type != "cpu" or activate_map:
            return super()._predict_by_feat_single(*arguments)
        threshold = rcnn_test_cfg.mask_thr_binary
        if threshold < 0:  # for gray masks
            return super()._predict_by_feat_single(*arguments)
        size, scale = img_meta["ori_shape"][:2], img_meta["scale_factor"]
        if rescale:
            bboxes /= bboxes.new_tensor([*scale, *scale])
        else:
            size = round(size[0] * scale[1]), round(size[1] * scale[0])
        own = torch.zeros_like(labels) if self.class_agnostic else labels
        probabilities = mask_preds[torch.arange(len(labels)), own][:, None].sigmoid()
        masks = _untouched(len(labels), *size)
        for i in range(len(labels)):
            pasted, place = _do_paste_mask(probabilities[i : i + 1], bboxes[i : i + 1], *size, skip_empty=True)
            masks[i][place] = pasted[0] >= threshold
        return masks


def _untouched(*shape: int) -> Tensor:
    """Return booleans that are false, and take up memory page by page where they are written."""
    number = math.prod(shape)
    memory = mmap.mmap(-1, max(number, 1))
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a system that has no huge pages, which hold a mask or two each
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.bool, count=max(number, 1))[:number].view(shape)


class NativeMaskHead(NativeMasks, FCNMaskHead):
    """MMDetection's ``FCNMaskHead`` with :class:`NativeMasks`."""


class NativeRoIExtractor(SingleRoIExtractor):
    """MMDetection's ``SingleRoIExtractor`` whose levels are pooled in one call, for inference on the CPU.

    Shape: as of ``mmdet.SingleRoIExtractor``; the result is in channels-last memory.
    """

    def forward(self, feats: tuple[Tensor, ...], rois: Tensor, roi_scale_factor: float | None = None) -> Tensor:
        """Pool regions ``(K, 5)`` from the maps of all levels: ``(K, C, height, width)``."""
        if feats[0].device.type != "cpu" or feats[0].dtype != torch.float32 or torch.is_grad_enabled():
            return super().forward(feats, rois, roi_scale_factor)
        feats, layer = feats[: self.num_inputs], self.roi_layers[0]
        rois = rois.type_as(feats[0])
        levels = self.map_roi_levels(rois, len(feats))
        if roi_scale_factor is not None:
            rois = self.roi_rescale(rois, roi_scale_factor)
        pooled = torch.ops.mmbivit.roi_align(
            [x.permute(0, 2, 3, 1).contiguous() for x in feats],
            rois.contiguous(),
            levels,
            [layer.spatial_scale for layer in self.roi_layers],
            layer.output_size,
            max(layer.sampling_ratio, 0),
            layer.aligned,
        )
        return pooled.permute(0, 3, 1, 2)


def use_native(part: nn.Module) -> None:
    """Let modules of a neck or head run as those of this file, where they compute the same.

    These differ from the classes that they take the place of in nothing but the forward pass.
    """
    for module in part.modules():
        if type(module) is SingleRoIExtractor and all(
            type(layer) is RoIAlign and layer.pool_mode == "avg" for layer in module.roi_layers
        ):
            module.__class__ = NativeRoIExtractor
        elif type(module) is FPN:
            module.__class__ = NativeFPN
        elif hasattr(module, "is_native"):
            module.is_native = True
        elif type(module) is FCNMaskHead:
            module.__class__ = NativeMaskHead
        elif type(module) in (nn.Linear, wrappers.Linear):
            module.__class__ = NativeLinear
        elif type(module) in (nn.Conv2d, wrappers.Conv2d) and _is_pointwise(module):
            module.__class__ = PointwiseConv2d
        elif type(module) in (nn.ConvTranspose2d, wrappers.ConvTranspose2d) and _only_enlarges(module):
            module.__class__ = UpsamplingConv2d


def _is_pointwise(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == conv.stride == (1, 1) and conv.groups == 1 and conv.padding == (0, 0)


def _only_enlarges(conv: nn.ConvTranspose2d) -> bool:
    return conv.kernel_size == conv.stride and conv.groups == 1 and not any((*conv.padding, *conv.output_padding))
