"""Distributions of activations before they are binarized."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmbivit.binary import ActivationQuantizer
from mmbivit.checks import UserError
from mmbivit.models.backbone import find_block
from mmbivit.models.observation import observed

from .unchanged import unchanged

__all__ = ["ActivationDistribution", "activation_distributions"]

BINS = 4096


@dataclass(frozen=True)
class ActivationDistribution:
    """What reaches the thresholds of one layer.

    Args:
        layer: name in the block, such as ``mlp.fc1`` for its input, or ``attn.q`` for the queries.
        edges: of the histogram, ``(bins + 1,)``.
        counts: values in each bin, ``(bins,)``.
        gamma: thresholds, one per channel (per token in the spatial interaction branch, unless ``per='channel'``).
        positive: share of values that become +1, those with ``x >= gamma`` (SI-BiViT, Eq. 3).
        inside: share of values through which a gradient passes, those with ``|x - gamma| <= 1`` (Eq. 2).
    """

    layer: str
    edges: np.ndarray
    counts: np.ndarray
    gamma: np.ndarray
    positive: float
    inside: float


def activation_distributions(
    network: nn.Module, images: Iterable[Tensor], block: str | None = None
) -> tuple[str, list[ActivationDistribution]]:
    """Run a backbone on images and return how the activations of a block lie about their thresholds.

    Values are those that the layers get, with the zeros that fill up windows at the border. The memory does not depend
    on the number of images.

    Args:
        network: a :class:`mmbivit.models.Backbone`.
        images: normalised images ``(B, 3, H, W)``.
        block: name of a block, by default the last of the first stage.

    Returns:
        The block's name, and the distributions in the order of its layers.

    Raises:
        ValueError: if there is no such block or no image, if nothing in the block has thresholds, or if a value is no
            number.
    """
    found = find_block(network, block)
    quantizers = {
        layer: part
        for layer, part in found.module.named_modules()
        if isinstance(part, ActivationQuantizer) and part.thresholds is not None
    }
    if not quantizers:
        raise UserError(f"nothing in block {found.name} is binarized with a threshold")
    tallies = {layer: _tallies(layer, part.thresholds.detach()) for layer, part in quantizers.items()}

    def see(layer: str, args: tuple, output: Tensor) -> None:
        for tally, x in zip(tallies[layer], args[0].chunk(len(tallies[layer]), dim=-1), strict=True):
            tally.add(x.float())

    with torch.no_grad(), unchanged(network, training=False), observed(quantizers, see):
        for image in images:
            network(image)
    return found.name, [tally.result() for of_layer in tallies.values() for tally in of_layer]


def _tallies(layer: str, gamma: Tensor) -> list["_Tally"]:
    """Return an empty tally for a layer's input, or for each of queries, keys and values, which share a quantizer."""
    if layer.endswith(".qkv_quantizer"):
        stem = layer.removesuffix("qkv_quantizer")
        return [_Tally(stem + part, of_part) for part, of_part in zip("qkv", gamma.chunk(3), strict=True)]
    return [_Tally(layer.partition(".input_quantizer")[0], gamma)]


class _Tally:
    """Counts values in bins of equal width, whose range about 0 doubles as far as values need it."""

    def __init__(self, layer: str, gamma: Tensor):
        self.layer = layer
        self.gamma = gamma
        self.limit = 1.0
        self.counts = torch.zeros(BINS, dtype=torch.int64, device=gamma.device)
        self.positive = self.inside = 0

    def add(self, x: Tensor) -> None:
        """Count the values of ``(*, C)``."""
        if not x.isfinite().all():
            raise UserError(f"{self.layer} gets values that are no numbers, or infinite; was the checkpoint damaged?")
        while x.abs().max() > self.limit:
            self.limit *= 2
            self.counts = F.pad(self.counts.view(-1, 2).sum(dim=1), (BINS // 4, BINS // 4))
        bins = (x * (BINS / 2 / self.limit)).floor().long() + BINS // 2
        self.counts += bins.flatten().clamp_(max=BINS - 1).bincount(minlength=BINS)
        self.positive += int((x >= self.gamma).sum())
        self.inside += int(((x - self.gamma).abs() <= 1).sum())

    def result(self) -> ActivationDistribution:
        """Return what was counted."""
        total = int(self.counts.sum())
        if not total:
            raise UserError("no image was given, so there are no activations")
        edges = np.linspace(-self.limit, self.limit, BINS + 1)
        counts, gamma = self.counts.cpu().numpy(), self.gamma.float().cpu().numpy()
        return ActivationDistribution(self.layer, edges, counts, gamma, self.positive / total, self.inside / total)
