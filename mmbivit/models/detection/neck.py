"""The feature pyramid with binary convolutions."""

from collections.abc import Mapping, Sequence
from typing import Any

from mmdet.models.necks import FPN
from torch import Tensor

from mmbivit.registry import MODELS

from .native import can_be_native, native_pyramid
from .part import BinaryPart, binarize_conv_module

__all__ = ["BinaryFPN"]


@MODELS.register_module()
class BinaryFPN(BinaryPart, FPN):
    """MMDetection's FPN with binary 3 x 3 convolutions: ``BN(conv(Sign(x - gamma))) + x``, where ``x`` is a lateral.

    Extra levels by convolutions of stride 2 are binary, too; their shortcut is an average pool. The 1 x 1 convolutions
    stay float, unless ``binary.laterals``.

    Args:
        args, options: of ``mmdet.FPN``.
        binary: see :class:`BinaryPart`; its own key is ``laterals``.

    Shape: as of ``mmdet.FPN``.

    Raises:
        ValueError: for an impossible setting of ``binary``.
    """

    is_native = False  # a packed one is

    def __init__(self, *args, binary: Mapping[str, Any] | None = None, **options):
        super().__init__(*args, **options)
        settings = self._read("neck", binary, ("laterals",))
        if settings is None:
            return
        for module in [*self.fpn_convs, *(self.lateral_convs if "laterals" in settings.also else ())]:
            binarize_conv_module(module, settings)
        self._finish_binary()

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Make the levels of the pyramid."""
        native = self.is_native and can_be_native(self, inputs)
        return native_pyramid(self, inputs) if native else super().forward(inputs)
