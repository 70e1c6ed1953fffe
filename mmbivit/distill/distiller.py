"""Adds distillation losses to a model's own losses, from outside the model."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmbivit.models.observation import observed

from .detectors import REGIONS, region_places, run_teacher
from .place import Place
from .taps import TAPS

__all__ = ["DistillTerm", "Distiller"]


@dataclass(frozen=True)
class DistillTerm:
    """One distillation loss.

    Args:
        loss: the module, see :mod:`mmbivit.distill.losses`.
        weight: its factor.
        stages: the training stages in which it is added.
    """

    loss: nn.Module
    weight: float = 1.0
    stages: tuple[int, ...] = (1,)

    @property
    def tap(self) -> str:
        """What is compared, a name of :data:`mmbivit.distill.taps.TAPS`."""
        return getattr(self.loss, "tap", "blocks")

    @property
    def log_name(self) -> str:
        """What the log calls it."""
        return getattr(self.loss, "log_name", "loss_distill")


class Distiller:
    """Adds distillation terms to the losses of a model by forward hooks; :meth:`remove` leaves no trace.

    The terms are computed inside the model's forward, so autocast, gradient accumulation and DDP treat them like any
    other loss. The teacher stays outside the module tree: no optimizer, EMA or checkpoint sees it.

    Args:
        model: the unwrapped model, called as ``model(inputs, data_samples, mode='loss')``.
        student: its backbone. Blocks without trainable parameters are left out.
        teacher: float backbone with the same blocks, or a classifier or detector with one; it is frozen here.
        terms: what is added.
        task_weight: factor of the model's own losses.

    Raises:
        ValueError: if the teacher does not match the student.
    """

    def __init__(
        self,
        model: nn.Module,
        student: nn.Module,
        teacher: nn.Module,
        terms: Sequence[DistillTerm],
        task_weight: float = 1.0,
    ):
        places, teacher_places, regions = {}, {}, {}
        taps = {term.tap: None for term in terms}
        for tap in taps:
            for found, all_found in zip(TAPS[tap](model, student, teacher), (places, teacher_places), strict=True):
                all_found.update({(tap, name): place for name, place in found.items()})
            if tap in REGIONS:
                regions.update({(tap, stage): place for stage, place in region_places(model, tap).items()})
        teacher.eval()  # not chained: mmdet's Swin returns None
        teacher.requires_grad_(False)
        outputs: dict[tuple[str, str], Tensor] = {}
        seen_regions: dict[tuple[str, str], Tensor] = {}
        watching = ExitStack()

        def start(module: nn.Module, args: tuple, kwargs: dict) -> None:
            watching.close()  # open still where the last forward failed
            outputs.clear()
            seen_regions.clear()
            if _mode(args, kwargs) == "loss":
                watching.enter_context(_watched(places, outputs))
                watching.enter_context(_watched(regions, seen_regions))

        def add_losses(module: nn.Module, args: tuple, kwargs: dict, losses: dict[str, Any]) -> None:
            if _mode(args, kwargs) != "loss":
                return
            watching.close()
            features = dict(outputs)
            outputs.clear()  # nothing here may hold their graph
            for tap, name in places:
                if (tap, name) not in features or not features[tap, name].requires_grad:
                    raise RuntimeError(
                        f"the output of {name} has no gradient, so it cannot be distilled: does the block use "
                        "reentrant checkpointing, or was the backbone run under no_grad?"
                    )
            targets: dict[tuple[str, str], Tensor] = {}
            with torch.no_grad(), _watched(teacher_places, targets):
                run_teacher(teacher, kwargs["inputs"] if "inputs" in kwargs else args[0], set(taps), seen_regions)
            if task_weight != 1:
                losses.update({key: _scaled(loss, task_weight) for key, loss in losses.items() if "loss" in key})
            for term in terms:
                losses[term.log_name] = term.weight * term.loss(_of(term.tap, features), _of(term.tap, targets))

        self._handles = [
            model.register_forward_pre_hook(start, with_kwargs=True),
            model.register_forward_hook(add_losses, with_kwargs=True),
        ]
        self._watching = watching

    def remove(self) -> None:
        """Remove every hook and let go of the teacher."""
        for handle in self._handles:
            handle.remove()
        self._watching.close()
        self._handles = []


def _watched(
    places: Mapping[tuple[str, str], Place], seen: dict[tuple[str, str], Tensor]
) -> AbstractContextManager[None]:
    """Note what passes at these places."""
    modules = {key: place.module for key, place in places.items()}
    return observed(modules, lambda key, args, output: seen.update({key: places[key].take(args, output)}))


def _of(tap: str, outputs: dict[tuple[str, str], Tensor]) -> dict[str, Tensor]:
    return {name: output for (other, name), output in outputs.items() if other == tap}


def _scaled(loss: Any, factor: float) -> Any:
    """Scale a loss, or a list of them, as heads of several levels return."""
    return [_scaled(part, factor) for part in loss] if isinstance(loss, (list, tuple)) else factor * loss


def _mode(args: tuple, kwargs: dict) -> str:
    """The ``mode`` of a call ``model(inputs, data_samples, mode)``."""
    return kwargs.get("mode", args[2] if len(args) > 2 else "tensor")
