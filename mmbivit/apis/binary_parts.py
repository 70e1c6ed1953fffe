"""Which parts of a detector beside its backbone are binary, as one option of a config."""

from collections.abc import Iterable, Sequence
from typing import Any

from mmengine.config import Config

from mmbivit.checks import UserError, check_choice

__all__ = ["BINARY_PARTS", "CONVOLUTIONS", "set_binary_parts"]

# By MMDetection's class: ours, and the arguments that the class stands for.
_BOX_HEADS: dict[str, dict[str, int]] = {
    "ConvFCBBoxHead": {},
    "Shared2FCBBoxHead": dict(num_shared_fcs=2),
    "Shared4Conv1FCBBoxHead": dict(num_shared_convs=4, num_shared_fcs=1),
}
_CLASSES: dict[str, dict[str, tuple[str, dict[str, int]]]] = {
    "neck": {"FPN": ("BinaryFPN", {})},
    "rpn": {"RPNHead": ("BinaryRPNHead", {})},
    "box": {
        **{name: ("BinaryConvFCBBoxHead", options) for name, options in _BOX_HEADS.items()},
        "RetinaHead": ("BinaryRetinaHead", {}),
    },
    "mask": {"FCNMaskHead": ("BinaryFCNMaskHead", {})},
}
BINARY_PARTS = tuple(_CLASSES)
# Names of convolutions whose weights take larger steps where they are binary (lr_mult in a config's custom_keys).
CONVOLUTIONS = {
    "neck": ("fpn_convs",),
    "rpn": ("rpn_conv",),
    "box": ("cls_convs", "reg_convs"),
    "mask": (".convs.",),
}


def set_binary_parts(cfg: Config, parts: Sequence[str]) -> None:
    """Make these parts of a config's detector binary, and no others.

    A part that is binary already keeps its settings; another gets the default ones and the training stages of the
    backbone. Parts that are not named become float, and lose the learning rate that the config gives binary ones.

    Args:
        cfg: config of a detector; it is changed.
        parts: of ``neck``, ``rpn``, ``box`` (of a single-stage detector, its dense head) and ``mask``.

    Raises:
        ValueError: if there is no such part, the detector has none, or its class has no binary form.
    """
    for part in parts:
        check_choice("--binary-parts", part, BINARY_PARTS)
    for part in BINARY_PARTS:
        configs = list(_configs(cfg.model, part))
        if part in parts and not configs:
            raise UserError(f"--binary-parts {part}: the config's {cfg.model.get('type')} has no such part")
        for config in configs:
            if part in parts:
                _make_binary(config, part, cfg.model.get("backbone") or {})
            elif _name(config).startswith("Binary"):
                config["binary"] = None
        if part not in parts:
            paramwise_cfg = (cfg.get("optim_wrapper") or {}).get("paramwise_cfg") or {}
            for name in CONVOLUTIONS[part]:
                paramwise_cfg.get("custom_keys", {}).pop(name, None)


def _configs(model: dict[str, Any], part: str) -> Iterable[dict[str, Any]]:
    """Return the configs of a part, those of all stages of a cascade."""
    roi_head = model.get("roi_head") or {}
    found = {
        "neck": model.get("neck"),
        "rpn": model.get("rpn_head"),
        "box": roi_head.get("bbox_head") or model.get("bbox_head"),
        "mask": roi_head.get("mask_head"),
    }[part]
    return filter(None, found if isinstance(found, (list, tuple)) else [found])


def _make_binary(config: dict[str, Any], part: str, backbone: dict[str, Any]) -> None:
    if not _name(config).startswith("Binary"):
        known = _CLASSES[part]
        if (name := _name(config)) not in known:
            raise UserError(f"--binary-parts {part}: a {name} has no binary form; those that have: {', '.join(known)}")
        ours, options = known[name]
        for key, value in options.items():
            config.setdefault(key, value)
        config["type"] = f"mmbivit.{ours}"
    if not config.get("binary"):
        stages = ("stage1", "training_stages")
        config["binary"] = {key: backbone[key] for key in stages if backbone.get(key) is not None}


def _name(config: dict[str, Any]) -> str:
    kind = config.get("type")
    return getattr(kind, "__name__", str(kind)).rpartition(".")[2]
