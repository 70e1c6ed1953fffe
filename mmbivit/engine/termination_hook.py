"""Ends a run that is told to end, by a scheduler or a terminal that is closed, so that it can go on later."""

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner

from mmbivit.registry import HOOKS

from .atomic_checkpoint_hook import AtomicCheckpointHook
from .latest_checkpoint import pointed_checkpoint

__all__ = ["TerminationHook"]

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


@HOOKS.register_module()
class TerminationHook(Hook):
    """On SIGTERM or SIGHUP, saves a checkpoint after the running iteration and ends the process with a line.

    Slurm and others send SIGTERM half a minute or so before they kill, a closed terminal SIGHUP. The line says what
    ``--resume`` goes on from; the exit status is 128 plus the signal's number. At a second signal, in validation, and
    with several processes, which would have to agree on an iteration, the run ends at once with what is saved already.
    A signal that is ignored, as ``nohup`` does, stays so. Saving needs an :class:`AtomicCheckpointHook`.
    """

    priority = "LOWEST"  # after whatever else belongs to an iteration or epoch

    def __init__(self) -> None:
        self._received: int | None = None
        self._is_training = False
        self._before: dict[int, Any] = {}

    def install(self, work_dir: str | Path) -> None:
        """Handle the signals from now on, in the main thread of this process.

        Args:
            work_dir: where the run's checkpoints are.
        """
        self._work_dir = work_dir
        self._pid = os.getpid()
        if threading.current_thread() is not threading.main_thread() or self._before:
            return
        for number in SIGNALS:
            if signal.getsignal(number) is signal.SIG_DFL:
                self._before[number] = signal.signal(number, self._handle)

    def restore(self) -> None:
        """Handle the signals as before :meth:`install`."""
        while self._before:
            signal.signal(*self._before.popitem())

    def before_run(self, runner: Runner) -> None:
        """Begin to handle the signals."""
        self.install(runner.work_dir)

    def after_run(self, runner: Runner) -> None:
        """Leave the signals to whoever had them before."""
        self.restore()

    def before_train_epoch(self, runner: Runner) -> None:
        """From here on the end of an iteration is near."""
        self._is_training = get_world_size() == 1

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Save and end, if a signal has come."""
        if self._received is not None:
            self._save_and_end(runner, dict(epoch=runner.epoch, iter=runner.iter + 1))

    def after_train_epoch(self, runner: Runner) -> None:
        """Save and end, if a signal has come while other hooks were at work."""
        self._is_training = False
        if self._received is not None:
            self._save_and_end(runner, dict(epoch=runner.epoch + 1, iter=runner.iter))

    def before_val_epoch(self, runner: Runner) -> None:
        """Validation may take long, and has nothing to save."""
        self._was_training, self._is_training = self._is_training, False

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Go on as before."""
        self._is_training = self._was_training

    def _handle(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a data worker that was forked
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif self._is_training and self._received is None:
            self._received = number
        else:
            if is_main_process():  # not by a logger, in the middle of whose work this may be
                os.write(2, f"{self.line(number)}\n".encode())
            raise SystemExit(128 + number)

    def _save_and_end(self, runner: Runner, place: dict[str, int]) -> None:
        for hook in runner.hooks:
            if isinstance(hook, AtomicCheckpointHook):
                hook.save_interrupted(runner, place)
        print_log(self.line(self._received), "current")
        raise SystemExit(128 + self._received)

    def line(self, number: int) -> str:
        """Say what has ended the run, and from where it goes on."""
        checkpoint = pointed_checkpoint(self._work_dir)
        goes_on = "nothing is saved yet" if checkpoint is None else f"--resume goes on from {checkpoint}"
        return f"Ended by {signal.Signals(number).name}: {goes_on}."
