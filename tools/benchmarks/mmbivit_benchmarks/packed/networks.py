"""The float and the binary backbone that the benchmark compares."""

import torch
from torch import nn

from mmbivit.binary import RPReLU, RSign
from mmbivit.models.mlp import SpatialInteraction

from .runtimes import Network

__all__ = ["NETWORKS", "make_networks"]

# Title, and the backbone without what makes it float or binary.
NETWORKS = {
    "swin_t": ("Swin-T backbone", dict(type="mmbivit.BinarySwinTransformer", arch="tiny")),
    "deit_s": ("DeiT-S", dict(type="mmbivit.BinaryVisionTransformer", arch="small", out_type="cls_token")),
}


def make_networks(name: str = "swin_t", arch: dict | None = None, image_size: int = 112) -> dict[bool, Network]:
    """Build the two backbones that are compared, with random weights: ``{binary: network}``.

    The float one is the network itself. The binary one is SI-BiViT's: spatial interaction, MLP ratio 3. Its norms,
    biases, thresholds and slopes are random too, and the norms' statistics are those of random images, so that no
    operation meets the zeros and ones of a fresh network.

    Args:
        name: one of :data:`NETWORKS`.
        arch: another one.
        image_size: of the images that statistics are of, and of ViT's token mixing.
    """
    config = dict(NETWORKS[name][1], drop_path_rate=0.0)
    if arch is not None:
        config["arch"] = arch
    if name == "deit_s":
        config["pretrain_img_size"] = image_size
    torch.manual_seed(0)
    networks = {
        False: Network.build(recipe="float", **config),
        True: Network.build(recipe="sibivit", mlp_ratio=3, spatial_interaction=dict(ratio=1.0), **config),
    }
    _randomise(networks[True].model, image_size)
    return networks


@torch.no_grad()
def _randomise(model: nn.Module, image_size: int) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(std=0.2)
            module.momentum = None  # the statistics become plain means
        elif isinstance(module, RSign):
            module.gamma.normal_(std=0.2)
        elif isinstance(module, RPReLU):
            for parameter in (module.gamma, module.zeta):
                parameter.normal_(std=0.2)
            module.slope.normal_(0.25, std=0.2)
        elif isinstance(module, SpatialInteraction):
            module.alpha.normal_()
        elif isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.normal_(std=0.2)
    model.train()(torch.randn(2, 3, image_size, image_size))
    model.eval()
