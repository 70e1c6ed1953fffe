"""The float and the binary detector that the benchmark compares, and the parts of one inference."""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from mmbivit import deploy, get_config
from mmbivit_benchmarks.evidence import set_value

__all__ = ["CONFIGS", "PARTS", "TENSOR_PARTS", "Parts", "detect", "make_detectors"]

# Whose backbone is binary: with float neck and heads, and with binary ones.
CONFIGS = dict(float_heads="mask_rcnn_sibivit_swin_t", whole="mask_rcnn_sibivit_swin_t_full")
PARTS = {
    "backbone": "backbone",
    "neck": "FPN",
    "rpn": "RPN, convolutions",
    "proposals": "RPN, proposals and NMS",
    "box_align": "RoIAlign for boxes",
    "box_head": "box head",
    "box_post": "boxes and NMS",
    "mask_align": "RoIAlign for masks",
    "mask_head": "mask head",
    "mask_post": "masks into the image",
}
TENSOR_PARTS = ("backbone", "neck", "rpn", "box_head", "mask_head")  # which any runtime can compute
LOGIT_DEVIATION = 3.0  # of class scores, so that some of 80 random classes are likely


@dataclass
class Parts:
    """One inference of Mask R-CNN, part by part, each on what the parts before it made.

    Args:
        model: mmdet's, in evaluation.
        images: normalised, ``(1, 3, H, W)``.
    """

    model: nn.Module
    images: Tensor
    values: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """Compute all parts, in their order."""
        for part in PARTS:
            self.values[part] = self.call(part)()

    @property
    def found(self) -> tuple[int, int]:
        """Numbers of proposals and of detections."""
        return len(self.values["proposals"][0]), len(self.values["box_post"][0])

    def call(self, part: str) -> Callable[[], Any]:
        """Return what computes a part from the values of those before it."""
        return torch.inference_mode()(getattr(self, f"_{part}"))

    def tensors(self, part: str) -> tuple[nn.Module, list[Tensor]]:
        """Return a module that takes tensors and returns tensors, and its inputs, of a part that is one."""
        head, values = self.model.roi_head, self.values
        return {
            "backbone": lambda: (self.model.backbone, [self.images]),
            "neck": lambda: (_Spread(self.model.neck), list(values["backbone"])),
            "rpn": lambda: (_Spread(self.model.rpn_head), list(values["neck"])),
            "box_head": lambda: (head.bbox_head, [values["box_align"]]),
            "mask_head": lambda: (head.mask_head, [values["mask_align"]]),
        }[part]()

    @property
    def _metas(self) -> list[dict[str, Any]]:
        return [_meta(self.images)]

    def _backbone(self) -> tuple[Tensor, ...]:
        return self.model.backbone(self.images)

    def _neck(self) -> tuple[Tensor, ...]:
        return self.model.neck(self.values["backbone"])

    def _rpn(self) -> tuple[list[Tensor], list[Tensor]]:
        return self.model.rpn_head(self.values["neck"])

    def _proposals(self) -> list[Any]:
        return self.model.rpn_head.predict_by_feat(*self.values["rpn"], batch_img_metas=self._metas)

    def _rois(self, boxes: Tensor) -> Tensor:
        return torch.cat([boxes.new_zeros(len(boxes), 1), boxes], dim=1)

    def _box_align(self) -> Tensor:
        head = self.model.roi_head
        maps = self.values["neck"][: head.bbox_roi_extractor.num_inputs]
        return head.bbox_roi_extractor(maps, self._rois(self.values["proposals"][0].bboxes))

    def _box_head(self) -> tuple[Tensor, Tensor]:
        return self.model.roi_head.bbox_head(self.values["box_align"])

    def _box_post(self) -> list[Any]:
        head, (scores, deltas) = self.model.roi_head, self.values["box_head"]
        rois = self._rois(self.values["proposals"][0].bboxes)
        return head.bbox_head.predict_by_feat((rois,), (scores,), (deltas,), self._metas, head.test_cfg)

    def _mask_align(self) -> Tensor:
        head = self.model.roi_head
        maps = self.values["neck"][: head.mask_roi_extractor.num_inputs]
        return head.mask_roi_extractor(maps, self._rois(self.values["box_post"][0].bboxes))

    def _mask_head(self) -> Tensor:
        return self.model.roi_head.mask_head(self.values["mask_align"])

    def _mask_post(self) -> list[Any]:
        head, found = self.model.roi_head, self.values["box_post"]
        # Copies, as masks are added to them.
        found = [found[0].clone()]
        return head.mask_head.predict_by_feat((self.values["mask_head"],), found, self._metas, head.test_cfg)


def _meta(images: Tensor) -> dict[str, Any]:
    size = tuple(images.shape[2:])
    return dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0), batch_input_shape=size)


@torch.inference_mode()
def detect(model: nn.Module, images: Tensor) -> Any:
    """Detect objects in a normalised image ``(1, 3, H, W)``, as MMDetection does."""
    from mmdet.structures import DetDataSample

    return model.predict(images, [DetDataSample(metainfo=_meta(images))], rescale=False)


class _Spread(nn.Module):
    """Gives a module its inputs as a list, and flattens its outputs."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = self.module(list(inputs))
        return tuple(outputs) if isinstance(outputs[0], Tensor) else tuple(x for level in outputs for x in level)


def make_detectors(images: Tensor, changes: dict[str, Any] | None = None) -> dict[str, tuple[Config, nn.Module]]:
    """Build three detectors with random weights: ``float``, and the packed ``float_heads`` and ``whole``.

    Necks and heads start from the float detector's weights, and take norms' statistics and the scales of their inputs
    from the images, as at the begin of a training. Class scores are as far apart as those of trained detectors, so
    that there are detections.

    Args:
        images: normalised, ``(1, 3, H, W)``.
        changes: of the configs, by dotted key.
    """
    configs = {name: get_config(config) for name, config in CONFIGS.items()}
    for cfg in configs.values():
        for key, value in (changes or {}).items():
            set_value(cfg, key, value)
        cfg.model.backbone.init_cfg = None
    floats = copy.deepcopy(configs["float_heads"])
    floats.model.backbone.update(recipe="float", mlp_ratio=4, spatial_interaction=None)
    torch.manual_seed(0)
    model = _build(floats)
    with _no_log():
        model.init_weights()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.2)
    parts = Parts(model.eval(), images)
    parts.run()
    predictor = model.roi_head.bbox_head.fc_cls
    predictor.weight.data *= LOGIT_DEVIATION / parts.values["box_head"][0].std()
    parts.run()
    found = dict(float=(floats, model))
    for name, cfg in configs.items():
        binary = _build(cfg)
        weights = {k: v for k, v in model.state_dict().items() if not k.startswith("backbone.")}
        with _no_log():
            binary.load_state_dict(weights, strict=False)
        _start(binary, parts)
        found[name] = (cfg, deploy.pack(binary))
    return found


def _build(cfg: Config) -> nn.Module:
    with DefaultScope.overwrite_default_scope("mmdet"):
        return MODELS.build(copy.deepcopy(cfg.model))


@contextmanager
def _no_log() -> Iterator[None]:
    """Keep to itself what MMEngine says of each weight."""
    level = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(level)


@torch.no_grad()
def _start(model: nn.Module, parts: Parts) -> None:
    """Let all norms take statistics, each part of what the float detector gives it."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # the statistics become plain means
    model.train()
    model.backbone(torch.randn(2, 3, 224, 224))
    values, head = parts.values, model.roi_head
    model.neck(values["backbone"])
    model.rpn_head(values["neck"])
    head.bbox_head(values["box_align"].clone())
    head.mask_head(values["mask_align"].clone())
    model.eval()
