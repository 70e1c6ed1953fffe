"""The packed transformer block, and the part of a packed network's configuration that says what it is made of."""

from dataclasses import dataclass, fields

from torch import nn

from mmbivit.checks import UserError, check_choice

from .modules import SELECTIONS, PackedAttention, PackedDualBranchMLP, PackedWindowAttention
from .network import PackedConfig
from .residual import PackedResidualAttention, PackedResidualMLP

__all__ = ["PackedBlock", "PackedBlockConfig"]


class PackedBlock(nn.Module):
    """Attention, then the dual-branch MLP, both in place.

    Args:
        attn: attention with its norm and shortcut.
        mlp: dual branch with its norms and shortcut.
        shift: cyclic shift of the windows in tokens.
    """

    def __init__(self, attn: PackedAttention, mlp: nn.Module, shift: int = 0):
        super().__init__()
        self.attn = attn
        self.mlp = mlp
        self.shift = shift


@dataclass(frozen=True, kw_only=True)
class PackedBlockConfig(PackedConfig):
    """What all blocks of a packed network have in common.

    Attributes:
        mask_padding: never attend to tokens that pad a feature map to whole windows.
        norm: ``'bn'`` folded into what follows, or ``'ln'``, of which only the affine is.
        selection: what selects keys; one of :data:`mmbivit.packed.modules.SELECTIONS`.
        select_ratio: with ``'ratio'`` a key is selected where its softmax reaches this share of the row's maximum.
        divide: whether selected values are divided by their number.
        scaled_heads: whether each head has a factor of its scores.
        residual: whether every binary layer has a shortcut.
        head_shortcut: whether queries, keys and values are added to the heads' output; of residual networks.

    Raises:
        ValueError: for values that are not among these.
    """

    mask_padding: bool = True
    norm: str = "bn"
    selection: str = "ratio"
    select_ratio: float = 0.25
    divide: bool = True
    scaled_heads: bool = False
    residual: bool = False
    head_shortcut: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("norm", self.norm, ("bn", "ln"))
        check_choice("selection", self.selection, SELECTIONS)
        if not isinstance(self.select_ratio, (int, float)) or not 0 < self.select_ratio <= 1:
            raise UserError(f"select_ratio={self.select_ratio}; expected a number in (0, 1]")
        for field in fields(self):
            if field.type is bool and not isinstance(getattr(self, field.name), bool):
                raise UserError(f"{field.name}={getattr(self, field.name)!r}; expected True or False")
        if self.head_shortcut and not self.residual:
            raise UserError("head_shortcut=True is of residual networks; expected residual=True, or neither")

    def build_attention(
        self, embed_dims: int, num_heads: int, window_size: int | None, scale: float, layer_norm: float | None
    ) -> PackedAttention:
        """Build the attention of a block; see :class:`mmbivit.packed.modules.PackedAttention`."""
        options = dict(selection=self.selection, ratio=self.select_ratio, divide=self.divide)
        options |= dict(scaled_heads=self.scaled_heads, layer_norm=layer_norm)
        if self.residual:
            return PackedResidualAttention(embed_dims, num_heads, window_size, scale, self.head_shortcut, **options)
        return PackedWindowAttention(embed_dims, num_heads, window_size, scale, **options)

    def build_mlp(
        self, embed_dims: int, hidden_dims: int, num_tokens: int, si_hidden: int | None, layer_norm: float | None
    ) -> nn.Module:
        """Build the dual branch of a block; see :class:`mmbivit.packed.modules.PackedDualBranchMLP`."""
        mlp = PackedResidualMLP if self.residual else PackedDualBranchMLP
        return mlp(embed_dims, hidden_dims, num_tokens, si_hidden, layer_norm)
