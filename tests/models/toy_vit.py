"""A backbone from outside: a plain ViT whose class token attends and is mixed along with one grid of tokens."""

from dataclasses import dataclass

import torch
from torch import nn

from mmbivit.binary import get_recipe
from mmbivit.models import Attention, Backbone, DualBranchMLP, SpatialInteraction, TokenLayout
from mmbivit.models.layout import BESIDE, norm_tokens
from mmbivit.models.patch import PatchEmbed
from mmbivit.models.recomputation import RecomputableBlock

SIDE = 4  # of the grid that the network is made for


@dataclass(frozen=True)
class AllTokens(TokenLayout):
    """One group: a class token, then the grid."""

    hw_shape: tuple[int, int]

    def split(self, x):
        return x

    def merge(self, groups):
        return groups

    def grid_tokens(self):
        return torch.tensor([[BESIDE, *range(self.hw_shape[0] * self.hw_shape[1])]])


class GlobalAttention(Attention):
    def __init__(self, channels, heads, recipe):
        super().__init__()
        self.num_heads = heads
        self.qkv = recipe.build_linear(channels, 3 * channels)
        self.qkv_quantizer = recipe.build_qkv_quantizer(3 * channels)
        self.attention = recipe.build_attention()
        self.proj = recipe.build_linear(channels, channels)

    def forward(self, x):
        batch, tokens, channels = x.shape
        qkv = self.qkv_quantizer(self.qkv(x)).view(batch, tokens, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        weights = self.attention(query @ key.transpose(-2, -1) / (channels / self.num_heads) ** 0.5)
        return self.proj((weights @ value).transpose(1, 2).flatten(2))


class ToyViTBlock(RecomputableBlock):
    def __init__(self, recipe, si):
        super().__init__(False)
        self.norm = recipe.norm_layer(8)
        self.self_attn = GlobalAttention(8, 2, recipe)
        mixing = SpatialInteraction(8, SIDE**2 + 1, 1.0, recipe) if si else None
        self.mlp = DualBranchMLP(8, 24, recipe, mixing)

    def layout(self, hw_shape):
        return AllTokens(hw_shape)

    def _forward(self, x, hw_shape):
        layout = self.layout(hw_shape)
        x = x + layout.merge(self.self_attn(layout.split(norm_tokens(self.norm, x))))
        return x + self.mlp(x, layout)


class ToyViT(Backbone):
    def __init__(self, recipe="sibivit", si=True):
        super().__init__(1, (0,), "activations", -1, norm_eval=False, convert_weights=True, init_cfg=None)
        recipe = get_recipe(recipe)
        self.num_features, self.strides = [8], [8]
        self.patch_embed = PatchEmbed(3, 8, 8, None)
        self._add_position_embedding((SIDE, SIDE), 8)
        self.class_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.drop_after_pos = nn.Dropout(0.0)
        self.stages = nn.ModuleList([nn.Module()])
        self.stages[0].blocks = nn.ModuleList(ToyViTBlock(recipe, si) for _ in range(2))
        self.norm0 = recipe.norm_layer(8)
        self._finish_init()

    def forward(self, images):
        x, hw_shape = self.embed(images)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks():
            x = block.module(x, hw_shape)
        return (self.feature_map(x[:, 1:], hw_shape, 0),)
