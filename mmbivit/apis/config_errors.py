"""What is wrong with a config, from the error of MMEngine or torch that could not build a part of it."""

import inspect
import os
import re
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import mmengine
import torch
from mmengine.registry import OPTIMIZERS, Registry

from mmbivit.checks import did_you_mean

__all__ = ["REFUSALS", "config_message"]

# What a library raises for a value that it does not take, on purpose or by failing.
REFUSALS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, ZeroDivisionError)
_MMENGINE, _TORCH = (str(Path(str(library.__file__)).resolve().parent) + os.sep for library in (mmengine, torch))
_RUNNER = os.path.join(_MMENGINE, "runner", "")
_STDLIB = str(Path(sysconfig.get_path("stdlib")).resolve()) + os.sep
_BUILDERS = ("build_from_cfg", "build_runner_from_cfg", "build_scheduler_from_cfg")
# Functions of MMEngine's runners that make something of a part of the config, and the key of that part.
_PARTS = {
    "_check_scheduler_cfg": "param_scheduler",
    "_maybe_compile": "compile",
    "build_dataloader": "dataloader",
    "build_evaluator": "evaluator",
    "build_log_processor": "log_processor",
    "build_logger": "log_level",
    "build_optim_wrapper": "optim_wrapper",
    "build_param_scheduler": "param_scheduler",
    "build_test_loop": "test_cfg",
    "build_train_loop": "train_cfg",
    "build_val_loop": "val_cfg",
    "build_visualizer": "visualizer",
    "register_hook": "hooks",
    "scale_lr": "auto_scale_lr",
    "set_randomness": "randomness",
    "setup_env": "env_cfg",
}
_UNKNOWN_KEY = re.compile(r"(\w+)(?:\.__init__)?\(\) got an unexpected keyword argument '(\w+)'")


def config_message(error: Exception) -> str | None:
    """Return what is wrong with the part of a config that MMEngine could not build, if that is the error.

    Args:
        error: one of :data:`REFUSALS`.

    Returns:
        One line, or ``None`` for an error from anywhere else, which may be a defect.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if frames and frames[-1].f_code.co_name == "call_hook" and isinstance(error.__context__, TypeError):
        return config_message(error.__context__)  # MMEngine adds the hook to a TypeError
    text = " ".join(str(error.args[0]).split()) if error.args else ""
    if isinstance(error, (KeyError, TypeError)):
        in_build = bool(frames) and frames[-1].f_code.co_name in _BUILDERS
        if in_build and "is not in the" in text:
            built = frames[-1].f_locals
            name = next(built[key] for key in ("obj_type", "runner_type", "scheduler_type") if key in built)
            return text.partition(". Please check")[0] + _hint(name, built["registry"])
        if (match := _UNKNOWN_KEY.search(text)) and _is_of_config(frames, match[2]):
            return f"{text}{_allowed(frames, *match.groups())}"
        if in_build and not match:
            return text
    return _refusal(error, frames, text)


def _hint(name: Any, registry: Registry) -> str:
    types = list(_types(registry))
    elsewhere = [known for known in types if known.endswith(f".{name}")]
    return did_you_mean(name, elsewhere or types) or ": check its spelling, or custom_imports of what has it"


def _types(registry: Registry) -> Iterator[str]:
    """Return the names that could stand in a config, with and without the scope."""
    for scope in (registry.root, *registry.root.children.values()):
        for name in scope.module_dict:
            yield from (name, f"{scope.scope}.{name}")


def _is_of_config(frames: list[FrameType], key: str) -> bool:
    """Whether a key was passed on by MMEngine out of a dict, as it does with configs."""
    values = (value for frame in frames if _is_mmengines(frame) for value in frame.f_locals.values())
    return any(isinstance(value, dict) and key in value for value in values)


def _allowed(frames: list[FrameType], name: str, key: str) -> str:
    """Return the keys that a class takes, if it is the one that a registry was building."""
    for cls in (frame.f_locals.get("obj_cls") for frame in reversed(frames)):
        if inspect.isclass(cls) and cls.__name__ == name:
            keys = [key for key in inspect.signature(cls).parameters if key not in ("args", "kwargs")]
            return f"; allowed: {', '.join(keys)}{did_you_mean(key, keys)}"
    return ""


def _refusal(error: Exception, frames: list[FrameType], text: str) -> str | None:
    """Return what a library does not take in the part of a config that it was building, if that is the error.

    From the function that builds the part on, everything has to be the library's. Of other code there may only be
    constructors that pass their arguments on.
    """
    builders = [
        i for i, frame in enumerate(frames) if _is_mmengines(frame) and frame.f_code.co_name in (*_BUILDERS, *_PARTS)
    ]
    if frames and _is_runner_itself(frames[-1]):
        builders.append(len(frames) - 1)
    if not builders or not all(map(_is_of_library, frames[builders[-1] + 1 :], [*frames[builders[-1] + 2 :], None])):
        return None
    for frame in frames[builders[-1] :]:
        if "optimizer_cls" in frame.f_locals and frame.f_locals["optimizer_cls"] is None:
            name = frame.f_locals["self"].optimizer_cfg["type"]
            return f"optim_wrapper.optimizer.type={name!r} is not in the optimizer registry{_hint(name, OPTIMIZERS)}"
    if isinstance(error, RuntimeError) and not _is_mmengines(frames[-1]):
        return None  # of torch, these are of devices and memory
    if isinstance(error, KeyError):
        text = f"KeyError: {text}"
    text = text or traceback.extract_tb(error.__traceback__)[-1].line or ""
    return f"{_part(frames[: builders[-1] + 1])} cannot be built: {text[:300]}; --debug shows where"


def _is_mmengines(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(_MMENGINE)


def _is_runner_itself(frame: FrameType) -> bool:
    """Whether a frame is of the runner's constructor, which looks at the config as a whole."""
    return frame.f_code.co_filename.startswith(_RUNNER) and frame.f_code.co_name == "__init__"


def _is_of_library(frame: FrameType, inner: FrameType | None) -> bool:
    file = frame.f_code.co_filename
    if file.startswith((_MMENGINE, _TORCH)) or (file.startswith(_STDLIB) and "-packages" not in file):
        return True
    return (
        inner is not None
        and frame.f_code.co_name == inner.f_code.co_name == "__init__"
        and frame.f_locals.get("self") is inner.f_locals.get("self")
    )


def _part(frames: list[FrameType]) -> str:
    """Return which part of the config was being built: its key, and the type with its plain values."""
    names = [frame.f_code.co_name for frame in frames if _is_mmengines(frame)]
    keys = [_PARTS[name] for name in names if name in _PARTS]
    if len(keys) > 1 and keys[-1] in ("dataloader", "evaluator"):
        keys.append(keys[-2].replace("cfg", keys[-1]))  # train_dataloader
    if frames[-1].f_code.co_name != "build_from_cfg":
        return keys[-1] if keys else "the config"
    built = frames[-1].f_locals
    values = [f"{key}={value!r}" for key, value in built["args"].items() if _is_plain(value)]
    built_type = f"{getattr(built['obj_type'], '__name__', built['obj_type'])}({', '.join(values)})"
    return f"{keys[-1]}: {built_type}" if keys else built_type


def _is_plain(value: Any) -> bool:
    """Whether a value of a config is short and shows all that it is."""
    if isinstance(value, (list, tuple)):
        return len(value) <= 4 and all(map(_is_plain, value))
    return value is None or (isinstance(value, (str, int, float)) and len(str(value)) <= 60)
