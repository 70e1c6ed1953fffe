"""The float and the binary backbone that the benchmark compares."""

import torch
from torch import nn

from mmbivit.binary import RPReLU, RSign
from mmbivit.models.mlp import SpatialInteraction

from .runtimes import Network

__all__ = ["make_networks"]


def make_networks(arch: str | dict = "tiny") -> dict[bool, Network]:
    """Build the two backbones that are compared, with random weights: ``{binary: network}``.

    The float one is Swin itself. The binary one is SI-BiViT's: spatial interaction, MLP ratio 3. Its norms, biases,
    thresholds and slopes are random too, and the norms' statistics are those of random images, so that no operation
    meets the zeros and ones of a fresh network.
    """
    stages = 4 if isinstance(arch, str) else len(arch["depths"])
    config = dict(arch=arch, out_indices=tuple(range(stages)), drop_path_rate=0.0)
    torch.manual_seed(0)
    networks = {
        False: Network.build(recipe="float", **config),
        True: Network.build(recipe="sibivit", mlp_ratio=3, spatial_interaction=dict(ratio=1.0), **config),
    }
    _randomise(networks[True].model)
    return networks


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
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
    model.train()(torch.randn(2, 3, 112, 112))
    model.eval()
