"""What a checkpoint holds beside its weights, checked before a run goes on from it.

A checkpoint may come from anybody. Loading weights only keeps code out of it, but MMEngine runs some of its texts as
configs, and takes the rest over as it is. ``docs/robustness.md`` lists every field and what becomes of it.
"""

from collections.abc import Callable
from numbers import Real
from typing import Any

from mmengine.runner import Runner
from torch import Tensor

from mmbivit.checkpoints.content import value_at
from mmbivit.checks import UserError

from .unwrapping import optim_wrappers, unwrapped_model

__all__ = ["GRADIENTS_KEY", "SIGNS_KEY", "UNITS_KEY", "check_fits_run", "why_not_resumable"]

# Fields of our own hooks.
GRADIENTS_KEY = "accumulated_gradients"
SIGNS_KEY = "sign_flips_signs"
UNITS_KEY = "resumable_training"

# What optimizers keep of each parameter in its shape.
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")

_NEEDED = ("meta", "message_hub", "optimizer")


def why_not_resumable(checkpoint: dict[str, Any]) -> str | None:
    """Return why no run can go on from a checkpoint: what it lacks, or a field of a wrong type; else None."""
    missing = [key for key in _NEEDED if key not in checkpoint]
    if missing:
        kind = "weights alone" if len(missing) == len(_NEEDED) else "weights of a run, but not its state"
        return f"it holds {kind} (no {', '.join(missing)}); a new run can start from it: --cfg-options load_from=FILE"
    for place, (is_required, is_right, expected) in _FIELDS.items():
        value = value_at(checkpoint, place)
        if value is None and not is_required:
            continue
        if not is_right(value):
            return f"its {place} is {_show(value)}, expected {expected}"
    for key, value in checkpoint["message_hub"]["runtime_info"].items():
        for prefix, kind in _BEST.items():
            if key.startswith(prefix) and not isinstance(value, kind):
                return f"its message_hub.runtime_info.{key} is {_show(value)}"
    return None


def check_fits_run(checkpoint: dict[str, Any], runner: Runner) -> None:
    """Check that the fields of a checkpoint are those of a run, which has been built.

    MMEngine only warns of weights that do not fit, and lets the state of a scheduler replace any of its attributes:
    what optimizer and schedulers do not have is removed, in place.

    Args:
        checkpoint: one for which :func:`why_not_resumable` returns None.
        runner: with its model, optimizer and schedulers.

    Raises:
        ValueError: if something does not fit; the message names it.
    """
    if checkpoint["meta"]["iter"] > runner.max_iters:
        raise UserError(f"it is at iteration {checkpoint['meta']['iter']}, and the run ends at {runner.max_iters}")
    model = unwrapped_model(runner)
    weights = {key.removeprefix("module."): value for key, value in checkpoint["state_dict"].items()}
    if unknown := weights.keys() - model.state_dict().keys():
        raise UserError(f"its state_dict.{min(unknown)} has no place in the config's model")
    _check_like(weights, model.state_dict(), "state_dict")

    average = checkpoint.get("ema_state_dict", {})
    _check_like(average, {key: weights.get(key[7:]) for key in average if key.startswith("module.")}, "ema_state_dict")
    gradients = checkpoint.get(GRADIENTS_KEY, {})
    _check_like(gradients, {key: value for key, value in model.named_parameters() if key in gradients}, GRADIENTS_KEY)

    _check_like(checkpoint["optimizer"], runner.optim_wrapper.state_dict(), "optimizer")
    for name, wrapper in optim_wrappers(runner).items():
        saved = checkpoint["optimizer"] if name is None else checkpoint["optimizer"][name]
        _check_states(saved["state"], [p for group in wrapper.param_groups for p in group["params"]])
        _remove_others(saved, wrapper.state_dict())
    if runner.param_schedulers is not None and "param_schedulers" in checkpoint:
        own = _states(runner.param_schedulers)
        _check_like(checkpoint["param_schedulers"], own, "param_schedulers")
        for name in own if isinstance(own, dict) else [slice(None)]:
            for pair in zip(checkpoint["param_schedulers"][name], own[name], strict=True):
                _remove_others(*pair)


def _states(schedulers: Any) -> Any:
    """Return the states of a list of schedulers, or of a dict of such lists, for several optimizers."""
    if isinstance(schedulers, dict):
        return {name: _states(some) for name, some in schedulers.items()}
    return [scheduler.state_dict() for scheduler in schedulers]


def _check_states(states: dict[int, Any], parameters: list[Tensor]) -> None:
    """Raise a ValueError unless an optimizer's states are of its parameters."""
    for i, state in states.items():
        place = f"optimizer.state.{i}"
        if not (isinstance(i, int) and 0 <= i < len(parameters)) or not isinstance(state, dict):
            raise UserError(f"its {place} is {_show(state)}, of which the run's optimizer knows nothing")
        for key, value in state.items():
            if key == "momentum_buffer" and value is None:  # of SGD without momentum
                continue
            if key in _MOMENTS:
                _check_like(value, parameters[i], f"{place}.{key}")
            elif not isinstance(value, Tensor | Real):
                raise UserError(f"its {place}.{key} is {_show(value)}, expected a tensor or a number")


def _remove_others(saved: dict[str, Any], own: dict[str, Any]) -> None:
    """Remove what a run's own part does not have, and would take over as an attribute."""
    for key in saved.keys() - own.keys():
        del saved[key]


def _check_like(saved: Any, own: Any, place: str) -> None:
    """Raise a ValueError unless saved values have the structure, types and shapes of a run's own.

    What torch fills in where it is missing, such as a flag that is new in an optimizer, may be missing.
    """
    if isinstance(own, dict):
        if not isinstance(saved, dict):
            raise UserError(f"its {place} is {_show(saved)}, expected keys and values")
        for key, value in own.items():
            if key in saved:
                _check_like(saved[key], value, f"{place}.{key}")
            elif not (value is None or isinstance(value, bool) or key in ("loss_scaler", "base_param_settings")):
                raise UserError(f"its {place} lacks {key}")
    elif isinstance(own, (list, tuple)):
        if not isinstance(saved, (list, tuple)) or len(saved) != len(own):
            raise UserError(f"its {place} is {_show(saved)}, expected {len(own)} items")
        for i, pair in enumerate(zip(saved, own, strict=True)):
            _check_like(*pair, f"{place}.{i}")
    elif isinstance(own, Tensor):
        if not isinstance(saved, Tensor) or saved.shape != own.shape:
            raise UserError(f"its {place} is {_show(saved)}, expected a tensor {tuple(own.shape)}")
    elif isinstance(own, bool | None):
        if not isinstance(saved, Real | None):
            raise UserError(f"its {place} is {_show(saved)}, expected {_show(own)}")
    elif not (isinstance(saved, Real) if isinstance(own, Real) else saved == own):
        raise UserError(f"its {place} is {_show(saved)}, expected {_show(own)}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _are(kind: Any) -> Callable[[Any], bool]:
    """Make a test of dicts with printable names, whose values are of a type."""
    return lambda value: (
        isinstance(value, dict)
        and all(isinstance(key, str) and key.isprintable() for key in value)
        and all(isinstance(item, kind) for item in value.values())
    )


def _is(kind: Any) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


# What MMEngine, mmdet and our hooks read of a checkpoint when a run goes on from it: whether it has to be there, a
# test, and what the test expects.
_FIELDS: dict[str, tuple[bool, Callable[[Any], bool], str]] = {
    "meta": (True, _are(object), "names and values"),
    "meta.epoch": (True, _is_count, "a count"),
    "meta.iter": (True, _is_count, "a count"),
    "meta.seed": (False, lambda value: _is_count(value) and value < 2**32, "an integer below 2^32"),
    "meta.dataset_meta": (False, _are(object), "names and values"),
    "message_hub": (True, _are(object), "names and values"),
    "message_hub.log_scalars": (True, _are(object), "histories by name"),
    "message_hub.runtime_info": (True, _are(object), "names and values"),
    "message_hub.runtime_info.keep_ckpt_ids": (
        False,
        lambda value: isinstance(value, list) and all(map(_is_count, value)),
        "a list of counts",
    ),
    "message_hub.runtime_info.eta": (False, _is(Real), "a number"),
    "message_hub.resumed_keys": (True, _are(bool), "flags by name"),
    "optimizer": (True, _is(dict), "keys and values"),
    "ema_state_dict": (False, _are(Tensor), "tensors by name"),
    GRADIENTS_KEY: (False, _are(Tensor), "tensors by name"),
    SIGNS_KEY: (False, _are(Tensor), "tensors by name"),
    UNITS_KEY: (
        False,
        lambda value: _are(int)(value) and value.keys() == {"iterations_per_epoch", "images_per_iteration"},
        "iterations_per_epoch and images_per_iteration",
    ),
}
# Keys of message_hub.runtime_info that begin so; save_best may have several.
_BEST = {"best_score": Real, "best_ckpt": str}


def _show(value: Any) -> str:
    """Return a value as a few words."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    if value is None:
        return "missing"
    text = " ".join(repr(value).split())
    return f"a {type(value).__name__} of {len(value)} items" if isinstance(value, (dict, list, tuple)) else text[:60]
