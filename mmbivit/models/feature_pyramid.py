"""Feature pyramids for backbones that return one map."""

from collections.abc import Sequence

from mmengine.model import BaseModule
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from mmbivit.checks import UserError, check_integer
from mmbivit.registry import MODELS

__all__ = ["SimpleFeaturePyramid"]


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """Makes four scales of one feature map, and coarser ones of the last (ViTDet, Fig. 2c); float.

    Transposed convolutions make maps of 4 and 2 times the size, a max pool one of half of it. Each gets a 1 x 1 and a
    3 x 3 convolution with LayerNorm over channels.

    Args:
        in_channels: channels ``C`` of the map; a list of one is taken, too, as other necks have it.
        out_channels: channels of the outputs.
        num_outs: maps that are returned, 4 or more.
        init_cfg: as of all modules of MMEngine.

    Shape: one map ``(B, C, H, W)`` of stride 16 -> ``num_outs`` maps of strides 4, 8, 16, 32, ...

    Raises:
        ValueError: for impossible numbers, and from ``forward`` for anything but one map.
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        out_channels: int = 256,
        num_outs: int = 5,
        init_cfg: dict | None = None,
    ):
        super().__init__(init_cfg=init_cfg)
        if isinstance(in_channels, (list, tuple)) and len(in_channels) == 1:
            in_channels = in_channels[0]
        check_integer("in_channels", in_channels, 4)
        check_integer("out_channels", out_channels, 1)
        check_integer("num_outs", num_outs, 4)
        self.num_outs = num_outs
        half, quarter = in_channels // 2, in_channels // 4
        larger = nn.ConvTranspose2d(in_channels, half, 2, stride=2)
        largest = (
            nn.ConvTranspose2d(in_channels, half, 2, stride=2),
            LayerNorm2d(half),
            nn.GELU(),
            nn.ConvTranspose2d(half, quarter, 2, stride=2),
        )
        scales = [(quarter, largest), (half, (larger,)), (in_channels, ()), (in_channels, (nn.MaxPool2d(2),))]
        self.scales = nn.ModuleList(
            nn.Sequential(
                *layers,
                nn.Conv2d(channels, out_channels, 1, bias=False),
                LayerNorm2d(out_channels),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                LayerNorm2d(out_channels),
            )
            for channels, layers in scales
        )

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the maps, the largest first."""
        if len(inputs) != 1:
            raise UserError(f"SimpleFeaturePyramid got {len(inputs)} feature maps; allowed: one, as of a plain ViT")
        outputs = [scale(inputs[0]) for scale in self.scales]
        while len(outputs) < self.num_outs:
            outputs.append(F.max_pool2d(outputs[-1], 1, stride=2))
        return tuple(outputs)
