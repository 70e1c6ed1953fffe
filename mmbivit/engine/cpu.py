"""What MMEngine has for GPUs alone: distributed training, mixed precision and peak memory."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.hooks import Hook
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import nn

from mmbivit.registry import HOOKS, MODEL_WRAPPERS, OPTIM_WRAPPERS

from .cpu_sync_batch_norm import use_cpu_sync_batch_norm

__all__ = ["CpuAmpOptimWrapper", "CpuDistributedDataParallel", "PeakMemoryHook"]


@MODEL_WRAPPERS.register_module()
class CpuDistributedDataParallel(MMDistributedDataParallel):
    """DDP for processes without GPU, in which SyncBN synchronises: torch refuses it there.

    That holds for ``SyncBN`` in the config of a layer and for MMEngine's ``sync_bn='torch'``.
    """

    def __init__(self, module: nn.Module, **options: Any):
        use_cpu_sync_batch_norm(module)
        super().__init__(module, **options)


@OPTIM_WRAPPERS.register_module()
class CpuAmpOptimWrapper(OptimWrapper):
    """Forward passes in bfloat16 on the CPU; MMEngine's ``AmpOptimWrapper`` refuses to start without a GPU."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Run a forward pass under autocast."""
        with super().optim_context(model), torch.autocast("cpu", dtype=torch.bfloat16):
            yield


@HOOKS.register_module()
class PeakMemoryHook(Hook):
    """Logs the peak memory of the process in MB as ``memory``, as MMEngine does on GPUs; for Linux and macOS."""

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Hand the memory to MMEngine's log."""
        if sys.platform == "win32" or get_device() != "cpu":
            return
        import resource

        per_mb = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KB
        runner.message_hub.update_scalar("train/memory", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // per_mb)
