"""Values of a config that MMEngine would only stumble over in the middle of a run."""

import re

import pytest
from mmengine.config import Config

from mmbivit.apis import evaluate, train, train_config
from mmbivit.engine.run_settings import check_run_settings

NAN, INF = float("nan"), float("inf")
RIGHT = dict(
    train_dataloader=dict(batch_size=1, num_workers=0, dataset={}),
    val_dataloader=dict(dataset={}),
    train_cfg=dict(type="EpochBasedTrainLoop", max_epochs=1e2, val_interval=1, val_begin=0),
    val_cfg=dict(fp16=True),
    optim_wrapper=dict(
        type="OptimWrapper",
        accumulative_counts=2,
        optimizer=dict(type="SGD", lr=0, momentum=0.9, weight_decay=None),
        clip_grad=dict(max_norm=INF, norm_type=2),
    ),
    param_scheduler=[
        dict(type="LinearLR", start_factor=0.1, begin=0, end=10),
        dict(type="MultiStepLR", milestones=[1, 2], gamma=0.1),
        dict(type="CosineAnnealingLR", T_max=None, eta_min=0),
    ],
    default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=-1, max_keep_ckpts=3)),
    auto_scale_lr=dict(enable=False, base_batch_size=16),
    randomness=dict(seed=2**32 - 1),
    log_processor=dict(window_size=10),
)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("train_dataloader.batch_size", ("x", 0, -1, 1.5, True)),
        ("train_dataloader.num_workers", ("x", -1, 1.5)),
        ("val_dataloader.num_workers", (-1,)),
        ("train_cfg.max_epochs", ("x", 0, -1, None, NAN)),
        ("train_cfg.max_iters", ("x", 0)),
        ("train_cfg.val_interval", ("x", 0, -1, None)),
        ("train_cfg.val_begin", ("x", -1, None)),
        ("val_cfg.fp16", ("x", 1)),
        ("optim_wrapper.accumulative_counts", ("x", 0, None)),
        ("optim_wrapper.optimizer.lr", ("fast", -1, NAN, [1])),
        ("optim_wrapper.optimizer.momentum", ("x", -1)),
        ("optim_wrapper.optimizer.weight_decay", ("x", -1)),
        ("optim_wrapper.clip_grad.max_norm", ("x", 0, -1, None, NAN)),
        ("optim_wrapper.clip_grad", (5, dict(max_nrom=1), dict(type="value", max_norm=1))),
        ("param_scheduler[0].start_factor", ("x", 0)),
        ("param_scheduler[0].begin", ("x", -1)),
        ("param_scheduler[0].end", ("x", 0)),
        ("param_scheduler[1].milestones", ("x", ["x"])),
        ("param_scheduler[1].gamma", ("x",)),
        ("param_scheduler[2].T_max", ("x", 0)),
        ("param_scheduler[2].eta_min", ("x",)),
        ("default_hooks.checkpoint.interval", ("x", -2, None)),
        ("default_hooks.checkpoint.max_keep_ckpts", ("x", -2)),
        ("default_hooks.checkpoint.filename_tmpl", (5,)),
        ("auto_scale_lr.base_batch_size", ("x", 0)),
        ("randomness.seed", ("x", -1, 2**32, 1.5, True)),
        ("log_processor.window_size", ("x", 0)),
    ],
)
def test_a_wrong_value_is_named(key, values):
    *path, last = re.findall(r"\w+", key)
    for value in values:
        cfg = Config(RIGHT)
        part = cfg
        for name in path:
            part = part[int(name) if name.isdigit() else name]
        part[last] = value
        with pytest.raises(ValueError) as caught:
            check_run_settings(cfg, ["train", "val"])
        assert str(caught.value).startswith(key) and "\n" not in str(caught.value), value


def test_right_values_pass():
    check_run_settings(Config(RIGHT), ["train", "val", "test"])
    check_run_settings(Config(RIGHT | dict(param_scheduler=None)), ["train"])


@pytest.mark.parametrize("key", ["train_dataloader", "train_cfg", "optim_wrapper"])
def test_training_needs_three_parts(key):
    with pytest.raises(ValueError, match=f"no {key}"):
        check_run_settings(Config(RIGHT | {key: None}), ["train"])
    check_run_settings(Config(RIGHT | {key: None}), ["test"])


def test_tools_check_before_they_read_data(classifier_configs, tmp_path):
    with pytest.raises(ValueError, match="^--seed=-1; allowed: an integer from 0 to"):
        train_config(classifier_configs["float"], work_dir=str(tmp_path), seed=-1)
    cfg = train_config(classifier_configs["float"], work_dir=str(tmp_path), data_root="no/such/folder")
    cfg.train_cfg.val_interval = 0
    cfg.test_dataloader.num_workers = -1
    with pytest.raises(ValueError, match="train_cfg.val_interval=0"):
        train(cfg)
    with pytest.raises(ValueError, match="test_dataloader.num_workers=-1"):
        evaluate(cfg)
