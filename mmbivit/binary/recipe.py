"""A recipe: which parts a network is built from: quantizers, activation function and norm."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Literal, get_args, get_origin, get_type_hints

from torch import nn

from mmbivit.checks import UserError, check_choice, check_keys

from .attention import SoftmaxThreshold
from .layers import BinaryLinear, RPReLU
from .quantizers import ActivationQuantizer, RSign, WeightQuantizer, WeightSign

__all__ = ["RECIPES", "Recipe", "get_recipe"]


# Fields of the quantizers that a recipe makes itself, by the field that replaces them.
_FIELDS_OF = dict(
    input_quantizer=("sign_ste", "threshold"), weight_quantizer=("weight_ste", "weight_center", "weight_scale")
)


@dataclass(frozen=True)
class Recipe:
    """What makes a network binary or float; one class of network serves all.

    A layer is given its quantizers by the recipe, one of its own for each side of each layer.

    Args:
        linear: ``'binary'`` for :class:`BinaryLinear` (SI-BiViT, Eq. 3-5), ``'float'`` for :class:`torch.nn.Linear`.
        input_quantizer: makes what binarizes the input of a binary linear layer from its number of features, in place
            of :class:`RSign` with the fields ``sign_ste`` and ``threshold``.
        sign_ste: gradient of activations, ``'clip'`` (Eq. 2) or ``'poly'``; see :func:`mmbivit.binary.sign_ste`.
        threshold: of activations, learned per ``'channel'`` (Eq. 3), or ``'none'``.
        weight_quantizer: makes what binarizes the weights of a binary linear layer, in place of :class:`WeightSign`
            with the fields ``weight_*`` below.
        weight_ste: whether gradients of binary weights have the factor ``'theta'`` of Eq. 4, or not (``'plain'``), as
            in most published code, or are passed on as they are (``'identity'``); see
            :func:`mmbivit.binary.binarize_weight`.
        weight_center: what is subtracted from weights before their sign: the mean of the ``'row'``, of the
            ``'tensor'``, or ``'none'``.
        weight_scale: what the mean magnitude is taken over: the ``'row'`` or the ``'tensor'``.
        qkv: ``'sign'`` binarizes queries, keys and values with a quantizer of their own (Eq. 3), like those of inputs;
            ``'float'`` leaves them.
        attention: ``'softmax_threshold'`` for probabilities in {0, 1}, ``'softmax'`` for float ones.
        act: ``'rprelu'`` or ``'gelu'``.
        norm: ``'bn'`` over channels (SI-BiViT 4.1.3) or ``'ln'``.

    Raises:
        ValueError: if a value is not one of those named, or a quantizer cannot be called; the message says what is
            allowed.
    """

    linear: Literal["binary", "float"] = "binary"
    input_quantizer: Callable[[int], ActivationQuantizer] | None = None
    sign_ste: Literal["clip", "poly"] = "clip"
    threshold: Literal["channel", "none"] = "channel"
    weight_quantizer: Callable[[], WeightQuantizer] | None = None
    weight_ste: Literal["theta", "plain", "identity"] = "theta"
    weight_center: Literal["row", "tensor", "none"] = "row"
    weight_scale: Literal["row", "tensor"] = "row"
    qkv: Literal["sign", "float"] = "sign"
    attention: Literal["softmax_threshold", "softmax"] = "softmax_threshold"
    act: Literal["rprelu", "gelu"] = "rprelu"
    norm: Literal["bn", "ln"] = "bn"

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if get_origin(hint) is Literal:
                check_choice(f"recipe.{name}", value, get_args(hint))
            elif not (callable(value) or value is None):
                raise UserError(f"recipe.{name}={value!r}; allowed: a class or function that makes a quantizer")
        for part, names in _FIELDS_OF.items():
            for name in names:
                if getattr(self, part) is not None and getattr(self, name) != getattr(type(self), name):
                    raise UserError(
                        f"recipe.{name}={getattr(self, name)!r} is of the quantizer that recipe.{part} replaces; "
                        "give one of the two"
                    )

    def build_linear(self, in_features: int, out_features: int, bias: bool = True) -> nn.Linear:
        """Build a linear layer ``(*, in_features) -> (*, out_features)`` of a block."""
        if self.linear == "float":
            return nn.Linear(in_features, out_features, bias=bias)
        return BinaryLinear(
            in_features,
            out_features,
            bias=bias,
            input_quantizer=self.build_input_quantizer(in_features),
            weight_quantizer=self.build_weight_quantizer(),
        )

    def build_input_quantizer(self, num_features: int) -> ActivationQuantizer:
        """Build what binarizes activations ``(*, num_features)``."""
        if self.input_quantizer is not None:
            return self.input_quantizer(num_features)
        return RSign(num_features, self.sign_ste, self.threshold)

    def build_weight_quantizer(self) -> WeightQuantizer:
        """Build what binarizes the weights of one layer."""
        if self.weight_quantizer is not None:
            return self.weight_quantizer()
        return WeightSign(self.weight_ste, self.weight_center, self.weight_scale)

    def build_qkv_quantizer(self, num_features: int) -> nn.Module:
        """Build what binarizes the concatenated queries, keys and values ``(*, num_features)``."""
        return self.build_input_quantizer(num_features) if self.qkv == "sign" else nn.Identity()

    def build_attention(self) -> nn.Module:
        """Build what turns scores ``(*, queries, keys)`` into attention weights."""
        return SoftmaxThreshold() if self.attention == "softmax_threshold" else nn.Softmax(dim=-1)

    def build_act(self, num_features: int) -> nn.Module:
        """Build the activation function of a hidden layer ``(*, num_features)``."""
        return RPReLU(num_features) if self.act == "rprelu" else nn.GELU()

    @property
    def norm_layer(self) -> Callable[[int], nn.Module]:
        """The class of norm, called with the number of channels; see :func:`mmbivit.models.layout.norm_tokens`."""
        return nn.BatchNorm1d if self.norm == "bn" else partial(nn.LayerNorm, eps=1e-5)


# By the name that a config gives; whoever adds one from outside does so before networks are built.
RECIPES: dict[str, Recipe] = {
    "sibivit": Recipe(),
    "float": Recipe(linear="float", qkv="float", attention="softmax", act="gelu", norm="ln"),
}


def get_recipe(recipe: str | dict | Recipe) -> Recipe:
    """Look up a recipe by name, or change some fields of one.

    Args:
        recipe: a name of :data:`RECIPES`; a dict of fields to change, with the name to start from under ``base``
            (default ``'sibivit'``); or a :class:`Recipe`.

    Raises:
        ValueError: for an unknown name, field or value; the message lists what is allowed.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, str):
        check_choice("recipe", recipe, RECIPES)
        return RECIPES[recipe]
    check_keys("recipe", recipe, (), ("base", *(field.name for field in fields(Recipe))))
    changes = dict(recipe)
    base = changes.pop("base", "sibivit")
    check_choice("recipe.base", base, RECIPES)
    return replace(RECIPES[base], **changes)
