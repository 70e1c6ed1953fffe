"""Ends the workers of data loaders with their process."""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from functools import partial

from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from mmbivit.registry import HOOKS

__all__ = ["WorkerEndHook", "end_workers_with_process"]

POLL_SECONDS = 1


@HOOKS.register_module()
class WorkerEndHook(Hook):
    """Lets no worker of a data loader outlive its process, however that dies.

    torch's workers look whether it lives, but then wait until somebody takes what they have prepared: after a SIGKILL,
    those with more than a pipe's worth of annotations stay for ever, with their memory and their share of the GPU.
    """

    def before_train(self, runner: Runner) -> None:
        """Set up the loaders of training and validation."""
        end_workers_with_process(runner.train_dataloader)
        if runner.val_loop is not None:
            end_workers_with_process(runner.val_dataloader)

    def before_test(self, runner: Runner) -> None:
        """Set up the loader of testing."""
        end_workers_with_process(runner.test_dataloader)


def end_workers_with_process(loader: DataLoader) -> None:
    """Make workers that a data loader starts from now on end with this process."""
    loader.worker_init_fn = partial(_start_worker, loader.worker_init_fn)


def _start_worker(init: Callable[[int], None] | None, worker: int) -> None:
    threading.Thread(target=_wait_for_end, args=(os.getppid(),), daemon=True).start()
    if init is not None:
        init(worker)


def _wait_for_end(parent: int) -> None:
    # A fork server, as parent, lives as long as its children; forked siblings hold the pipe that tells of the process.
    process = multiprocessing.parent_process()
    while os.getppid() == parent and process.is_alive():
        time.sleep(POLL_SECONDS)
    os._exit(1)
