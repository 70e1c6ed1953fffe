"""Training of detectors and classifiers."""

import logging
import signal
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from torch import nn

from mmbivit.checkpoints import use_safe_loading
from mmbivit.checks import UserError, check_integer
from mmbivit.datasets import check_coco_data, check_image_data, set_data_root
from mmbivit.engine import TerminationHook, find_resumable_checkpoint
from mmbivit.engine.allocator import keep_freed_memory
from mmbivit.engine.device import distributed, enable_amp, set_launcher
from mmbivit.engine.quiet import quiet
from mmbivit.engine.run_settings import check_run_settings, check_seed
from mmbivit.engine.runner import build_runner

from .binary_parts import set_binary_parts
from .checkpoints import fetch_checkpoints
from .config import load_config, set_work_dir

__all__ = ["train", "train_config"]

_HOOKS = (
    *("ThroughputHook", "PeakMemoryHook", "ResumableTrainingHook", "NonFiniteHook", "WorkerEndHook"),
    *("ReleaseMemoryHook", "TerminationHook"),
)


def train_config(
    config: str | Path,
    *,
    work_dir: str | None = None,
    amp: bool | str = False,
    accumulate: int | None = None,
    auto_scale_lr: bool = False,
    ema: float | None = None,
    resume: str | None = None,
    cfg_options: dict[str, Any] | None = None,
    launcher: str = "none",
    data_root: str | None = None,
    float_checkpoint: str | None = None,
    backbone_checkpoint: str | None = None,
    tensorboard: bool = False,
    wandb: str | None = None,
    seed: int | None = None,
    skip_non_finite: int | None = None,
    binary_parts: Sequence[str] | None = None,
) -> Config:
    """Make the config of a training run from a config file and the options of ``tools/train.py``.

    Args:
        config: the config file.
        work_dir: where logs and checkpoints go; ``work_dirs/<config's name>`` by default.
        amp: train in mixed precision, ``'fp16'`` or ``'bf16'``; ``True`` for what suits the device (see
            :func:`mmbivit.engine.device.enable_amp`).
        accumulate: iterations whose gradients are added up before the optimizer makes a step.
        auto_scale_lr: scale the learning rate with the images per step of the optimizer, over all processes.
        ema: weight of the new value in an exponential moving average of the model, per step of the optimizer. The
            average is what is validated and saved. A config's own ``EMAHook`` stays as it is.
        resume: a checkpoint to go on from, or ``'auto'`` for the latest in ``work_dir``, if there is one.
        cfg_options: changes by dotted key; they go first, so that other options have the last word.
        launcher: ``none``, ``pytorch``, ``slurm`` or ``mpi``.
        data_root: folder of the data set, in COCO's layout for a detector, with class folders for a classifier.
        float_checkpoint: see :func:`mmbivit.apis.load_config`.
        backbone_checkpoint: see :func:`mmbivit.apis.load_config`.
        tensorboard: write event files for TensorBoard too.
        wandb: log to this project of Weights & Biases too.
        seed: seed of all random numbers.
        skip_non_finite: how many iterations with a loss that is no number are skipped before training stops; see
            :class:`mmbivit.engine.NonFiniteHook`.
        binary_parts: which parts of a detector beside its backbone are binary, see :func:`set_binary_parts`.

    Raises:
        FileNotFoundError: if config or checkpoint do not exist.
        ValueError: if an option does not fit the config; the message names the option.
    """
    cfg = load_config(config, cfg_options, float_checkpoint, backbone_checkpoint)
    if binary_parts is not None:
        set_binary_parts(cfg, binary_parts)
    check_run_settings(cfg, ["train"])
    set_work_dir(cfg, work_dir)
    set_launcher(cfg, launcher)
    if data_root is not None:
        set_data_root(cfg, data_root)
    if amp:
        enable_amp(cfg, None if amp is True else amp)
    if accumulate is not None:
        check_integer("--accumulate", accumulate, 1)
        cfg.optim_wrapper.accumulative_counts = accumulate
    if auto_scale_lr:
        _scale_lr(cfg)
    if ema is not None:
        _add_ema(cfg, ema)
    if resume is not None:
        _set_resume(cfg, resume)
    if tensorboard:
        _add_backend(cfg, "tensorboard", dict(type="TensorboardVisBackend"))
    if wandb is not None:
        project = dict(project=wandb, name=Path(cfg.work_dir).name)
        _add_backend(cfg, "wandb", dict(type="WandbVisBackend", init_kwargs=project))
    if seed is not None:
        check_seed("--seed", seed)
        cfg.merge_from_dict({"randomness.seed": seed})
    if skip_non_finite is not None:
        check_integer("--skip-non-finite", skip_non_finite, 0)
        hook = dict(type="mmbivit.NonFiniteHook", max_skipped=skip_non_finite)
        cfg.custom_hooks = [*(cfg.get("custom_hooks") or []), hook]
    return cfg


def _scale_lr(cfg: Config) -> None:
    if not {"enable", "base_batch_size"} <= set(cfg.get("auto_scale_lr") or {}):
        raise UserError("--auto-scale-lr needs auto_scale_lr=dict(enable=False, base_batch_size=...) in the config")
    cfg.auto_scale_lr.enable = True
    steps = cfg.optim_wrapper.get("accumulative_counts", 1)
    if steps > 1:  # MMEngine compares the base with the images of one iteration
        cfg.auto_scale_lr.base_batch_size /= steps


def _add_ema(cfg: Config, momentum: float) -> None:
    if not 0 < momentum < 1:
        raise UserError(f"--ema {momentum}; allowed: more than 0 and less than 1, such as 0.0002")
    hooks = [*(cfg.get("custom_hooks") or []), *(cfg.get("default_hooks") or {}).values()]
    if any(str((hook or {}).get("type")).endswith("EMAHook") for hook in hooks):
        print_log("--ema: the config has an EMAHook, which stays as it is.", "current", logging.WARNING)
        return
    ema = dict(
        type="EMAHook",
        ema_type="ExponentialMovingAverage",
        momentum=momentum,
        interval=cfg.optim_wrapper.get("accumulative_counts", 1),  # nothing changes in between
        update_buffers=True,  # BatchNorm's statistics have to fit the averaged weights
    )
    cfg.custom_hooks = [*(cfg.get("custom_hooks") or []), ema]


def _add_backend(cfg: Config, package: str, backend: dict[str, Any]) -> None:
    """Log to one more place, by an option that is called like the package it needs."""
    if find_spec(package) is None:
        raise UserError(f"--{package} needs the package {package}: pip install {package}")
    if not cfg.get("visualizer"):
        cfg.visualizer = dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend")])
    cfg.visualizer.vis_backends = [*cfg.visualizer.vis_backends, backend]


def _set_resume(cfg: Config, resume: str) -> None:
    if resume == "auto":
        # MMEngine, told to resume where there is nothing to resume, starts without the config's load_from.
        latest = find_resumable_checkpoint(cfg.work_dir)
        if latest is None:
            print_log(f"Nothing to resume in {cfg.work_dir}: training starts anew.", "current", logging.WARNING)
            return
        resume = str(latest)
    elif "://" not in resume and not Path(resume).is_file():
        raise FileNotFoundError(f"--resume: checkpoint {resume} does not exist")
    cfg.resume = True
    cfg.load_from = resume


@quiet()
def train(cfg: Config) -> nn.Module:
    """Run the training of a config and return the model, without the wrapper of distributed training.

    Data and checkpoints are looked for first, before anything is built.

    Raises:
        FileNotFoundError: if data or a checkpoint is missing; the message says what to do.
        ValueError: if a setting is impossible; it names the setting.
    """
    use_safe_loading()
    termination = TerminationHook()
    termination.install(cfg.work_dir)
    try:
        modes = [mode for mode in ("train", "val") if cfg.get(f"{mode}_dataloader")]
        check_run_settings(cfg, ["train", *modes])
        notes = check_coco_data(cfg, modes)
        check_image_data(cfg, modes)
        with distributed(cfg):
            return _train(cfg, notes, termination)
    except KeyboardInterrupt:
        print_log(termination.line(signal.SIGINT), "current")
        raise
    finally:
        termination.restore()


def _train(cfg: Config, notes: Iterable[str], termination: TerminationHook) -> nn.Module:
    fetch_checkpoints(cfg)
    _complete(cfg)
    if get_device() == "cpu":
        keep_freed_memory()
    runner = build_runner(cfg, notes)
    termination.restore()
    (termination,) = (hook for hook in runner.hooks if isinstance(hook, TerminationHook))
    termination.install(runner.work_dir)
    try:
        model = runner.train()
    finally:
        termination.restore()
    return model.module if is_model_wrapper(model) else model


def _complete(cfg: Config) -> None:
    """Add to a config what makes its run survive, so that its dumped copy trains the same under MMEngine alone."""
    _save_atomically(cfg)
    if cfg.get("param_scheduler") is None:
        cfg.param_scheduler = []  # MMEngine warns at each checkpoint that it has none to save
    hooks = list(cfg.get("custom_hooks") or ())
    types = [hook.get("type") for hook in (*hooks, *filter(None, cfg.default_hooks.values()))]
    there = {getattr(kind, "__name__", str(kind)).rpartition(".")[2] for kind in types}
    cfg.custom_hooks = [*hooks, *(dict(type=f"mmbivit.{name}") for name in _HOOKS if name not in there)]


def _save_atomically(cfg: Config) -> None:
    """Put our checkpoint hook in the place of MMEngine's, which may leave nothing to resume from."""
    cfg.setdefault("default_hooks", {})
    cfg.default_hooks.setdefault("checkpoint", dict(interval=1))  # both return the plain dict, not what is stored
    if (checkpoint := cfg.default_hooks.checkpoint) is not None:
        checkpoint.setdefault("type", "CheckpointHook")
    for hook in filter(None, (checkpoint, *(cfg.get("custom_hooks") or ()))):
        if hook.get("type") in ("CheckpointHook", "mmengine.CheckpointHook", CheckpointHook):
            hook["type"] = "mmbivit.AtomicCheckpointHook"
