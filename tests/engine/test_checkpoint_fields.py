"""What a checkpoint says beside its weights reaches a resumed run as it should be, or stops it in one line."""

import copy
import functools

import numpy as np
import pytest
import torch

from mmbivit.apis import use_safe_loading
from mmbivit.checkpoints import drop_configs, load_checkpoint_file
from mmbivit.engine.checkpoint_fields import why_not_resumable

from .toy import make_runner

EMA = dict(type="EMAHook", ema_type="ExponentialMovingAverage", momentum=0.1)
SCHEDULER = [dict(type="LinearLR", start_factor=0.5, by_epoch=False, begin=0, end=6)]
HOOKS = [dict(type="mmbivit.ResumableTrainingHook"), EMA]
CHECKPOINT = dict(type="mmbivit.AtomicCheckpointHook", by_epoch=False, interval=3, max_keep_ckpts=2)


def run(work_dir, **kwargs):
    """A run that accumulates two iterations and is saved after three."""
    options = dict(
        length=6, optim=dict(accumulative_counts=2), hooks=HOOKS, checkpoint=CHECKPOINT, param_scheduler=SCHEDULER
    )
    return make_runner(work_dir, None, by_epoch=False, **options | kwargs)


@functools.cache
def saved_in(folder):
    run(folder).train()
    return load_checkpoint_file(str(folder / "iter_3.pth"))


@pytest.fixture
def saved(tmp_path_factory):
    """A checkpoint with every field that MMEngine and our hooks write."""
    use_safe_loading()
    return copy.deepcopy(saved_in(tmp_path_factory.getbasetemp() / "saved"))


def put(checkpoint, place, value):
    *path, last = place.split("/")
    for key in path:
        checkpoint = checkpoint[int(key) if key.isdecimal() else key]
    checkpoint[last] = value


def resume(folder, checkpoint):
    torch.save(checkpoint, folder / "x.pth")
    runner = run(folder / "run", load_from=str(folder / "x.pth"), resume=True)
    runner.train()
    return runner


def test_a_whole_checkpoint_is_resumed(saved, tmp_path):
    assert why_not_resumable(saved) is None
    assert set(saved) == {
        *("meta", "state_dict", "message_hub", "optimizer", "param_schedulers"),
        *("ema_state_dict", "accumulated_gradients", "resumable_training"),
    }
    assert resume(tmp_path, saved).iter == 6


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("meta", []),
        ("meta/epoch", "1"),
        ("meta/iter", 2.5),
        ("meta/iter", -1),
        ("meta/iter", True),
        ("meta/iter", 10**9),
        ("meta/seed", "x"),
        ("meta/seed", -1),
        ("meta/dataset_meta", "coco"),
        ("message_hub", {}),
        ("message_hub/log_scalars", []),
        ("message_hub/log_scalars", {"train/\x1b[2J": 1}),
        ("message_hub/resumed_keys", dict(seed="no")),
        ("message_hub/runtime_info", None),
        ("message_hub/runtime_info/keep_ckpt_ids", ["../../x"]),
        ("message_hub/runtime_info/keep_ckpt_ids", 3),
        ("message_hub/runtime_info/best_score", "high"),
        ("message_hub/runtime_info/best_ckpt", 5),
        ("message_hub/runtime_info/best_ckpt_acc", ["x"]),
        ("message_hub/runtime_info/eta", "soon"),
        ("state_dict/head.weight", torch.zeros(2, 2)),
        ("state_dict/head.weight", None),
        ("state_dict/other.weight", torch.zeros(1)),
        ("optimizer", [1]),
        ("optimizer/state", 0),
        ("optimizer/state/0", [1]),
        ("optimizer/state/0/exp_avg", "x"),
        ("optimizer/state/1/exp_avg_sq", None),
        ("optimizer/state/1/exp_avg_sq", torch.zeros(7, 7)),
        ("optimizer/state/1/step", [1]),
        ("optimizer/param_groups/0/weight_decay", None),
        ("optimizer/param_groups", []),
        ("optimizer/param_groups/0/lr", "x"),
        ("optimizer/param_groups/0/betas", (0.9,)),
        ("optimizer/param_groups/0/params", [0]),
        ("param_schedulers", {}),
        ("param_schedulers", [1]),
        ("param_schedulers/0/last_step", "x"),
        ("param_schedulers/0/param_name", "betas"),
        ("ema_state_dict", dict(a=1)),
        ("ema_state_dict/module.head.weight", torch.zeros(7)),
        ("ema_state_dict/module.unknown", torch.zeros(7)),
        ("accumulated_gradients", dict(a=1)),
        ("accumulated_gradients/head.weight", torch.zeros(7)),
        ("resumable_training", dict(iterations_per_epoch=0)),
        ("resumable_training", dict(iterations_per_epoch="x", images_per_iteration=2)),
    ],
    ids=str,
)
def test_a_field_of_a_wrong_type_is_one_line_that_names_it(saved, tmp_path, place, value):
    put(saved, place, value)
    with pytest.raises(ValueError) as caught:
        resume(tmp_path, saved)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'x.pth'} cannot be resumed: ") and "\n" not in message
    assert ".".join(place.split("/")[:2]) in message or value == 10**9


@pytest.mark.parametrize("keep", ["state_dict", "state_dict meta", "state_dict meta message_hub"])
def test_weights_alone_are_called_so(saved, tmp_path, keep):
    with pytest.raises(ValueError, match=r"x.pth cannot be resumed: it holds weights .*no .*optimizer.*load_from"):
        resume(tmp_path, {key: saved[key] for key in keep.split()})


def test_optimizer_and_schedulers_get_no_foreign_attributes(saved, tmp_path):
    saved["optimizer"]["base_param_settings"] = 1
    saved["param_schedulers"][0] |= dict(step="x", _get_value=1)
    (scheduler,) = resume(tmp_path, saved).param_schedulers
    assert callable(scheduler.step) and not {"step", "_get_value"} & vars(scheduler).keys()


def test_checkpoints_of_older_versions_of_torch_are_resumed(saved, tmp_path):
    """They lack a flag of the optimizer."""
    del saved["optimizer"]["param_groups"][0]["fused"]
    saved["message_hub"]["runtime_info"]["eta"] = np.float64(3.5)
    assert resume(tmp_path, saved).iter == 6


def test_texts_that_mmengine_runs_are_dropped_on_every_load(saved):
    info = saved["message_hub"]["runtime_info"]
    info["cfg"] = saved["meta"]["cfg"] = saved["meta"]["config"] = "raise SystemExit"
    dropped = drop_configs(saved)
    assert dropped is saved and not {"cfg", "config"} & (saved["meta"].keys() | info.keys())
    assert saved["meta"]["iter"] == 3
    for odd in ({}, dict(meta=3, message_hub=[]), dict(message_hub=dict(runtime_info="x"))):
        assert drop_configs(copy.deepcopy(odd)) == odd


def test_the_hook_drops_them_also_with_mmengines_own_loader(saved, tmp_path):
    saved["meta"]["config"] = f"import os\nos.mkdir({str(tmp_path / 'trap')!r})"
    resume(tmp_path, saved)
    assert not (tmp_path / "trap").exists()
