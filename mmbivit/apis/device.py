"""What training needs to know about the device: several processes and mixed precision, on CPUs too."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import barrier, init_dist, is_distributed
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner import Runner
from torch import nn

__all__ = ["CpuAmpOptimWrapper", "PeakMemoryHook", "distributed", "enable_amp", "set_launcher"]


def set_launcher(cfg: Config, launcher: str) -> None:
    """Set who starts the processes, and adapt the config if they have no GPU.

    MMEngine's defaults take one GPU per process for granted. On CPUs the backend is gloo, DDP gets no device, and
    SyncBN, which has no CPU implementation, becomes BN (with the same keys in checkpoints).

    Raises:
        ValueError: for a launcher other than ``none`` and ``pytorch`` on a machine without GPU.
    """
    cfg.launcher = launcher
    if launcher == "none" or get_device() != "cpu":
        return
    if launcher != "pytorch":
        raise ValueError(f"--launcher {launcher} needs a GPU; on CPUs use tools/dist_train.sh, or --launcher pytorch")
    cfg.merge_from_dict({"env_cfg.dist_cfg.backend": "gloo"})
    wrapper = dict(
        type="MMDistributedDataParallel",
        broadcast_buffers=False,
        find_unused_parameters=cfg.get("find_unused_parameters", False),
    )
    cfg.model_wrapper_cfg = {**wrapper, **(cfg.get("model_wrapper_cfg") or {}), "device_ids": None}
    _replace_sync_bn(cfg.model)


def _replace_sync_bn(node: Any) -> None:
    if isinstance(node, dict):
        if node.get("type") in ("SyncBN", "MMSyncBN"):
            node["type"] = "BN"
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for child in node:
            _replace_sync_bn(child)


@contextmanager
def distributed(cfg: Config) -> Iterator[None]:
    """Connect the processes, if there are several and they are not connected yet, and part them at the end.

    MMEngine's runner, when it is built inside, finds them connected.
    """
    if cfg.launcher == "none" or is_distributed():
        yield
        return
    if get_device() == "cpu":
        # MMEngine's init_dist selects a GPU first.
        torch.distributed.init_process_group(**cfg.env_cfg.dist_cfg)
    else:
        init_dist(cfg.launcher, **cfg.env_cfg.dist_cfg)
    yield
    # Gloo's threads can abort a process that ends while they run, and they run as long as DDP refers to them: what the
    # runner leaves behind has to go first. After an error nobody waits, since the other processes may hang.
    barrier()
    gc.collect()
    torch.distributed.destroy_process_group()


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
        raise ValueError(f"--amp {precision}; allowed: fp16, bf16")
    wrapper = cfg.optim_wrapper
    if get_device() == "cpu":
        if precision == "fp16":
            raise ValueError("--amp fp16 needs a GPU; on CPUs give --amp bf16, or --amp")
        for key in ("loss_scale", "dtype", "use_fsdp"):
            wrapper.pop(key, None)
        wrapper.type = "CpuAmpOptimWrapper"
        return
    wrapper.type = "AmpOptimWrapper"
    wrapper.loss_scale = dict(enabled=False) if precision == "bf16" else "dynamic"
    if precision is not None:
        wrapper.dtype = "bfloat16" if precision == "bf16" else "float16"


@OPTIM_WRAPPERS.register_module()
class CpuAmpOptimWrapper(OptimWrapper):
    """Forward passes in bfloat16 on the CPU; MMEngine's ``AmpOptimWrapper`` refuses to start without a GPU."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Run a forward pass under autocast."""
        with super().optim_context(model), torch.autocast("cpu", dtype=torch.bfloat16):
            yield


class PeakMemoryHook(Hook):
    """Logs the peak memory of the process in MB as ``memory``, as MMEngine does for GPUs; for Linux and macOS."""

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Hand the memory to MMEngine's log."""
        if sys.platform == "win32":
            return
        import resource

        per_mb = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KB
        runner.message_hub.update_scalar("train/memory", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // per_mb)
