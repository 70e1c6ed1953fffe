"""Training speed in the log."""

from collections import deque
from typing import Any

from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor

from mmbivit.registry import HOOKS

__all__ = ["ThroughputHook"]


@HOOKS.register_module()
class ThroughputHook(Hook):
    """Logs ``images_per_s``: images of all processes per second, over the window of the log, data loading included.

    All processes are taken to have batches as large as this one's. The remaining time is ``eta`` in the same line, by
    MMEngine.
    """

    priority = "NORMAL"  # after IterTimerHook, which has it too and is registered first, and before LoggerHook

    def before_train(self, runner: Runner) -> None:
        """Start counting."""
        self._images: deque[int] = deque(maxlen=runner.log_processor.window_size)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Hand the speed to MMEngine's log."""
        inputs = data_batch.get("inputs") if isinstance(data_batch, dict) else None
        times = runner.message_hub.log_scalars.get("train/time")
        if not isinstance(inputs, (list, tuple, Tensor)) or times is None:
            return
        self._images.append(len(inputs))  # batches differ: the last one of an epoch may be small
        seconds = len(self._images) * times.mean(len(self._images))
        runner.message_hub.update_scalar("train/images_per_s", get_world_size() * sum(self._images) / seconds)
