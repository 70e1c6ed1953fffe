"""The two stages in real Runners: the six decisions of the training design, each with its test.

Several processes: tests/robustness/rank_checks.py.
"""

import gc
import logging
import weakref
from contextlib import contextmanager

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from torch import nn

from mmbivit.checkpoints import load_checkpoint_file
from mmbivit.engine import DecoupledTrainingHook
from mmbivit.models import BinarySwinTransformer
from tests.analysis.logs import logged

from .toy import ARCH, ToyModel, make_runner, save_teacher, teacher_cfg


@pytest.fixture
def teacher(tmp_path):
    save_teacher(tmp_path / "teacher.pth")
    return teacher_cfg(tmp_path / "teacher.pth")


class Watch(Hook):
    """Notes the stage, the learning rate and which losses were computed in each iteration."""

    priority = "LOWEST"

    def __init__(self):
        self.rows = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        optimized = runner.optim_wrapper.optimizer.state
        self.rows.append(
            dict(
                iter=runner.iter,
                stage=model.backbone.stage,
                losses=sorted(outputs),
                si_optimized=sum(".si." in n and p in optimized for n, p in model.named_parameters()),
                hooks=len(model._forward_hooks) + len(model._forward_pre_hooks),
            )
        )


@pytest.mark.parametrize("by_epoch", [True, False])
def test_both_stages(tmp_path, teacher, by_epoch):
    watch = Watch()
    switch, length = (dict(switch_epoch=1), 2) if by_epoch else (dict(switch_iter=4), 8)
    model = ToyModel()
    keys = list(model.state_dict())
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    runner = make_runner(
        tmp_path / "run", dict(teacher=teacher, **switch), model=model, by_epoch=by_epoch, length=length, hooks=[watch]
    )
    runner.train()

    assert [row["stage"] for row in watch.rows] == [1] * 4 + [2] * 4
    assert [row["losses"] for row in watch.rows] == [["loss", "loss_distill", "loss_task"]] * 4 + [
        ["loss", "loss_task"]
    ] * 4
    assert [row["hooks"] > 0 for row in watch.rows] == [True] * 4 + [False] * 4
    # Decision 1: idle SI parameters are not optimized, and the set of keys never changes.
    branch = sum(".si." in name for name in start)
    assert [row["si_optimized"] for row in watch.rows] == [0] * 4 + [branch] * 4
    assert list(model.state_dict()) == keys
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert {name for name in start if ".si." in name} <= moved
    # Decision 4: the log has loss_distill in stage 1 only; no teacher in the checkpoint.
    assert ["loss_distill" in entry for entry in logged(tmp_path / "run", "loss")] == [True] * 4 + [False] * 4
    last = sorted((tmp_path / "run").glob("*.pth"))[-1]
    saved = torch.load(last, weights_only=False)
    assert list(saved["state_dict"]) == keys
    assert "train/loss_distill" not in saved["message_hub"]["resumed_keys"]  # which a resumed run would miss


def test_the_switch_is_one_readable_line(tmp_path, teacher, caplog):
    runner = make_runner(tmp_path / "run", dict(switch_epoch=1, teacher=teacher), length=2)
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    runner.logger.addHandler(handler)
    runner.train()
    # 3 blocks of 6 binary layers and one patch merging
    assert [message for message in messages if message.startswith("Stage 2")] == [
        "Stage 2 from iteration 4 (epoch 2): 19 layers have binary weights now, 3 spatial interaction branches are "
        "awake, teacher freed."
    ]


def test_optimizer_keeps_si_parameters_with_paramwise_cfg(tmp_path):
    """Decision 1: they are in the optimizer from the start, without state until the switch."""
    runner = make_runner(
        tmp_path / "run",
        dict(switch_epoch=1),
        length=2,
        optim=dict(paramwise_cfg=dict(custom_keys={".si.": dict(lr_mult=0.5)})),
    )
    names = {id(p): name for name, p in runner.model.named_parameters()}
    states = []

    class States(Hook):
        def after_train_epoch(self, runner):
            optimizer = runner.optim_wrapper.optimizer
            inside = {names[id(p)] for group in optimizer.param_groups for p in group["params"]}
            states.append((inside, {names[id(p)] for p in optimizer.state}))

    runner.register_hook(States())
    runner.train()
    branch = {name for name in names.values() if ".si." in name}
    assert all(inside == set(names.values()) for inside, _ in states)
    assert not branch & states[0][1] and branch <= states[1][1]


@pytest.mark.parametrize("update_buffers", [True, False])
def test_ema_copy_follows_the_stage(tmp_path, teacher, update_buffers):
    """Decision 2: EMA does not average integers, so the hook switches the copy too."""
    seen = []

    class Stages(Hook):
        def after_train_epoch(self, runner):
            ema = next(hook.ema_model for hook in runner.hooks if hasattr(hook, "ema_model")).module
            seen.append((ema.backbone.stage, int(ema.backbone.training_stage), len(ema._forward_hooks)))
            assert not any("teacher" in key for key in ema.state_dict())

    ema = dict(type="EMAHook", update_buffers=update_buffers, momentum=0.1)
    runner = make_runner(tmp_path / "run", dict(switch_epoch=1, teacher=teacher), length=2, hooks=[ema, Stages()])
    runner.train()
    assert seen == [(1, 1, 0), (2, 2, 0)]
    saved = torch.load(tmp_path / "run" / "epoch_2.pth", weights_only=False)
    assert int(saved["state_dict"]["backbone.training_stage"]) == 2
    assert int(saved["ema_state_dict"]["module.backbone.training_stage"]) == 2


@pytest.mark.parametrize("by_epoch", [True, False])
@pytest.mark.parametrize("ema", [False, True])
def test_resume_before_at_and_after_the_switch_equals_no_interruption(tmp_path, teacher, by_epoch, ema):
    """Decision 3: the stage follows from the iteration alone."""
    switch, length = (dict(switch_epoch=2), 4) if by_epoch else (dict(switch_iter=3), 6)
    hook = dict(teacher=teacher, reset_lr=True, **switch)
    end = dict(by_epoch=by_epoch, begin=0, end=length // 2)
    late = dict(by_epoch=by_epoch, begin=length // 2, end=length)
    kwargs = dict(
        by_epoch=by_epoch,
        length=length,
        param_scheduler=[
            dict(type="CosineAnnealingLR", eta_min_ratio=0.3, **end),
            dict(type="CosineAnnealingLR", **late),
        ],
        hooks=[dict(type="EMAHook", momentum=0.1)] if ema else [],
    )
    whole = make_runner(tmp_path / "whole", hook, **kwargs)
    whole.train()
    prefix = "epoch" if by_epoch else "iter"
    for point in range(1, length):
        resumed = make_runner(
            tmp_path / f"resumed{point}",
            hook,
            **kwargs,
            load_from=str(tmp_path / "whole" / f"{prefix}_{point}.pth"),
            resume=True,
        )
        resumed.train()
        assert resumed.model.backbone.stage == 2
        for (name, expected), actual in zip(
            whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
        ):
            assert torch.equal(actual, expected), f"{name} after resuming from {prefix} {point}"
        rates = [[group["lr"] for group in runner.optim_wrapper.param_groups] for runner in (whole, resumed)]
        assert rates[0] == rates[1]


def test_teacher_is_freed_at_the_switch_and_its_forward_stops(tmp_path, teacher, monkeypatch):
    calls, references = [], []
    original = DecoupledTrainingHook._start_distillation

    def start(self, runner, stage):
        original(self, runner, stage)
        if stage == 2:
            return
        # The teacher is reachable only through what distillation registered.
        found = [o for o in gc.get_objects() if isinstance(o, BinarySwinTransformer) and o is not self._backbone]
        found = [
            o
            for o in found
            if not any(p.requires_grad for p in o.parameters()) and o.patch_embed.proj.out_channels == 8
        ]
        assert len(found) == 1 and not found[0].training
        found[0].register_forward_hook(lambda *_: calls.append(runner.iter))
        references.append(weakref.ref(found[0]))

    monkeypatch.setattr(DecoupledTrainingHook, "_start_distillation", start)
    gc.collect()
    make_runner(tmp_path / "run", dict(switch_epoch=1, teacher=teacher), length=2).train()
    gc.collect()
    assert calls == [0, 1, 2, 3]
    assert references[0]() is None


class CpuAutocastOptimWrapper(OptimWrapper):
    """What AmpOptimWrapper does on a GPU; MMEngine's own refuses to run on the CPU."""

    @contextmanager
    def optim_context(self, model):
        with super().optim_context(model), torch.autocast("cpu", dtype=torch.bfloat16):
            yield


@pytest.mark.parametrize(
    "optim", [dict(type=CpuAutocastOptimWrapper), dict(accumulative_counts=3)], ids=["autocast", "accumulation"]
)
def test_autocast_and_accumulation_reach_the_distillation_term(tmp_path, teacher, optim):
    watch = Watch()
    seen = []

    class Dtypes(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if not seen:
                block = runner.model.backbone.stages[0].blocks[0].mlp.fc1
                block.register_forward_hook(lambda m, a, out: seen.append(out.dtype))

    runner = make_runner(
        tmp_path / "run", dict(switch_epoch=1, teacher=teacher), length=2, optim=optim, hooks=[watch, Dtypes()]
    )
    runner.train()
    assert seen[0] == (torch.bfloat16 if "type" in optim else torch.float32)
    assert [("loss_distill" in row["losses"]) for row in watch.rows] == [True] * 4 + [False] * 4
    assert all(torch.isfinite(p).all() for p in runner.model.parameters())


def test_the_switch_drops_what_an_accumulation_has_gathered(tmp_path):
    """Gradients of the network with float weights are no part of a step with binary ones."""
    waiting = []

    class Waiting(Hook):
        priority = "LOW"

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            waiting.append(any(p.grad is not None for p in runner.model.parameters()))

    kwargs = dict(length=2, optim=dict(accumulative_counts=3), hooks=[Waiting()])
    make_runner(tmp_path / "run", dict(switch_epoch=1), **kwargs).train()
    assert waiting == [False, True, True, False, False, True, False, True]  # iteration 4 would have one waiting


def test_checkpointed_blocks_can_be_distilled_and_equal_plain_ones(tmp_path, teacher):
    """Decision 5: non-reentrant checkpointing keeps the gradient of captured features."""
    states = []
    for with_cp in (False, True):
        model = ToyModel(with_cp=with_cp)
        make_runner(tmp_path / str(with_cp), dict(switch_epoch=1, teacher=teacher), model=model, length=2).train()
        states.append(model.state_dict())
    for name, expected in states[0].items():
        torch.testing.assert_close(states[1][name], expected, msg=name)


def test_frozen_blocks_are_not_distilled(tmp_path, teacher):
    model = ToyModel(frozen_stages=1)
    watch = Watch()
    make_runner(tmp_path / "run", dict(switch_epoch=1, teacher=teacher), model=model, length=2, hooks=[watch]).train()
    assert "loss_distill" in watch.rows[0]["losses"]


def test_reset_lr_restarts_the_cosine(tmp_path, teacher):
    """Decision 6: rates of both stages, by the closed form of the two cosines."""
    rates = []

    class Rates(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            rates.append(runner.optim_wrapper.param_groups[0]["lr"])

    scheduler = [
        dict(type="CosineAnnealingLR", eta_min_ratio=0.3, by_epoch=False, begin=0, end=4),
        dict(type="CosineAnnealingLR", eta_min_ratio=0.0, by_epoch=False, begin=4, end=8),
    ]
    hook = dict(switch_iter=4, reset_lr=True)
    make_runner(tmp_path / "run", hook, by_epoch=False, length=8, hooks=[Rates()], param_scheduler=scheduler).train()
    cosine = [(1 + torch.cos(torch.tensor(torch.pi * i / 4)).item()) / 2 for i in range(4)]
    expected = [1e-2 * (0.3 + 0.7 * c) for c in cosine] + [1e-2 * c for c in cosine]
    assert rates == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scheduler", [None, []])
def test_reset_lr_without_schedulers_has_nothing_to_reset(tmp_path, scheduler):
    """It ended in a KeyError at the switch, when stage 1 was done."""
    runner = make_runner(tmp_path, dict(switch_epoch=1, reset_lr=True), length=2, param_scheduler=scheduler)
    runner.train()
    assert runner.model.backbone.stage == 2
    assert runner.optim_wrapper.param_groups[0]["lr"] == 1e-2


@pytest.mark.parametrize("reset", [False, True])
def test_reset_optimizer_makes_stage_2_start_like_a_new_run(tmp_path, reset):
    """Adam's first step has the size of the learning rate, whatever the gradient; a later one has not."""
    moves = []

    class Moves(Hook):
        priority = "LOWEST"

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            self.before = runner.model.backbone.stages[0].blocks[0].mlp.fc1.weight.detach().clone()

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            weight = runner.model.backbone.stages[0].blocks[0].mlp.fc1.weight
            moves.append(float((weight.detach() - self.before).abs().median()))

    hook = dict(switch_iter=4, reset_optimizer=reset)
    work_dir = tmp_path / "run"
    runner = make_runner(work_dir, hook, by_epoch=False, length=6, hooks=[Moves()], optim=dict(clip_grad=None))
    runner.train()
    assert moves[0] == pytest.approx(1e-2, rel=0.01)  # but for Adam's epsilon
    assert (moves[4] == pytest.approx(1e-2, rel=0.01)) == reset, moves
    states = load_checkpoint_file(str(work_dir / "iter_6.pth"))["optimizer"]["state"]
    steps = {int(state["step"]) for state in states.values()}
    assert max(steps) == (2 if reset else 6)


@pytest.mark.parametrize(
    ("hook", "by_epoch", "message"),
    [
        ({}, True, "give exactly one of switch_epoch and switch_iter"),
        (dict(switch_epoch=1, switch_iter=1), True, "give exactly one of"),
        (dict(switch_epoch=2), True, "switch_epoch=2 leaves a stage empty; allowed: 1 to 1"),
        (dict(switch_epoch=0), True, "switch_epoch=0; allowed: an integer of 1 or more"),
        (dict(switch_iter=8), True, "switch_iter=8 leaves a stage empty; allowed: 1 to 7"),
        (dict(switch_epoch=1), False, "needs an epoch-based loop; with IterBasedTrainLoop give switch_iter"),
        (dict(switch_epoch=1, distill_weight=-1), True, "distill_weight=-1; allowed: a number >= 0"),
        (dict(switch_epoch=1, teacher=dict(type="mmdet.SwinTransformer")), True, "teacher has no weights"),
    ],
)
def test_impossible_settings_are_refused_before_training(tmp_path, hook, by_epoch, message):
    with pytest.raises(ValueError) as error:
        make_runner(tmp_path / "run", hook, by_epoch=by_epoch, length=2).train()
    assert message in str(error.value)


def test_a_teacher_that_does_not_match_is_refused(tmp_path):
    other = dict(ARCH, depths=(2, 2))
    save_teacher(tmp_path / "teacher.pth", other)
    cfg = teacher_cfg(tmp_path / "teacher.pth", arch=other)
    with pytest.raises(
        ValueError, match=r"teacher's blocks do not match the student's in 1 places, first stages\.1\.blocks\.1"
    ):
        make_runner(tmp_path / "run", dict(switch_epoch=1, teacher=cfg), length=2).train()


def test_a_teacher_checkpoint_of_another_arch_is_refused(tmp_path):
    save_teacher(tmp_path / "teacher.pth", dict(ARCH, embed_dims=16))
    with pytest.raises(ValueError, match=r"checkpoint is of another arch: patch_embed\.proj\.weight has shape"):
        make_runner(
            tmp_path / "run", dict(switch_epoch=1, teacher=teacher_cfg(tmp_path / "teacher.pth")), length=2
        ).train()


def test_mmdet_swin_can_be_the_teacher(tmp_path):
    from mmdet.models.backbones import SwinTransformer

    teacher = SwinTransformer(**ARCH, strides=(4, 2), out_indices=(1,))
    state = {f"backbone.{k}": v for k, v in teacher.state_dict().items() if v.is_floating_point()}
    torch.save(dict(state_dict=state), tmp_path / "mmdet.pth")  # without indices of positions, as newer files are
    cfg = dict(
        type="mmdet.SwinTransformer",
        strides=(4, 2),
        out_indices=(1,),
        init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "mmdet.pth"), prefix="backbone."),
        **ARCH,
    )
    watch = Watch()
    make_runner(tmp_path / "run", dict(switch_epoch=1, teacher=cfg), length=2, hooks=[watch]).train()
    assert "loss_distill" in watch.rows[0]["losses"]


def test_a_model_without_a_two_stage_backbone_is_refused(tmp_path):
    model = ToyModel()
    model.backbone = nn.Identity()
    with pytest.raises(ValueError, match="exactly one backbone such as mmbivit.BinarySwinTransformer, ToyModel has 0"):
        make_runner(tmp_path / "run", dict(switch_epoch=1), model=model, length=2).train()


class LastBlockLoss(nn.Module):
    """Distance of the last block's outputs, under a name of its own."""

    log_name = "loss_last"

    def forward(self, student, teacher):
        name = list(student)[-1]
        return (student[name].float() - teacher[name]).square().mean()


def test_a_loss_that_names_stage_2_keeps_the_teacher_beyond_the_switch(tmp_path, teacher, caplog):
    losses = [dict(type="mmbivit.BlockMSELoss"), dict(type=LastBlockLoss, stages=(1, 2), weight=0.5)]
    hook = dict(switch_epoch=1, teacher=teacher, distill_loss=losses, distill_weight=3.0, task_weight=(1.0, 0.25))
    runs = {}
    for point, epochs, kwargs in (
        ("whole", 3, {}),
        ("resumed", 3, dict(load_from=str(tmp_path / "whole" / "epoch_2.pth"), resume=True)),
    ):
        watch = Watch()
        with caplog.at_level(logging.INFO, "mmengine"):
            runner = make_runner(tmp_path / point, hook, length=epochs, hooks=[watch], **kwargs)
            runner.train()
        runs[point] = [row["losses"] for row in watch.rows], runner.model
    first = ["loss", "loss_distill", "loss_last", "loss_task"]
    second = ["loss", "loss_last", "loss_task"]
    assert runs["whole"][0] == [first] * 4 + [second] * 8
    assert runs["resumed"][0] == [second] * 4
    for (name, a), b in zip(
        runs["whole"][1].state_dict().items(), runs["resumed"][1].state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    assert not any(model._forward_hooks for _, model in runs.values())
    assert "teacher freed" not in caplog.text
    hook_object = DecoupledTrainingHook(**hook)
    assert [(term.weight, term.stages) for term in hook_object.terms] == [(3.0, (1,)), (1.5, (1, 2))]
    assert hook_object.task_weights == (1.0, 0.25)


def test_a_loss_of_stage_2_is_refused_before_training(tmp_path):
    arch = ARCH | dict(num_heads=(2, 2))
    save_teacher(tmp_path / "teacher.pth", arch)
    teacher = teacher_cfg(tmp_path / "teacher.pth", arch=arch)
    losses = [dict(type="mmbivit.BlockMSELoss"), dict(type="mmbivit.AttentionRankingLoss", weight=10, stages=(2,))]
    watch = Watch()
    runner = make_runner(
        tmp_path / "run", dict(switch_epoch=1, teacher=teacher, distill_loss=losses), length=2, hooks=[watch]
    )
    with pytest.raises(ValueError, match=r"stages\.0\.blocks\.0 has 2 heads in the teacher and 1 in the student"):
        runner.train()
    assert not watch.rows


class TaplessLoss(LastBlockLoss):
    tap = "logit"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(distill_loss=dict(type=TaplessLoss)), "TaplessLoss.tap='logit' is unknown; allowed: .*mean 'logits'"),
        (
            dict(distill_loss=[dict(type="mmbivit.BlockMSELoss")] * 2),
            "the log calls the same: loss_distill, loss_distill",
        ),
        (dict(distill_loss=[dict(weight=1.0)]), r"distill_loss=.*; allowed: dict\(type="),
        (dict(distill_loss=dict(type="mmbivit.BlockMSELoss", stages=(3,))), r"distill_loss.stages\[0\]=3"),
        (dict(distill_loss=dict(type="mmbivit.BlockMSELoss", weight=-1)), "distill_loss.weight=-1"),
        (dict(task_weight=(1, 2, 3)), "task_weight=.*; allowed: a number, or a list of 2, one for each stage"),
        (dict(task_weight="half"), "task_weight='half'"),
    ],
)
def test_impossible_losses_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DecoupledTrainingHook(switch_epoch=1, **options)
