"""Where tokens lie: groups of them that see each other, such as (shifted) windows, and norms over tokens."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["BESIDE", "PADDING", "AllTokens", "TokenLayout", "WindowLayout", "norm_tokens"]

PADDING, BESIDE = -1, -2  # no token of the grid: what fills up a group, and a token beside the grid


def norm_tokens(norm: nn.Module, x: Tensor) -> Tensor:
    """Normalise tokens over their channels, the same way for BatchNorm1d, SyncBatchNorm and LayerNorm.

    Args:
        norm: norm of ``C`` channels.
        x: tokens ``(B, N, C)``; BatchNorm takes its statistics over batch and tokens.
    """
    return norm(x.reshape(-1, x.shape[-1])).view(x.shape)


class TokenLayout(ABC):
    """How the tokens of an image form the groups within which they attend or are mixed.

    A block has tokens ``(B, N, C)``: those of a grid, row by row, and perhaps others, such as a class token.
    """

    hw_shape: tuple[int, int]  # height and width of the grid

    @abstractmethod
    def split(self, x: Tensor) -> Tensor:
        """Partition tokens ``(B, N, C)`` into groups ``(B * groups, n, C)``; padding is 0."""

    @abstractmethod
    def merge(self, groups: Tensor) -> Tensor:
        """Undo :meth:`split`; what lay on padding is cut."""

    @abstractmethod
    def grid_tokens(self) -> Tensor:
        """Return which token of the grid each one of a group is, ``(groups, n)``, row by row from 0.

        It is ``PADDING`` (-1) for padding, and ``BESIDE`` (-2) for tokens beside the grid, such as a class token.
        """

    def spread(self, weights: Tensor) -> Tensor:
        """Return attention weights ``(*, keys)`` by token, ``(*, n)``; the same where each token has its own key."""
        return weights

    def attention_mask(self, mask_padding: bool, device: torch.device | None = None) -> Tensor | None:
        """Return which keys a query must not attend to, ``(groups, n, n)``, or ``None`` if every key is allowed."""
        return None


@dataclass(frozen=True)
class AllTokens(TokenLayout):
    """One group of all tokens.

    Args:
        hw_shape: height and width of the grid of tokens.
        extra_tokens: how many tokens beside the grid come first, such as a class token.
    """

    hw_shape: tuple[int, int]
    extra_tokens: int = 0

    def split(self, x: Tensor) -> Tensor:
        """Return the tokens as they are."""
        return x

    def merge(self, groups: Tensor) -> Tensor:
        """Return the tokens as they are."""
        return groups

    def grid_tokens(self) -> Tensor:
        """Return which token of the grid each one is, ``(1, n)``."""
        beside = torch.full((self.extra_tokens,), BESIDE)
        return torch.cat([beside, torch.arange(self.hw_shape[0] * self.hw_shape[1])])[None]


@dataclass(frozen=True)
class WindowLayout(TokenLayout):
    """Maps tokens of a feature map to square (shifted) windows and back.

    Args:
        hw_shape: height and width of the feature map in tokens.
        window_size: height and width of a window in tokens.
        shift: cyclic shift towards the top left before partition, in tokens; 0 for none.
    """

    hw_shape: tuple[int, int]
    window_size: int
    shift: int = 0

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width after padding at the bottom and right to whole windows."""
        height, width = (-(-size // self.window_size) * self.window_size for size in self.hw_shape)
        return height, width

    def split(self, x: Tensor) -> Tensor:
        """Partition tokens ``(B, H*W, C)`` into windows ``(B*num_windows, window_size**2, C)``; padding is 0."""
        batch, _, channels = x.shape
        height, width = self.hw_shape
        padded_height, padded_width = self.padded
        x = x.view(batch, height, width, channels)
        if (padded_height, padded_width) != (height, width):
            x = F.pad(x, (0, 0, 0, padded_width - width, 0, padded_height - height))
        if self.shift:
            x = x.roll((-self.shift, -self.shift), dims=(1, 2))
        size = self.window_size
        x = x.view(batch, padded_height // size, size, padded_width // size, size, channels)
        return x.transpose(2, 3).reshape(-1, size * size, channels)

    def merge(self, windows: Tensor) -> Tensor:
        """Undo :meth:`split`: ``(B*num_windows, window_size**2, C) -> (B, H*W, C)``; what lay on padding is cut."""
        channels = windows.shape[-1]
        height, width = self.hw_shape
        padded_height, padded_width = self.padded
        size = self.window_size
        x = windows.view(-1, padded_height // size, padded_width // size, size, size, channels)
        x = x.transpose(2, 3).reshape(-1, padded_height, padded_width, channels)
        if self.shift:
            x = x.roll((self.shift, self.shift), dims=(1, 2))
        return x[:, :height, :width].reshape(-1, height * width, channels)

    def grid_tokens(self) -> Tensor:
        """Return which token of the grid each one of a window is, ``(num_windows, window_size**2)``; -1 for padding."""
        height, width = self.hw_shape
        return self.split(torch.arange(1, height * width + 1).view(1, -1, 1)).squeeze(-1) - 1

    def attention_mask(self, mask_padding: bool, device: torch.device | None = None) -> Tensor | None:
        """Return which keys a query must not attend to, or ``None`` if every key is allowed.

        After a cyclic shift a window may hold tokens from opposite borders of the image; they do not see each other.
        With ``mask_padding`` real tokens do not see padding; padding sees itself, so that no row is empty.

        Returns:
            Boolean tensor ``(num_windows, window_size**2, window_size**2)``, True where masked.
        """
        has_padding = mask_padding and self.padded != self.hw_shape
        if not self.shift and not has_padding:
            return None
        rows, columns = (self._regions(axis, device) for axis in (0, 1))
        regions = rows[:, None] * 3 + columns
        if has_padding:
            # Built before the shift, as the shift moves padding along with the tokens.
            padding = torch.ones(self.padded, dtype=torch.bool, device=device)
            padding[: self.hw_shape[0], : self.hw_shape[1]] = False
            regions = regions.masked_fill(padding.roll((-self.shift, -self.shift), dims=(0, 1)), -1)
        height, width = self.padded
        size = self.window_size
        regions = regions.view(height // size, size, width // size, size).transpose(1, 2).reshape(-1, size * size)
        return regions[:, :, None] != regions[:, None, :]

    def _regions(self, axis: int, device: torch.device | None) -> Tensor:
        """Number the parts of a shifted axis whose tokens were neighbours: before, in and wrapped into the last."""
        position = torch.arange(self.padded[axis], device=device)
        if not self.shift:
            return torch.zeros_like(position)
        length = self.padded[axis]
        return (position >= length - self.window_size).long() + (position >= length - self.shift).long()
