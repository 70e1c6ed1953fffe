"""A plan of three stages in real Runners: whatever happens at the switch of two stages happens at each of its switches.

Several processes: tests/robustness/rank_checks.py.
"""

import logging

import pytest
import torch
from mmengine.hooks import Hook
from torch import nn

from mmbivit.checkpoints import load_checkpoint_file
from mmbivit.engine import DecoupledTrainingHook
from tests.analysis.logs import logged

from .toy import ToyModel, make_runner, save_teacher, teacher_cfg

# BiViT's cross-layer order: attention's weights first, then the MLP's, then all.
CROSS_LAYER = [dict(activations=True, weights=["attn"]), dict(activations=True, weights=["attn", "mlp"])]
BY_EPOCH = dict(hook=dict(switch_epoch=[1, 2]), by_epoch=True, length=3)  # of 4 iterations
BY_ITER = dict(hook=dict(switch_iter=[2, 5]), by_epoch=False, length=8)


class LastBlockLoss(nn.Module):
    """Distance of the last block's outputs, under a name of its own."""

    log_name = "loss_last"

    def forward(self, student, teacher):
        name = list(student)[-1]
        return (student[name].float() - teacher[name]).square().mean()


class ConstantTask(ToyModel):
    """Its own loss is 2, whatever its weights."""

    def forward(self, inputs, data_samples=None, mode="tensor"):
        out = super().forward(inputs, data_samples, mode)
        return out if mode != "loss" else dict(loss_task=0 * out["loss_task"] + 2)


class Watch(Hook):
    """Notes the stage of the model and what it lost in each iteration."""

    priority = "LOWEST"

    def __init__(self):
        self.stages, self.losses = [], []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.stages.append(runner.model.backbone.stage)
        self.losses.append({name: loss.item() for name, loss in outputs.items()})


@pytest.fixture
def teacher(tmp_path):
    save_teacher(tmp_path / "teacher.pth")
    return teacher_cfg(tmp_path / "teacher.pth")


@pytest.fixture
def distilling(teacher):
    """Block outputs are distilled in stage 1, the last block's once more in stage 3, and nothing in stage 2."""
    losses = [dict(type="mmbivit.BlockMSELoss"), dict(type=LastBlockLoss, stages=(1, 3))]
    return dict(teacher=teacher, distill_loss=losses, task_weight=[0.5, 1.0, 0.25])


def runner_of(work_dir, options, hook=None, model=ToyModel, **kwargs):
    options = dict(options)
    hook = options.pop("hook") | (hook or {})
    return make_runner(work_dir, hook, model=model(training_stages=CROSS_LAYER), **options, **kwargs)


@pytest.mark.parametrize("options", [BY_EPOCH, BY_ITER], ids=["epochs", "iterations"])
def test_stages_losses_and_log(tmp_path, distilling, options):
    watch, messages = Watch(), []
    runner = runner_of(tmp_path / "run", options, distilling, ConstantTask, hooks=[watch])
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    runner.logger.addHandler(handler)
    keys = list(runner.model.state_dict())
    runner.train()

    lengths = (4, 4, 4) if options is BY_EPOCH else (2, 3, 3)
    stages = [stage for stage, length in enumerate(lengths, 1) for _ in range(length)]
    assert watch.stages == stages
    names = {
        1: {"loss", "loss_task", "loss_distill", "loss_last"},
        2: {"loss", "loss_task"},
        3: {"loss", "loss_task", "loss_last"},
    }
    assert [set(losses) for losses in watch.losses] == [names[stage] for stage in stages]
    # The weight of the task is its weight beside distillation, so stage 2 has none.
    assert [losses["loss_task"] for losses in watch.losses] == [{1: 1.0, 2: 2.0, 3: 0.5}[stage] for stage in stages]
    entries = logged(tmp_path / "run", "loss")
    assert ["loss_distill" in entry for entry in entries] == [stage == 1 for stage in stages]
    assert ["loss_last" in entry for entry in entries] == [stage != 2 for stage in stages]
    assert list(runner.model.state_dict()) == keys and not runner.model._forward_hooks

    at = [(lengths[0], 2), (sum(lengths[:2]), 3)] if options is BY_EPOCH else [(2, 1), (5, 1)]
    # 3 blocks of 2 layers in attention and 4 in the MLP, spatial interaction included, and one patch merging
    assert [message for message in messages if message.startswith("Stage ")] == [
        f"Stage 2 from iteration {at[0][0]} (epoch {at[0][1]}): 18 layers have binary weights now, 0 spatial "
        "interaction branches are awake, weights outside attn, mlp are still float, spatial interaction is idle, "
        "teacher freed.",
        f"Stage 3 from iteration {at[1][0]} (epoch {at[1][1]}): 19 layers have binary weights now, 3 spatial "
        "interaction branches are awake.",
    ]


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("options", [BY_EPOCH, BY_ITER], ids=["epochs", "iterations"])
def test_resume_within_each_stage_equals_no_interruption(tmp_path, distilling, options, ema):
    """With random numbers, which building a teacher in the middle must not change."""
    prefix, length = ("epoch", 3) if options is BY_EPOCH else ("iter", 8)
    by_epoch = options["by_epoch"]
    scheduler = dict(type="CosineAnnealingLR", eta_min_ratio=0.1, by_epoch=by_epoch, begin=0, end=length)
    kwargs = dict(
        hook=distilling | dict(reset_lr=True, reset_optimizer=True),
        model=lambda **plan: ToyModel(drop_path_rate=0.5, **plan),
        param_scheduler=[scheduler],
    )

    def run(name, **resume):
        hooks = [dict(type="mmbivit.ResumableTrainingHook")] + [dict(type="EMAHook", momentum=0.1)] * ema
        runner = runner_of(tmp_path / name, options, hooks=hooks, **kwargs, **resume)
        runner.train()
        return runner, load_checkpoint_file(str(tmp_path / name / f"{prefix}_{length}.pth"))

    whole, expected = run("whole")
    for point in range(1, length):
        file = tmp_path / "whole" / f"{prefix}_{point}.pth"
        resumed, saved = run(f"resumed{point}", load_from=str(file), resume=True)
        assert resumed.model.backbone.stage == 3
        for key in ["state_dict"] + ["ema_state_dict"] * ema:
            assert saved[key].keys() == expected[key].keys()
            for name, value in expected[key].items():
                assert torch.equal(saved[key][name], value), f"{key} {name} after resuming from {prefix} {point}"
        rates = [[group["lr"] for group in runner.optim_wrapper.param_groups] for runner in (whole, resumed)]
        assert rates[0] == rates[1]
        for name, state in expected["optimizer"]["state"].items():
            assert all(torch.equal(value, saved["optimizer"]["state"][name][key]) for key, value in state.items())


def test_checkpoints_and_the_copy_of_ema_know_their_stage(tmp_path, teacher):
    seen = []

    class Stages(Hook):
        def after_train_epoch(self, runner):
            copy = next(hook.ema_model for hook in runner.hooks if hasattr(hook, "ema_model")).module
            layers = dict(copy.backbone.named_modules())
            binary = [layers[f"stages.0.{name}"].weight_bits for name in ("blocks.0.mlp.fc1", "downsample.reduction")]
            seen.append((copy.backbone.stage, binary))

    ema = dict(type="EMAHook", momentum=0.1)
    runner_of(tmp_path, BY_EPOCH, dict(teacher=teacher), hooks=[ema, Stages()]).train()
    assert seen == [(1, [32, 32]), (2, [1, 32]), (3, [1, 1])]
    for epoch in (1, 2, 3):
        saved = load_checkpoint_file(str(tmp_path / f"epoch_{epoch}.pth"))
        for key, prefix in (("state_dict", ""), ("ema_state_dict", "module.")):
            model = ToyModel(training_stages=CROSS_LAYER)
            model.load_state_dict({name.removeprefix(prefix): v for name, v in saved[key].items() if name != "steps"})
            assert model.backbone.stage == epoch


def test_each_switch_drops_what_an_accumulation_has_gathered(tmp_path):
    waiting = []

    class Waiting(Hook):
        priority = "LOW"

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            waiting.append(any(p.grad is not None for p in runner.model.parameters()))

    runner_of(tmp_path, BY_ITER, optim=dict(accumulative_counts=3), hooks=[Waiting()]).train()
    assert waiting == [False, True, False, False, True, False, False, True]  # those of 2 and 5 would wait otherwise


@pytest.mark.parametrize("reset", [False, True])
def test_each_switch_resets_what_it_is_told_to(tmp_path, reset):
    rates, steps = [], []

    class Notes(Hook):
        priority = "LOW"

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            rates.append(runner.optim_wrapper.param_groups[0]["lr"])
            steps.append(max((int(s["step"]) for s in runner.optim_wrapper.optimizer.state.values()), default=0))

    scheduler = dict(type="ExponentialLR", gamma=0.5, by_epoch=False)
    hook = dict(reset_lr=reset, reset_optimizer=reset)
    runner_of(tmp_path, BY_ITER, hook, hooks=[Notes()], param_scheduler=[scheduler]).train()
    since = [0, 1, 0, 1, 2, 0, 1, 2] if reset else range(8)
    assert steps == list(since)
    # The scheduler, which multiplies what it finds, steps once more right after a reset.
    expected = [1e-2 * 0.5 ** (n + (reset and place >= 2)) for place, n in enumerate(since)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "hook", "message"),
    [
        (
            BY_EPOCH,
            dict(switch_epoch=1),
            "switch_epoch=1; expected 2, one for each of the 3 training stages of BinarySwinTransformer but the first",
        ),
        (BY_ITER, dict(switch_iter=[1, 2, 3]), "switch_iter=1, 2, 3; expected 2, one for"),
        (BY_EPOCH, dict(switch_epoch=[1, 3]), "switch_epoch=1, 3 leaves a stage empty; allowed: 1 to 2"),
        (BY_ITER, dict(switch_iter=[2, 8]), "switch_iter=2, 8 leaves a stage empty; allowed: 1 to 7"),
        (
            BY_ITER,
            dict(switch_iter=[2, 2]),
            r"switch_iter=\[2, 2\]; allowed: a rising list of when stage 2, 3 and so on",
        ),
        (BY_ITER, dict(switch_iter=[3, 2]), r"switch_iter=\[3, 2\]; allowed: a rising list"),
        (BY_ITER, dict(switch_iter=[]), r"switch_iter=\[\]; expected 2, one for each"),
        (BY_ITER, dict(switch_iter=[0, 2]), "switch_iter=0; allowed: an integer of 1 or more"),
        (
            BY_ITER,
            dict(task_weight=(1, 0.05)),
            r"task_weight=\(1, 0.05\); allowed: a number, or a list of 3, one for each",
        ),
        (
            BY_ITER,
            dict(distill_loss=dict(type="mmbivit.BlockMSELoss", stages=(1, 4))),
            r"distill_loss.stages\[1\]=4; allowed: an integer from 1 to 3",
        ),
    ],
)
def test_what_does_not_fit_the_plan_is_refused_before_training(tmp_path, options, hook, message):
    with pytest.raises(ValueError, match=message) as error:
        runner_of(tmp_path, options, hook).train()
    assert "\n" not in str(error.value) and not logged(tmp_path)


def test_a_single_stage_distils_from_its_first_iteration_to_its_last(tmp_path, teacher):
    watch = Watch()
    hook = dict(switch_epoch=[], teacher=teacher, task_weight=0.5)
    model = ConstantTask(training_stages=[])
    assert (model.backbone.stage, model.backbone.last_stage) == (1, 1)
    make_runner(tmp_path, hook, model=model, by_epoch=False, length=4, hooks=[watch]).train()
    assert watch.stages == [1] * 4
    assert all(set(losses) >= {"loss_task", "loss_distill"} and losses["loss_task"] == 1 for losses in watch.losses)


def test_a_number_is_of_all_stages():
    assert DecoupledTrainingHook(switch_iter=[2, 5, 7], task_weight=0.5).task_weights == (0.5,) * 4
