"""What every backbone shares: stages, freezing, initialisation, position embedding, loading, and its list of blocks."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from mmengine.logging import MMLogger
from mmengine.model import BaseModule
from timm.layers import trunc_normal_
from torch import Tensor, nn

from mmbivit.checkpoints import load_checkpoint_file, load_pretrained, register_key_mapping
from mmbivit.checks import UserError, check_flag, did_you_mean
from mmbivit.packed.modules import position_embedding

from .arch import check_indices, check_init_cfg
from .layout import TokenLayout, WindowLayout, norm_tokens
from .stage import StagedModule, training_plan

__all__ = ["Backbone", "Block", "find_block", "find_blocks"]


@dataclass(frozen=True)
class Block:
    """A transformer block of a backbone, and where its tokens lie.

    Args:
        name: as in ``named_modules()`` of the backbone.
        module: the block; it takes tokens ``(B, N, C)`` first, and returns as many.
        channels: ``C``.
        stride: pixels along a side of a token.
        layout: for the height and width of the grid of tokens, which of them attend to each other.
    """

    name: str
    module: nn.Module
    channels: int
    stride: int
    layout: Callable[[tuple[int, int]], TokenLayout]

    def hw_shape(self, image_size: Sequence[int]) -> tuple[int, int]:
        """Return the height and width of the grid of tokens for an image of this height and width in pixels."""
        height, width = (-(-pixels // self.stride) for pixels in image_size)
        return height, width


class Backbone(StagedModule, BaseModule):
    """Base of backbones that are trained in stages; a network adds its parts and its forward.

    A subclass builds, after ``super().__init__``,

    - ``patch_embed``, from images to tokens by a convolution, and ``drop_after_pos``, the dropout of these,
    - ``stages``, each with ``blocks`` of its own grid; a block says by ``layout(hw_shape)`` how its tokens lie,
    - ``norm{i}`` for each of ``out_indices``,
    - ``num_features`` and ``strides``, channels of a token and pixels along it, by stage,

    has as ``weight_names`` what its weights are called in other implementations, if there are any,
    and then calls ``_finish_init``. One with blocks elsewhere has its own ``blocks()``. Its ``binary_options`` are the
    arguments that its float counterpart leaves at their defaults.

    Args:
        num_stages: how many stages there will be.
        out_indices: stages whose normalised output is returned.
        stage1: what is binary in training stage 1 of two, ``'activations'`` (by default), ``'weights'`` or ``'all'``.
        frozen_stages: freeze the patch embedding (0) and the first stages (1, 2, ...); -1 for none.
        norm_eval: keep the running statistics of BatchNorm fixed in training.
        convert_weights: accept the key names of other implementations on load; otherwise only our own.
        init_cfg: ``dict(type='Pretrained', checkpoint=file, URL or timm://NAME, prefix='backbone.')`` or ``None``.
        training_stages: any other plan, in place of ``stage1``: the arguments of a :class:`TrainingStage` for each
            training stage but the last.

    Raises:
        ValueError: for a setting of the wrong type or out of range.
    """

    num_features: Sequence[int]
    strides: Sequence[int]
    weight_names: ModuleType | None = None  # a module of mmbivit.checkpoints.names
    binary_options: Sequence[str] = ("mlp_ratio", "spatial_interaction")

    def __init__(
        self,
        num_stages: int,
        out_indices: Sequence[int],
        stage1: str | None,
        frozen_stages: int,
        norm_eval: bool,
        convert_weights: bool,
        init_cfg: dict | None,
        training_stages: Sequence[dict] | None = None,
    ):
        check_init_cfg(init_cfg)
        super().__init__(init_cfg=init_cfg)
        check_indices(out_indices, frozen_stages, num_stages)
        self.training_plan = training_plan(stage1, training_stages)
        check_flag("norm_eval", norm_eval)
        check_flag("convert_weights", convert_weights)
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.convert_weights = convert_weights
        self.absolute_pos_embed: nn.Parameter | None = None

    def _add_position_embedding(self, hw_shape: tuple[int, int], channels: int) -> None:
        """Make a learnable position embedding for a grid of tokens; other grids get it interpolated."""
        self.pos_embed_shape = hw_shape
        self.absolute_pos_embed = nn.Parameter(torch.zeros(1, hw_shape[0] * hw_shape[1], channels))

    def _finish_init(self) -> None:
        """Initialise, enter the last stage and freeze; call at the end of ``__init__``, when all layers exist."""
        self._init_linear_layers()
        self._init_stage(self.training_plan)
        register_key_mapping(self, self.weight_names, convert_foreign=self.convert_weights)
        self._freeze_stages()

    def _init_linear_layers(self) -> None:
        """Initialise linear layers as ViT and Swin do: truncated normal, standard deviation 0.02, biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.absolute_pos_embed is not None:
            trunc_normal_(self.absolute_pos_embed, std=0.02)

    def init_weights(self) -> None:
        """Load the checkpoint of ``init_cfg``, if there is one; ``__init__`` has initialised everything already.

        Raises:
            ValueError: if the checkpoint is of another architecture.
        """
        if self.init_cfg:
            file = self.init_cfg["checkpoint"]
            missing, unexpected = load_pretrained(self, load_checkpoint_file(file), prefix=self.init_cfg.get("prefix"))
            MMLogger.get_current_instance().info(
                f"{type(self).__name__}: loaded {file}; missing {missing or 'none'}, unexpected {unexpected or 'none'}"
            )
        self._is_init = True

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        return _patch_projection(self).in_channels

    def blocks(self) -> Iterator[Block]:
        """Yield the transformer blocks in the order in which they run."""
        for i, stage in enumerate(self.stages):
            for j, module in enumerate(stage.blocks):
                yield Block(f"stages.{i}.blocks.{j}", module, self.num_features[i], self.strides[i], module.layout)

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return the tokens ``(B, N, C)`` of images with their positions, and the height and width of their grid."""
        x, hw_shape = self.patch_embed(images)
        if self.absolute_pos_embed is not None:
            x = x + position_embedding(self.absolute_pos_embed, self.pos_embed_shape, hw_shape)
        return self.drop_after_pos(x), hw_shape

    def feature_map(self, x: Tensor, hw_shape: tuple[int, int], stage: int) -> Tensor:
        """Normalise the tokens ``(B, H*W, C)`` of a stage in ``out_indices`` and lay them out as ``(B, C, H, W)``."""
        out = norm_tokens(getattr(self, f"norm{stage}"), x)
        return out.view(out.shape[0], *hw_shape, -1).permute(0, 3, 1, 2).contiguous()

    def train(self, mode: bool = True) -> "Backbone":
        """Switch between training and evaluation, but leave frozen parts in evaluation."""
        super().train(mode)
        self._freeze_stages()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def _freeze_stages(self) -> None:
        if self.frozen_stages < 0:
            return
        frozen = [self.patch_embed, self.drop_after_pos, *self.stages[: self.frozen_stages]]
        frozen += [getattr(self, f"norm{i}") for i in self.out_indices if i < self.frozen_stages]
        for module in frozen:
            module.eval().requires_grad_(False)
        if self.absolute_pos_embed is not None:
            self.absolute_pos_embed.requires_grad_(False)


def find_blocks(network: nn.Module) -> dict[str, Block]:
    """Return the transformer blocks of a backbone by name, in their order; none if it has none that are known.

    Args:
        network: a :class:`Backbone`, or one of another library whose blocks have shifted windows, as mmdet's
            ``SwinTransformer``.
    """
    blocks = network.blocks() if isinstance(network, Backbone) else _foreign_blocks(network)
    return {block.name: block for block in blocks}


def _foreign_blocks(network: nn.Module) -> Iterator[Block]:
    for i, stage in enumerate(getattr(network, "stages", ())):
        for j, module in enumerate(getattr(stage, "blocks", ())):
            attention = getattr(module, "attn", None)
            if not hasattr(attention, "shift_size"):
                continue

            def layout(hw_shape: tuple[int, int], attention: nn.Module = attention) -> WindowLayout:
                return WindowLayout(hw_shape, attention.window_size, attention.shift_size)

            channels = module.norm1.weight.numel()
            stride = _patch_projection(network).stride[0] * 2**i
            yield Block(f"stages.{i}.blocks.{j}", module, channels, stride, layout)


def _patch_projection(network: nn.Module) -> nn.Conv2d:
    return next(part for part in network.patch_embed.modules() if isinstance(part, nn.Conv2d))


def find_block(network: nn.Module, name: str | None = None) -> Block:
    """Return one transformer block of a backbone.

    Args:
        network: see :func:`find_blocks`.
        name: such as ``stages.0.blocks.1``; by default the last block with tokens of the first one's size.

    Raises:
        ValueError: if there is no such block.
    """
    blocks = find_blocks(network)
    if not blocks:
        raise UserError(f"{type(network).__name__} has no transformer blocks that are known")
    names = list(blocks)
    if name is None:
        stride = blocks[names[0]].stride
        return [block for block in blocks.values() if block.stride == stride][-1]
    if name not in blocks:
        raise UserError(
            f"there is no block {name!r}; allowed: the {len(names)} from {names[0]} to {names[-1]}"
            f"{did_you_mean(name, names)}"
        )
    return blocks[name]
