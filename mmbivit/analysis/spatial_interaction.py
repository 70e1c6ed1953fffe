"""Spatial interaction capability: how much the tokens of a binary network see of each other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmbivit.checks import UserError, check_integers
from mmbivit.models.attention import Attention
from mmbivit.models.backbone import find_blocks
from mmbivit.models.mlp import SpatialInteraction
from mmbivit.models.observation import observed
from mmbivit.models.stage import StagedModule

from .unchanged import unchanged

__all__ = ["InteractionRow", "SpatialInteractionCapability", "spatial_interaction"]


@dataclass(frozen=True)
class InteractionRow:
    """Spatial interaction capability of one module of a block.

    Args:
        block: name of the block in the backbone, such as ``stages.0.blocks.1``.
        module: name in the block of its attention, such as ``attn``, or of a linear layer of its token mixing, such as
            ``mlp.si.fc1``; ``mlp`` for the MLP over channels.
        tokens: tokens ``n`` of a group: those that attend to each other, as in a window, or are mixed.
        hidden_tokens: hidden tokens ``n'`` of the token mixing; ``None`` for the other modules.
        windows: groups of one image.
        sic: capability for one image (Eq. 6).
    """

    block: str
    module: str
    tokens: int
    hidden_tokens: int | None
    windows: int
    sic: int


@dataclass(frozen=True)
class SpatialInteractionCapability:
    """Spatial interaction capability of a network.

    Args:
        rows: of each module of each block, in the order of the network.
        input_shape: channels, height and width of the image.
    """

    rows: tuple[InteractionRow, ...]
    input_shape: tuple[int, int, int]

    @property
    def total(self) -> int:
        """Capability of the whole network."""
        return sum(row.sic for row in self.rows)

    @property
    def attention(self) -> int:
        """Capability of the attention alone."""
        return sum(row.sic for row in self.rows if row.hidden_tokens is None)  # MLPs over channels add 0

    @property
    def times(self) -> float:
        """Total relative to attention alone, the papers' "SIC times"; NaN where windows have a single token."""
        return self.total / self.attention if self.attention else math.nan

    def by_block(self) -> dict[str, tuple[int, int]]:
        """Return the capability of attention and of token mixing (both layers) by block."""
        sums: dict[str, tuple[int, int]] = {}
        for row in self.rows:
            attention, mixing = sums.get(row.block, (0, 0))
            if row.hidden_tokens is None:
                sums[row.block] = (attention + row.sic, mixing)
            else:
                sums[row.block] = (attention, mixing + row.sic)
        return sums


def spatial_interaction(module: nn.Module, input_shape: Sequence[int]) -> SpatialInteractionCapability:
    """Compute ``SIC = sum_i Inter(Z_i) * Range(Z_i)`` of each block (SI-BiViT, Eq. 6, 3.2 and 3.3.1).

    In a group of ``n`` tokens, such as a window, each token meets ``n - 1`` others, and in a binary network the
    strength of a meeting has a range of 2 values:

    - attention: ``2 n (n - 1)``, or ``2 n (m - 1)`` where keys are pooled and ``m`` of them are left; BinaryViT's
      branches that pool are no binary products and add nothing,
    - MLP over channels: 0, since each token is on its own,
    - each linear layer of the token mixing: ``2 n' (n - 1)`` with ``n'`` hidden tokens.

    The token mixing has two linear layers, ``n -> n'`` and ``n' -> n``. Counting each as above makes a network with it
    ``1 + 2 n' / n`` times one without, which are the papers' figures exactly: 3 times for ``n' = n`` (Table 7), 2 and
    5 for ``n / 2`` and ``2 n`` (Table 8), 7 for ``3 n`` (supplement, Table 2).

    All groups of one image are added up; token mixing may have other groups than attention. Eq. 6 knows no masks: keys
    that are masked, because a window is shifted or padded, count like any other.

    Args:
        module: a binary backbone of ours, or a classifier or detector with it as ``backbone``. It is run once, in
            evaluation mode, on an image of zeros; afterwards it is as before.
        input_shape: channels, height and width of the image in pixels.

    Raises:
        ValueError: for an impossible shape, and for a network without SIC: one without our blocks, with float attention
            or float token mixing, or not in its last training stage.
    """
    check_integers("input_shape", input_shape, 1, 100_000)
    if len(input_shape) != 3:
        raise UserError(f"input_shape={tuple(input_shape)}; allowed: (channels, height, width)")
    backbone = getattr(module, "backbone", module)
    parts = {
        (block, name): part
        for block, found in find_blocks(backbone).items()
        for name, part in found.module.named_modules()
        if isinstance(part, Attention | SpatialInteraction)
    }
    _check_binary(backbone, parts)
    groups_of = _groups(backbone, parts, input_shape)
    rows = []
    for (block, name), part in parts.items():
        groups, tokens, met = groups_of[block, name]
        if isinstance(part, Attention):
            rows.append(InteractionRow(block, name, tokens, None, groups, groups * 2 * tokens * (met - 1)))
            rows.append(InteractionRow(block, "mlp", tokens, None, groups, 0))
        else:
            hidden = part.fc1.out_features
            sic = groups * 2 * hidden * (met - 1)
            rows += [InteractionRow(block, f"{name}.{fc}", tokens, hidden, groups, sic) for fc in ("fc1", "fc2")]
    return SpatialInteractionCapability(tuple(rows), tuple(input_shape))


def _check_binary(backbone: nn.Module, parts: dict[tuple[str, str], Attention | SpatialInteraction]) -> None:
    """Raise where the range of an interaction is not 2."""
    if not any(isinstance(part, Attention) for part in parts.values()):
        raise UserError(
            f"{type(backbone).__name__} has no spatial interaction capability (Eq. 6): it is defined for binary "
            "attention, such as mmbivit.BinarySwinTransformer's"
        )
    if isinstance(backbone, StagedModule) and backbone.stage != backbone.last_stage:
        raise UserError(
            f"the network is in training stage {backbone.stage}, where it is not all binary; "
            f"give one of stage {backbone.last_stage}"
        )
    for (block, _), part in parts.items():
        if isinstance(part, Attention):
            what, bits = "attention", {getattr(part.attention, "bits", 32)}
        else:
            what, bits = "token mixing", {getattr(linear, "weight_bits", 32) for linear in (part.fc1, part.fc2)}
        if bits != {1}:
            raise UserError(
                f"the {what} of {block} is float, but spatial interaction capability (Eq. 6) is defined for a "
                "binary network; give a config with a binary recipe, such as 'sibivit'"
            )


def _groups(
    backbone: nn.Module, modules: dict[tuple[str, str], nn.Module], input_shape: Sequence[int]
) -> dict[tuple[str, str], tuple[int, int, int]]:
    """Run an image through the backbone; return groups, tokens of a group, and those that each meets, by module."""
    shapes: dict[tuple[str, str], tuple[int, int, int]] = {}
    seen = {key: part.attention if isinstance(part, Attention) else part for key, part in modules.items()}

    def see(key: tuple[str, str], args: tuple, output: Tensor) -> None:
        if isinstance(modules[key], Attention):
            groups, _, tokens, met = output.shape
        else:
            groups, tokens, _ = args[0].shape
            met = tokens
        shapes[key] = (groups, tokens, met)

    image = next(backbone.parameters()).new_zeros(1, *input_shape)
    try:
        with unchanged(backbone, training=False), observed(seen, see), torch.no_grad():
            backbone(image)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"input_shape={tuple(input_shape)} does not pass through the network: {reason}") from error
    return shapes
