"""Training stages of a binary backbone: which of its parts are binary, and whether spatial interaction is awake."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from mmbivit.binary import Quantizer
from mmbivit.checkpoints.content import STAGE_KEY
from mmbivit.checks import UserError, check_choice, check_flag, check_keys

__all__ = ["StagedModule", "TrainingStage", "staged_modules", "training_plan"]

_SIDES = ("weights", "activations")
_SAVED_LAST = 2  # the number that a checkpoint has for the last stage, whatever the plan


@dataclass(frozen=True)
class TrainingStage:
    """Which parts of a backbone are binary in one stage of its training.

    Args:
        activations: which quantizers of activations are on: ``True`` for all, ``False`` for none, or those in some
            places. A place is one or more parts of a module's path that follow each other, such as ``'attn'`` or
            ``'mlp.fc2'``. Queries, keys, values and attention weights are activations in ``'attn'``.
        weights: which quantizers of weights are on, in the same way.
        branch: whether spatial interaction is awake.
    """

    activations: bool | tuple[str, ...] = False
    weights: bool | tuple[str, ...] = False
    branch: bool = False

    def binarizes(self, name: str, side: str) -> bool:
        """Whether the quantizer of this name, of activations or of weights, is on."""
        places = getattr(self, side)
        return places if isinstance(places, bool) else any(_lies_in(name, place) for place in places)

    def unfinished(self) -> list[str]:
        """Say what is not yet as in the last stage, each in a few words."""
        texts = []
        for side in _SIDES:
            if (places := getattr(self, side)) is not True:
                where = f" outside {', '.join(places)}" if places else ""
                texts.append(f"{side}{where} are still float")
        return texts if self.branch else [*texts, "spatial interaction is idle"]


_LAST = TrainingStage(activations=True, weights=True, branch=True)
_STAGE1 = {
    "activations": TrainingStage(activations=True),
    "weights": TrainingStage(weights=True),
    "all": _LAST,
}


def training_plan(stage1: str | None, training_stages: Sequence[dict] | None) -> tuple[TrainingStage, ...]:
    """Return all stages of a plan, the last one included, in which all is binary and spatial interaction awake.

    Args:
        stage1: short form of a plan of two: what is binary in the first, ``'activations'`` (by default),
            ``'weights'`` or ``'all'``, spatial interaction included.
        training_stages: the arguments of a :class:`TrainingStage` for each stage but the last.

    Raises:
        ValueError: if both are given, or one is impossible.
    """
    if training_stages is None:
        stage1 = "activations" if stage1 is None else stage1
        check_choice("stage1", stage1, _STAGE1)
        return _STAGE1[stage1], _LAST
    if stage1 is not None:
        raise UserError(f"stage1={stage1!r} and training_stages are both given; expected one of the two")
    if isinstance(training_stages, str) or not isinstance(training_stages, Sequence):
        raise UserError(
            f"training_stages={training_stages!r}; allowed: a list such as [dict(activations=True)], without the last "
            "stage, in which all is binary"
        )
    return (*(_check_stage(f"training_stages[{i}]", stage) for i, stage in enumerate(training_stages)), _LAST)


def _check_stage(name: str, stage: Any) -> TrainingStage:
    check_keys(name, stage, (), [field.name for field in fields(TrainingStage)])
    stage = dict(stage)
    check_flag(f"{name}.branch", stage.get("branch", False))
    for side in stage.keys() & set(_SIDES):
        value = stage[side]
        if isinstance(value, (list, tuple)) and value and all(isinstance(place, str) for place in value):
            stage[side] = tuple(value)
        elif not isinstance(value, bool):
            raise UserError(
                f"{name}.{side}={value!r}; allowed: True, False, or a list of places such as ['attn', 'mlp.fc2']"
            )
    return TrainingStage(**stage)


class StagedModule(nn.Module):
    """Mixin of backbones, necks and heads trained in stages; ``stage``, from 1 on, travels in every checkpoint.

    By default there are two (SI-BiViT, Alg. 1):

    =========== ======= =======
    .           stage 1 stage 2
    =========== ======= =======
    activations binary  binary
    weights     float   binary
    SI branch   idle    active
    =========== ======= =======

    With ``stage1='weights'`` it is the other way round in stage 1 (the baseline of SI-BiViT 4.1.3): binary weights,
    float activations. With ``'all'`` stage 1 is binary and whole, as stage 2 is: only distillation and what the hook
    resets at the switch tell them apart then, which shows what the float weights of stage 1 are good for. Any other
    plan is a list of :class:`TrainingStage`. In the last stage all is binary, and a fresh model is in it. The
    parameters of all stages exist from the start: optimizer, EMA and checkpoints see one unchanging set of keys.
    """

    # An integer buffer is saved, loaded and broadcast like any other; the Python mirror spares a device sync. It counts
    # from the end, so that a network at the end of its training is that under any plan, and no other is.
    _STAGE_KEY = STAGE_KEY
    is_staged = True  # not so of a float neck or head
    is_part = False  # of a detector, beside its backbone

    def _init_stage(self, plan: tuple[TrainingStage, ...]) -> None:
        """Register the stages; call at the end of ``__init__``, when all layers exist.

        Raises:
            ValueError: if the plan names a place where nothing is to be made binary; it says which there are.
        """
        self.training_plan = plan
        self._check_places()
        self._stage = self.last_stage
        self.register_buffer(self._STAGE_KEY, torch.tensor(_SAVED_LAST))
        self.register_load_state_dict_post_hook(_refresh_stage)

    @property
    def stage(self) -> int:
        """The training stage, from 1 to ``last_stage``."""
        return self._stage

    @property
    def last_stage(self) -> int:
        """The number of training stages."""
        return len(self.training_plan)

    def set_stage(self, stage: int) -> tuple[int, int]:
        """Switch the parts to a stage, by what they say of themselves; calling it again changes nothing.

        A quantizer says by ``side`` of which side it is, a branch that may idle has ``active``.

        Args:
            stage: from 1 to ``last_stage``.

        Returns:
            How many binary linear layers have binary weights now, and how many SI branches are active.

        Raises:
            ValueError: for any other stage.
        """
        if stage not in range(1, self.last_stage + 1):
            allowed = ", ".join(map(str, range(1, self.last_stage + 1)))
            raise UserError(f"stage={stage!r} is unknown; allowed: {allowed}")
        wanted = self.training_plan[stage - 1]
        binary_layers = active_branches = 0
        for name, module in self.named_modules():
            if isinstance(module, Quantizer):
                module.binarize = wanted.binarizes(name, module.side)
                binary_layers += module.binarize and module.side == "weights"
            elif hasattr(module, "active"):
                module.active = wanted.branch
                active_branches += module.active
        self._stage = stage
        self._stage_tensor().fill_(stage - self.last_stage + _SAVED_LAST)
        return binary_layers, active_branches

    def _stage_tensor(self) -> Tensor:
        return getattr(self, self._STAGE_KEY)

    def _check_places(self) -> None:
        quantizers = {name: module.side for name, module in self.named_modules() if isinstance(module, Quantizer)}
        if not quantizers:  # a float network takes any plan
            return
        for side in _SIDES:
            names = [name for name, other in quantizers.items() if other == side]
            for i, stage in enumerate(self.training_plan):
                places = getattr(stage, side)
                places = () if isinstance(places, bool) else places
                if unknown := [place for place in places if not any(_lies_in(name, place) for name in names)]:
                    known = dict.fromkeys(".".join(re.sub(r".*\.\d+\.", "", name).split(".")[:2]) for name in names)
                    raise UserError(
                        f"training_stages[{i}].{side} names {unknown[0]!r}, where no {side} are made binary; allowed: "
                        f"parts of {', '.join(known) or '(nothing)'}"
                    )


def staged_modules(model: nn.Module) -> dict[str, StagedModule]:
    """Return the modules of a model that are trained in stages, by name: its backbone, and binary necks and heads.

    Those inside another one, which switches them along, and float parts are left out.
    """
    found: dict[str, StagedModule] = {}
    for name, module in model.named_modules():
        inside = any(f"{name}.".startswith(f"{other}.") or not other for other in found)
        if isinstance(module, StagedModule) and module.is_staged and not inside:
            found[name] = module
    return found


def _lies_in(name: str, place: str) -> bool:
    return f".{place}." in f".{name}."


def _refresh_stage(module: StagedModule, incompatible_keys) -> None:
    """Take the stage over from a checkpoint that was just loaded."""
    stage = int(module._stage_tensor()) + module.last_stage - _SAVED_LAST
    kind = type(module).__name__
    if not 1 <= stage <= module.last_stage:
        raise UserError(
            f"the checkpoint is of a training stage that this {kind}, which has {module.last_stage}, does not "
            "have; give it the training_stages that the checkpoint was trained with"
        )
    unfinished = module.training_plan[stage - 1].unfinished()
    if stage != module.stage and unfinished:
        print_log(
            f"This {kind} comes from training stage {stage}: its {' and its '.join(unfinished)}. Train on to stage "
            f"{module.last_stage} for the 1-bit network.",
            logger="current",
            level=30,
        )
    module.set_stage(stage)
