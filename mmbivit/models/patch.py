"""From images to tokens."""

from torch import Tensor, nn
from torch.nn import functional as F

from .layout import norm_tokens

__all__ = ["PatchEmbed"]


class PatchEmbed(nn.Module):
    """Cut an image into patches and project each to a token; float in every recipe (SI-BiViT 4.1.1).

    Args:
        in_channels: channels of the image.
        embed_dims: channels ``C`` of a token.
        patch_size: height and width of a patch in pixels; the image is padded to whole patches with 0.
        norm: normalises the tokens, or ``None``.

    Shape: ``(B, in_channels, H, W) -> (B, H'*W', C)`` with ``H' = ceil(H / patch_size)``.
    """

    def __init__(self, in_channels: int, embed_dims: int, patch_size: int, norm: nn.Module | None):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, embed_dims, patch_size, stride=patch_size)
        self.norm = norm

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return the tokens and the height and width of their grid."""
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % self.patch_size, 0, -height % self.patch_size))
        x = self.proj(images)
        hw_shape = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)
        return (x if self.norm is None else norm_tokens(self.norm, x)), hw_shape
