"""Attention maps: which tokens of the image one token attends to."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mmbivit.checks import UserError
from mmbivit.models.attention import find_attention
from mmbivit.models.backbone import Block, find_block
from mmbivit.models.layout import BESIDE, PADDING, TokenLayout
from mmbivit.models.observation import observed

from .unchanged import unchanged

__all__ = ["AttentionMap", "attention_map"]


@dataclass(frozen=True)
class AttentionMap:
    """Which tokens one token of a block attends to, on the grid ``H' x W'`` of the block's tokens.

    Args:
        block: name of the block.
        weights: attention weights by head and token, ``(heads, H', W')``; NaN for tokens that the asking token cannot
            see: those outside its group, as of a window, and those that a shifted window has from the opposite border.
        query: row and column of the asking token.
        stride: pixels along a token.
        padding: by head, the sum of weights on the padding of a window at the border, ``(heads,)``.
        binary: whether weights are selections, ``1 / number selected`` or 0, instead of probabilities.
        beside: by head, the sum of weights on tokens beside the grid, such as a class token, ``(heads,)``; ``None``
            where there are none.
    """

    block: str
    weights: np.ndarray
    query: tuple[int, int]
    stride: int
    padding: np.ndarray
    binary: bool
    beside: np.ndarray | None = None

    @property
    def visible(self) -> np.ndarray:
        """Which tokens the asking token can see, ``(H', W')``."""
        return ~np.isnan(self.weights[0])


def attention_map(
    network: nn.Module, image: Tensor, block: str | None = None, query: tuple[int, int] | None = None
) -> AttentionMap:
    """Run a backbone on an image and return what one token attends to.

    Args:
        network: a :class:`mmbivit.models.Backbone` of any recipe, or mmdet's ``SwinTransformer``.
        image: normalised image ``(1, 3, H, W)``.
        block: name of a block, by default the last of the first stage.
        query: pixel ``(x, y)`` whose token asks, the middle of the image by default.

    Raises:
        ValueError: if there is no such block or pixel, or the network is of another kind.
    """
    found = find_block(network, block)
    height, width = image.shape[-2:]
    x, y = query or (width // 2, height // 2)
    if not (0 <= x < width and 0 <= y < height):
        raise UserError(
            f"pixel {x} {y} is not in the image, which has {width} x {height} pixels where the network gets it; "
            f"allowed: 0 to {width - 1} and 0 to {height - 1}"
        )
    weights, binary = _run(network, image, found)
    token = (y // found.stride, x // found.stride)
    layout = found.layout(found.hw_shape((height, width)))
    on_grid, on_padding, beside = _of_token(weights, layout, token)
    return AttentionMap(found.name, on_grid, token, found.stride, on_padding, binary, beside)


def _run(network: nn.Module, image: Tensor, block: Block) -> tuple[Tensor, bool]:
    """Return the attention weights of a block, ``(groups, heads, n, keys)``, and whether they are binary."""
    softmax = _softmax(block)
    seen = {}
    watching = observed(dict(weights=softmax), lambda name, _, output: seen.update({name: output}))
    with torch.no_grad(), unchanged(network, training=False), watching:
        network(image)
    return seen["weights"].float().cpu(), getattr(softmax, "bits", 32) == 1


def _softmax(block: Block) -> nn.Module:
    """Return the part of a block that makes scores into weights: our attention's, or the one softmax of another's."""
    if (found := find_attention(block.module)) is None:
        raise UserError(
            f"the attention of {type(block.module).__name__} cannot be looked at; allowed: blocks of "
            "mmbivit's backbones and of mmdet.SwinTransformer"
        )
    return found[1]


def _of_token(
    weights: Tensor, layout: TokenLayout, token: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Take one query's weights out of ``(groups, heads, n, keys)``: on the grid, on padding, and beside the grid."""
    height, width = layout.hw_shape
    tokens = layout.grid_tokens()
    group, position = (tokens == token[0] * width + token[1]).nonzero()[0].tolist()
    keys, of_query = tokens[group], layout.spread(weights[group, :, position])
    visible = keys >= 0
    if (mask := layout.attention_mask(mask_padding=False)) is not None:
        visible &= ~mask[group, position]
    on_grid = torch.full((len(of_query), height * width), torch.nan)
    on_grid[:, keys[visible]] = of_query[:, visible]
    on_padding, beside = (of_query[:, keys == kind].sum(dim=1).numpy() for kind in (PADDING, BESIDE))
    return on_grid.view(-1, height, width).numpy(), on_padding, beside if (keys == BESIDE).any() else None
