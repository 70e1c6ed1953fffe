"""Stops a run at its first loss or gradient that is no number, before that reaches a weight."""

from collections.abc import Iterable
from functools import wraps
from typing import Any

import torch
from mmengine.dist import all_gather_object, all_reduce
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from torch import Tensor, nn

from mmbivit.checks import check_integer
from mmbivit.registry import HOOKS

from .unwrapping import unwrapped_model

__all__ = ["NonFiniteHook"]

SKIPPED = "skipped_steps"
ADVICE = (
    "Look at these images and their annotations, lower the learning rate or clip gradients "
    "(optim_wrapper.clip_grad=dict(max_norm=1)), or skip some such steps: --skip-non-finite N"
)


@HOOKS.register_module()
class NonFiniteHook(Hook):
    """Stops training on all ranks when a loss or a gradient is infinite or not a number, before the optimizer's step.

    The message names losses or parameters, iteration and images. Losses alone would not do: signs turn what is not a
    number into -1, so that a binary network has a finite loss of it, with gradients that are not. Parameters and
    running statistics are also looked at before each checkpoint, and never saved if they are not finite.

    Gradients that overflow in float16 are left to the loss scaler, which skips such steps by itself.

    Args:
        max_skipped: how many steps of the whole run are skipped instead, with a warning: weights and buffers (running
            statistics) stay as they were after the step before. ``train/skipped_steps`` in the log counts them.

    Raises:
        ValueError: for a negative ``max_skipped``.
        FloatingPointError: in training, as above.
    """

    priority = "LOW"  # after the hooks that add losses

    def __init__(self, max_skipped: int = 0):
        check_integer("max_skipped", max_skipped, 0)
        self.max_skipped = max_skipped
        self._images: list[str] = []  # of this rank, since the last step
        self._problem: str | None = None  # of a loss, since the last step
        self._buffers: list[Tensor] = []  # after the last step
        self._handle: Any = None

    def before_train(self, runner: Runner) -> None:
        """Watch the losses that the model returns, and the steps of the optimizer."""
        model, wrapper = unwrapped_model(runner), runner.optim_wrapper
        step = self._step = wrapper.step

        def check_losses(module: nn.Module, args: tuple, output: Any) -> None:
            if module.training and isinstance(output, dict):
                self._problem = self._problem or self._problem_of_losses(runner, output)
                if self._problem is not None and not self._may_skip(runner):
                    raise FloatingPointError(_last_words(self._problem))

        @wraps(step)  # schedulers mark it
        def checked_step(**kwargs: Any) -> None:
            problem = self._problem or self._problem_of_gradients(runner)
            if problem is None:
                step(**kwargs)
                self._keep(model)
            elif self._may_skip(runner):
                self._skip(runner, problem)
            else:
                raise FloatingPointError(_last_words(problem))
            self._problem, self._images = None, []

        self._keep(model)
        self._handle = model.register_forward_hook(check_losses)
        wrapper.step = checked_step

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Note which images the next step will be of."""
        self._images += _image_names(data_batch)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Refuse to save parameters or running statistics that are not finite."""
        parameters = dict(unwrapped_model(runner).named_parameters())
        for name, value in checkpoint["state_dict"].items():
            watched = name in parameters or name.endswith(("running_mean", "running_var"))
            if watched and not bool(value.isfinite().all()):
                raise FloatingPointError(
                    f"{name} is not finite after iteration {runner.iter + 1}, although losses and gradients were: no "
                    f"checkpoint was saved. {ADVICE}"
                )

    def after_train(self, runner: Runner) -> None:
        """Remove what was hung onto the model and its optimizer."""
        self._handle.remove()
        runner.optim_wrapper.step = self._step

    def _may_skip(self, runner: Runner) -> bool:
        return _skipped(runner) < self.max_skipped

    def _skip(self, runner: Runner, problem: str) -> None:
        for buffer, value in zip(unwrapped_model(runner).buffers(), self._buffers, strict=True):
            buffer.copy_(value)
        skipped = _skipped(runner) + 1
        runner.message_hub.update_info(SKIPPED, skipped)
        runner.message_hub.update_scalar(f"train/{SKIPPED}", skipped)
        MMLogger.get_current_instance().warning(f"{problem}: step skipped, {skipped} of at most {self.max_skipped}.")

    def _keep(self, model: nn.Module) -> None:
        if self.max_skipped:
            self._buffers = [buffer.clone() for buffer in model.buffers()]

    def _problem_of_losses(self, runner: Runner, losses: dict[str, Any]) -> str | None:
        """What is wrong with the losses of any rank; all ranks must call this."""
        sums = {name: _sum(value) for name, value in losses.items() if "loss" in name}
        total = torch.stack(list(sums.values())).sum()
        bad = (~total.isfinite()).int()
        all_reduce(bad, op="max")
        if not bad:
            return None
        # The sum of finite losses may be too large too.
        names = [name for name, value in sums.items() if not value.isfinite()] or list(sums)
        found = None if total.isfinite() else f"{', '.join(names)} of images {', '.join(self._images)}"
        return f"loss not finite in iteration {runner.iter + 1}: {_by_rank(found)}"

    def _problem_of_gradients(self, runner: Runner) -> str | None:
        """What is wrong with the gradients, which are the same on all ranks."""
        scaler = getattr(runner.optim_wrapper, "loss_scaler", None)
        if scaler is not None and scaler.is_enabled():
            return None
        gradients = {n: p.grad for n, p in unwrapped_model(runner).named_parameters() if p.grad is not None}
        if torch.nn.utils.get_total_norm(gradients.values(), float("inf")).isfinite():
            return None
        bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
        others = f" and {len(bad) - 1} others" if len(bad) > 1 else ""
        where = _by_rank(f"images {', '.join(self._images)}")
        return f"gradient not finite in iteration {runner.iter + 1}: {bad[0]}{others}, of {where}"


def _last_words(problem: str) -> str:
    return f"{problem}. No weight was changed and nothing was saved. {ADVICE}"


def _skipped(runner: Runner) -> int:
    return runner.message_hub.get_info(SKIPPED) if SKIPPED in runner.message_hub.runtime_info else 0


def _by_rank(found: str | None) -> str:
    """What each rank has found; all ranks must call this."""
    return "; ".join(f"{text} (rank {rank})" for rank, text in enumerate(all_gather_object(found)) if text is not None)


def _sum(loss: Tensor | Iterable[Tensor]) -> Tensor:
    parts = [loss] if isinstance(loss, Tensor) else loss
    return torch.stack([part.detach().float().mean() for part in parts]).sum()


def _image_names(data_batch: Any) -> list[str]:
    """Ids of a batch's images, else their paths: of detectors' data samples, or of a classifier's batch."""
    batch = data_batch if isinstance(data_batch, dict) else {}
    names = []
    if isinstance(samples := batch.get("data_samples"), (list, tuple)):
        metas = [getattr(sample, "metainfo", {}) for sample in samples]
        names = [str(meta.get("img_id", meta.get("img_path", "unknown"))) for meta in metas]
    return names or [str(path) for path in batch.get("img_path") or ()] or ["unknown"]
