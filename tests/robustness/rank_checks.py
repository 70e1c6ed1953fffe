"""Run by torchrun on two gloo ranks: writes the error of each check, or nothing, to ``rank<rank>.json``."""

import copy
import gc
import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.dist import all_gather_object, get_rank
from mmengine.hooks import Hook
from torch import distributed, nn

from mmbivit.binary import ScaledSign
from mmbivit.engine import CpuDistributedDataParallel, CpuSyncBatchNorm
from mmbivit.engine.ranks_hook import RanksHook, check_same_config
from tests.engine.toy import ToyModel, make_runner, save_teacher, teacher_cfg


def synchronised(norm: nn.Module) -> nn.Module:
    """What DDP makes of a BatchNorm in torch's SyncBN."""
    # DDP wants a parameter, which the norm may lack.
    model = nn.Sequential(nn.SyncBatchNorm.convert_sync_batchnorm(norm), nn.Linear(1, 1))
    norm = CpuDistributedDataParallel(model).module[0]
    assert type(norm) is CpuSyncBatchNorm
    return norm


def compare_with_one_process(norm: nn.Module, shapes, offset=0.0, atol=1e-12) -> None:
    """Outputs, gradients and statistics of two steps equal those of BatchNorm of the whole batch."""
    torch.manual_seed(0)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    ours = synchronised(copy.deepcopy(norm))
    assert list(ours.state_dict()) == list(norm.state_dict())
    for _ in range(2):
        parts = [(torch.randn(shape, dtype=torch.float64) + offset) for shape in shapes]
        weights = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
        whole = torch.cat(parts).requires_grad_()
        norm.zero_grad()
        expected = norm(whole)
        (expected * torch.cat(weights)).sum().backward()
        mine = parts[get_rank()].requires_grad_()
        ours.zero_grad()
        out = ours(mine)
        (out * weights[get_rank()]).sum().backward()
        sizes = [shape[0] for shape in shapes]
        assert torch.allclose(out, expected.split(sizes)[get_rank()], rtol=0, atol=atol)
        assert torch.allclose(mine.grad, whole.grad.split(sizes)[get_rank()], rtol=0, atol=atol)
        for name, parameter in ours.named_parameters():
            distributed.all_reduce(parameter.grad)  # DDP's part
            assert torch.allclose(parameter.grad, norm.get_parameter(name).grad, rtol=0, atol=atol), name
        for name, buffer in norm.named_buffers():
            assert torch.allclose(ours.get_buffer(name), buffer, rtol=atol, atol=atol), name


def sync_bn_of_tokens():
    compare_with_one_process(nn.BatchNorm1d(3).double(), [(5, 3), (2, 3)])


def sync_bn_of_images():
    compare_with_one_process(nn.BatchNorm2d(3, eps=0.1, momentum=None).double(), [(1, 3, 2, 4), (4, 3, 2, 4)])


def sync_bn_with_an_empty_rank():
    compare_with_one_process(nn.BatchNorm2d(2).double(), [(3, 2, 2, 2), (0, 2, 2, 2)])


def sync_bn_with_a_large_mean():
    # Variance 1 and mean 1e6: E[x^2] - E[x]^2 would be off by 1e-4 in float64.
    compare_with_one_process(nn.BatchNorm1d(2).double(), [(4, 2), (3, 2)], offset=1e6, atol=1e-8)


def sync_bn_without_weights_and_statistics():
    compare_with_one_process(nn.BatchNorm1d(2, affine=False, track_running_stats=False).double(), [(4, 2), (3, 2)])


def sync_bn_evaluates_alone():
    norm = synchronised(nn.BatchNorm1d(2))
    norm.running_mean.fill_(3.0)
    if get_rank() == 0:  # a collective would wait for the other
        out = norm.eval()(torch.full((1, 2), 5.0))
        assert torch.allclose(out, torch.full((1, 2), 2.0), atol=1e-4)


def sync_bn_of_too_few_values():
    norm = synchronised(nn.BatchNorm1d(2))
    assert norm(torch.ones(0, 2)).shape == (0, 2)
    assert norm.num_batches_tracked == 0 and norm.running_mean.eq(0).all() and norm.running_var.eq(1).all()
    with pytest.raises(ValueError, match="one value per channel over all processes"):
        norm(torch.ones(1 - get_rank(), 2))


def sync_bn_of_bfloat16():
    out = synchronised(nn.BatchNorm1d(2))(torch.arange(8.0).view(4, 2).bfloat16() + 100 * get_rank())
    assert out.dtype == torch.bfloat16
    values = torch.cat([torch.arange(8.0).view(4, 2) + shift for shift in (0, 100)])
    expected = nn.BatchNorm1d(2)(values).chunk(2)[get_rank()]
    assert torch.allclose(out.float(), expected, atol=0.02)


def statistics_are_averaged():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2).eval(), nn.BatchNorm1d(2, track_running_stats=False))
    for norm in model[:2]:
        norm.running_mean.fill_(1.0 + 2 * get_rank())
        norm.running_var.fill_(5.0 - 2 * get_rank())
    RanksHook().after_train_iter(SimpleNamespace(model=model), 0)
    assert model[0].running_mean.tolist() == [2, 2] and model[0].running_var.tolist() == [4, 4]
    assert model[1].running_mean.tolist() == [1.0 + 2 * get_rank()] * 2
    RanksHook().after_train_iter(SimpleNamespace(model=nn.Linear(1, 1)), 0)


def learned_scales_start_equal():
    quantizer = ScaledSign(2, "none", groups=2)
    quantizer(torch.tensor([[1.0, -3.0]]) * (1 + get_rank()))
    assert quantizer.scale.value.tolist() == [3, 9]  # twice the mean magnitude, of both ranks


def different_iterations_are_refused():
    def begin(iter=4, max_iters=8, weight=1.0):
        model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(model.weight, weight)
        RanksHook().before_train(SimpleNamespace(iter=iter, max_iters=max_iters, model=model))

    begin()
    with pytest.raises(ValueError, match="iterations to train: 8 on rank 0, 7 on rank 1; .*set round_up=True"):
        begin(max_iters=8 - get_rank())
    with pytest.raises(ValueError, match="first iteration: 0 on rank 0, 4 on rank 1; .*checkpoint to resume from"):
        begin(iter=4 * get_rank())
    with pytest.raises(ValueError, match="checksum of the weights: "):
        begin(weight=float(get_rank()))


def different_configs_are_refused():
    def cfg(**changes):
        same = dict(optim_wrapper=dict(optimizer=dict(lr=0.1)), hooks=[dict(switch_epoch=1)], resume=False)
        return Config(same | (changes if get_rank() else {}))

    check_same_config(cfg(work_dir="there", function=get_rank))
    check_same_config(Config(dict(load_from=f"/machine{get_rank()}/epoch_3.pth", data_root=f"{get_rank()}/coco/")))
    for changes, text in [
        (dict(optim_wrapper=dict(optimizer=dict(lr=0.2))), "optim_wrapper.optimizer.lr: 0.1 on rank 0, 0.2 on rank 1"),
        (dict(hooks=[dict(switch_epoch=2)]), "hooks.0.switch_epoch: 1 on rank 0, 2 on rank 1"),
        (dict(resume=True, load_from="epoch_3.pth"), "resume: False on rank 0, True on rank 1"),
        (dict(seed=3), "seed: not set on rank 0, 3 on rank 1"),
    ]:
        with pytest.raises(ValueError, match=text):
            check_same_config(cfg(**changes))


def ddp_runner(name: str, hook: dict | None, wrapper: dict, **options):
    return make_runner(
        Path(sys.argv[1]) / name,
        hook,
        launcher="pytorch",
        env_cfg=dict(dist_cfg=dict(backend="gloo")),
        cfg=dict(model_wrapper_cfg=wrapper),
        **dict(model=ToyModel(), length=4) | options,
    )


def refused(message: str, **wrapper) -> None:
    """A runner with this wrapper is refused before its first iteration."""
    runner = ddp_runner("refused", dict(switch_iter=4), wrapper)
    with pytest.raises(ValueError, match=message):
        runner.train()
    assert runner.iter == 0


def wrappers_without_what_stage_1_needs_are_refused():
    ddp = dict(type="MMDistributedDataParallel", device_ids=None)
    refused("set find_unused_parameters=True", **ddp)
    refused("set model_wrapper_cfg.static_graph=False", find_unused_parameters=True, static_graph=True, **ddp)


def other_wrappers_are_refused():
    for name in ("MMSeparateDistributedDataParallel", "DistributedDataParallel"):
        refused(f"wrapped in {name}; .* supports MMDistributedDataParallel alone: remove", type=name, device_ids=None)
    refused("wrapped in DataParallel; ", type="DataParallel")


DDP = dict(type="MMDistributedDataParallel", device_ids=None, find_unused_parameters=True)


class Snapshot(Hook):
    """Notes the stage of each iteration, and the parameters just before the switch."""

    priority = "VERY_HIGH"

    def __init__(self):
        self.stages, self.before = [], None

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 4:
            self.before = parameters(runner)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.stages.append(runner.model.module.backbone.stage)


def parameters(runner) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in runner.model.module.named_parameters()}


def parameters_stay_equal_through_the_switch():
    teacher, snapshot = Path(sys.argv[1]) / "teacher.pth", Snapshot()
    if get_rank() == 0:
        save_teacher(teacher)
    distributed.barrier()
    # Two epochs of 2 iterations on each rank for stage 1, two for stage 2.
    hook = dict(switch_iter=4, teacher=teacher_cfg(teacher))
    runner = ddp_runner("switched", hook, DDP, hooks=[snapshot])
    runner.train()
    assert snapshot.stages == [1] * 4 + [2] * 4
    before, after = snapshot.before, parameters(runner)
    assert after.keys() == dict(ToyModel().named_parameters()).keys()
    for values in (before, after):
        for pair in zip(*all_gather_object(list(values.values())), strict=True):
            assert torch.equal(*pair)
    assert any(".si." in name for name, value in after.items() if not torch.equal(value, before[name]))


def parameters_stay_equal_in_a_plan_of_three_stages():
    """Other parameters have no gradient in each: thresholds of float activations, and the idle branch."""
    plan = [dict(weights=["attn"]), dict(activations=["attn"], weights=True)]
    snapshot, idle = Snapshot(), []

    class Idle(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            state = runner.optim_wrapper.optimizer.state
            idle.append({name for name, p in runner.model.module.named_parameters() if p not in state})

    runner = ddp_runner(
        "planned", dict(switch_iter=[2, 5]), DDP, model=ToyModel(training_stages=plan), hooks=[snapshot, Idle()]
    )
    runner.train()
    assert snapshot.stages == [1] * 2 + [2] * 3 + [3] * 3
    for pair in zip(*all_gather_object(list(parameters(runner).values())), strict=True):
        assert torch.equal(*pair)
    gammas = {name for name in parameters(runner) if "quantizer.gamma" in name}
    branch = {name for name in parameters(runner) if ".si." in name}
    assert (
        idle == [gammas | branch] * 2 + [{name for name in gammas | branch if ".attn." not in name}] * 3 + [set()] * 3
    )


class BadOnRank1(ToyModel):
    """Has a loss, or an input, that is no number in the second iteration of one rank."""

    calls = 0
    where = "loss"

    def forward(self, inputs, data_samples=None, mode="tensor"):
        self.calls += 1
        factor = float("nan") if self.calls == 2 and get_rank() == 1 else 1
        if self.where == "input":
            return super().forward(inputs * factor, data_samples, mode)
        return {name: loss * factor for name, loss in super().forward(inputs, data_samples, mode).items()}


def stopped(where, message):
    model = BadOnRank1()
    model.where = where
    runner = ddp_runner(f"bad_{where}", None, DDP, model=model, hooks=[dict(type="mmbivit.NonFiniteHook")])
    with pytest.raises(FloatingPointError, match=message):
        runner.train()
    assert runner.iter == 1 and all(parameter.isfinite().all() for parameter in runner.model.parameters())


def a_loss_of_one_rank_stops_all():
    stopped("loss", r"loss not finite in iteration 2: loss_task of images unknown \(rank 1\)\.")


def a_gradient_of_one_rank_stops_all():
    stopped("input", r"gradient not finite in iteration 2: .*of images .* \(rank 0\); images .* \(rank 1\)\.")


def a_loss_of_one_rank_is_skipped_by_all():
    """Also in the middle of an accumulation; parameters and statistics stay finite and equal."""
    for accumulate in (1, 3):
        hooks = [dict(type="mmbivit.NonFiniteHook", max_skipped=1), dict(type="mmbivit.RanksHook")]
        optim = dict(accumulative_counts=accumulate)
        runner = ddp_runner(f"skipped{accumulate}", None, DDP, model=BadOnRank1(), hooks=hooks, optim=optim)
        start = [parameter.detach().clone() for parameter in runner.model.parameters()]
        runner.train()
        assert runner.message_hub.get_info("skipped_steps") == 1
        values = list(runner.model.state_dict().values())
        assert all(value.isfinite().all() for value in values)
        for pair in zip(*all_gather_object(values), strict=True):
            assert torch.equal(*pair)
        assert all(not torch.equal(a, b) for a, b in zip(start, runner.model.parameters(), strict=True))


def gradients_of_an_accumulation_are_resumed():
    """A checkpoint between two steps has the mean over the ranks: the next step is the same up to rounding."""
    hooks = [dict(type="mmbivit.ResumableTrainingHook"), dict(type="mmbivit.RanksHook")]
    checkpoint = dict(type="mmbivit.AtomicCheckpointHook", by_epoch=False, interval=1)
    optim = dict(accumulative_counts=3, optimizer=dict(type="SGD", lr=0.1))
    options = dict(hooks=hooks, optim=optim, checkpoint=checkpoint, length=2)
    whole = ddp_runner("whole", None, DDP, **options)
    whole.train()
    folder = Path(sys.argv[1])
    file = str(folder / "whole" / "iter_2.pth")
    gradients = torch.load(file, weights_only=False)["accumulated_gradients"]
    assert sum(bool(gradient.any()) for gradient in gradients.values()) > 20
    ddp_runner("resumed", None, DDP, **options | dict(model=ToyModel(), load_from=file, resume=True)).train()
    after = [torch.load(folder / run / "iter_3.pth", weights_only=False)["state_dict"] for run in ("whole", "resumed")]
    for a, b in zip(*(state.values() for state in after), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)


CHECKS = (
    sync_bn_of_tokens,
    sync_bn_of_images,
    sync_bn_with_an_empty_rank,
    sync_bn_with_a_large_mean,
    sync_bn_without_weights_and_statistics,
    sync_bn_evaluates_alone,
    sync_bn_of_too_few_values,
    sync_bn_of_bfloat16,
    statistics_are_averaged,
    learned_scales_start_equal,
    different_iterations_are_refused,
    different_configs_are_refused,
    wrappers_without_what_stage_1_needs_are_refused,
    other_wrappers_are_refused,
    parameters_stay_equal_through_the_switch,
    parameters_stay_equal_in_a_plan_of_three_stages,
    a_loss_of_one_rank_stops_all,
    a_gradient_of_one_rank_stops_all,
    a_loss_of_one_rank_is_skipped_by_all,
    gradients_of_an_accumulation_are_resumed,
)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    errors = {}
    for check in CHECKS:
        errors[check.__name__] = ""
        try:
            check()
        except Exception:
            errors[check.__name__] = traceback.format_exc()
    (folder / f"rank{get_rank()}.json").write_text(json.dumps(errors))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # Gloo's threads may abort a process that ends while they run: free the models, then end the group.
    gc.collect()
    distributed.barrier()
    distributed.destroy_process_group()
