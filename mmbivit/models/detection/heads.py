"""Heads with binary convolutions and linear layers."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmdet.models.dense_heads import RetinaHead, RPNHead
from mmdet.models.roi_heads.bbox_heads import ConvFCBBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.registry import MODELS as MMDET_MODELS
from torch import Tensor, nn

from mmbivit.binary import BinaryConvTranspose2d
from mmbivit.checks import UserError, check_integer
from mmbivit.registry import MODELS

from .native import NativeMasks
from .part import BinaryPart, Settings, binarize_conv_module, over_levels

__all__ = ["BinaryConvFCBBoxHead", "BinaryFCNMaskHead", "BinaryRPNHead", "BinaryRetinaHead"]


@MODELS.register_module()
class BinaryRPNHead(BinaryPart, RPNHead):
    """MMDetection's RPN head with binary 3 x 3 convolutions: ``RPReLU(BN(conv(Sign(x - gamma))) + x)``.

    Statistics of the norm are those of all levels together, in training as in evaluation. The 1 x 1 convolutions that
    score and regress stay float, unless ``binary.predictor``.

    Args:
        args, options: of ``mmdet.RPNHead``.
        binary: see :class:`BinaryPart`; its own key is ``predictor``.

    Shape: as of ``mmdet.RPNHead``.

    Raises:
        ValueError: for an impossible setting of ``binary``.
    """

    def __init__(self, *args, binary: Mapping[str, Any] | None = None, **options):
        super().__init__(*args, **options)
        settings = self._read("rpn_head", binary, ("predictor",))
        if settings is None:
            return
        if isinstance(self.rpn_conv, nn.Sequential):
            for module in self.rpn_conv:
                binarize_conv_module(module, settings)
        else:
            self.rpn_conv = settings.convolution(self.rpn_conv, act=True)
        if "predictor" in settings.also:
            self.rpn_cls, self.rpn_reg = settings.last(self.rpn_cls), settings.last(self.rpn_reg)
        self._finish_binary()

    def forward(self, x: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Score and regress the anchors of all levels."""
        if not self.is_staged:
            return super().forward(x)
        several = isinstance(self.rpn_conv, nn.Sequential)
        convs = [module.conv for module in self.rpn_conv] if several else [self.rpn_conv]
        maps = list(x)
        if hasattr(convs[-1], "predict") and isinstance(self.rpn_cls, nn.Conv2d):  # packed, and float behind it
            for conv in convs[:-1]:
                maps = over_levels(conv, maps)
            outputs = [convs[-1].predict(y, (self.rpn_cls, self.rpn_reg)) for y in maps]
            return [scores for scores, _ in outputs], [deltas for _, deltas in outputs]
        for conv in convs:
            maps = over_levels(conv, maps)
        return [self.rpn_cls(y) for y in maps], [self.rpn_reg(y) for y in maps]


@MODELS.register_module()
class BinaryRetinaHead(BinaryPart, RetinaHead):
    """MMDetection's RetinaNet head with binary 3 x 3 convolutions: ``RPReLU(BN(conv(Sign(x - gamma))) + x)``.

    Statistics of norms are those of all levels together. The convolutions that score and regress stay float, unless
    ``binary.predictor``.

    Args:
        args, options: of ``mmdet.RetinaHead``.
        binary: see :class:`BinaryPart`; its own key is ``predictor``.

    Shape: as of ``mmdet.RetinaHead``.

    Raises:
        ValueError: for an impossible setting of ``binary``.
    """

    def __init__(self, *args, binary: Mapping[str, Any] | None = None, **options):
        super().__init__(*args, **options)
        settings = self._read("bbox_head", binary, ("predictor",))
        if settings is None:
            return
        for module in (*self.cls_convs, *self.reg_convs):
            binarize_conv_module(module, settings)
        if "predictor" in settings.also:
            self.retina_cls, self.retina_reg = settings.last(self.retina_cls), settings.last(self.retina_reg)
        self._finish_binary()

    def forward(self, x: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Score and regress the anchors of all levels."""
        if not self.is_staged:
            return super().forward(x)
        towers = []
        for modules in (self.cls_convs, self.reg_convs):
            maps = list(x)
            for module in modules:
                maps = over_levels(module.conv, maps)
            towers.append(maps)
        return [self.retina_cls(y) for y in towers[0]], [self.retina_reg(y) for y in towers[1]]


@MODELS.register_module()
class BinaryConvFCBBoxHead(BinaryPart, ConvFCBBoxHead):
    """MMDetection's box head with binary convolutions and a binary first linear layer, which is the large one.

    Convolutions are ``RPReLU(BN(conv(Sign(x - gamma))) + x)``, the first linear layer ``ReLU(BN(W Sign(x - gamma)))``.
    The linear layers after it stay float, unless ``binary.hidden``: signs of a hidden vector lose what it says
    (measured: docs/detectors.md). ``binary.last_fc_channels`` makes the last of them narrower than
    ``fc_out_channels``, and the float layers smaller; of a float head's units those with the largest weights are taken.
    The layers that score and regress stay float, unless ``binary.predictor``.

    Args:
        args, options: of ``mmdet.ConvFCBBoxHead``; ``Shared2FCBBoxHead`` is ``num_shared_fcs=2``.
        binary: see :class:`BinaryPart`; its own keys are ``hidden``, ``predictor`` and ``last_fc_channels``.

    Shape: as of ``mmdet.ConvFCBBoxHead``.

    Raises:
        ValueError: for an impossible setting of ``binary``.
    """

    def __init__(self, *args, binary: Mapping[str, Any] | None = None, **options):
        super().__init__(*args, **options)
        binary = None if binary is None else dict(binary)
        width = binary.pop("last_fc_channels", None) if binary else None
        settings = self._read("bbox_head", binary, ("hidden", "predictor"))
        if settings is None:
            return
        if width is not None:
            self._narrow(width)
        for module in (*self.shared_convs, *self.cls_convs, *self.reg_convs):
            binarize_conv_module(module, settings)
        hidden = "hidden" in settings.also
        for fcs in (self.shared_fcs, self.cls_fcs, self.reg_fcs):
            for i, fc in enumerate(fcs):
                first = i == 0 and (fcs is self.shared_fcs or not self.shared_fcs)
                if first or hidden:
                    fcs[i] = settings.linear(fc, shortcut=not first, act=hidden)
        if hidden:
            self.relu = nn.Identity()  # the binary layers have their RPReLU
        if "predictor" in settings.also:
            for layer in ("fc_cls", "fc_reg"):
                if hasattr(self, layer):
                    setattr(self, layer, settings.last(getattr(self, layer)))
        if options.get("init_cfg") is None:
            self.init_cfg.pop()  # of linear layers, whose norms do not take it
        self._finish_binary()

    def map_order(self) -> Tensor | None:
        """Return the order in which the first linear layer takes a map whose channels come last.

        Positions of its inputs ``(height * width * C,)``; ``None`` if it takes no map, or one that a layer before it
        makes.
        """
        if not self.is_staged or not self.shared_fcs or self.shared_convs or self.with_avg_pool:
            return None
        return torch.arange(self.in_channels * self.roi_feat_area).view(self.in_channels, -1).T.flatten()

    def forward(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Score and refine regions."""
        if self.is_staged and self.shared_fcs and getattr(self.shared_fcs[0], "channels_last", False):
            x = x.permute(0, 2, 3, 1).flatten(1)
        return super().forward(x)

    def _narrow(self, width: int) -> None:
        """Give the last shared linear layer another number of outputs."""
        check_integer("bbox_head.binary.last_fc_channels", width, 1)
        if len(self.shared_fcs) < 2 or self.cls_fcs or self.reg_fcs:
            raise UserError(
                "bbox_head.binary.last_fc_channels needs num_shared_fcs of 2 or more, and no num_cls_fcs or num_reg_fcs"
            )
        self.shared_fcs[-1] = nn.Linear(self.shared_fcs[-1].in_features, width)
        for layer, cfg in (("fc_cls", self.cls_predictor_cfg), ("fc_reg", self.reg_predictor_cfg)):
            if hasattr(self, layer):
                sizes = dict(in_features=width, out_features=getattr(self, layer).out_features)
                setattr(self, layer, MMDET_MODELS.build(cfg | sizes))

    def _fit_float(self, own: dict[str, Tensor]) -> None:
        """Cut the last shared linear layer of a float head to this one's width, keeping the units of largest norm."""
        names = (
            "fc_cls.weight",
            "fc_reg.weight",
            *(f"shared_fcs.{len(self.shared_fcs) - 1}.{n}" for n in ("weight", "bias")),
        )
        if not all(name in own for name in names):
            return
        scores, boxes, weight, bias = (own[name] for name in names)
        width = self.fc_cls.in_features
        if weight.ndim == 2 and len(weight) > width and len(weight) == len(bias) == scores.shape[-1] == boxes.shape[-1]:
            norms = weight.norm(dim=1) * torch.cat([scores, boxes]).norm(dim=0)
            keep = norms.topk(width).indices.sort().values
            own.update(zip(names, (scores[:, keep], boxes[:, keep], weight[keep], bias[keep]), strict=True))


@MODELS.register_module()
class BinaryFCNMaskHead(BinaryPart, NativeMasks, FCNMaskHead):
    """MMDetection's mask head with binary 3 x 3 convolutions: ``RPReLU(BN(conv(Sign(x - gamma))) + x)``.

    The transposed convolution stays float unless ``binary.upsample``, the last layer unless ``binary.predictor``.

    Args:
        args, options: of ``mmdet.FCNMaskHead``.
        binary: see :class:`BinaryPart`; its own keys are ``upsample`` and ``predictor``.

    Shape: as of ``mmdet.FCNMaskHead``.

    Raises:
        ValueError: for an impossible setting of ``binary``.
    """

    def __init__(self, *args, binary: Mapping[str, Any] | None = None, **options):
        super().__init__(*args, **options)
        settings = self._read("mask_head", binary, ("upsample", "predictor"))
        if settings is None:
            return
        for module in self.convs:
            binarize_conv_module(module, settings)
        if "upsample" in settings.also:
            self.upsample = _binary_upsampling(self.upsample, settings)
        if "predictor" in settings.also:
            self.conv_logits = settings.last(self.conv_logits)
        self._finish_binary()


def _binary_upsampling(upsample: nn.Module, settings: Settings) -> BinaryConvTranspose2d:
    if not isinstance(upsample, nn.ConvTranspose2d):
        raise UserError("mask_head.binary.upsample=True needs upsample_cfg.type='deconv'; others have no weights")
    quantizers = settings.recipe.build_quantizers(upsample.in_channels, upsample.out_channels)
    return BinaryConvTranspose2d.from_float(upsample, **quantizers)
