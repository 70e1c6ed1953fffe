"""Reading a config and putting what the command line says into it."""

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner

from mmbivit.checks import UserError, did_you_mean
from mmbivit.datasets.wrappers import inner_dataset
from mmbivit.engine.quiet import quiet
from mmbivit.engine.safe_yaml import read_yaml_as_data
from mmbivit.files import check_writable

__all__ = ["is_classifier", "load_config", "set_work_dir"]

# Our configs take these variables as the place of a checkpoint, with a default: '{{$VARIABLE:default}}'.
CHECKPOINT_VARIABLES = {
    "float_checkpoint": "MMBIVIT_FLOAT_CHECKPOINT",
    "backbone_checkpoint": "MMBIVIT_BACKBONE_CHECKPOINT",
}

# What MMEngine's runners take from a config beside the arguments of their constructors.
_RUNNER_KEYS = {
    *("activation_checkpointing", "broadcast_buffers", "compile", "custom_imports", "detect_anomalous_params"),
    *("efficient_conv_bn_eval", "find_unused_parameters", "model_wrapper_cfg", "runner_type", "strategy", "sync_bn"),
    *("tta_model", "tta_pipeline"),
}
_DATALOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")
_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("model", *_DATALOADERS, "train_cfg", "val_cfg", "test_cfg"), dict),
    **dict.fromkeys(("optim_wrapper", "default_hooks", "data_preprocessor", "env_cfg", "log_processor"), dict),
    **dict.fromkeys(("visualizer", "randomness", "auto_scale_lr", "tta_model"), dict),
    **dict.fromkeys(("custom_hooks", "tta_pipeline"), list),
    **dict.fromkeys(("param_scheduler", "val_evaluator", "test_evaluator"), (dict, list)),
    **dict.fromkeys(("load_from", "work_dir", "default_scope", "experiment_name", *CHECKPOINT_VARIABLES), str),
    **dict.fromkeys(("resume", "find_unused_parameters"), bool),
}


@quiet()
def load_config(
    path: str | Path,
    cfg_options: dict[str, Any] | None = None,
    float_checkpoint: str | None = None,
    backbone_checkpoint: str | None = None,
) -> Config:
    """Read a config file.

    Args:
        path: the config file.
        cfg_options: changes by dotted key, such as ``{"model.backbone.with_cp": True}``.
        float_checkpoint: file or URL of the float detector that student and teacher start from; ``'none'`` starts
            the student at random and trains without a teacher; ``None`` leaves the config's default.
        backbone_checkpoint: file or URL of the backbone that a fine-tuning config starts from.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if an option does not fit the config; the message names the option.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"config {path} does not exist")
    if path.suffix not in (".py", ".yaml", ".yml", ".json"):
        raise UserError(f"config {path} is not a config file; expected .py, .yaml or .json")
    without_float = float_checkpoint == "none"
    given = {
        "float_checkpoint": None if without_float else float_checkpoint,
        "backbone_checkpoint": backbone_checkpoint,
    }
    files = {key: Path(file).as_posix() if "://" not in file else file for key, file in given.items() if file}
    with _environment({CHECKPOINT_VARIABLES[key]: file for key, file in files.items()}):
        cfg = _read(path)
    for key, file in files.items():
        if cfg.get(key) != file:
            raise UserError(f"--{key.replace('_', '-')}: config {path} does not use a {key.replace('_', ' ')}")
    if without_float:
        _remove_float_checkpoint(cfg)
    if cfg_options:
        _check_known(cfg, cfg_options, path)
        try:
            cfg.merge_from_dict(cfg_options)
        except Exception as error:  # MMEngine checks some, and fails on the way in others
            raise UserError(f"--cfg-options do not fit config {path}: {_one_line(error)}") from error
    _check_structure(cfg, path)
    return cfg


def _read(path: Path) -> Config:
    read_yaml_as_data()
    try:
        return Config.fromfile(path)
    except OSError as error:  # of a base, most often
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
        raise kind(f"config {path} cannot be read: {_one_line(error)}") from error
    except (Exception, SystemExit) as error:  # a config is code, so anything may go wrong in it
        raise UserError(f"config {path} cannot be read: {type(error).__name__}: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _check_known(cfg: Config, cfg_options: dict[str, Any], path: Path) -> None:
    """Refuse options that would add a key that nothing reads, such as one that is spelled wrongly."""
    known = {*cfg, *_RUNNER_KEYS, *inspect.signature(Runner.__init__).parameters} - {"self", "cfg"}
    for option in cfg_options:
        key = option.partition(".")[0]
        if key not in known:
            raise UserError(
                f"--cfg-options {' '.join(option.split())}: neither config {path} nor MMEngine's runner has {key!r}"
                f"{did_you_mean(key, known)}"
            )


def _check_structure(cfg: Config, path: Path) -> None:
    """Refuse a config that lacks a model, or has something of another type where its parts belong."""
    if not cfg.get("model"):
        raise UserError(f"config {path} has no model: expected model=dict(type=..., ...)")
    for key, expected in _TYPES.items():
        value = cfg.get(key)
        if value is not None and not isinstance(value, expected):
            names = expected.__name__ if isinstance(expected, type) else " or ".join(t.__name__ for t in expected)
            raise UserError(f"config {path}: {key} is a {type(value).__name__}, expected a {names}")
    for key in _DATALOADERS:
        if loader := cfg.get(key):
            _check_loader(f"config {path}: {key}", loader)
    hooks = [*(cfg.get("custom_hooks") or ()), *(cfg.get("default_hooks") or {}).values()]
    for part in (cfg.model.get("backbone"), *hooks):
        if isinstance(part, (str, int, float, list, tuple)):
            raise UserError(f"config {path}: {part!r} is where the config of a backbone or a hook belongs, a dict")


def _check_loader(name: str, loader: dict[str, Any]) -> None:
    if not isinstance(loader.get("dataset"), dict):
        raise UserError(f"{name}.dataset is missing, or no dict")
    for key in ("sampler", "batch_sampler"):
        if isinstance(value := loader.get(key), (str, int, float, list, tuple)):
            raise UserError(f"{name}.{key} is {value!r}, expected a dict")
    pipeline = inner_dataset(loader["dataset"]).get("pipeline") or []
    if not isinstance(pipeline, (list, tuple)) or any(isinstance(step, (str, int, float)) for step in pipeline):
        raise UserError(f"{name}.dataset.pipeline is {pipeline!r}, expected a list of dicts")


def set_work_dir(cfg: Config, work_dir: str | None) -> None:
    """Set where logs and checkpoints go: the option, else what the config says, else ``work_dirs/<config's name>``.

    Raises:
        OSError: if nothing can be written there.
    """
    if work_dir is not None:
        cfg.work_dir = work_dir
    elif cfg.get("work_dir") is None:
        cfg.work_dir = str(Path("work_dirs") / Path(cfg.filename).stem)
    check_writable("work_dir" if work_dir is None else "--work-dir", cfg.work_dir, folder=True)


def is_classifier(cfg: Config) -> bool:
    """Whether a config is of an image classifier; any other is taken for a detector's."""
    model_type = (cfg.get("model") or {}).get("type")
    return str(getattr(model_type, "__name__", model_type)).endswith("ImageClassifier")


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _remove_float_checkpoint(cfg: Config) -> None:
    """Let the student start at random and train without the teacher whose weights are not wanted."""
    file = cfg.get("float_checkpoint")
    if file is None:
        return
    cfg.float_checkpoint = None
    if cfg.get("load_from") == file:
        cfg.load_from = None
    for hook in cfg.get("custom_hooks") or []:
        if (hook.get("teacher") or {}).get("init_cfg", {}).get("checkpoint") == file:
            hook.teacher = None
    backbone = cfg.model.get("backbone", {})
    if (backbone.get("init_cfg") or {}).get("checkpoint") == file:
        backbone.init_cfg = None
