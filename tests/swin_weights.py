"""Tiny Swins of timm with random weights, and their weights under the names of others."""

import torch
from timm.models.swin_transformer import SwinTransformer as TimmSwin
from torch import Tensor, nn

from mmbivit.models import ImageClassifier

__all__ = ["ARCH", "make_classifier", "make_timm_swin", "official_keys", "randomise"]

ARCH = dict(embed_dims=8, depths=(2, 2), num_heads=(1, 2))


def randomise(model: nn.Module) -> nn.Module:
    """Draw every parameter, those of norms and biases too, and return the model in evaluation."""
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.2)
    model.eval()  # not chained: mmdet's Swin returns None
    return model


def make_timm_swin() -> TimmSwin:
    """Return timm's Swin of two stages; at 112 pixels both feature maps are larger than a window."""
    options = dict(img_size=112, window_size=7, num_classes=3, drop_path_rate=0.0)
    return randomise(TimmSwin(embed_dim=8, depths=(2, 2), num_heads=(1, 2), **options))


def make_classifier(num_classes: int = 3, **backbone) -> ImageClassifier:
    """Return our classifier of the same size, float unless ``backbone`` says otherwise."""
    backbone = dict(arch=ARCH, recipe="float", out_indices=(1,), drop_path_rate=0.0) | backbone
    return ImageClassifier(dict(type="mmbivit.BinarySwinTransformer", **backbone), num_classes).eval()


def official_keys(timm_state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's state dict under the names of the official files: patch merging ends a stage, buffers are saved."""
    state = {}
    for key, value in timm_state.items():
        if key.startswith("layers.1.downsample."):
            key = key.replace("layers.1.", "layers.0.")
        state[key.replace("head.fc.", "head.")] = value
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(16, 49, 49)
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49)
    return state
