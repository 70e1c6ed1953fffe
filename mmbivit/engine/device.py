"""What training needs to know about the device: several processes and mixed precision, on CPUs too."""

import gc
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import barrier, get_rank, init_dist, is_distributed
from mmengine.logging import print_log

from mmbivit.checks import UserError

from .ranks_hook import check_same_config

__all__ = ["distributed", "enable_amp", "set_launcher"]

# What the processes of a launcher find in their environment.
LAUNCHER_VARIABLES = {
    "pytorch": ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_NODELIST"),
    "mpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "MASTER_ADDR"),
}


def set_launcher(cfg: Config, launcher: str, device: str | None = None) -> None:
    """Set who starts the processes, add the hook that keeps them together, and adapt the config to CPUs if need be.

    MMEngine's defaults take one GPU per process for granted. On CPUs the backend is gloo, DDP gets no device, and
    SyncBN is our own (see :class:`mmbivit.engine.CpuDistributedDataParallel`).

    Args:
        cfg: the config.
        launcher: ``none``, ``pytorch``, ``slurm`` or ``mpi``.
        device: ``cpu`` for what runs there on any machine; the best there is by default.

    Raises:
        ValueError: for two-stage training by a strategy that cannot do it; on a machine without GPU, for a launcher
            other than ``none`` and ``pytorch``, for a strategy, and for a model wrapper other than DDP.
    """
    cfg.launcher = launcher
    _check_strategy(cfg)
    if launcher == "none":
        return
    hooks = cfg.get("custom_hooks") or []
    if not any(hook.get("type") == "mmbivit.RanksHook" for hook in hooks):
        cfg.custom_hooks = [*hooks, dict(type="mmbivit.RanksHook")]
    if (device or get_device()) == "cpu":
        _adapt_to_cpus(cfg)


def _check_strategy(cfg: Config) -> None:
    """Refuse what would fail when ``FlexibleRunner`` is built, or at the switch."""
    strategy = (cfg.get("strategy") or {}).get("type")
    hooks = [str(hook.get("type")) for hook in cfg.get("custom_hooks") or []]
    if strategy not in (None, "SingleDeviceStrategy", "DDPStrategy") and any(
        hook.endswith("DecoupledTrainingHook") for hook in hooks
    ):
        raise UserError(
            f"strategy.type={strategy!r} cannot train in two stages: remove strategy and runner_type from the config, "
            "and set find_unused_parameters=True, for DDP"
        )


def _adapt_to_cpus(cfg: Config) -> None:
    if cfg.launcher != "pytorch":
        raise UserError(
            f"--launcher {cfg.launcher} needs a GPU; on CPUs use tools/dist_train.sh, or --launcher pytorch"
        )
    if cfg.get("strategy") is not None:
        raise UserError("strategy does not work on CPUs: remove it and runner_type from the config")
    cfg.merge_from_dict({"env_cfg.dist_cfg.backend": "gloo"})
    options = dict(cfg.get("model_wrapper_cfg") or {})
    wrapper = options.pop("type", "MMDistributedDataParallel")
    if wrapper not in ("MMDistributedDataParallel", "mmbivit.CpuDistributedDataParallel"):
        raise UserError(
            f"model_wrapper_cfg.type={wrapper!r} does not work on CPUs: remove model_wrapper_cfg from the config"
        )
    defaults = dict(broadcast_buffers=False, find_unused_parameters=cfg.get("find_unused_parameters", False))
    cfg.model_wrapper_cfg = {**defaults, **options, "type": "mmbivit.CpuDistributedDataParallel", "device_ids": None}
    if cfg.get("sync_bn") == "mmcv":
        cfg.sync_bn = "torch"
    _replace_mm_sync_bn(cfg.model)


def _replace_mm_sync_bn(node: Any) -> None:
    """Replace mmcv's SyncBN by torch's, from which it differs in its operators, which are for GPUs."""
    if isinstance(node, dict):
        if node.get("type") == "MMSyncBN":
            node["type"] = "SyncBN"
            node.pop("stats_mode", None)
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for child in node:
            _replace_mm_sync_bn(child)


@contextmanager
def distributed(cfg: Config, device: str | None = None) -> Iterator[None]:
    """Connect the processes, if there are several and they are not connected yet, and part them at the end.

    MMEngine's runner, when it is built inside, finds them connected.

    Args:
        cfg: the config, after :func:`set_launcher`.
        device: as given there.

    Raises:
        ValueError: if nobody has started the processes as the launcher does, if there are more than GPUs, for an
            impossible ``env_cfg.dist_cfg.timeout``, or if the processes have different configs.
    """
    if cfg.launcher == "none" or is_distributed():
        yield
        return
    _connect(cfg, device)
    check_same_config(cfg)
    try:
        yield
    except RuntimeError as error:
        if re.search("gloo|nccl|timed? ?out|connection (closed|reset)", str(error), re.IGNORECASE):
            message = (
                f"Rank {get_rank()} lost contact with another process, which has ended (see its message) or has not "
                "answered within env_cfg.dist_cfg.timeout seconds (1800 by default with gloo, 600 with NCCL)"
            )
            print_log(message, "current", logging.ERROR)
        raise
    # Gloo's threads can abort a process that ends while they run, and they run as long as DDP refers to them: what the
    # runner leaves behind has to go first. After an error nobody waits, since the other processes may hang.
    barrier()
    gc.collect()
    torch.distributed.destroy_process_group()


def _connect(cfg: Config, device: str | None) -> None:
    _check_environment(cfg.launcher, device)
    options = dict((cfg.get("env_cfg") or {}).get("dist_cfg") or {})
    timeout = options.get("timeout")
    if timeout is not None and not (isinstance(timeout, (int, float)) and timeout > 0):
        raise UserError(f"env_cfg.dist_cfg.timeout={timeout!r}; allowed: a number of seconds, more than 0")
    if (device or get_device()) != "cpu":
        init_dist(cfg.launcher, **options)
        return
    # MMEngine's init_dist selects a GPU first, and would also turn seconds into a timedelta.
    if timeout is not None:
        options["timeout"] = timedelta(seconds=timeout)
    torch.distributed.init_process_group(**options)


def _check_environment(launcher: str, device: str | None) -> None:
    missing = [name for name in LAUNCHER_VARIABLES[launcher] if name not in os.environ]
    if missing:
        raise UserError(
            f"--launcher {launcher}: {', '.join(missing)} not set, so no launcher has started this process; use "
            "tools/dist_train.sh, tools/slurm_train.sh or mpirun, or leave --launcher out for a single process"
        )
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if launcher == "pytorch" and 0 < gpus <= (rank := int(os.environ.get("LOCAL_RANK", 0))):
        raise UserError(f"process {rank + 1} of this machine has no GPU of its own, there are {gpus}; start {gpus}")


def enable_amp(cfg: Config, precision: str | None = None) -> None:
    """Train in mixed precision; everything else about the optimizer stays as configured.

    Args:
        cfg: the config.
        precision: ``'fp16'``, with dynamic loss scaling; ``'bf16'``, whose exponents need none; ``None`` for float16 on
            GPUs (or the ``optim_wrapper.dtype`` of the config) and bfloat16 on CPUs.

    Raises:
        ValueError: for another precision, or for ``'fp16'`` on a CPU.
    """
    if precision not in (None, "fp16", "bf16"):
        raise UserError(f"--amp {precision}; allowed: fp16, bf16")
    wrapper = cfg.optim_wrapper
    if get_device() == "cpu":
        if precision == "fp16":
            raise UserError("--amp fp16 needs a GPU; on CPUs give --amp bf16, or --amp")
        for key in ("loss_scale", "dtype", "use_fsdp"):
            wrapper.pop(key, None)
        wrapper.type = "mmbivit.CpuAmpOptimWrapper"
        return
    wrapper.type = "AmpOptimWrapper"
    wrapper.loss_scale = dict(enabled=False) if precision == "bf16" else "dynamic"
    if precision is not None:
        wrapper.dtype = "bfloat16" if precision == "bf16" else "float16"
