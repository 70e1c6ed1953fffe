"""Architectures by name, and checks of what users write in a config."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mmbivit.binary import Recipe, get_recipe
from mmbivit.checks import (
    UserError,
    check_choice,
    check_flag,
    check_integer,
    check_integers,
    check_keys,
    check_number,
    did_you_mean,
)

__all__ = [
    "ARCHITECTURES",
    "MixingSettings",
    "check_arch",
    "check_image_size",
    "check_indices",
    "check_init_cfg",
    "check_recipe",
    "check_settings",
    "check_spatial_interaction",
    "grid_sides",
    "hidden_dims",
]

ARCHITECTURES = {
    "tiny": dict(embed_dims=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "small": dict(embed_dims=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    "base": dict(embed_dims=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
}

# Upper limits are far above any network: they catch slips, which would end in a lack of memory.
MAX_CHANNELS = 2**16
MAX_RATIO = 64
_check_rate = partial(check_number, low=0, high=1, below=True)


def _check_scale(name: str, value: float | None) -> None:
    if value is not None:
        check_number(name, value, 0, 1e6, above=True)


_SETTINGS: dict[str, Callable[..., None]] = {
    **dict.fromkeys(("qkv_bias", "patch_norm", "use_abs_pos_embed", "with_cp", "shift_single_window"), check_flag),
    "mask_padding": check_flag,
    "qk_scale": _check_scale,
    **dict.fromkeys(("drop_rate", "attn_drop_rate", "drop_path_rate"), _check_rate),
    "mlp_ratio": partial(check_number, low=0, high=MAX_RATIO, above=True),
    "in_channels": partial(check_integer, low=1, high=1024),
    "patch_size": partial(check_integer, low=1, high=256),
    "window_size": partial(check_integer, low=1, high=64),
}


def check_settings(**settings: Any) -> None:
    """Check settings of a backbone that do not depend on each other, by name.

    Raises:
        ValueError: naming the first that is of the wrong type or out of range, and what is allowed.
    """
    for name, value in settings.items():
        _SETTINGS[name](name, value)


def check_arch(
    arch: str | dict, known: Mapping[str, dict] = ARCHITECTURES
) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Return channels, depths and heads of an architecture that fits together; those with a name are ``known``."""
    if isinstance(arch, str):
        if arch not in known:
            names = ", ".join(map(repr, known))
            raise UserError(
                f"arch={arch!r} is unknown; allowed: {names}, or dict(embed_dims=, depths=, num_heads=)"
                f"{did_you_mean(arch, known)}"
            )
        arch = known[arch]
    check_keys("arch", arch, ("embed_dims", "depths", "num_heads"))
    embed_dims, depths, num_heads = (arch[key] for key in ("embed_dims", "depths", "num_heads"))
    check_integer("arch.embed_dims", embed_dims, 1, MAX_CHANNELS)
    check_integers("arch.depths", depths, 1, 1000)
    check_integers("arch.num_heads", num_heads, 1, MAX_CHANNELS)
    if len(depths) != len(num_heads) or len(depths) > 8:
        raise UserError(f"arch.depths={depths} and arch.num_heads={num_heads} need one entry each for 1 to 8 stages")
    for i, heads in enumerate(num_heads):
        if embed_dims * 2**i % heads:
            channels = embed_dims * 2**i
            raise UserError(f"arch.num_heads[{i}]={heads} does not divide the {channels} channels of stage {i}")
    return embed_dims, tuple(depths), tuple(num_heads)


def check_recipe(
    recipe: str | dict | Recipe, mask_padding: bool | None, downsample: str | None
) -> tuple[Recipe, bool, str]:
    """Return the recipe, and two options of the backbone with their defaults filled in.

    A dict may hold the options too, as those of earlier releases did.

    Args:
        recipe: see :func:`mmbivit.binary.get_recipe`.
        mask_padding: ``None`` for off where the recipe that one starts from has float layers, else on.
        downsample: ``'binary'``, ``'float'``, or ``None`` for what the layers are of the recipe that one starts from.
    """
    options: dict[str, Any] = dict(mask_padding=mask_padding, downsample=downsample)
    allowed = dict(mask_padding=(True, False), downsample=("binary", "float"))
    for name, value in options.items():
        if value is not None:
            check_choice(name, value, allowed[name])
    start = recipe
    if isinstance(recipe, dict):
        recipe = dict(recipe)
        for name in [name for name in options if name in recipe]:
            check_choice(f"recipe.{name}", recipe[name], allowed[name])
            if options[name] is not None:
                raise UserError(f"recipe.{name} and {name} are both given; expected {name} alone")
            options[name] = recipe.pop(name)
        start = recipe.get("base", "sibivit")
    recipe = get_recipe(recipe)
    kind = get_recipe(start).linear
    defaults: dict[str, Any] = dict(mask_padding=kind != "float", downsample=kind)
    mask_padding, downsample = (defaults[name] if value is None else value for name, value in options.items())
    return recipe, mask_padding, downsample


@dataclass(frozen=True)
class MixingSettings:
    """Settings of the token-mixing branch.

    Args:
        ratio: hidden over input tokens, ``n' / n``.
        axis: which tokens are mixed, ``'window'`` or ``'grid'``; what that is depends on the backbone.
        alpha_init: where the balancing factor alpha starts.
        per: what the thresholds and the activation function of the branch have parameters for, ``'token'`` or
            ``'channel'``.
    """

    ratio: float
    axis: str = "window"
    alpha_init: float = 0.0
    per: str = "token"


def check_spatial_interaction(spatial_interaction: dict | None) -> MixingSettings | None:
    """Return the settings of the token-mixing branch, or ``None`` where it is off."""
    if spatial_interaction is None:
        return None
    check_keys("spatial_interaction", spatial_interaction, ("ratio",), ("axis", "alpha_init", "per"))
    settings = MixingSettings(**spatial_interaction)
    check_number("spatial_interaction.ratio", settings.ratio, 0, MAX_RATIO, above=True)
    check_choice("spatial_interaction.axis", settings.axis, ("window", "grid"))
    check_number("spatial_interaction.alpha_init", settings.alpha_init, -1e3, 1e3)
    check_choice("spatial_interaction.per", settings.per, ("token", "channel"))
    return settings


def grid_sides(image_size: tuple[int, int], patch_size: int, num_stages: int) -> list[int]:
    """Return the tokens along the feature map of each stage, for a square image that stages halve.

    Raises:
        ValueError: if the image is not square.
    """
    if image_size[0] != image_size[1]:
        raise UserError(
            f"pretrain_img_size={image_size}; allowed: one number, as spatial_interaction.axis='grid' tiles feature "
            "maps with those of a square image"
        )
    sides = [-(-image_size[0] // patch_size)]
    while len(sides) < num_stages:
        sides.append(-(-sides[-1] // 2))
    return sides


def check_indices(out_indices: Sequence[int], frozen_stages: int, num_stages: int) -> None:
    """Check that stages to return and to freeze exist."""
    check_integers("out_indices", out_indices, 0, num_stages - 1)
    if list(out_indices) != sorted(set(out_indices)):
        raise UserError(f"out_indices={tuple(out_indices)}; allowed: each stage once, in ascending order")
    check_integer("frozen_stages", frozen_stages, -1, num_stages)


def check_image_size(size: int | Sequence[int]) -> tuple[int, int]:
    """Return height and width of the image that a position embedding is made for, in pixels."""
    pair = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    check_integers("pretrain_img_size", pair, 1, 4096)
    if len(pair) != 2:
        raise UserError(f"pretrain_img_size={pair}; allowed: an integer, or (height, width)")
    return pair


def check_init_cfg(init_cfg: dict | None) -> None:
    """Check where a backbone's weights come from; whether the file is there shows when it is loaded."""
    if init_cfg is None:
        return
    if isinstance(init_cfg, dict):  # first of all: other types have other keys
        check_choice("init_cfg.type", init_cfg.get("type", "Pretrained"), ("Pretrained",))
    check_keys("init_cfg", init_cfg, ("type", "checkpoint"), ("prefix",))
    if not isinstance(init_cfg["checkpoint"], str) or not init_cfg["checkpoint"]:
        raise UserError(f"init_cfg.checkpoint={init_cfg['checkpoint']!r}; allowed: a file, a URL or timm://NAME")
    if not isinstance(init_cfg.get("prefix"), (str, type(None))):
        raise UserError(f"init_cfg.prefix={init_cfg['prefix']!r}; allowed: text such as 'backbone.', or None")


def hidden_dims(channels: int, mlp_ratio: float) -> int:
    """Return the hidden width of an MLP over channels."""
    hidden = channels * mlp_ratio
    if hidden < 1 or hidden != int(hidden):
        raise UserError(f"mlp_ratio={mlp_ratio} times {channels} channels is {hidden}, not a whole positive width")
    return int(hidden)
