"""The dual branch: an MLP over channels beside a binary MLP over tokens (SI-BiViT 3.3.1)."""

import torch
from torch import Tensor, nn

from mmbivit.binary import ActivationQuantizer, BinaryLinear, Recipe, product_and_act, scaled_product
from mmbivit.checks import UserError

from .arch import MixingSettings
from .layout import TokenLayout, norm_tokens

__all__ = ["DualBranchMLP", "SpatialInteraction", "build_mixing"]


class Transposed(nn.Module):
    """A module that takes channels last, on ``(*, C, n)``."""

    def __init__(self, part: nn.Module):
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x.transpose(-1, -2)).transpose(-1, -2)


class TransposedQuantizer(ActivationQuantizer):
    """A quantizer of channels, on ``(*, C, n)``. It does not fold: packed layers have thresholds for tokens."""

    def __init__(self, part: ActivationQuantizer):
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x.transpose(-1, -2)).transpose(-1, -2)

    def kept_levels(self, x: Tensor) -> Tensor | None:
        levels = self.part.kept_levels(x)
        return levels if levels is None or levels.shape[1] == 1 else None  # those of channels do not fit tokens


class SpatialInteraction(nn.Module):
    """Token mixing across the tokens of a group: ``alpha * SI(x^T)^T`` (SI-BiViT, Eq. 8, and supplement 3).

    ``SI`` is a linear layer over tokens ``n -> n'``, an activation and a linear layer ``n' -> n``, shared by all
    channels. ``alpha`` is the channel-wise balancing factor, by default 0 at the start, so that adding the branch
    changes nothing.

    Args:
        embed_dims: channels ``C``.
        num_tokens: tokens ``n`` of a group, such as a window.
        ratio: ``n' / n``.
        recipe: which quantizers to build.
        alpha_init: where alpha starts.
        per: ``'token'`` gives thresholds and the activation function parameters for each token, as the linear layers
            have; ``'channel'`` for each channel, as Eq. 3 and Algorithm 1 of the paper suggest.

    Shape: ``(B * groups, n, C) -> (B * groups, n, C)``.
    """

    def __init__(
        self,
        embed_dims: int,
        num_tokens: int,
        ratio: float,
        recipe: Recipe,
        alpha_init: float = 0.0,
        per: str = "token",
    ):
        super().__init__()
        hidden = int(num_tokens * ratio)
        if hidden < 1:
            raise UserError(f"spatial_interaction.ratio={ratio} leaves no hidden token of {num_tokens}")
        self.norm = recipe.norm_layer(embed_dims)
        self.fc1 = recipe.build_linear(num_tokens, hidden, place="fc1")
        self.act = recipe.build_act(hidden)
        self.fc2 = recipe.build_linear(hidden, num_tokens, place="fc2")
        if per == "channel":
            self.act = Transposed(recipe.build_act(embed_dims))
            for place, layer in (("fc1", self.fc1), ("fc2", self.fc2)):
                if isinstance(layer, BinaryLinear):
                    layer.input_quantizer = TransposedQuantizer(recipe.build_input_quantizer(embed_dims, place))
        self.alpha = nn.Parameter(torch.full((embed_dims,), float(alpha_init)))
        self.active = True  # a training stage may let it idle

    def forward(self, groups: Tensor) -> Tensor:
        hidden = product_and_act(self.fc1, self.act, groups.transpose(1, 2))
        return scaled_product(self.fc2, self.alpha, hidden).transpose(1, 2)


def build_mixing(
    embed_dims: int, num_tokens: int, recipe: Recipe, settings: MixingSettings | None
) -> SpatialInteraction | None:
    """Build the token mixing branch over so many tokens, if there are settings of one."""
    if settings is None:
        return None
    return SpatialInteraction(embed_dims, num_tokens, settings.ratio, recipe, settings.alpha_init, settings.per)


class DualBranchMLP(nn.Module):
    """``MLP(norm1(x)) + alpha * SI(norm2(x)^T)^T`` (SI-BiViT, Fig. 3 and supplement 3).

    Args:
        embed_dims: channels ``C``.
        hidden_dims: hidden width of the MLP branch.
        recipe: which quantizers, activation function and norm to build.
        spatial_interaction: the token mixing branch, or ``None`` for a plain MLP.
        drop: dropout rate after the activation function and of the output of the MLP branch.

    Shape: ``(B, L, C) -> (B, L, C)``.
    """

    def __init__(
        self,
        embed_dims: int,
        hidden_dims: int,
        recipe: Recipe,
        spatial_interaction: SpatialInteraction | None = None,
        drop: float = 0.0,
    ):
        super().__init__()
        self.norm = recipe.norm_layer(embed_dims)
        self.fc1 = recipe.build_linear(embed_dims, hidden_dims, place="fc1")
        self.act = recipe.build_act(hidden_dims)
        self.fc2 = recipe.build_linear(hidden_dims, embed_dims, place="fc2")
        self.drop = nn.Dropout(drop)
        self.si = spatial_interaction

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Apply both branches; ``layout`` says in which groups the second one mixes tokens."""
        hidden = product_and_act(self.fc1, self.act, norm_tokens(self.norm, x))
        mlp = self.drop(self.fc2(self.drop(hidden)))
        if self.si is None or not self.si.active:
            return mlp
        return mlp + layout.merge(self.si(layout.split(norm_tokens(self.si.norm, x))))
