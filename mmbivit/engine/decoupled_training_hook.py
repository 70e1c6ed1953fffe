"""Training in stages, such as the decoupled training strategy (SI-BiViT 3.3.2, Alg. 1), as a hook."""

import copy
from collections.abc import Sequence
from itertools import pairwise

import torch
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.model import MMDistributedDataParallel, is_model_wrapper
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import nn

from mmbivit.checkpoints import load_checkpoint_file, load_pretrained
from mmbivit.checks import UserError, check_choice, check_flag, check_integer, check_integers, check_keys, check_number
from mmbivit.distill import Distiller, DistillTerm
from mmbivit.distill.taps import TAPS
from mmbivit.models import find_blocks
from mmbivit.models.stage import StagedModule, TrainingStage, staged_modules
from mmbivit.registry import HOOKS

from .unwrapping import optim_wrappers, unwrapped_model

__all__ = ["DecoupledTrainingHook", "build_teacher", "build_terms", "find_staged_backbone"]


def find_staged_backbone(model: nn.Module) -> StagedModule:
    """Return the one backbone of a model that is trained in stages.

    Raises:
        ValueError: if there is none, or more than one.
    """
    found = [module for module in staged_modules(model).values() if not module.is_part]
    if len(found) != 1:
        raise UserError(
            f"training in stages needs a model with exactly one backbone such as mmbivit.BinarySwinTransformer, "
            f"{type(model).__name__} has {len(found)}"
        )
    return found[0]


@HOOKS.register_module()
class DecoupledTrainingHook(Hook):
    """Trains a binary backbone in stages, by default two: distil with float weights, then go fully binary with SI.

    Stage 1: binary activations, float weights, the SI branch idle; the block outputs of a float teacher are distilled
    (Eq. 9) and logged as ``loss_distill``. Stage 2: binary weights, the SI branch active, task loss only; teacher and
    distillation are gone, unless a distillation loss names stage 2. What is binary in a stage, and how many there are,
    says the backbone (``stage1`` or ``training_stages``). The stage follows from the current epoch or iteration alone,
    so a resumed run is in the right one. A copy of the model kept by EMA is switched along, and the best score of
    ``CheckpointHook(save_best=...)`` is forgotten at each switch.

    Args:
        switch_epoch: first epoch of stage 2, in ``[1, max_epochs)``; needs an epoch-based loop. A rising list of the
            first epochs of stage 2, 3 and so on for a backbone with more stages, an empty one for a single stage.
        switch_iter: first iteration of stage 2, in ``[1, max_iters)``, or such a list; for any loop. Give exactly one
            of the two.
        teacher: config of the float backbone, with ``init_cfg=dict(type='Pretrained', checkpoint=..., prefix=...)``;
            its blocks must match the student's. To distil logits, of a ``mmbivit.ImageClassifier`` with such a
            backbone. ``None`` trains stage 1 without distillation.
        distill_weight: factor of all distillation losses.
        distill_loss: config of a loss of :mod:`mmbivit.distill.losses`, ``BlockMSELoss`` by default; or a list of
            several. Each may have a ``weight``, 1 by default, and the ``stages`` in which it is added, by default
            ``(1,)``.
        task_weight: factor of the model's own losses where something is distilled; a list gives that of each stage.
            The published code of SI-BiViT has 0.05 in stage 2.
        reset_lr: set the learning rates back to their initial values before the first iteration after each switch.
            Schedulers that begin at a switch start from there; MMEngine's multiply what they find.
        reset_optimizer: forget at each switch what the optimizer remembers of gradients. Those of float weights are
            ``1 / theta`` times as large as those of binary ones (Eq. 4), and Adam's mean of their squares would keep
            the steps of stage 2 as much smaller, for about ``1 / (1 - beta2)`` iterations.

    Raises:
        ValueError: from the constructor or before training, if a setting is impossible; it names the setting.
    """

    priority = "NORMAL"

    def __init__(
        self,
        switch_epoch: int | list[int] | None = None,
        switch_iter: int | list[int] | None = None,
        teacher: dict | None = None,
        distill_weight: float = 1.0,
        distill_loss: dict | list[dict] | None = None,
        task_weight: float | Sequence[float] = 1.0,
        reset_lr: bool = False,
        reset_optimizer: bool = False,
    ):
        if (switch_epoch is None) == (switch_iter is None):
            raise UserError("give exactly one of switch_epoch and switch_iter")
        self.switch_by = "switch_epoch" if switch_iter is None else "switch_iter"
        self.switches = _check_switches(self.switch_by, switch_epoch if switch_iter is None else switch_iter)
        stages = len(self.switches) + 1
        check_number("distill_weight", distill_weight, 0, 1e6)
        check_flag("reset_lr", reset_lr)
        check_flag("reset_optimizer", reset_optimizer)
        if teacher is not None:
            _check_teacher(teacher)
        self.task_weights = _check_task_weight(task_weight, stages)
        self.teacher_cfg = copy.deepcopy(teacher)
        self.terms = build_terms(distill_loss, distill_weight, stages)
        self.reset_lr = reset_lr
        self.reset_optimizer = reset_optimizer
        self._teacher: nn.Module | None = None
        self._distiller: Distiller | None = None

    def before_train(self, runner: Runner) -> None:
        """Check the settings, then bring model and distillation into the stage where training starts or resumes."""
        model = unwrapped_model(runner)
        self._parts = staged_modules(model)
        if all(part.is_part for part in self._parts.values()) and self._parts:
            self._backbone = getattr(model, "backbone", model)  # float, of another library
        else:
            self._backbone = find_staged_backbone(model)
        self._check_switches(runner)
        self._check_wrapper(runner)
        for wrapper in optim_wrappers(runner).values():
            for group in wrapper.param_groups:
                group.setdefault("initial_lr", group["lr"])  # without schedulers nobody else does, nor changes the rate
        stage = self._wanted_stage(runner)
        self._check_losses_after(runner, stage)
        self._enter_stage(runner, stage)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        """Switch to the next stage when its time has come."""
        if self._wanted_stage(runner) != self._stage:
            self._enter_stage(runner, self._wanted_stage(runner))

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Reset the learning rates after the last iteration before a switch.

        This runs before schedulers step and checkpoints are written, so a resumed run has the same rates.
        """
        if self.reset_lr and runner.iter + 1 in self._switch_iters(runner):
            for wrapper in optim_wrappers(runner).values():
                for group in wrapper.param_groups:
                    group["lr"] = group["initial_lr"]

    def after_train(self, runner: Runner) -> None:
        """Remove what distillation left on the model, if training ended in a stage that distils."""
        self._stop_distillation()

    @property
    def _stage(self) -> int:
        """The training stage, which all parts are in; the backbone is the first of them."""
        return next(iter(self._parts.values())).stage

    @property
    def _plan(self) -> Sequence[TrainingStage]:
        return next(iter(self._parts.values())).training_plan

    def _switch_iters(self, runner: Runner) -> list[int]:
        length = len(runner.train_dataloader) if self.switch_by == "switch_epoch" else 1
        return [switch * length for switch in self.switches]

    def _wanted_stage(self, runner: Runner) -> int:
        return 1 + sum(switch <= runner.iter for switch in self._switch_iters(runner))

    def _check_switches(self, runner: Runner) -> None:
        by_epoch = self.switch_by == "switch_epoch"
        given = f"{self.switch_by}={', '.join(map(str, self.switches)) or '[]'}"
        if by_epoch and self.switches and not isinstance(runner.train_loop, EpochBasedTrainLoop):
            raise UserError(
                f"{given} needs an epoch-based loop; with {type(runner.train_loop).__name__} give switch_iter"
            )
        end = runner.max_epochs if by_epoch else runner.max_iters
        if self.switches and self.switches[-1] >= end:
            raise UserError(f"{given} leaves a stage empty; allowed: 1 to {end - 1}")
        for part in self._parts.values():
            if len(self.switches) != (needed := part.last_stage - 1):
                raise UserError(
                    f"{given}; expected {needed}, one for each of the {needed + 1} training stages of "
                    f"{type(part).__name__} but the first"
                )

    def _check_wrapper(self, runner: Runner) -> None:
        model = runner.model
        if not is_model_wrapper(model):
            return
        if not isinstance(model, MMDistributedDataParallel):
            raise UserError(
                f"the model is wrapped in {type(model).__name__}; training in stages supports "
                "MMDistributedDataParallel alone: remove model_wrapper_cfg, strategy and runner_type from the config, "
                "and set find_unused_parameters=True"
            )
        if not model.find_unused_parameters:
            raise UserError(
                "parts that idle in a stage have no gradient: set find_unused_parameters=True in the "
                "config (in model_wrapper_cfg, if it has one), or DDP fails in the second iteration"
            )
        if model.static_graph:
            raise UserError("the graph changes between the stages: set model_wrapper_cfg.static_graph=False")

    def _check_losses_after(self, runner: Runner, stage: int) -> None:
        """Let distillation that only a later stage starts fail before training, instead of at the switch."""
        terms = [term for term in self.terms if stage not in term.stages and max(term.stages) > stage]
        if self.teacher_cfg is not None and terms:
            self._teacher = build_teacher(self.teacher_cfg)
            Distiller(unwrapped_model(runner), self._backbone, self._teacher, terms).remove()

    def _enter_stage(self, runner: Runner, stage: int) -> None:
        before = self._stage
        counts = [part.set_stage(stage) for part in self._parts.values()]
        binary_layers, branches = map(sum, zip(*counts, strict=True))
        for hook in runner.hooks:
            if isinstance(ema_model := getattr(hook, "ema_model", None), nn.Module):
                for part in staged_modules(ema_model).values():
                    part.set_stage(stage)
        taught = self._teacher is not None
        self._start_distillation(runner, stage)
        teacher_freed = ", teacher freed" if taught and self._teacher is None else ""
        for term in self.terms:
            if stage not in term.stages:
                # MMEngine would go on logging the last value, also after a resume.
                hub, key = runner.message_hub, f"train/{term.log_name}"
                hub.log_scalars.pop(key, None)
                hub._resumed_keys.pop(key, None)  # else a resumed run warns that it is missing
        if stage > before:
            # An accumulation that the switch cuts has gathered gradients of another network.
            for wrapper in optim_wrappers(runner).values():
                wrapper.zero_grad()
                if self.reset_optimizer:
                    wrapper.optimizer.state.clear()
            # CheckpointHook(save_best=...) would compare with a network that is less binary. The path of its
            # checkpoint stays: the first one that is best in the new stage replaces it.
            hub = runner.message_hub
            for key in [key for key in hub.runtime_info if key.startswith("best_score")]:  # one for each metric
                hub.pop_info(key)
                hub._resumed_keys.pop(key, None)  # else a resumed run warns that it is missing
            unfinished = "".join(f", {text}" for text in self._plan[stage - 1].unfinished())
            MMLogger.get_current_instance().info(
                f"Stage {stage} from iteration {runner.iter} (epoch {runner.epoch + 1}): {binary_layers} layers have "
                f"binary weights now, {branches} spatial interaction branches are awake{unfinished}{teacher_freed}."
            )

    def _start_distillation(self, runner: Runner, stage: int) -> None:
        """Distil what a stage distils, which may be nothing: then the teacher goes."""
        teacher = self._teacher
        self._stop_distillation()
        terms = [term for term in self.terms if stage in term.stages]
        if self.teacher_cfg is None or not terms:
            return
        if teacher is None:
            teacher = build_teacher(self.teacher_cfg)
        self._teacher = teacher.to(next(unwrapped_model(runner).parameters()).device)
        self._distiller = Distiller(
            unwrapped_model(runner), self._backbone, teacher, terms, self.task_weights[stage - 1]
        )

    def _stop_distillation(self) -> None:
        if self._distiller is not None:
            self._distiller.remove()
        self._distiller = self._teacher = None


def build_terms(
    distill_loss: dict | list[dict] | None, distill_weight: float, num_stages: int = 2
) -> list[DistillTerm]:
    """Build the distillation losses of a hook's config, for a plan of so many training stages.

    Raises:
        ValueError: if one is no config of a loss or compares what no tap takes, a weight or a stage is impossible, or
            two have one name in the log.
    """
    default = dict(type="mmbivit.BlockMSELoss") if distill_loss is None else distill_loss
    configs = default if isinstance(default, (list, tuple)) else [default]
    terms = []
    for config in configs:
        if not isinstance(config, dict) or "type" not in config:
            raise UserError(
                f"distill_loss={distill_loss!r}; allowed: dict(type='mmbivit.BlockMSELoss', ...), or a list of such"
            )
        options = dict(config)
        weight, stages = options.pop("weight", 1.0), options.pop("stages", (1,))
        check_number("distill_loss.weight", weight, 0, 1e6)
        check_integers("distill_loss.stages", stages, 1, num_stages)
        term = DistillTerm(ROOT_MODELS.build(options), distill_weight * weight, tuple(stages))
        check_choice(f"{type(term.loss).__name__}.tap", term.tap, TAPS)
        terms.append(term)
    names = [term.log_name for term in terms]
    if len(set(names)) < len(names):
        raise UserError(f"distill_loss has losses that the log calls the same: {', '.join(names)}")
    return terms


def _check_switches(name: str, value: int | Sequence[int]) -> tuple[int, ...]:
    """Return when each stage but the first begins."""
    switches = value if isinstance(value, (list, tuple)) else [value]
    for switch in switches:
        check_integer(name, switch, 1)
    if any(later <= earlier for earlier, later in pairwise(switches)):
        raise UserError(f"{name}={value!r}; allowed: a rising list of when stage 2, 3 and so on begin")
    return tuple(switches)


def _check_task_weight(task_weight: float | Sequence[float], num_stages: int) -> tuple[float, ...]:
    """Return the weight of each stage."""
    weights = task_weight if isinstance(task_weight, (list, tuple)) else [task_weight] * num_stages
    if len(weights) != num_stages:
        raise UserError(
            f"task_weight={task_weight!r}; allowed: a number, or a list of {num_stages}, one for each stage"
        )
    for weight in weights:
        check_number("task_weight", weight, 0, 1e6)
    return tuple(weights)


def _check_teacher(teacher: dict) -> None:
    if not isinstance(teacher, dict) or "type" not in teacher:
        raise UserError(f"teacher={teacher!r}; allowed: dict(type='mmbivit.BinarySwinTransformer', ...) or None")
    if "init_cfg" not in teacher:
        raise UserError(
            "teacher has no weights: give teacher.init_cfg=dict(type='Pretrained', checkpoint=FILE_OR_URL), "
            "or teacher=None to train stage 1 without distillation"
        )
    check_keys("teacher.init_cfg", teacher["init_cfg"], ["checkpoint"], ["type", "prefix"])


def build_teacher(cfg: dict) -> nn.Module:
    """Build a teacher, and load its weights through our own loader for any class of backbone.

    Args:
        cfg: config of the backbone, or of a classifier, with ``init_cfg`` that names its checkpoint.

    Raises:
        FileNotFoundError: if the checkpoint does not exist.
        ValueError: if it lacks weights of the teacher's blocks, or of its head.
    """
    cfg = copy.deepcopy(cfg)
    init_cfg = cfg.pop("init_cfg")
    with torch.random.fork_rng(devices=[]):  # a run that is resumed builds it at another time
        teacher = ROOT_MODELS.build(cfg)
    checkpoint = load_checkpoint_file(init_cfg["checkpoint"])
    backbone, prefix = getattr(teacher, "backbone", teacher), init_cfg.get("prefix")
    if backbone is not teacher:
        prefix = prefix or ""
    missing, _ = load_pretrained(teacher, checkpoint, prefix=prefix)
    inside = "" if backbone is teacher else "backbone."
    needed = (
        "head.",
        "neck.",
        "rpn_head.",
        "roi_head.",
        "bbox_head.",
        *(f"{inside}{n}." for n in find_blocks(backbone)),
    )
    tensors = teacher.state_dict()  # integers, such as indices of positions, are computed and need no checkpoint
    if missing := [key for key in missing if key.startswith(needed) and tensors[key].is_floating_point()]:
        raise UserError(
            f"teacher.init_cfg.checkpoint={init_cfg['checkpoint']} lacks {len(missing)} tensors of the teacher's "
            f"blocks or heads, first {missing[0]}: is it a {cfg['type']} with the same arch?"
        )
    return teacher
