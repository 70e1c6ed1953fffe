"""Values of a config that MMEngine takes as they are, and stumbles over in the middle of a run."""

from collections.abc import Sequence
from math import inf
from typing import Any

from mmengine.config import Config

from mmbivit.checks import UserError, check_flag, check_integer, check_keys, check_number

__all__ = ["check_run_settings", "check_seed"]

# Key -> least value, and whether that itself is too little. Where an integer is meant, MMEngine also takes 1e5.
_NUMBERS = {
    "train_cfg.max_epochs": (1, False),
    "train_cfg.max_iters": (1, False),
    "train_cfg.val_begin": (0, False),
    "train_cfg.val_interval": (1, False),
    "optim_wrapper.accumulative_counts": (1, False),
    "optim_wrapper.clip_grad.max_norm": (0, True),
    "optim_wrapper.clip_grad.clip_value": (0, True),
    "auto_scale_lr.base_batch_size": (0, True),
    "default_hooks.checkpoint.interval": (-1, False),
    "default_hooks.checkpoint.max_keep_ckpts": (-1, False),
}
# In these None is a value, or the same as none.
_NUMBERS_OF_OPTIMIZERS = dict.fromkeys(("lr", "momentum", "weight_decay"), (0, False))
_NUMBERS_OF_SCHEDULERS = {
    **dict.fromkeys(("T_max", "end", "step_size", "total_iters", "total_steps", "start_factor"), (0, True)),
    **dict.fromkeys(("begin", "end_factor", "eta_min", "eta_min_ratio", "factor", "gamma", "power"), (0, False)),
}
_TRAINING = ("train_dataloader", "train_cfg", "optim_wrapper")


def check_run_settings(cfg: Config, modes: Sequence[str]) -> None:
    """Check the numbers and flags of a config that would end a run only when they are used, or would do nonsense.

    What a constructor refuses is left to it: see :func:`mmbivit.apis.errors.is_user_error`.

    Args:
        cfg: the config.
        modes: what is to run, of ``train``, ``val`` and ``test``.

    Raises:
        ValueError: that names the key and says what is allowed.
    """
    for mode in modes:
        for key, least in (("batch_size", 1), ("num_workers", 0)):
            if (value := _get(cfg, name := f"{mode}_dataloader.{key}")) is not None:
                check_integer(name, value, least)
        if (value := _get(cfg, f"{mode}_cfg.fp16")) is not None:
            check_flag(f"{mode}_cfg.fp16", value)
    if (value := _get(cfg, "log_processor.window_size")) is not None:
        check_integer("log_processor.window_size", value, 1)
    if (seed := _get(cfg, "randomness.seed")) is not None:
        check_seed("randomness.seed", seed)
    if "train" in modes:
        _check_training(cfg)


def check_seed(name: str, seed: Any) -> None:
    """Raise a ValueError unless a value is a seed that numpy takes too."""
    check_integer(name, seed, 0, 2**32 - 1)


def _check_training(cfg: Config) -> None:
    for key in _TRAINING:
        if not cfg.get(key):
            raise UserError(f"the config has no {key}; training needs {', '.join(_TRAINING)}")
    if clip_grad := cfg.optim_wrapper.get("clip_grad"):
        by_value = isinstance(clip_grad, dict) and clip_grad.get("type") == "value"
        norm = ("norm_type", "error_if_nonfinite")
        required, optional = ("clip_value", ()) if by_value else ("max_norm", norm)
        check_keys("optim_wrapper.clip_grad", clip_grad, (required,), ("type", "foreach", *optional))
    checkpoint = _get(cfg, "default_hooks.checkpoint")
    for key in ("filename_tmpl", "out_dir"):
        if not isinstance(value := _get(checkpoint, key), (str, type(None))):
            raise UserError(f"default_hooks.checkpoint.{key}={value!r}; allowed: text")
    for key, (least, above) in _NUMBERS.items():
        parent, _, name = key.rpartition(".")
        if name in (_get(cfg, parent) or ()):
            check_number(key, _get(cfg, key), least, inf, above=above)
    _check_part("optim_wrapper.optimizer", cfg.optim_wrapper.get("optimizer"), _NUMBERS_OF_OPTIMIZERS)
    schedulers = cfg.get("param_scheduler") or ()
    for i, scheduler in enumerate([schedulers] if isinstance(schedulers, dict) else schedulers):
        _check_part(f"param_scheduler[{i}]", scheduler, _NUMBERS_OF_SCHEDULERS)
        milestones = _get(scheduler, "milestones")
        for milestone in milestones if isinstance(milestones, (list, tuple)) else [milestones]:
            if milestones is not None:
                check_number(f"param_scheduler[{i}].milestones", milestone, 0, inf)


def _check_part(name: str, part: Any, numbers: dict[str, tuple[int, bool]]) -> None:
    for key, (least, above) in numbers.items():
        if (value := _get(part, key)) is not None:
            check_number(f"{name}.{key}", value, least, inf, above=above)


def _get(cfg: Any, key: str) -> Any:
    """Return the value of a dotted key, ``None`` where there is none."""
    for name in key.split("."):
        cfg = cfg.get(name) if isinstance(cfg, (Config, dict)) else None
    return cfg
