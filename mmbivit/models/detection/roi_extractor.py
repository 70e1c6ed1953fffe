"""Features of regions by a native kernel."""

import torch
from mmcv.ops import RoIAlign
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from torch import Tensor, nn

from mmbivit.packed import detection_operators  # noqa: F401  it registers torch.ops.mmbivit.roi_align

__all__ = ["NativeRoIExtractor", "use_native_roi_align"]


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


def use_native_roi_align(head: nn.Module) -> None:
    """Let the RoI extractors of a head pool by the native kernel, where it computes the same."""
    for module in head.modules():
        if type(module) is SingleRoIExtractor and all(
            type(layer) is RoIAlign and layer.pool_mode == "avg" for layer in module.roi_layers
        ):
            module.__class__ = NativeRoIExtractor  # which differs in nothing but its forward pass
