"""The packed Swin Transformer: the inference twin of ``mmbivit.BinarySwinTransformer``, needing torch alone."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmbivit.checks import UserError

from .modules import (
    FloatPatchMerging,
    OutputNorm,
    PackedDualBranchMLP,
    PackedPatchMerging,
    PackedWindowAttention,
    PatchEmbedding,
)

__all__ = ["PackedSwinTransformer"]


class PackedBlock(nn.Module):
    """Window attention, then the dual-branch MLP, both in place.

    Args:
        attn: attention with its norm and shortcut.
        mlp: dual branch with its norms and shortcut.
        shift: cyclic shift of the windows in tokens.
    """

    def __init__(self, attn: PackedWindowAttention, mlp: PackedDualBranchMLP, shift: int):
        super().__init__()
        self.attn = attn
        self.mlp = mlp
        self.shift = shift


class PackedStage(nn.Module):
    """Blocks of one resolution, then patch merging, or ``None`` in the last stage."""

    def __init__(self, blocks: Sequence[PackedBlock], downsample: nn.Module | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


class PackedSwinTransformer(nn.Module):
    """Swin Transformer that computes with bits; made by :func:`mmbivit.deploy.pack` or :func:`mmbivit.deploy.load`.

    All arguments are plain values, kept in ``config``; ``PackedSwinTransformer(**config)`` is an empty network for the
    same ``state_dict``.

    Args:
        embed_dims: channels of the first stage; each stage doubles them.
        depths: blocks of each stage.
        num_heads: attention heads of each stage.
        hidden_dims: hidden width of the MLP of each stage.
        si_hidden: hidden tokens of the spatial interaction; ``None`` for none.
        scales: factor of the attention scores of each stage.
        select_ratio: a key is selected where its softmax reaches this share of the row's maximum.
        window_size: tokens along a window, up to 31.
        patch_size: pixels along a patch.
        in_channels: channels of the image.
        out_indices: stages whose normalised output is returned.
        float_downsample: patch merging with float weights and inputs.
        pos_embed_shape: grid of a position embedding that is added to the tokens; ``None`` for none.
        shift_single_window: shift windows also where a feature map is not longer than one.
        mask_padding: never attend to tokens that pad a feature map to whole windows.

    Shape: images ``(B, in_channels, H, W)`` float32 -> tuple of ``(B, embed_dims * 2**i, ceil(H / (4 * 2**i)), ...)``
    for ``i`` in ``out_indices``. No gradients.

    Raises:
        ValueError: for impossible sizes; and from ``forward``, for input of another dtype, rank or number of channels.
    """

    def __init__(
        self,
        embed_dims: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        hidden_dims: Sequence[int],
        si_hidden: int | None,
        scales: Sequence[float],
        select_ratio: float = 0.25,
        window_size: int = 7,
        patch_size: int = 4,
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        float_downsample: bool = False,
        pos_embed_shape: Sequence[int] | None = None,
        shift_single_window: bool = True,
        mask_padding: bool = True,
    ):
        super().__init__()
        self.config: dict[str, Any] = {
            name: list(value) if isinstance(value, (list, tuple)) else value
            for name, value in locals().items()
            if name not in ("self", "__class__")
        }
        check_config(**self.config)
        self.num_features = [embed_dims * 2**i for i in range(len(depths))]
        self.out_indices = tuple(out_indices)
        self.window_size = window_size
        self.shift_single_window = shift_single_window
        self.mask_padding = mask_padding
        self.patch_embed = PatchEmbedding(in_channels, embed_dims, patch_size)
        shape = None if pos_embed_shape is None else (1, pos_embed_shape[0] * pos_embed_shape[1], embed_dims)
        self.register_buffer("absolute_pos_embed", None if shape is None else torch.zeros(shape))
        self.stages = nn.ModuleList()
        for i, channels in enumerate(self.num_features):
            blocks = [
                PackedBlock(
                    PackedWindowAttention(channels, num_heads[i], window_size, scales[i], -math.log(select_ratio)),
                    PackedDualBranchMLP(channels, hidden_dims[i], window_size**2, si_hidden),
                    shift=window_size // 2 if block % 2 else 0,
                )
                for block in range(depths[i])
            ]
            downsample = None
            if i < len(depths) - 1:
                downsample = FloatPatchMerging(channels) if float_downsample else PackedPatchMerging(channels)
            self.stages.append(PackedStage(blocks, downsample))
        for i in self.out_indices:
            self.add_module(f"norm{i}", OutputNorm(self.num_features[i]))
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the feature maps of ``out_indices``."""
        self._check(images)
        size = self.patch_embed.patch_size
        hw_shape = (-(-images.shape[2] // size), -(-images.shape[3] // size))
        x = self.patch_embed(images.contiguous())
        if self.absolute_pos_embed is not None:
            x = x + self._position_embedding(hw_shape)
        outputs = []
        for i, stage in enumerate(self.stages):
            for block in stage.blocks:
                layout = self._layout(hw_shape, block.shift)
                block.attn(x, layout)
                block.mlp(x, layout)
            if i in self.out_indices:
                outputs.append(getattr(self, f"norm{i}")(x, *hw_shape))
            if stage.downsample is not None:
                x = stage.downsample(x, *hw_shape)
                hw_shape = ((hw_shape[0] + 1) // 2, (hw_shape[1] + 1) // 2)
        return tuple(outputs)

    def _check(self, images: Tensor) -> None:
        channels = self.config["in_channels"]
        if images.ndim != 4 or images.shape[1] != channels or min(images.shape[2:]) < 1:
            raise UserError(f"images have shape {tuple(images.shape)}; expected (B, {channels}, H, W)")
        if images.dtype != torch.float32:
            raise UserError(f"images are {images.dtype}; packed networks take torch.float32 (normalised pixels)")

    def _layout(self, hw_shape: tuple[int, int], shift: int) -> list[int]:
        """Return height, width, window, shift and mask_padding, as the operators take them."""
        single = min(hw_shape) <= self.window_size and not self.shift_single_window
        return [*hw_shape, self.window_size, 0 if single else shift, int(self.mask_padding)]

    def _position_embedding(self, hw_shape: tuple[int, int]) -> Tensor:
        pretrained = tuple(self.config["pos_embed_shape"])
        if hw_shape == pretrained:
            return self.absolute_pos_embed
        grid = self.absolute_pos_embed.transpose(1, 2).unflatten(2, pretrained)
        return F.interpolate(grid, size=hw_shape, mode="bicubic").flatten(2).transpose(1, 2)


def check_config(
    embed_dims: int,
    depths: list[int],
    num_heads: list[int],
    hidden_dims: list[int],
    si_hidden: int | None,
    scales: list[float],
    select_ratio: float,
    window_size: int,
    patch_size: int,
    in_channels: int,
    out_indices: list[int],
    pos_embed_shape: list[int] | None,
    **switches: bool,
) -> None:
    """Raise a ValueError unless the arguments of :class:`PackedSwinTransformer` make a network."""
    sizes = dict(embed_dims=[embed_dims], depths=depths, num_heads=num_heads, hidden_dims=hidden_dims)
    sizes |= dict(window_size=[window_size], patch_size=[patch_size], in_channels=[in_channels])
    sizes |= dict(si_hidden=[] if si_hidden is None else [si_hidden], pos_embed_shape=pos_embed_shape or [])
    for name, values in sizes.items():
        if not isinstance(values, list) or not all(type(value) is int and value >= 1 for value in values):
            raise UserError(f"{name}={values}; expected whole numbers of 1 or more")
    stages = len(depths)
    if not 1 <= stages <= 8 or {len(num_heads), len(hidden_dims), len(scales)} != {stages}:
        raise UserError("depths, num_heads, hidden_dims and scales need one entry for each of 1 to 8 stages")
    for i, heads in enumerate(num_heads):
        if embed_dims * 2**i % heads:
            raise UserError(f"num_heads[{i}]={heads} does not divide {embed_dims * 2**i} channels")
        if embed_dims * 2**i // heads > 992:
            raise UserError(f"num_heads[{i}]={heads}: a head has {embed_dims * 2**i // heads} channels; allowed: 992")
    if not isinstance(out_indices, list) or sorted(set(out_indices)) != out_indices or not out_indices:
        raise UserError(f"out_indices={out_indices}; expected rising numbers of stages")
    if not all(type(i) is int and 0 <= i < stages for i in out_indices):
        raise UserError(f"out_indices={out_indices}; allowed: 0 to {stages - 1}")
    if window_size > 31 or (si_hidden or 0) > 961:
        raise UserError(f"window_size={window_size}, si_hidden={si_hidden}; allowed: up to 31 and 961")
    if not all(isinstance(scale, float) and abs(scale) <= 1e5 for scale in scales) or not 0 < select_ratio <= 1:
        raise UserError(f"scales={scales}, select_ratio={select_ratio}; expected numbers up to 1e5, and one in (0, 1]")
    if pos_embed_shape is not None and len(pos_embed_shape) != 2:
        raise UserError(f"pos_embed_shape={pos_embed_shape}; expected height and width")
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise UserError(f"{name}={value!r}; expected True or False")
