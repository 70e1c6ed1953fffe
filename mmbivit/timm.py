"""The classifiers in timm's registry: ``import mmbivit.timm``, then ``timm.create_model('sibivit_deit_small')``.

They take timm's arguments (``num_classes``, ``in_chans``, ``img_size``, ``drop_rate``, ``drop_path_rate``) and those of
the backbone, such as ``recipe``. A new one is in the last stage of training, where all is binary, so that timm's own
training loop works on it; the two stages of SI-BiViT are trained by ``tools/train.py``. What
``timm.models.save_for_hf`` writes, ``timm.create_model('local-dir:FOLDER')`` and ``'hf-hub:NAME'`` read.
"""

import copy
from collections.abc import Callable
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from mmbivit.models import ImageClassifier

__all__ = ["TimmClassifier"]

_SI = dict(recipe="sibivit", mlp_ratio=3, spatial_interaction=dict(ratio=1.0))
_VIT = dict(type="mmbivit.BinaryVisionTransformer", out_type="cls_token", **_SI)
_SWIN = dict(
    type="mmbivit.BinarySwinTransformer", out_indices=(3,), shift_single_window=False, downsample="float"
) | dict(_SI, spatial_interaction=dict(ratio=1.0, axis="grid"))
_NEST = dict(type="mmbivit.BinaryNesT", out_indices=(2,), **_SI)
_SIZES = ("tiny", "small", "base")
_NETWORKS: dict[str, dict[str, Any]] = {
    **{f"sibivit_vit_{arch}": dict(_VIT, arch=arch) for arch in _SIZES},
    **{f"sibivit_deit_{arch}": dict(_VIT, arch=arch) for arch in _SIZES},
    **{f"sibivit_swin_{arch}": dict(_SWIN, arch=arch) for arch in _SIZES},
    **{f"sibivit_nest_{arch}": dict(_NEST, arch=arch) for arch in _SIZES},
    "binaryvit_small": dict(type="mmbivit.BinaryViT", out_indices=(3,)),
}
_HALF = (0.5, 0.5, 0.5)


def _default_cfg(name: str) -> dict[str, Any]:
    vit = "_vit_" in name
    return dict(
        input_size=(3, 224, 224),
        fixed_input_size=True,
        pool_size=None,
        crop_pct=0.875,
        interpolation="bicubic",
        mean=_HALF if vit else IMAGENET_DEFAULT_MEAN,
        std=_HALF if vit else IMAGENET_DEFAULT_STD,
        first_conv="backbone.patch_embed.proj",
        classifier="head",
    )


default_cfgs = generate_default_cfgs({name: _default_cfg(name) for name in _NETWORKS})


class TimmClassifier(ImageClassifier):
    """An :class:`mmbivit.ImageClassifier` with what timm asks of its models.

    Args:
        backbone: config of the backbone.
        num_classes: classes of the head.
        in_chans: channels of the images.
        img_size: height and width of the images in pixels, or both alike.
        drop_rate: dropout of the pooled features.
        options: other arguments of the backbone.

    Shape: images ``(B, in_chans, H, W)`` -> logits ``(B, num_classes)``.
    """

    def __init__(
        self,
        backbone: dict[str, Any],
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 224,
        drop_rate: float = 0.0,
        **options: Any,
    ):
        backbone = copy.deepcopy(backbone) | dict(in_channels=in_chans, pretrain_img_size=img_size) | options
        super().__init__(backbone, num_classes, drop_rate=drop_rate)
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.head.in_features

    def forward_features(self, x: Tensor) -> Tensor:
        """Return what is classified, ``(B, C, H, W)``."""
        return self.backbone(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Classify features, or pool them."""
        pooled = self.drop(x.mean(dim=(2, 3)))
        return pooled if pre_logits else self.head(pooled)

    def get_classifier(self) -> nn.Linear:
        """Return the head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give it a new head."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks again in the backward pass."""
        for block in self.backbone.blocks():
            block.module.with_cp = enable

    def no_weight_decay(self) -> set[str]:
        """Return what does not decay: positions, and tokens beside the grid."""
        ends = ("absolute_pos_embed", "extra_embed", "relative_position_bias_table")
        return {name for name, _ in self.named_parameters() if name.endswith(ends)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return how timm's layer decay groups parameters."""
        stem = r"^backbone\.(?:patch_embed|absolute_pos_embed|extra_embed)"
        stage = r"^backbone\.stages\.(\d+)"
        if coarse:
            return dict(stem=stem, blocks=stage)
        after = (10**6,)  # the blocks of its stage
        blocks = [
            (stage + r"\.blocks\.(\d+)", None),
            (stage + r"\.(?:downsample|pool|pos_embed)", after),
            (r"^backbone\.norm", after),
        ]
        return dict(stem=stem, blocks=blocks)


def _entry(name: str, backbone: dict[str, Any]) -> Callable[..., TimmClassifier]:
    def create(pretrained: bool = False, **options: Any) -> TimmClassifier:
        return build_model_with_cfg(TimmClassifier, name, pretrained, backbone=backbone, **options)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"Build ``{name}``; see :class:`TimmClassifier`."
    return create


for _name, _backbone in _NETWORKS.items():
    globals()[_name] = register_model(_entry(_name, _backbone))
