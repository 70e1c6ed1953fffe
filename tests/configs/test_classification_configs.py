"""The classification configs train as the paper says (SI-BiViT 4.1.2)."""

import math
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS
from torch import nn

from mmbivit.apis.config import load_config
from tests.configs.test_configs import FOLDER, build, load

NAMES = [path.relative_to(FOLDER).as_posix() for path in sorted((FOLDER / "classification").glob("*imagenet*.py"))]
TWO_STAGE = [name for name in NAMES if "float" not in name]
TAUGHT = [name for name in TWO_STAGE if "weights_first" not in name]
TINY_ARCH = dict(embed_dims=12, depths=(2, 2, 2, 2), num_heads=(1, 2, 3, 6))


def learning_rates(cfg: Config, epoch_length: int) -> list[float]:
    """The rate of every iteration, by MMEngine's own schedulers and the reset of DecoupledTrainingHook."""
    switches = [hook.switch_epoch * epoch_length for hook in cfg.custom_hooks if hook.get("reset_lr")]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cfg.optim_wrapper.optimizer.lr)
    schedulers = []
    for entry in cfg.param_scheduler:
        options = dict(entry)
        name = options.pop("type")
        assert options.pop("convert_to_iter_based")
        cls = PARAM_SCHEDULERS.get(name)
        schedulers.append(cls.build_iter_from_epoch(optimizer=optimizer, epoch_length=epoch_length, **options))
    rates = []
    for iteration in range(cfg.train_cfg.max_epochs * epoch_length):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if iteration + 1 in switches:
            optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["initial_lr"]
        for scheduler in schedulers:
            scheduler.step()
    return rates


def test_both_data_sets_have_the_same_variants():
    variants = [{name.replace("_tiny", "") for name in NAMES if ("tiny_" in name) == tiny} for tiny in (True, False)]
    assert variants[0] == variants[1]
    assert len(variants[0]) == 6


@pytest.mark.parametrize("name", NAMES)
def test_optimizer_and_epochs(name):
    cfg = load(name)

    assert cfg.optim_wrapper.optimizer.type == "AdamW"
    assert cfg.optim_wrapper.optimizer.weight_decay == (0.05 if "float" in name else 2e-5)
    assert cfg.train_cfg.max_epochs == 300
    # DeiT's linear rule for the batch of all GPUs, which --auto-scale-lr starts from.
    batch = cfg.auto_scale_lr.base_batch_size
    assert batch == 8 * cfg.train_dataloader.batch_size
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(5e-4 * batch / 512)
    assert cfg.model.num_classes == (200 if "tiny_" in name else 1000)


@pytest.mark.parametrize("name", [name for name in NAMES if "sibivit" in name])
def test_what_carries_the_papers_name_mixes_the_grid_with_float_merging(name):
    backbone = load(name).model.backbone
    mixing = backbone.spatial_interaction
    if "windows" in name:
        assert (mixing.axis, backbone.downsample) == ("window", "binary")
    else:
        assert backbone.downsample == "float"
        assert mixing is None or (mixing.axis, mixing.ratio, backbone.pretrain_img_size) == ("grid", 1.0, 224)
    assert backbone.mlp_ratio == (4 if mixing is None else 3)


@pytest.mark.parametrize("name", TWO_STAGE)
def test_stage_2_begins_as_a_run_of_its_own_with_warm_up_and_cosine(name):
    cfg = load(name)
    per_epoch = 4
    rates = learning_rates(cfg, per_epoch)

    def cosine(share: float) -> float:
        return 1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * share)) / 2

    (hook,) = cfg.custom_hooks
    assert (hook.switch_epoch, hook.reset_lr, hook.reset_optimizer) == (150, True, True)
    stages = rates[: 150 * per_epoch], rates[150 * per_epoch :]
    for stage in stages:
        assert stage[0] == pytest.approx(1e-6)
        assert stage[5 * per_epoch] == pytest.approx(1e-3)
        assert stage[77 * per_epoch + 2] == pytest.approx(cosine((77.5 - 5) / 145))
        assert stage[-1] < 1.01e-5


def test_float_rate_falls_once():
    rates = learning_rates(load("classification/swin_t_imagenet_float.py"), 4)

    assert rates[20] == pytest.approx(1e-3)
    assert all(earlier >= later for earlier, later in zip(rates[20:], rates[21:], strict=False))


@pytest.mark.parametrize("name", ["sibivit_swin_t_imagenet", "swin_t_imagenet_float"])
def test_only_matrices_decay(name):
    cfg = load(f"classification/{name}.py")
    model = build({**cfg.model, "backbone": {**cfg.model.backbone, "arch": TINY_ARCH}})
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    decay = cfg.optim_wrapper.optimizer.weight_decay
    groups = {
        names[id(parameter)]: g["weight_decay"] for g in wrapper.optimizer.param_groups for parameter in g["params"]
    }
    assert groups.keys() == set(names.values())
    layers = ("qkv", "attn.proj", "fc1", "fc2", "reduction", "patch_embed.proj", "head")
    decaying = {name for name, value in groups.items() if value}
    assert decaying == {name for name in groups if name.endswith(tuple(f"{layer}.weight" for layer in layers))}
    assert {groups[name] for name in decaying} == {decay}
    kinds = {name.rsplit(".", 1)[1] for name in groups.keys() - decaying}
    binary_only = {"gamma", "slope", "zeta", "alpha"} if "sibivit" in name else set()
    assert kinds == {"weight", "bias", "relative_position_bias_table"} | binary_only


@pytest.mark.parametrize("name", TAUGHT)
def test_one_option_sets_teacher_and_start(name):
    cfg = load_config(FOLDER / name, float_checkpoint="/some/float.pth")

    teacher = cfg.custom_hooks[0].teacher
    assert teacher.init_cfg.checkpoint == "/some/float.pth"
    assert teacher.backbone.arch == cfg.model.backbone.arch
    assert teacher.num_classes == cfg.model.num_classes
    assert "/some/float.pth" in (cfg.load_from, (cfg.model.backbone.get("init_cfg") or {}).get("checkpoint"))
    assert "timm://" not in str(cfg.to_dict())

    cfg = load_config(FOLDER / name, float_checkpoint="none")
    assert (cfg.load_from, cfg.custom_hooks[0].teacher, cfg.model.backbone.get("init_cfg")) == (None, None, None)


@pytest.mark.parametrize("name", TAUGHT)
def test_the_default_teacher_is_a_swin_that_timm_has(name, monkeypatch):
    import timm

    monkeypatch.delenv("MMBIVIT_FLOAT_CHECKPOINT", raising=False)
    cfg = load(name)
    if "tiny_imagenet" in name:  # a network of Tiny-ImageNet, which is trained first
        assert (
            cfg.load_from == f"work_dirs/{'swin_s' if 'swin_s' in name else 'swin_t'}_tiny_imagenet_float/epoch_300.pth"
        )
        cfg = load("classification/swin_t_tiny_imagenet_float.py")
        assert cfg.load_from is None and cfg.model.backbone.init_cfg.checkpoint == cfg.float_checkpoint
        name = "swin_t"
    file = cfg.float_checkpoint

    assert file.startswith("timm://")
    assert file.removeprefix("timm://") in timm.list_pretrained()
    assert ("small" in file) == ("swin_s" in name)


@pytest.mark.parametrize("name", [name for name in NAMES if "weights_first" in name])
def test_the_papers_baseline_order_has_no_teacher(name):
    cfg = load(name)

    assert cfg.model.backbone.stage1 == "weights"
    assert (cfg.model.backbone.spatial_interaction, cfg.model.backbone.mlp_ratio) == (None, 4)
    assert (cfg.custom_hooks[0].teacher, cfg.load_from, cfg.model.backbone.get("init_cfg")) == (None, None, None)


def test_augmentation_is_that_of_deit():
    cfg = load("classification/sibivit_swin_t_imagenet.py")
    (transform,) = cfg.train_dataloader.dataset.pipeline
    preprocessor = cfg.model.data_preprocessor

    assert (transform.auto_augment, transform.interpolation) == ("rand-m9-mstd0.5-inc1", "bicubic")
    assert preprocessor.mixup == dict(mixup_alpha=0.8, cutmix_alpha=1.0)
    assert preprocessor.random_erasing == dict(probability=0.25, mode="pixel")
    assert cfg.model.label_smoothing == 0.1
    assert cfg.val_dataloader.dataset.pipeline[0].crop_pct == 224 / 256


def test_every_data_hint_names_a_tool():
    for name in NAMES:
        if hint := load(name).get("data_hint"):
            assert (Path(FOLDER).parent / hint.split()[1]).is_file()
