"""Classifiers through the same training: two stages, resuming, accumulation, EMA, mixed precision, logs."""

import importlib.machinery
import subprocess
import sys
from unittest.mock import MagicMock

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from mmbivit.apis import train, train_config
from mmbivit.checkpoints import load_checkpoint_file
from mmbivit.engine.decoupled_training_hook import build_teacher, find_staged_backbone
from tests.analysis.logs import logged
from tests.tiny import CLASSES

PLAIN = {"model.data_preprocessor.mixup": None, "model.data_preprocessor.random_erasing": None}


@pytest.fixture
def config(classifier_configs, float_classifier, tmp_path):
    """Make a training config that writes into a folder below ``tmp_path``."""

    def make(name="binary", run="run", cfg_options=None, **options):
        checkpoint = dict(float_checkpoint=str(float_classifier)) if name == "binary" else {}
        cfg_options = {"experiment_name": f"{tmp_path.name}_{run}"} | (cfg_options or {})
        options = dict(seed=0, cfg_options=cfg_options) | checkpoint | options
        return train_config(classifier_configs[name], work_dir=str(tmp_path / run), **options)

    return make


def load(path):
    return torch.load(path, weights_only=False)


def assert_same(expected: dict, state_dict: dict, **tolerance):
    assert expected.keys() == state_dict.keys()
    for key, value in expected.items():
        torch.testing.assert_close(state_dict[key], value, msg=lambda text, key=key: f"{key}: {text}", **tolerance)


def test_both_stages_with_a_teacher(config, float_classifier, tmp_path):
    model = train(config())

    assert model.backbone.stage == 2
    steps = logged(tmp_path / "run", "loss")
    assert [step["epoch"] for step in steps] == [1, 1, 1, 2, 2, 2]
    assert ["loss_distill" in step for step in steps] == [True] * 3 + [False] * 3
    assert all(step["images_per_s"] > 0 and step["memory"] > 0 for step in steps)
    assert [entry["accuracy/top1"] for entry in logged(tmp_path / "run", "accuracy/top1")]
    (log,) = tmp_path.glob("run/*/*.log")
    assert "eta: " in log.read_text()
    checkpoint = load(tmp_path / "run" / "epoch_2.pth")
    assert checkpoint["meta"]["dataset_meta"]["classes"] == CLASSES
    # It started from the float classifier: six steps of at most about the learning rate later, the head is still near.
    head = load(float_classifier)["state_dict"]["head.weight"]
    assert (model.head.weight - head).abs().max() < 6 * 1.1e-2


def test_a_float_classifier_is_distilled_by_several_losses_in_both_stages(config, float_classifier, tmp_path):
    cfg = config(cfg_options=PLAIN | {"log_processor.window_size": 1})
    (hook,) = [hook for hook in cfg.custom_hooks if "teacher" in hook]
    backbone = {key: value for key, value in hook.teacher.items() if key != "init_cfg"}
    hook.teacher = dict(
        type="mmbivit.ImageClassifier", num_classes=len(CLASSES), backbone=backbone, init_cfg=hook.teacher.init_cfg
    )
    hook.distill_loss = [
        dict(type="mmbivit.BlockMSELoss"),
        dict(type="mmbivit.SoftCrossEntropyLoss", stages=(1, 2)),
        dict(type="mmbivit.HardCrossEntropyLoss", stages=(2,), weight=0.5),
        dict(type="mmbivit.DirectionMatchingLoss"),
        dict(type="mmbivit.DirectionMatchingLoss", of="blocks", stages=(1, 2)),
        dict(type="mmbivit.AttentionRankingLoss", stages=(1, 2), weight=10),
    ]
    train(cfg)

    steps = logged(tmp_path / "run", "loss")
    for name, stages in (
        ("loss_distill", (1,)),
        ("loss_distill_logits", (1, 2)),
        ("loss_distill_hard", (2,)),
        ("loss_distill_direction_qkv", (1,)),
        ("loss_distill_direction_blocks", (1, 2)),
        ("loss_distill_ranking", (1, 2)),
    ):
        assert [name in step for step in steps] == [stage in stages for stage in (1, 1, 1, 2, 2, 2)], name
        assert all(step[name] > 0 for step in steps if name in step)
    for step in steps:
        parts = sum(value for key, value in step.items() if key.startswith("loss_"))
        assert step["loss"] == pytest.approx(parts, rel=1e-5)

    headless = {k: v for k, v in load(float_classifier)["state_dict"].items() if not k.startswith("head.")}
    torch.save(dict(state_dict=headless), tmp_path / "headless.pth")
    hook.teacher.init_cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "headless.pth"))
    with pytest.raises(ValueError, match="lacks 2 tensors of the teacher's blocks or heads, first head.weight"):
        build_teacher(hook.teacher)


def test_resumed_run_equals_an_uninterrupted_one(config, tmp_path):
    # Without Mixup, since MMEngine does not save the state of random numbers.
    train(config(run="whole", ema=0.25, cfg_options=PLAIN))
    resumed = train(config(run="resumed", ema=0.25, cfg_options=PLAIN, resume=str(tmp_path / "whole" / "epoch_1.pth")))

    assert resumed.backbone.stage == 2
    whole, other = (load(tmp_path / run / "epoch_2.pth") for run in ("whole", "resumed"))
    assert_same(whole["state_dict"], other["state_dict"], rtol=0, atol=0)
    assert_same(whole["ema_state_dict"], other["ema_state_dict"], rtol=0, atol=0)


def test_accumulated_gradients_equal_those_of_a_large_batch(config):
    sgd = {"optim_wrapper.optimizer": dict(_delete_=True, type="SGD", lr=0.1)}
    states = []
    for run, batch_size, accumulate in (("large", 18, None), ("small", 6, 3)):
        options = {"train_dataloader.batch_size": batch_size, "optim_wrapper.clip_grad": dict(max_norm=0.5)} | sgd
        states.append(train(config("float", run, options, accumulate=accumulate)).state_dict())
    assert_same(states[0], states[1], rtol=1e-4, atol=1e-5)  # float32 sums in another order


def test_ema_averages_weights_and_batch_norm_in_both_stages(config, tmp_path):
    cfg = config(ema=0.25, accumulate=2, cfg_options={"train_cfg.max_epochs": 3})
    seen = []

    @HOOKS.register_module(force=True)
    class RecordingHook(Hook):
        def after_train_iter(self, runner, *args, **kwargs):
            seen.append({key: value.clone() for key, value in runner.model.state_dict().items()})
            (ema,) = (hook.ema_model for hook in runner.hooks if hasattr(hook, "ema_model"))
            assert find_staged_backbone(ema).stage == runner.model.backbone.stage == (1 if runner.epoch == 0 else 2)

    cfg.custom_hooks.append(dict(type="RecordingHook"))
    train(cfg)

    assert len(seen) == 9
    average = {key: value.clone() for key, value in seen[0].items()}
    for i in range(2, 9, 2):  # the optimizer makes a step in every second iteration
        for key, value in seen[i].items():
            if value.is_floating_point():
                average[key] += 0.25 * (value - average[key])
    checkpoint = load(tmp_path / "run" / "epoch_3.pth")
    saved = checkpoint["state_dict"]
    assert int(saved.pop("backbone.training_stage")) == 2
    saved = {key: value for key, value in saved.items() if value.is_floating_point()}
    assert any(key.endswith("running_var") for key in saved)
    assert_same({key: average[key] for key in saved}, saved)
    assert_same(
        {f"module.{key}": value for key, value in seen[-1].items()} | {"steps": torch.tensor(9)},
        checkpoint["ema_state_dict"],
    )


def test_mixed_precision_on_the_cpu(config, tmp_path):
    cfg = config(amp="bf16", accumulate=2, ema=0.1)
    wrapper = cfg.optim_wrapper
    assert (wrapper.type, wrapper.accumulative_counts) == ("mmbivit.CpuAmpOptimWrapper", 2)
    assert (wrapper.clip_grad, wrapper.paramwise_cfg) == (dict(max_norm=5.0), dict(flat_decay_mult=0.0))
    dtypes = set()
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: dtypes.add(output.dtype) if module.__class__.__name__ == "BinaryLinear" else None
    )
    try:
        model = train(cfg)
    finally:
        hook.remove()
    assert torch.bfloat16 in dtypes
    assert all(value.dtype == torch.float32 for value in model.parameters())
    assert all(torch.isfinite(torch.tensor(step["loss"])) for step in logged(tmp_path / "run", "loss"))


def test_wandb_gets_project_and_scalars(config, monkeypatch):
    wandb = MagicMock(__spec__=importlib.machinery.ModuleSpec("wandb", None))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    train(config("float", wandb="tiny"))

    options = wandb.init.call_args.kwargs
    assert (options["project"], options["name"]) == ("tiny", "run")
    logged = {key for call in wandb.log.call_args_list for key in call.args[0]}
    assert {"loss_cls", "images_per_s", "accuracy/top1"} <= logged


def test_data_is_checked_before_anything_is_built(config):
    cfg = config("float", data_root="no/such/folder")
    cfg.model.backbone.type = "NoSuchBackbone"
    with pytest.raises(FileNotFoundError, match="no/such/folder"):
        train(cfg)
    with pytest.raises(ValueError, match=r"3 classes, but model.num_classes=4"):
        train(config("float", cfg_options={"model.num_classes": 4}))


def test_checkpoint_of_another_classifier_is_one_line(config, tmp_path):
    weights = {"head.weight": torch.zeros(5, 16), "head.bias": torch.zeros(5)}
    torch.save(dict(state_dict=weights), tmp_path / "five.pth")
    with pytest.raises(ValueError, match="head has 5 classes, this model num_classes=3"):
        train(config(float_checkpoint=str(tmp_path / "five.pth")))


def test_the_dumped_config_trains_the_same_under_mmengine_alone(classifier_configs, float_classifier, tmp_path):
    """Hooks, checkpoint hook and mixed precision that the tool adds are in it, as registered classes."""
    weights = tmp_path / "float.pth"  # alone, as MMEngine 0.10.7 loads no more than that from its own checkpoints
    torch.save(dict(state_dict=load_checkpoint_file(str(float_classifier))["state_dict"]), weights)
    options = {"experiment_name": tmp_path.name, "default_hooks.checkpoint.interval": 1}
    kwargs = dict(seed=0, amp="bf16", float_checkpoint=str(weights), cfg_options=options)
    train(train_config(classifier_configs["binary"], work_dir=str(tmp_path / "ours"), **kwargs))
    (dumped,) = (tmp_path / "ours").glob("*.py")
    code = (
        f"import torch; torch.set_num_threads({torch.get_num_threads()})\n"
        "from mmengine.config import Config; from mmengine.runner import Runner\n"
        f"cfg = Config.fromfile({str(dumped)!r}); cfg.work_dir = {str(tmp_path / 'theirs')!r}\n"
        "Runner.from_cfg(cfg).train()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    ours, theirs = (load_checkpoint_file(str(tmp_path / run / "epoch_2.pth")) for run in ("ours", "theirs"))
    assert int(ours["state_dict"]["backbone.training_stage"]) == 2
    assert all(torch.equal(value, theirs["state_dict"][key]) for key, value in ours["state_dict"].items())
    assert ours.keys() == theirs.keys()
