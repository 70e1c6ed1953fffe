"""Binary networks with random parameters everywhere, so that no threshold is tied and no fold is trivial."""

import torch
from torch import nn

from mmbivit.binary import BinaryLinear, ElasticBinary, LearnedScale, RPReLU, RSign, ScaledSign
from mmbivit.models import BinarySwinTransformer, SpatialInteraction

ARCH = dict(embed_dims=8, depths=(2, 1), num_heads=(1, 2))
SI = dict(ratio=1.0)


def randomise(module: nn.Module, std: float = 0.3) -> nn.Module:
    """Draw norms (some gains negative), thresholds, slopes (some negative), biases and alphas; returns the module."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm1d):
            nn.init.normal_(m.running_mean, std=std)
            nn.init.uniform_(m.running_var, 0.5, 2)
            nn.init.normal_(m.weight, mean=0.5, std=0.6)
            nn.init.normal_(m.bias, std=std)
        elif isinstance(m, nn.LayerNorm):
            nn.init.normal_(m.weight, mean=0.5, std=0.6)
            nn.init.normal_(m.bias, std=std)
        elif isinstance(m, LearnedScale):
            nn.init.normal_(m.value, mean=0.1, std=0.1)  # some negative
        elif isinstance(m, (RSign, ScaledSign, ElasticBinary)) and m.gamma is not None:
            nn.init.normal_(m.gamma, std=std)
        elif isinstance(m, RPReLU):
            nn.init.normal_(m.gamma, std=std)
            nn.init.normal_(m.slope, mean=0.25, std=0.5)
            nn.init.normal_(m.zeta, std=std)
        elif isinstance(m, BinaryLinear):
            nn.init.normal_(m.weight, std=0.1)
            if m.bias is not None:
                nn.init.normal_(m.bias, std=std)
        elif isinstance(m, SpatialInteraction):
            nn.init.normal_(m.alpha, std=std)
        elif hasattr(m, "relative_position_bias_table"):
            nn.init.normal_(m.relative_position_bias_table, std=0.5)
    return module.eval()


def binary_swin(seed: int = 0, **kwargs) -> BinarySwinTransformer:
    """A small binary Swin with two stages, in evaluation."""
    torch.manual_seed(seed)
    kwargs = dict(arch=ARCH, mlp_ratio=3, spatial_interaction=SI, out_indices=(0, 1)) | kwargs
    return randomise(BinarySwinTransformer(**kwargs))
