"""Options of training, checkpoints it starts from, and a run through both stages."""

import os
import shutil
import signal
import sys
import urllib.error
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from mmbivit.apis import train, train_config
from mmbivit.apis.checkpoints import fetch_checkpoints
from mmbivit.checkpoints import load_checkpoint_file, use_safe_loading
from mmbivit.engine import ThroughputHook
from tests.analysis.logs import logged

OURS = Path(__file__).parents[2] / "configs"
EMA = dict(type="EMAHook", ema_type="ExponentialMovingAverage", interval=1, update_buffers=True)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty cache of torch.hub."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub"


def differences(base: Config, changed: Config) -> set[str]:
    return {key for key in {*base, *changed} if base.get(key) != changed.get(key)}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(work_dir="x"), {"work_dir": "x"}),
        (dict(seed=3), {"randomness": {"seed": 3}}),
        (dict(auto_scale_lr=True), {"auto_scale_lr": {"enable": True, "base_batch_size": 16}}),
        (dict(cfg_options={"find_unused_parameters": True}), {"find_unused_parameters": True}),
        (dict(ema=0.1), {"custom_hooks": [EMA | dict(momentum=0.1)]}),
    ],
)
def test_option_changes_its_part_of_the_config_only(configs, options, expected):
    base, cfg = train_config(configs["float"]), train_config(configs["float"], **options)

    assert differences(base, cfg) == set(expected)
    assert {key: cfg[key] for key in expected} == expected


def test_without_options_the_config_is_as_written(configs):
    cfg = train_config(configs["float"])
    assert differences(Config.fromfile(configs["float"]), cfg) == {"work_dir", "launcher"}
    assert (cfg.work_dir, cfg.launcher) == (os.path.join("work_dirs", "tiny_float"), "none")


@pytest.mark.parametrize(
    ("package", "value", "backend"),
    [
        ("tensorboard", True, dict(type="TensorboardVisBackend")),
        ("wandb", "p", dict(type="WandbVisBackend", init_kwargs=dict(project="p", name="tiny_float"))),
    ],
)
def test_logs_go_to_one_more_place(configs, monkeypatch, package, value, backend):
    monkeypatch.setattr(sys.modules["mmbivit.apis.train"], "find_spec", lambda name: name)
    local = dict(type="LocalVisBackend")
    assert train_config(configs["float"], **{package: value}).visualizer.vis_backends == [local, backend]
    without = {"visualizer": None}
    cfg = train_config(configs["float"], cfg_options=without, **{package: value})
    assert cfg.visualizer == dict(type="Visualizer", vis_backends=[local, backend])

    monkeypatch.setattr(sys.modules["mmbivit.apis.train"], "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"--{package} needs the package {package}: pip install {package}"):
        train_config(configs["float"], **{package: value})


def test_accumulated_gradients_count_as_one_batch(configs):
    cfg = train_config(configs["float"], accumulate=4, ema=0.1, auto_scale_lr=True)
    wrapper = train_config(configs["float"]).optim_wrapper
    assert cfg.optim_wrapper == dict(**wrapper, accumulative_counts=4)
    assert cfg.auto_scale_lr == dict(enable=True, base_batch_size=16 / 4)
    assert cfg.custom_hooks == [EMA | dict(momentum=0.1, interval=4)]
    for count in (0, -1):
        with pytest.raises(ValueError, match=f"--accumulate={count}; allowed"):
            train_config(configs["float"], accumulate=count)


def test_ema_keeps_other_hooks_and_an_ema_of_the_config(configs):
    cfg = train_config(configs["binary"], ema=0.1)
    assert [hook.type for hook in cfg.custom_hooks] == ["mmbivit.DecoupledTrainingHook", "EMAHook"]
    own = [dict(type="EMAHook", momentum=0.5)]
    assert train_config(configs["float"], ema=0.1, cfg_options={"custom_hooks": own}).custom_hooks == own
    for momentum in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match=f"--ema {momentum}; allowed: more than 0 and less than 1"):
            train_config(configs["float"], ema=momentum)


def test_auto_scale_lr_needs_the_base_batch_size(configs):
    with pytest.raises(ValueError, match="--auto-scale-lr needs auto_scale_lr"):
        train_config(configs["float"], auto_scale_lr=True, cfg_options={"auto_scale_lr": None})


@pytest.mark.parametrize(
    ("amp", "expected"),
    [
        (True, dict(loss_scale="dynamic")),
        ("fp16", dict(loss_scale="dynamic", dtype="float16")),
        ("bf16", dict(loss_scale=dict(enabled=False), dtype="bfloat16")),
    ],
)
def test_amp_on_gpus(configs, monkeypatch, amp, expected):
    monkeypatch.setattr("mmbivit.engine.device.get_device", lambda: "cuda")
    options = {"optim_wrapper.paramwise_cfg": dict(flat_decay_mult=0.0), "optim_wrapper.clip_grad": dict(max_norm=1)}
    plain = train_config(configs["float"], accumulate=2, cfg_options=options).optim_wrapper
    wrapper = train_config(configs["float"], amp=amp, accumulate=2, cfg_options=options).optim_wrapper
    assert wrapper == plain | expected | dict(type="AmpOptimWrapper")
    kept = train_config(configs["float"], amp=True, cfg_options={"optim_wrapper.dtype": "bfloat16"}).optim_wrapper
    assert kept.dtype == "bfloat16"


def test_bf16_on_gpus_makes_the_step_of_plain_training(configs, monkeypatch):
    from mmengine.optim import build_optim_wrapper

    monkeypatch.setattr("mmbivit.engine.device.get_device", lambda: "cuda")
    monkeypatch.setattr("mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available", lambda: True)
    layers, wrappers = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)], []
    layers[1].load_state_dict(layers[0].state_dict())
    for layer, amp in zip(layers, (False, "bf16"), strict=True):
        options = {"optim_wrapper.clip_grad": dict(max_norm=0.1)}
        cfg = train_config(configs["float"], amp=amp, accumulate=2, cfg_options=options)
        wrappers.append(build_optim_wrapper(layer, cfg.optim_wrapper))
        for scale in (1.0, 2.0):
            wrappers[-1].update_params(layer(scale * torch.ones(1, 2)).square().sum())
    assert wrappers[1].cast_dtype == torch.bfloat16
    torch.testing.assert_close(layers[1].weight, layers[0].weight, rtol=0, atol=0)
    wrappers[1].load_state_dict(wrappers[1].state_dict())  # as a resumed run does


def test_amp_on_cpus(configs, monkeypatch):
    monkeypatch.setattr("mmbivit.engine.device.get_device", lambda: "cpu")
    options = {"optim_wrapper.loss_scale": 512.0, "optim_wrapper.dtype": "float16"}
    for amp in (True, "bf16"):
        wrapper = train_config(configs["float"], amp=amp, cfg_options=options).optim_wrapper
        assert wrapper.type == "mmbivit.CpuAmpOptimWrapper"
        assert not {"loss_scale", "dtype"} & wrapper.keys()
    with pytest.raises(ValueError, match="--amp fp16 needs a GPU"):
        train_config(configs["float"], amp="fp16")
    with pytest.raises(ValueError, match="--amp fp8; allowed: fp16, bf16"):
        train_config(configs["float"], amp="fp8")


def test_launcher_on_gpus_leaves_the_config_alone(monkeypatch):
    monkeypatch.setattr("mmbivit.engine.device.get_device", lambda: "cuda")
    name = OURS / "cascade_mask_rcnn_sibivit_swin_t.py"
    cfg = train_config(name, launcher="slurm")
    assert differences(train_config(name), cfg) == {"launcher", "custom_hooks"}
    assert cfg.env_cfg.dist_cfg.backend == "nccl"


def test_launcher_on_cpus_takes_gloo_and_keeps_sync_bn(monkeypatch):
    monkeypatch.setattr("mmbivit.engine.device.get_device", lambda: "cpu")
    cfg = train_config(OURS / "cascade_mask_rcnn_sibivit_swin_t.py", launcher="pytorch")

    assert cfg.env_cfg.dist_cfg.backend == "gloo"
    wrapper = dict(type="mmbivit.CpuDistributedDataParallel", device_ids=None, broadcast_buffers=False)
    assert cfg.model_wrapper_cfg == dict(**wrapper, find_unused_parameters=True)
    assert [head.norm_cfg.type for head in cfg.model.roi_head.bbox_head] == ["SyncBN"] * 3
    with pytest.raises(ValueError, match="--launcher slurm needs a GPU"):
        train_config(OURS / "mask_rcnn_sibivit_swin_t.py", launcher="slurm")


def test_resume(configs, tmp_path):
    checkpoint = tmp_path / "epoch_1.pth"
    config, option = configs["binary"], dict(work_dir=str(tmp_path))

    # Nothing to resume: as without the option, with the weights that the config starts from.
    cfg = train_config(config, resume="auto", **option)
    assert (cfg.resume, cfg.load_from) == (False, cfg.float_checkpoint)
    with pytest.raises(FileNotFoundError, match=r"--resume: checkpoint .*epoch_1.pth does not exist"):
        train_config(config, resume=str(checkpoint), **option)

    hub = dict(log_scalars={}, runtime_info={}, resumed_keys={})
    content = dict(state_dict={}, optimizer={}, message_hub=hub, meta=dict(epoch=1, iter=4))
    torch.save(content, checkpoint)
    (tmp_path / "last_checkpoint").write_text(str(checkpoint))
    for resume in ("auto", str(checkpoint)):
        cfg = train_config(config, resume=resume, **option)
        assert (cfg.resume, cfg.load_from) == (True, str(checkpoint))


@pytest.mark.parametrize("place", ["before_train_iter", "before_run"])
def test_a_signal_ends_a_run_with_its_number_and_what_it_has(classifier_configs, tmp_path, monkeypatch, place):
    def end(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ThroughputHook, place, end)
    before = signal.getsignal(signal.SIGTERM)
    options = {"experiment_name": tmp_path.name}
    cfg = train_config(classifier_configs["float"], work_dir=str(tmp_path), cfg_options=options)
    with pytest.raises(SystemExit) as stop:
        train(cfg)
    assert stop.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
    assert [path.name for path in tmp_path.glob("*.pth")] == ["interrupted.pth"] * (place == "before_train_iter")


def test_data_root_reaches_datasets_and_metrics(configs):
    cfg = train_config(configs["float"], data_root="elsewhere")
    assert cfg.train_dataloader.dataset.data_root == cfg.val_dataloader.dataset.data_root == "elsewhere"
    assert Path(cfg.val_evaluator.ann_file) == Path("elsewhere/annotations/instances_val2017.json")


def test_missing_float_checkpoint_is_one_line_with_the_option(configs):
    cfg = train_config(configs["binary"], float_checkpoint="no/such.pth")
    with pytest.raises(
        FileNotFoundError, match=r"no/such.pth does not exist; give the float.* --float-checkpoint FILE"
    ):
        fetch_checkpoints(cfg)


def test_unreachable_float_checkpoint_names_url_and_option(configs, hub, monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(FileNotFoundError) as error:
        fetch_checkpoints(train_config(configs["binary"]))
    assert "https://unreachable.invalid/float.pth" in str(error.value)
    assert "--float-checkpoint FILE" in str(error.value)
    assert "\n" not in str(error.value)


def test_url_is_downloaded_once_and_used_by_student_and_teacher(configs, hub, monkeypatch):
    calls = []

    def download(url, path, *args, **kwargs):
        calls.append(url)
        Path(path).write_bytes(b"weights")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    cfg = train_config(configs["binary"])
    fetch_checkpoints(cfg)

    local = str(hub / "checkpoints" / "float.pth")
    assert calls == ["https://unreachable.invalid/float.pth"]
    assert (cfg.load_from, cfg.custom_hooks[0].teacher.init_cfg.checkpoint) == (local, local)


def test_finetuning_without_a_backbone_names_the_option(configs, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no pretrained backbone is given; .* --backbone-checkpoint FILE"):
        fetch_checkpoints(train_config(configs["finetune"]))
    with pytest.raises(FileNotFoundError, match=r"missing.pth does not exist; .* --backbone-checkpoint FILE"):
        fetch_checkpoints(train_config(configs["finetune"], backbone_checkpoint="missing.pth"))

    file = tmp_path / "backbone.pth"
    file.touch()
    cfg = train_config(configs["finetune"], backbone_checkpoint=str(file))
    fetch_checkpoints(cfg)
    assert cfg.model.backbone.init_cfg.checkpoint == str(file)


def test_other_schemes_are_left_to_mmengine():
    cfg = Config(dict(load_from="torchvision://resnet50", model=dict(backbone=dict(init_cfg=None))))
    fetch_checkpoints(cfg)
    assert cfg.load_from == "torchvision://resnet50"


def test_missing_data_is_found_before_the_model_is_built(configs, monkeypatch):
    cfg = train_config(configs["float"], data_root="no/such/folder")
    cfg.model.type = "NoSuchModel"
    with pytest.raises(FileNotFoundError, match="no/such/folder"):
        train(cfg)


def test_safe_loading_refuses_code(tmp_path):
    from mmengine.runner.checkpoint import CheckpointLoader

    torch.save(dict(state_dict={}, evil=os.system), tmp_path / "evil.pth")
    use_safe_loading()
    with pytest.raises(ValueError, match=r"evil.pth is no checkpoint that can be loaded safely"):
        CheckpointLoader.load_checkpoint(str(tmp_path / "evil.pth"), map_location="cpu")


@pytest.mark.parametrize("amp", [False, True])
def test_both_stages_with_log_memory_eta_and_event_file(configs, float_checkpoint, tmp_path, amp):
    model = train(
        train_config(
            configs["binary"],
            work_dir=str(tmp_path),
            float_checkpoint=str(float_checkpoint),
            tensorboard=True,
            seed=0,
            amp=amp,
            cfg_options={"experiment_name": tmp_path.name},
        )
    )

    assert model.backbone.stage == 2
    steps = logged(tmp_path, "loss")
    assert [step["epoch"] for step in steps] == [1, 1, 2, 2]
    assert ["loss_distill" in step for step in steps] == [True, True, False, False]
    assert all(50 < step["memory"] < 20000 for step in steps)
    assert all(step["images_per_s"] > 0 for step in steps)
    assert list(tmp_path.glob("*/vis_data/events.out.tfevents.*"))
    (log,) = tmp_path.glob("*/*.log")
    assert "eta: " in log.read_text()
    # The run started from the float detector: after four small steps the heads are still near it.
    start = torch.load(float_checkpoint, weights_only=False)["state_dict"]["roi_head.bbox_head.fc_cls.weight"]
    assert (model.roi_head.bbox_head.fc_cls.weight - start).abs().max() < 4 * 1.1e-3


def test_amp_on_the_cpu_computes_in_bfloat16(configs):
    from mmengine.optim import build_optim_wrapper

    layer = torch.nn.Linear(2, 2)
    wrapper = build_optim_wrapper(layer, dict(type="mmbivit.CpuAmpOptimWrapper", optimizer=dict(type="SGD", lr=0.1)))
    with wrapper.optim_context(layer):
        assert layer(torch.ones(1, 2)).dtype == torch.bfloat16
    assert layer(torch.ones(1, 2)).dtype == torch.float32


@pytest.mark.slow
def test_a_resumed_detector_equals_one_without_interruption(configs, float_checkpoint, tmp_path):
    """With random flips, RoI sampling and stochastic depth, and a worker in the second run; across the switch."""

    def run(name, **kwargs):
        pipeline = [
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PackDetInputs"),
        ]
        options = {
            "experiment_name": f"{tmp_path.name}_{name}",
            "train_dataloader.dataset.pipeline": pipeline,
            "model.backbone.drop_path_rate": 0.5,
            "train_cfg.val_interval": 9,
            "default_hooks.checkpoint.max_keep_ckpts": 2,
        }
        cfg = train_config(
            configs["binary"],
            work_dir=str(tmp_path / name),
            seed=3,
            ema=0.1,
            float_checkpoint=str(float_checkpoint),
            cfg_options=options | kwargs.pop("options", {}),
            **kwargs,
        )
        train(cfg)
        return load_checkpoint_file(str(tmp_path / name / "epoch_2.pth"))

    whole = run("whole")
    (tmp_path / "resumed").mkdir()
    shutil.copy(tmp_path / "whole" / "epoch_1.pth", tmp_path / "resumed" / "epoch_1.pth")
    resumed = run("resumed", resume="auto", options={"train_dataloader.num_workers": 1})
    for key in ("state_dict", "ema_state_dict"):
        assert whole[key].keys() == resumed[key].keys()
        assert [name for name, value in whole[key].items() if not torch.equal(value, resumed[key][name])] == []
    assert int(whole["state_dict"]["backbone.training_stage"]) == 2
