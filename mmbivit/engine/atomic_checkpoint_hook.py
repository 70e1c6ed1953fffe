"""Checkpoints that survive a kill at any moment."""

import hashlib
import io
import os
import re
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_reduce, is_main_process, master_only
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner
from torch import Tensor

from mmbivit.checkpoints import load_checkpoint_file
from mmbivit.files import atomic_writer, remove_parts
from mmbivit.registry import HOOKS

from .checkpoint_fields import GRADIENTS_KEY
from .latest_checkpoint import POINTER, find_resumable_checkpoint
from .unwrapping import unwrapped_model

__all__ = ["AtomicCheckpointHook"]

INTERRUPTED = "interrupted.pth"


class AtomicLocalBackend(LocalBackend):
    """Files on this machine, each of them whole at any moment."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write a file; see :func:`mmbivit.files.atomic_writer`."""
        with atomic_writer(filepath) as file:
            file.write(obj)


register_backend("mmbivit_atomic", AtomicLocalBackend, force=True)


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """MMEngine's ``CheckpointHook`` with all its options, of which a kill or a full disk leaves something to resume.

    MMEngine removes an old checkpoint, writes the new one in place and then the pointer ``last_checkpoint``. Here a
    file is written beside its place, flushed to the disk and renamed, the pointer likewise, and only then what is old
    goes. The pointer is relative to the work directory, which may thus be moved. With ``resume=True`` and no
    ``load_from``, the runner goes on from the newest checkpoint that loads.

    Where gradients are accumulated over iterations and a checkpoint falls between two steps of the optimizer, it holds
    the gradients so far, averaged over the ranks, so that a resumed run makes the same step.

    Files on remote storage (``out_dir='s3://...'``) are written by their backend, which has its own guarantees.

    Args:
        *args: see ``mmengine.hooks.CheckpointHook``.
        **kwargs: likewise.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._gradients: dict[str, Tensor] = {}
        self._saved_iter: int | None = None

    def before_run(self, runner: Runner) -> None:
        """Let a runner that was told to resume find the newest checkpoint that loads."""
        if runner._resume and runner._load_from is None:
            latest = find_resumable_checkpoint(runner.work_dir)
            runner._load_from = None if latest is None else str(latest)
            runner._resume = latest is not None

    def before_train(self, runner: Runner) -> None:
        """Prepare the folder of the checkpoints; what killed processes have left there is removed."""
        if (self.file_client_args or {}).get("backend") == "disk":  # the old name of local files
            self.file_client_args = None
        info = runner.message_hub.runtime_info
        kept = [step for step in info.pop("keep_ckpt_ids", []) if isinstance(step, int)]
        best = {key: info.pop(key) for key in list(info) if key.startswith("best_ckpt")}
        super().before_train(runner)  # which would remove what these name, wherever it is
        self._adopt(runner, kept, best)
        if isinstance(self.file_backend, LocalBackend) and self.file_client_args is None:
            self.backend_args = dict(backend="mmbivit_atomic")
            if is_main_process():
                for path in remove_parts(self.out_dir):
                    runner.logger.info(f"Removed {path}, which an interrupted run has left.")

    def _adopt(self, runner: Runner, kept: list[int], best: dict[str, str]) -> None:
        """Take over the files that a checkpoint names as those of its run, if they are of this run, too.

        They are, where the checkpoint lies among them: beside the checkpoints that this run writes, named as it names
        them. The folder in their paths is not looked at, as a work directory may have been moved.
        """
        if not runner._resume or not self._is_beside(str(runner._load_from)):
            return
        if self.max_keep_ckpts > 0:
            for step in kept[: -self.max_keep_ckpts] if is_main_process() else ():
                self._remove(self._path(step))
            self.keep_ckpt_ids.extend(kept)  # a deque, which holds the last ones
            runner.message_hub.update_info("keep_ckpt_ids", list(self.keep_ckpt_ids))
        number = r"\d+".join(map(re.escape, re.split(r"\{[^{}]*\}", self.filename_tmpl)))
        for name in self._best_paths():
            key = f"best_ckpt_{name}" if name else "best_ckpt"
            file = re.split(r"[/\\]", str(best.get(key)))[-1]
            if re.fullmatch(f"best_.+_{number}", file):
                path = self.file_backend.join_path(self.out_dir, file)
                self._set_best_path(name, path)
                runner.message_hub.update_info(key, path)

    def _is_beside(self, path: str) -> bool:
        """Whether a checkpoint is in the folder of this run's checkpoints."""
        if "://" in path:
            return path.rpartition("/")[0] == str(self.out_dir).rstrip("/")
        return os.path.realpath(os.path.dirname(path)) == os.path.realpath(self.out_dir)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Add the gradients of an unfinished accumulation."""
        if self._gradients and "optimizer" in checkpoint:
            checkpoint[GRADIENTS_KEY] = self._gradients

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Go on with an unfinished accumulation."""
        gradients = checkpoint.pop(GRADIENTS_KEY, None)
        if not gradients or not runner._resume:
            return
        for name, parameter in unwrapped_model(runner).named_parameters():
            if name in gradients:
                parameter.grad = gradients[name].to(parameter)
        runner.logger.info("The gradients that were accumulated since the optimizer's last step were restored.")

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict[str, Any]) -> None:
        """Save, point to it, then remove what is one too many."""
        outdated = None
        if self.max_keep_ckpts > 0:
            kept = [kept for kept in self.keep_ckpt_ids if kept != step]
            # Until it is gone, the outdated one is in the list: a resumed run removes it.
            runner.message_hub.update_info("keep_ckpt_ids", [*kept, step])
            outdated = kept[0] if len(kept) == self.max_keep_ckpts else None
            self.keep_ckpt_ids.clear()
            self.keep_ckpt_ids.extend([*kept, step])  # a deque, which lets go of the first one
        self.last_ckpt = self._path(step)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        self._save(runner, self.filename_tmpl.format(step), meta, self.save_optimizer, self.save_param_scheduler)
        if is_main_process():
            self._remove(self.file_backend.join_path(self.out_dir, INTERRUPTED))
            if outdated is not None:
                self._remove(self._path(outdated))

    def save_interrupted(self, runner: Runner, place: dict[str, int]) -> None:
        """Save what a run that has to end can go on from, as ``interrupted.pth``; the next checkpoint removes it.

        Nothing is saved where the last checkpoint is of this iteration.

        Args:
            runner: the runner, between two iterations.
            place: ``epoch`` and ``iter``, the numbers of those that are done.
        """
        if place["iter"] != self._saved_iter:
            self._save(runner, INTERRUPTED, place, save_optimizer=True, save_param_scheduler=True)

    def _save(
        self, runner: Runner, name: str, meta: dict[str, Any], save_optimizer: bool, save_param_scheduler: bool
    ) -> None:
        """Save a checkpoint, then point to it."""
        self._gradients = _accumulated_gradients(runner) if save_optimizer else {}
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=save_optimizer,
            save_param_scheduler=save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        self._gradients = {}
        self._saved_iter = meta["iter"]
        if is_main_process():
            path = self.file_backend.join_path(self.out_dir, name)
            pointer = path if "://" in path else os.path.relpath(path, runner.work_dir)
            with atomic_writer(Path(runner.work_dir) / POINTER) as file:
                file.write(pointer.encode())

    def _save_best_checkpoint(self, runner: Runner, metrics: dict[str, float]) -> None:
        """Save a checkpoint that is better, then remove the one that was best."""
        before = self._best_paths()
        for name in before:
            self._set_best_path(name, None)  # what MMEngine does not know it does not remove first
        super()._save_best_checkpoint(runner, metrics)
        for name, path in before.items():
            new = self._best_paths()[name]
            if new is None:
                self._set_best_path(name, path)
            elif path and new != path and is_main_process():
                self._remove(path)
                runner.logger.info(f"The previous best checkpoint {path} is removed")

    @master_only
    def _publish_model(self, runner: Runner, ckpt_path: str) -> None:
        """Write a copy with ``published_keys`` only, named by the beginning of its SHA-256."""
        checkpoint = load_checkpoint_file(ckpt_path)
        content = io.BytesIO()
        torch.save({key: value for key, value in checkpoint.items() if key in self.published_keys}, content)
        digest = hashlib.sha256(content.getbuffer()).hexdigest()
        path = f"{os.path.splitext(ckpt_path)[0]}-{digest[:8]}.pth"
        self.file_backend.put(content.getvalue(), path)
        runner.logger.info(f"The checkpoint ({ckpt_path}) is published to {path}.")

    def _path(self, step: int) -> str:
        return self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(step))

    def _remove(self, path: str) -> None:
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)
        elif self.file_backend.isdir(path):
            self.file_backend.rmtree(path)

    def _best_paths(self) -> dict[str, str | None]:
        """Paths of the best checkpoints, by what they are best in; one indicator has no name of its own."""
        if not self.save_best:
            return {}
        return dict(self.best_ckpt_path_dict) if len(self.key_indicators) > 1 else {"": self.best_ckpt_path}

    def _set_best_path(self, name: str, path: str | None) -> None:
        if name:
            self.best_ckpt_path_dict[name] = path
        else:
            self.best_ckpt_path = path


def _accumulated_gradients(runner: Runner) -> dict[str, Tensor]:
    """Gradients since the optimizer's last step by parameter, averaged over the ranks; all ranks must call this."""
    gradients: dict[str, Tensor] = {}
    if runner.optim_wrapper.should_update():  # it has just made a step
        return gradients
    for name, parameter in unwrapped_model(runner).named_parameters():
        if parameter.grad is not None:
            gradients[name] = parameter.grad.detach().clone()
            all_reduce(gradients[name], op="mean")
            gradients[name] = gradients[name].cpu()
    return gradients
