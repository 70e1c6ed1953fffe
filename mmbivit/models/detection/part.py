"""What all binary necks and heads share: their settings, training stages, and the weights of float ones."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from mmcv.cnn import ConvModule
from mmengine.logging import print_log
from torch import Tensor, nn

from mmbivit.binary import BinaryConv2d, BinaryLayer, BinaryLinear, Recipe, ResidualBinaryLinear, get_recipe
from mmbivit.checkpoints.content import STAGE_KEY, is_float_for
from mmbivit.checks import UserError, check_flag, check_keys
from mmbivit.models.stage import StagedModule, training_plan

__all__ = ["BinaryPart", "Settings"]


@dataclass(frozen=True)
class Settings:
    """What the binary layers of a neck or head are like.

    Args:
        recipe: makes their quantizers.
        shortcut: whether the input of a layer is added to its output, where widths allow that.
        norm: whether there is a BatchNorm behind each product.
        also: which of the layers that stay float by default are binary, too.
    """

    recipe: Recipe
    shortcut: bool
    norm: bool
    also: frozenset[str]

    def convolution(self, conv: nn.Conv2d, act: bool) -> BinaryConv2d:
        """Make a convolution binary, with what surrounds it."""
        quantizers = self.recipe.build_quantizers(conv.in_channels, conv.out_channels)
        return BinaryConv2d.from_float(
            conv, **quantizers, norm=self.norm, shortcut=self.shortcut, act=act, like_float=True
        )

    def linear(self, linear: nn.Linear, shortcut: bool, act: bool) -> ResidualBinaryLinear:
        """Make a linear layer binary, with what surrounds it."""
        quantizers = self.recipe.build_quantizers(linear.in_features, linear.out_features)
        options = dict(norm=self.norm, shortcut=shortcut and self.shortcut, act=act, like_float=True)
        return ResidualBinaryLinear.from_float(linear, **quantizers, **options)

    def last(self, layer: nn.Module) -> BinaryLayer:
        """Make a layer binary whose outputs are used as they are."""
        if isinstance(layer, nn.Linear):
            quantizers = self.recipe.build_quantizers(layer.in_features, layer.out_features)
            return BinaryLinear.from_float(layer, **quantizers)
        return BinaryConv2d.from_float(layer, **self.recipe.build_quantizers(layer.in_channels, layer.out_channels))


class BinaryPart(StagedModule):
    """Mixin of necks and heads of MMDetection, before its class: some of their layers become binary.

    Keys of weights are MMDetection's. Where the checkpoint of a float detector is loaded, its weights are taken, its
    norms' affine too, and what only the binary part has starts fresh; widths have to be equal.

    The option ``binary`` of each is ``None`` for MMDetection's own float part, or a dict of

    - ``recipe``: a name of :data:`mmbivit.binary.RECIPES`, or a dict of changes to one (default ``'sibivit'``),
    - ``shortcut``: add the input of each binary layer to its output, where widths allow it (default),
    - ``norm``: put a BatchNorm behind each product (default),
    - ``stage1`` or ``training_stages``: see :class:`mmbivit.models.StagedModule`; as many stages as the backbone has,
    - what else may be binary in this part (not by default).
    """

    is_staged = False
    is_part = True

    def _read(self, name: str, binary: Mapping[str, Any] | None, also: Iterable[str]) -> Settings | None:
        """Return the settings that ``binary`` stands for, or ``None`` if the part is float."""
        if binary is None:
            return None
        also = tuple(also)
        check_keys(f"{name}.binary", binary, (), ("recipe", "shortcut", "norm", "stage1", "training_stages", *also))
        flags = dict(shortcut=True, norm=True, **dict.fromkeys(also, False))
        flags = {key: binary.get(key, default) for key, default in flags.items()}
        for key, value in flags.items():
            check_flag(f"{name}.binary.{key}", value)
        recipe = get_recipe(binary.get("recipe", "sibivit"))
        if recipe.linear == "float":
            raise UserError(f"{name}.binary.recipe has float layers; give {name}.binary=None for a float part")
        self._plan = training_plan(binary.get("stage1"), binary.get("training_stages"))
        return Settings(
            recipe, flags.pop("shortcut"), flags.pop("norm"), frozenset(key for key, value in flags.items() if value)
        )

    def _fit_float(self, own: dict[str, Tensor]) -> None:
        """Change the weights of a float part, by their names in it, to fit this one, in place."""

    def _finish_binary(self) -> None:
        """Enter the last stage and take float weights from now on; call at the end of ``__init__``."""
        self.is_staged = True
        self._init_stage(self._plan)
        self.register_load_state_dict_pre_hook(_take_weights)


def binarize_conv_module(module: ConvModule, settings: Settings) -> None:
    """Make the convolution of mmcv's bundle binary; norm and activation of the binary layer replace the bundle's."""
    module.conv = settings.convolution(module.conv, act=module.with_activation)
    if module.with_norm:
        delattr(module, module.norm_name)
        module.with_norm, module.norm_name = False, None
    module.with_activation = False


def over_levels(layer: BinaryConv2d, maps: list[Tensor]) -> list[Tensor]:
    """Apply a layer to the maps of all levels, in training with common statistics."""
    return layer.over_levels(maps) if layer.training else [layer(x) for x in maps]


def _take_weights(part: BinaryPart, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    """Fit the weights of a float part, before they are loaded."""
    own = {key[len(prefix) :]: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
    current = part.state_dict()
    layers = {name: layer for name, layer in part.named_modules() if isinstance(layer, BinaryLayer)}
    for key in (f"{name}.weight" for name in layers):
        if key in own and own[key].shape != current[key].shape:
            raise UserError(
                f"the checkpoint's {prefix}{key} has shape {tuple(own[key].shape)}, this model's {type(part).__name__} "
                f"expects {tuple(current[key].shape)}; give a detector of the same widths"
            )
    if own and is_float_for(part, own):
        print_log(
            f"The weights of {prefix}* are float: what is binary in {type(part).__name__} starts fresh.", "current"
        )
        part._fit_float(own)
        for name, layer in layers.items():
            if getattr(layer, "norm", None) is not None:
                _move_norm(own, name)
            fresh = (
                key for key in current if key.startswith(f"{name}.") and key not in (f"{name}.weight", f"{name}.bias")
            )
            for key in fresh:
                own.setdefault(key, current[key])
        own.setdefault(STAGE_KEY, current[STAGE_KEY])
    state_dict.update({prefix + key: value for key, value in own.items()})


def _move_norm(state_dict: dict[str, Tensor], layer: str) -> None:
    """Give a layer's norm the bias of a float layer, or the affine of the norm beside it in mmcv's bundle."""
    if (bias := state_dict.pop(f"{layer}.bias", None)) is not None:
        state_dict[f"{layer}.norm.bias"] = bias
    for kind in ("bn", "gn"):
        beside = f"{layer.rpartition('.')[0]}.{kind}."
        for key in [key for key in state_dict if key.startswith(beside)]:
            value, tensor = state_dict.pop(key), key.removeprefix(beside)
            if tensor in ("weight", "bias"):
                state_dict[f"{layer}.norm.{tensor}"] = value
                state_dict[f"{layer}.first_batch.started"] = torch.ones((), dtype=torch.uint8)
