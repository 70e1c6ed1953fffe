"""A recipe: which parts a network is built from: quantizers, shortcuts, activation function and norm."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, Literal, get_args, get_origin, get_type_hints

from torch import nn

from mmbivit.checks import UserError, check_choice, check_flag, check_keys, check_number

from .attention import ElasticAttention, ScoreSign, SoftmaxThreshold
from .layers import BinaryLinear, HeadNorm, HeadShortcut, ResidualBinaryLinear, RPReLU
from .quantizers import (
    ActivationQuantizer,
    ElasticBinary,
    LearnedScaleWeightSign,
    Quantizer,
    RSign,
    ScaledSign,
    WeightQuantizer,
    WeightSign,
)

__all__ = ["RECIPES", "Recipe", "get_recipe"]


# Fields of the quantizers that a recipe makes itself, by the field that replaces them.
_FIELDS_OF = dict(
    input_quantizer=("activations", "sign_ste", "threshold"),
    weight_quantizer=("weight_ste", "weight_center", "weight_scale"),
)
_ACTIVATIONS = ("input_quantizer", *_FIELDS_OF["input_quantizer"])
_LAYER = ("linear", *_ACTIVATIONS, "weight_quantizer", *_FIELDS_OF["weight_quantizer"], "layer_shortcut")
# Which fields each of the places has.
PLACES = {**dict.fromkeys(("qkv", "proj", "fc1", "fc2"), _LAYER), "heads": ("qkv", "qkv_scales", *_ACTIVATIONS)}
_ATTENTIONS = dict(
    softmax_threshold=lambda heads: SoftmaxThreshold(),
    softmax_select=lambda heads: SoftmaxThreshold(divide=False),
    score_positive=lambda heads: ScoreSign(),
    score_nonnegative=lambda heads: ScoreSign(zero=True),
    elastic=lambda heads: ElasticAttention(),
    elastic_heads=lambda heads: ElasticAttention(heads, factor=2.0),
    softmax=lambda heads: nn.Softmax(dim=-1),
)


def _elastic_from(start: float, num_heads: int) -> ElasticAttention:
    return ElasticAttention(start=start, scale_gradient=False)


@dataclass(frozen=True)
class Recipe:
    """What makes a network binary or float; one class of network serves all.

    A layer is given its quantizers by the recipe, one of its own for each side of each layer.

    Args:
        linear: ``'binary'`` for :class:`BinaryLinear` (SI-BiViT, Eq. 3-5), ``'float'`` for :class:`torch.nn.Linear`.
        input_quantizer: makes what binarizes the input of a binary linear layer from its number of features, in place
            of the parts that ``activations``, ``sign_ste`` and ``threshold`` name.
        activations: of inputs, ``'sign'`` (:class:`RSign`), ``'scaled'`` for a learned scale, which is the window of
            the gradient, too (:class:`ScaledSign`), or ``'elastic'`` for values in {0, alpha} (:class:`ElasticBinary`).
        sign_ste: gradient of ``'sign'``, ``'clip'`` (Eq. 2) or ``'poly'``; see :func:`mmbivit.binary.sign_ste`.
        threshold: of activations, learned per ``'channel'`` (Eq. 3), or ``'none'``.
        weight_quantizer: makes what binarizes the weights of a binary linear layer, in place of the parts that the
            fields ``weight_*`` below name.
        weight_ste: whether gradients of binary weights have the factor ``'theta'`` of Eq. 4, or not (``'plain'``), as
            in most published code, or are passed on as they are (``'identity'``); see
            :func:`mmbivit.binary.binarize_weight`.
        weight_center: what is subtracted from weights before their sign: the mean of the ``'row'``, of the
            ``'tensor'``, or ``'none'``.
        weight_scale: what the mean magnitude is taken over, the ``'row'`` or the ``'tensor'``; or ``'learned'`` for a
            scale of each row that training moves.
        qkv: ``'sign'`` binarizes queries, keys and values with a quantizer of their own (Eq. 3), like those of inputs;
            ``'float'`` leaves them.
        qkv_scales: where they are ``'scaled'``: one scale for each ``'tensor'`` of the three, or for each ``'head'``.
        attention: what turns scores into weights: ``'softmax_threshold'`` selects keys by their probability and divides
            by their number, ``'softmax_select'`` does not divide (:class:`SoftmaxThreshold`); ``'score_positive'`` and
            ``'score_nonnegative'`` select by the score (:class:`ScoreSign`); ``'elastic'`` and, with a scale for each
            head, ``'elastic_heads'`` round probabilities (:class:`ElasticAttention`); ``'softmax'`` is float. Or
            a function that makes such a module from the number of heads.
        layer_shortcut: norm, shortcut and RPReLU around every binary linear layer (:class:`ResidualBinaryLinear`).
        head_shortcut: queries, keys and values are added to the heads' output (:class:`HeadShortcut`).
        head_norm: a LayerNorm of queries and one of keys, over the channels of a head (:class:`HeadNorm`).
        act: ``'rprelu'``, ``'gelu'``, ``'relu'`` or ``'none'``.
        norm: ``'bn'`` over channels (SI-BiViT 4.1.3) or ``'ln'``.
        norm_eps: what a LayerNorm adds to the variance; a backbone has that of its float weights.
        keep_bits: whether training keeps bits for the backward pass where they suffice, and on CPUs uses native
            kernels where they compute the same. Otherwise every operation is torch's or one of
            :mod:`mmbivit.binary.functional`, step by step as it is written there, and keeps floats.
        places: other values of the fields above in some places: the linear layers ``'qkv'``, ``'proj'``, ``'fc1'`` and
            ``'fc2'`` (those of the token mixing are called so, too), and ``'heads'``, the quantizer of queries, keys
            and values. For example ``dict(fc2=dict(activations='elastic'))``.

    Raises:
        ValueError: if a value is not one of those named, a quantizer cannot be called, or two fields contradict each
            other; the message names them and says what is allowed.
    """

    linear: Literal["binary", "float"] = "binary"
    input_quantizer: Callable[[int], ActivationQuantizer] | None = None
    activations: Literal["sign", "scaled", "elastic"] = "sign"
    sign_ste: Literal["clip", "poly"] = "clip"
    threshold: Literal["channel", "none"] = "channel"
    weight_quantizer: Callable[[], WeightQuantizer] | None = None
    weight_ste: Literal["theta", "plain", "identity"] = "theta"
    weight_center: Literal["row", "tensor", "none"] = "row"
    weight_scale: Literal["row", "tensor", "learned"] = "row"
    qkv: Literal["sign", "float"] = "sign"
    qkv_scales: Literal["tensor", "head"] = "tensor"
    attention: str | Callable[[int], nn.Module] = "softmax_threshold"
    layer_shortcut: bool = False
    head_shortcut: bool = False
    head_norm: bool = False
    act: Literal["rprelu", "gelu", "relu", "none"] = "rprelu"
    norm: Literal["bn", "ln"] = "bn"
    norm_eps: float = 1e-5
    keep_bits: bool = True
    places: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if get_origin(hint) is Literal:
                check_choice(f"recipe.{name}", value, get_args(hint))
            elif hint is bool:
                check_flag(f"recipe.{name}", value)
            elif name.endswith("_quantizer") and not (callable(value) or value is None):
                raise UserError(f"recipe.{name}={value!r}; allowed: a class or function that makes a quantizer")
        if not callable(self.attention):
            check_choice("recipe.attention", self.attention, _ATTENTIONS)
        check_number("recipe.norm_eps", self.norm_eps, 0, 1, above=True)
        for part, names in _FIELDS_OF.items():
            for name in names:
                if getattr(self, part) is not None and self._differs(name):
                    raise UserError(
                        f"recipe.{name}={getattr(self, name)!r} is of the quantizer that recipe.{part} replaces; "
                        "give one of the two"
                    )
        if self.activations != "sign" and self._differs("sign_ste"):
            raise UserError(
                f"recipe.sign_ste={self.sign_ste!r} is of activations='sign'; the gradient of "
                f"recipe.activations={self.activations!r} follows its learned scale"
            )
        check_keys("recipe.places", self.places, (), PLACES)
        for place, changes in self.places.items():
            check_keys(f"recipe.places.{place}", changes, (), PLACES[place])
            self.at(place)

    def _differs(self, name: str) -> bool:
        return getattr(self, name) != getattr(type(self), name)

    def at(self, place: str | None) -> "Recipe":
        """Return the recipe of one of the ``places``; ``None`` for none of them."""
        changes = self.places.get(place, {})  # type: ignore[arg-type]  # None is no place
        return replace(self, places={}, **changes) if changes else self

    def build_linear(
        self, in_features: int, out_features: int, bias: bool = True, place: str | None = None
    ) -> nn.Linear:
        """Build a linear layer ``(*, in_features) -> (*, out_features)`` of a block."""
        recipe = self.at(place)
        if recipe.linear == "float":
            return nn.Linear(in_features, out_features, bias=bias)
        kind = ResidualBinaryLinear if recipe.layer_shortcut else BinaryLinear
        return kind(
            in_features,
            out_features,
            bias=bias,
            input_quantizer=recipe.build_input_quantizer(in_features),
            weight_quantizer=recipe._build_weight_quantizer(out_features),
        )

    def build_quantizers(self, in_features: int, out_features: int) -> dict[str, ActivationQuantizer | WeightQuantizer]:
        """Build the two quantizers of a binary layer outside blocks, as its arguments: in necks and heads."""
        return dict(
            input_quantizer=self.build_input_quantizer(in_features),
            weight_quantizer=self._build_weight_quantizer(out_features),
        )

    def build_input_quantizer(self, num_features: int, place: str | None = None) -> ActivationQuantizer:
        """Build what binarizes activations ``(*, num_features)``."""
        return self.at(place)._build_activation_quantizer(num_features, groups=1)

    def _build_activation_quantizer(self, num_features: int, groups: int) -> ActivationQuantizer:
        quantizer = self._new_activation_quantizer(num_features, groups)
        quantizer.keep_bits = self.keep_bits
        return quantizer

    def _new_activation_quantizer(self, num_features: int, groups: int) -> ActivationQuantizer:
        if self.input_quantizer is not None:
            return self.input_quantizer(num_features)
        if self.activations == "scaled":
            return ScaledSign(num_features, self.threshold, groups)
        if self.activations == "elastic":
            return ElasticBinary(num_features, self.threshold)
        return RSign(num_features, self.sign_ste, self.threshold)

    def _build_weight_quantizer(self, out_features: int) -> WeightQuantizer:
        quantizer = self._new_weight_quantizer(out_features)
        quantizer.keep_bits = self.keep_bits
        return quantizer

    def _new_weight_quantizer(self, out_features: int) -> WeightQuantizer:
        if self.weight_quantizer is not None:
            return self.weight_quantizer()
        if self.weight_scale == "learned":
            return LearnedScaleWeightSign(out_features, self.weight_ste, self.weight_center)
        return WeightSign(self.weight_ste, self.weight_center, self.weight_scale)

    def build_qkv_quantizer(self, num_features: int, num_heads: int = 1) -> nn.Module:
        """Build what binarizes the concatenated queries, keys and values ``(*, num_features)``."""
        recipe = self.at("heads")
        if recipe.qkv == "float":
            return nn.Identity()
        groups = 3 if recipe.qkv_scales == "tensor" else 3 * num_heads
        return recipe._build_activation_quantizer(num_features, groups)

    def build_attention(self, num_heads: int = 1) -> nn.Module:
        """Build what turns scores ``(B, heads, queries, keys)`` into attention weights."""
        build = self.attention if callable(self.attention) else _ATTENTIONS[self.attention]
        attention = build(num_heads)
        if isinstance(attention, Quantizer):
            attention.keep_bits = self.keep_bits
        return attention

    def build_head_shortcut(self, embed_dims: int) -> HeadShortcut | None:
        """Build what adds queries, keys and values to the heads' output, if there is such a shortcut."""
        return HeadShortcut(embed_dims) if self.head_shortcut else None

    def build_head_norm(self, head_dim: int) -> HeadNorm | None:
        """Build the norm of queries or keys ``(*, head_dim)``, if there is one."""
        return HeadNorm(head_dim, eps=self.norm_eps) if self.head_norm else None

    def build_act(self, num_features: int) -> nn.Module:
        """Build the activation function of a hidden layer ``(*, num_features)``."""
        if self.act == "rprelu":
            return RPReLU(num_features)
        return dict(gelu=nn.GELU, relu=nn.ReLU, none=nn.Identity)[self.act]()

    @property
    def norm_layer(self) -> Callable[[int], nn.Module]:
        """The class of norm, called with the number of channels; see :func:`mmbivit.models.layout.norm_tokens`."""
        return nn.BatchNorm1d if self.norm == "bn" else partial(nn.LayerNorm, eps=self.norm_eps)


_LN_GELU: dict[str, Any] = dict(norm="ln", act="gelu", threshold="none")
_LEARNED_ROWS: dict[str, Any] = dict(weight_scale="learned")

# By the name that a config gives; whoever adds one from outside does so before networks are built. What each takes from
# its paper, and where published code differs, is in docs/methods.md.
RECIPES: dict[str, Recipe] = {
    "sibivit": Recipe(),
    "float": Recipe(linear="float", qkv="float", attention="softmax", act="gelu", norm="ln"),
    "bireal": Recipe(
        **_LN_GELU,
        weight_ste="plain",
        weight_center="none",
        sign_ste="poly",
        attention="score_nonnegative",
        places=dict(heads=dict(sign_ste="clip")),
    ),
    "reactnet": Recipe(
        weight_ste="plain",
        sign_ste="poly",
        attention=partial(_elastic_from, 0.005),
        layer_shortcut=True,
        head_shortcut=True,
        act="none",
    ),
    "bibert": Recipe(**_LN_GELU, weight_ste="plain", attention="score_positive"),
    "bivit": Recipe(**_LN_GELU, attention="softmax_select", places=dict(qkv=_LEARNED_ROWS, proj=_LEARNED_ROWS)),
    "bit": Recipe(
        weight_ste="identity",
        weight_center="tensor",
        weight_scale="tensor",
        activations="scaled",
        attention="elastic",
        act="relu",
        norm="ln",
        places=dict(fc2=dict(activations="elastic")),
    ),
    "bi-vit": Recipe(
        **_LN_GELU,
        weight_ste="plain",
        weight_center="none",
        sign_ste="poly",
        qkv_scales="head",
        attention="elastic_heads",
        places=dict(heads=dict(activations="scaled", sign_ste="clip")),
    ),
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
