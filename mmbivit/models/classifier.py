"""Image classification with a binary or float backbone: what is pretrained is what a detector fine-tunes."""

import copy
from collections.abc import Sequence
from typing import Any

from mmengine.model import BaseModel
from timm.layers import trunc_normal_
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from mmbivit.checkpoints import register_classifier_key_mapping
from mmbivit.checks import UserError, check_integer, check_number
from mmbivit.registry import MODELS

from .arch import check_init_cfg

__all__ = ["ImageClassifier"]


@MODELS.register_module()
class ImageClassifier(BaseModel):
    """Backbone, global average pooling and a float linear head (SI-BiViT 4.1.1 leaves the classifier in float).

    The loss is timm's cross-entropy: with label smoothing for class numbers, with soft targets where the data
    preprocessor has mixed images.

    Args:
        backbone: config of a backbone that returns feature maps; the last one is classified.
        num_classes: classes of the head.
        topk: predictions per image, fewer where there are fewer classes.
        label_smoothing: share of the target that is spread over all classes, in [0, 1).
        drop_rate: dropout of the pooled features.
        data_preprocessor: config, :class:`mmbivit.models.ClassificationPreprocessor` by default; ``num_classes`` and
            ``label_smoothing`` are filled in.
        init_cfg: ``dict(type='Pretrained', checkpoint=...)`` of a whole classifier. Float classifiers of timm and the
            official Swin are accepted, as by ``load_from``.

    Raises:
        ValueError: for an impossible setting, or when a checkpoint with another number of classes is loaded.
    """

    # What the training data was; the class names of predictions. Set from a checkpoint's ``meta['dataset_meta']``.
    dataset_meta: dict[str, Any] | None = None

    def __init__(
        self,
        backbone: dict,
        num_classes: int,
        topk: int = 5,
        label_smoothing: float = 0.1,
        drop_rate: float = 0.0,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ):
        check_integer("num_classes", num_classes, 2, 10**7)
        check_integer("topk", topk, 1)
        check_number("label_smoothing", label_smoothing, 0, 1, below=True)
        check_number("drop_rate", drop_rate, 0, 1, below=True)
        for name, value in (("backbone", backbone), ("data_preprocessor", data_preprocessor or {})):
            if not isinstance(value, dict):
                raise UserError(f"{name}={value!r}; allowed: the config of one, a dict with 'type'")
        check_init_cfg(init_cfg)
        preprocessor = dict(type="mmbivit.ClassificationPreprocessor") | copy.deepcopy(data_preprocessor or {})
        if preprocessor.get("mixup"):
            preprocessor = dict(num_classes=num_classes, label_smoothing=label_smoothing) | preprocessor
        super().__init__(data_preprocessor=preprocessor, init_cfg=init_cfg)
        self.backbone = MODELS.build(backbone)
        if not hasattr(self.backbone, "num_features") or not hasattr(self.backbone, "out_indices"):
            raise UserError(
                f"backbone.type={type(self.backbone).__name__} has no num_features and out_indices, which say how many "
                "channels it returns; allowed: backbones of mmbivit, and mmdet.SwinTransformer"
            )
        self.topk = min(topk, num_classes)
        self.drop = nn.Dropout(drop_rate)
        channels = getattr(self.backbone, "out_channels", self.backbone.num_features)
        self.head = nn.Linear(channels[self.backbone.out_indices[-1]], num_classes)
        trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.hard_loss = LabelSmoothingCrossEntropy(label_smoothing)
        self.soft_loss = SoftTargetCrossEntropy()
        register_classifier_key_mapping(self)

    def forward(
        self,
        inputs: Tensor,
        labels: Tensor | None = None,
        mode: str = "tensor",
        img_path: Sequence[str] | None = None,
    ) -> Tensor | dict[str, Tensor] | list[dict[str, Any]]:
        """Classify a batch that the data preprocessor has normalised.

        Args:
            inputs: images ``(B, 3, H, W)``.
            labels: class numbers ``(B,)``, or class shares ``(B, num_classes)`` of mixed images.
            mode: ``'tensor'``, ``'loss'`` or ``'predict'``.
            img_path: where the images come from; returned with the predictions.

        Returns:
            ``'tensor'``: logits ``(B, num_classes)``. ``'loss'``: ``dict(loss_cls=...)``. ``'predict'``: for each
            image a dict of ``pred_labels`` and ``pred_scores`` ``(topk,)``, best first, their ``pred_names`` if
            ``dataset_meta`` is known, and ``label`` and ``img_path`` if given.
        """
        logits = self.head(self.drop(self.backbone(inputs)[-1].mean(dim=(2, 3))))
        if mode == "tensor":
            return logits
        if mode == "loss":
            loss = self.soft_loss if labels.ndim == 2 else self.hard_loss  # type: ignore[union-attr]  # a loss has labels
            return dict(loss_cls=loss(logits.float(), labels))
        if mode == "predict":
            return self._predictions(logits, labels, img_path)
        raise UserError(f"mode={mode!r}; allowed: 'tensor', 'loss', 'predict'")

    def _predictions(
        self, logits: Tensor, labels: Tensor | None, img_path: Sequence[str] | None
    ) -> list[dict[str, Any]]:
        scores, indices = (best.cpu() for best in logits.float().softmax(dim=1).topk(self.topk))
        names = (self.dataset_meta or {}).get("classes")
        predictions = []
        for i in range(len(logits)):
            prediction: dict[str, Any] = dict(pred_labels=indices[i], pred_scores=scores[i])
            if names is not None:
                prediction["pred_names"] = [names[label] for label in indices[i].tolist()]
            if labels is not None:
                prediction["label"] = int(labels[i])
            if img_path is not None:
                prediction["img_path"] = img_path[i]
            predictions.append(prediction)
        return predictions
