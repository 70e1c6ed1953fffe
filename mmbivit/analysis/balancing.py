"""Balancing factors: how much of the spatial interaction each channel takes."""

import numpy as np
from torch import nn

from mmbivit.checks import UserError
from mmbivit.models.backbone import find_blocks
from mmbivit.models.mlp import SpatialInteraction

__all__ = ["balancing_factors"]


def balancing_factors(network: nn.Module) -> dict[str, np.ndarray]:
    """Return the balancing factor ``alpha`` of each channel, ``(C,)``, by block (SI-BiViT, Eq. 8 and 4.3.2).

    Args:
        network: a backbone with spatial interaction.

    Raises:
        ValueError: if it has none.
    """
    factors = {
        name: module.alpha.detach().float().cpu().numpy().copy()
        for name, block in find_blocks(network).items()
        for module in block.module.modules()
        if isinstance(module, SpatialInteraction)
    }
    if not factors:
        raise UserError(
            f"this {type(network).__name__} has no spatial interaction, so there are no balancing factors; "
            "a backbone with spatial_interaction=dict(ratio=1.0) has them"
        )
    return factors
