"""The transformer block: attention, then the dual branch, each with a norm and a shortcut."""

from abc import abstractmethod

from timm.layers import DropPath
from torch import Tensor, nn

from mmbivit.binary import Recipe

from .attention import MultiHeadAttention
from .layout import TokenLayout, norm_tokens
from .mlp import DualBranchMLP
from .recomputation import RecomputableBlock

__all__ = ["TransformerBlock"]


class TransformerBlock(RecomputableBlock):
    """Base of blocks ``x + attn(norm1(x))``, then ``x + mlp(x)``; a subclass says how tokens lie.

    Args:
        embed_dims: channels ``C``.
        attn: attention inside the groups of :meth:`layout`.
        mlp: dual branch, which mixes the tokens of the groups of :meth:`mixing_layout`.
        recipe: which norm to build.
        drop_path: probability of dropping a branch of a sample.
        with_cp: recompute the block in the backward pass.
        mask_padding: never attend to what fills up groups.

    Shape: ``(B, N, C) -> (B, N, C)``.
    """

    def __init__(
        self,
        embed_dims: int,
        attn: MultiHeadAttention,
        mlp: DualBranchMLP,
        recipe: Recipe,
        drop_path: float = 0.0,
        with_cp: bool = False,
        mask_padding: bool = True,
    ):
        super().__init__(with_cp)
        self.mask_padding = mask_padding
        self.norm1 = recipe.norm_layer(embed_dims)
        self.attn = attn
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    @abstractmethod
    def layout(self, hw_shape: tuple[int, int]) -> TokenLayout:
        """Return within which groups the tokens of a grid of ``hw_shape`` attend to each other."""

    def mixing_layout(self, hw_shape: tuple[int, int]) -> TokenLayout:
        """Return within which groups they are mixed; by default the same."""
        return self.layout(hw_shape)

    def _forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        layout = self.layout(hw_shape)
        mask = layout.attention_mask(self.mask_padding, x.device)
        x = x + self.drop_path(layout.merge(self.attn(layout.split(norm_tokens(self.norm1, x)), mask)))
        return x + self.drop_path(self.mlp(x, self.mixing_layout(hw_shape)))
