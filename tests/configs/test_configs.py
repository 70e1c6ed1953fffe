"""Every config in ``configs/`` builds, and says what its comments claim."""

import re
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from mmbivit.apis.config import load_config
from mmbivit.distill.taps import check_blocks_match

FOLDER = Path(__file__).parents[2] / "configs"
ALL = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.py") if "_base_" not in path.parts)
COCO = [name for name in ALL if "/" not in name]
TWO_STAGE = [name for name in COCO if "finetune" not in name]


@pytest.fixture
def uninitialised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave new weights as they are in memory: most of the time of building a Swin goes into random numbers."""
    monkeypatch.setattr("mmbivit.models.backbone.trunc_normal_", lambda tensor, std: tensor)
    for layer in (nn.Linear, nn.Conv2d):
        monkeypatch.setattr(layer, "reset_parameters", lambda self: None)


def build(cfg: dict) -> nn.Module:
    from mmdet.registry import MODELS

    init_default_scope("mmdet")
    return MODELS.build(cfg)


@cache
def _read(name: str) -> Config:
    return Config.fromfile(FOLDER / name)


def load(name: str) -> Config:
    return deepcopy(_read(name))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", ALL)
def test_builds_and_every_custom_key_matches_a_parameter(name, uninitialised):
    cfg = load(name)
    model = build(cfg.model)

    names = [parameter for parameter, _ in model.named_parameters()]
    keys = cfg.optim_wrapper.get("paramwise_cfg", {}).get("custom_keys", {})
    if cfg.model.backbone.get("spatial_interaction") is None:
        keys = {key: value for key, value in keys.items() if not key.startswith("si.")}
    keys.pop("attn.attention.", None)  # learned scales, which this recipe has not
    if cfg.model.backbone.recipe not in ("sibivit", "float"):
        keys = {}  # of parts that other recipes have
    assert [key for key in keys if not any(key in parameter for parameter in names)] == []

    for hook in cfg.get("custom_hooks", []):
        if teacher := hook.get("teacher"):
            teacher = build({key: value for key, value in teacher.items() if key != "init_cfg"})
            losses = hook.get("distill_loss")
            if isinstance(losses, dict) and losses.type == "mmbivit.SoftCrossEntropyLoss":
                continue  # which compares logits alone
            check_blocks_match(model.backbone, getattr(teacher, "backbone", teacher))


@pytest.mark.parametrize("recipe", ["sibivit", "reactnet", "bivit", "bit", "bi-vit"])
def test_weight_decay_falls_on_weights_and_biases_only(recipe):
    from mmengine.optim import build_optim_wrapper

    cfg = load("mask_rcnn_sibivit_swin_t.py")
    arch = dict(embed_dims=12, depths=(2, 2, 2, 2), num_heads=(1, 2, 3, 6))
    backbone = build({**cfg.model.backbone, "arch": arch, "recipe": recipe})
    groups = build_optim_wrapper(backbone, cfg.optim_wrapper).optimizer.param_groups

    names = {id(parameter): name for name, parameter in backbone.named_parameters()}
    kinds = {0.05: set(), 0.0: set()}
    for group in groups:
        (parameter,) = group["params"]
        path = names[id(parameter)].split(".")
        kind = "norm" if "norm" in path[-2] else path[-1].removeprefix("relative_position_bias_")
        kinds[group["weight_decay"]].add(kind)
    flat = {"norm", "gamma", "slope", "zeta", "alpha", "table", "value"}  # the last are learned scales
    assert kinds[0.05] == {"weight", "bias"}
    assert kinds[0.0] <= flat and ("value" in kinds[0.0]) == (recipe != "sibivit")


@pytest.mark.parametrize("name", COCO)
def test_schedule_is_the_official_1x(name):
    cfg = load(name)
    optimizer = cfg.optim_wrapper.optimizer

    assert (optimizer.type, optimizer.lr, tuple(optimizer.betas)) == ("AdamW", 1e-4, (0.9, 0.999))
    assert optimizer.weight_decay == 0.05
    assert "momentum" not in optimizer
    assert cfg.train_cfg.max_epochs == 12
    warm_up, steps = cfg.param_scheduler
    end = 1000 if "mmdet" in name else 500
    assert (warm_up.type, warm_up.start_factor, warm_up.end, warm_up.by_epoch) == ("LinearLR", 0.001, end, False)
    assert (steps.milestones, steps.gamma) == ([8, 11], 0.1)
    # The comment says 12 x 7330 iterations; COCO's train2017 has 117266 images with annotations.
    assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size == 16
    assert -(-117266 // 16) == 7330


@pytest.mark.parametrize("name", [name for name in COCO if "retinanet" not in name])
def test_training_pipeline_is_that_of_mmdets_swin(name):
    crop = "1x" if "mmdet" in name else "ms-crop-3x"
    reference = Config.fromfile(mmdet_configs() / "swin" / f"mask-rcnn_swin-t-p4-w7_fpn_{crop}_coco.py")

    ours = load(name).train_dataloader.dataset.pipeline
    assert without_scope(ours) == without_scope(reference.train_dataloader.dataset.pipeline)


# Of the official Swin's configs mask_rcnn_swin_tiny_..._adamw_1x, cascade_mask_rcnn_swin_tiny_..._1x and _small_..._3x.
OFFICIAL_DROP_PATH = {"mask_rcnn_sibivit_swin_t": 0.1, "cascade_mask_rcnn_sibivit_swin_t": 0.0}


@pytest.mark.parametrize("name", [name for name in COCO if "retinanet" not in name and "swin" in name])
def test_drop_path_is_that_of_the_source(name):
    if "mmdet" in name:
        reference = Config.fromfile(mmdet_configs() / "swin" / "mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py")
        expected = reference.model.backbone.drop_path_rate
        ours, theirs = load(name).param_scheduler, reference.param_scheduler
        assert without_scope(ours) == without_scope(theirs)
    else:
        stem = re.sub("(_full|_no_si)?(_finetune)?$", "", name.removesuffix(".py"))
        stem = re.sub("(bireal|bibert|bivit|bi_vit)", "sibivit", stem) if "sibivit" not in stem else stem
        expected = OFFICIAL_DROP_PATH.get(stem, 0.2)
    assert load(name).model.backbone.drop_path_rate == expected


@pytest.mark.parametrize("name", TWO_STAGE)
def test_both_stages_take_six_epochs_and_one_option_sets_every_float_checkpoint(name):
    cfg = load_config(FOLDER / name, float_checkpoint="/some/float.pth")
    (hook,) = cfg.custom_hooks

    assert (hook.switch_epoch, hook.distill_weight) == (6, 1.0)
    assert hook.teacher.init_cfg.checkpoint == "/some/float.pth"
    assert hook.teacher.get("backbone", hook.teacher).arch == cfg.model.backbone.arch
    assert "/some/float.pth" in (cfg.load_from, cfg.model.backbone.get("init_cfg", {}).get("checkpoint"))
    assert "https://" not in str(cfg.to_dict())
    assert cfg.find_unused_parameters is True

    cfg = load_config(FOLDER / name, float_checkpoint="none")
    assert (cfg.load_from, cfg.custom_hooks[0].teacher, cfg.model.backbone.get("init_cfg")) == (None, None, None)


@pytest.mark.parametrize("name", TWO_STAGE)
def test_float_checkpoint_is_a_url_by_default(name, monkeypatch):
    monkeypatch.delenv("MMBIVIT_FLOAT_CHECKPOINT", raising=False)
    cfg = load(name)

    if "swin" not in name:
        assert cfg.float_checkpoint.startswith("timm://")
        return
    assert cfg.float_checkpoint.startswith("https://")
    assert cfg.float_checkpoint.endswith(".pth")
    assert ("small" in cfg.model.backbone.arch) == ("small" in cfg.float_checkpoint or "swin-s" in cfg.float_checkpoint)


@pytest.mark.parametrize("name", [name for name in COCO if "finetune" in name])
def test_finetuning_has_one_stage_and_starts_from_a_backbone(name):
    cfg = load_config(FOLDER / name, backbone_checkpoint="/some/backbone.pth")

    assert (cfg.custom_hooks, cfg.load_from) == ([], None)
    assert cfg.model.backbone.init_cfg == dict(type="Pretrained", checkpoint="/some/backbone.pth", prefix="backbone.")
    with pytest.raises(ValueError, match=r"--float-checkpoint.* does not use a float checkpoint"):
        load_config(FOLDER / name, float_checkpoint="/some/float.pth")


@pytest.mark.parametrize(
    ("name", "millions"),
    # The official Swin's model zoo: 48 M, 86 M, and 107 M for Cascade with Swin-S; mmdet's RetinaNet has 38.5 M.
    [
        ("mask_rcnn_sibivit_swin_t.py", 48),
        ("cascade_mask_rcnn_sibivit_swin_t.py", 86),
        ("cascade_mask_rcnn_sibivit_swin_s.py", 107),
    ],
)
def test_as_float_it_has_the_parameters_of_the_official_detector(name, millions, uninitialised):
    cfg = load(name)
    cfg.model.backbone.update(recipe="float", mlp_ratio=4, spatial_interaction=None)

    assert round(count(build(cfg.model)) / 1e6) == millions


@pytest.mark.parametrize(
    ("name", "float_name"),
    [
        ("mask_rcnn_sibivit_swin_t.py", "mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py"),
        ("mask_rcnn_sibivit_swin_t_no_si.py", "mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py"),
    ],
)
def test_student_starts_from_all_of_mmdets_float_detector(name, float_name):
    float_cfg = Config.fromfile(mmdet_configs() / "swin" / float_name)
    float_cfg.model.backbone.init_cfg = None
    float_state = build(float_cfg.model).state_dict()
    student = build(load(name).model)

    missing, unexpected = student.load_state_dict(float_state, strict=False)

    assert unexpected == []
    assert [key for key in missing if "num_batches_tracked" not in key] == []
    heads = [key for key in float_state if not key.startswith("backbone.")]
    assert len(heads) > 20
    assert all(torch.equal(student.state_dict()[key], float_state[key]) for key in heads)
    own, other = "backbone.stages.0.blocks.0.attn.qkv.weight", "backbone.stages.0.blocks.0.attn.w_msa.qkv.weight"
    assert torch.equal(student.state_dict()[own], float_state[other])


def test_cascade_heads_have_the_keys_of_the_official_checkpoint(uninitialised):
    model = build(load("cascade_mask_rcnn_sibivit_swin_t.py").model)

    keys = set(model.state_dict())
    for head in range(3):
        stem = f"roi_head.bbox_head.{head}"
        convs = {f"{stem}.shared_convs.{i}.{part}" for i in range(4) for part in ("conv.weight", "bn.running_mean")}
        assert convs | {f"{stem}.shared_fcs.0.weight", f"{stem}.fc_cls.weight", f"{stem}.fc_reg.weight"} <= keys
        assert model.roi_head.bbox_head[head].fc_reg.out_features == 4 * 80
        assert f"{stem}.shared_convs.0.conv.bias" not in keys
    assert isinstance(model.roi_head.bbox_head[0].shared_convs[0].bn, nn.SyncBatchNorm)


def mmdet_configs() -> Path:
    import mmdet

    return Path(mmdet.__file__).parent / ".mim" / "configs"


def without_scope(node):
    """The same pipeline without the scopes that ``mmdet::`` adds, and with lists for tuples."""
    if isinstance(node, dict):
        return {key: without_scope(value) for key, value in node.items() if key != "_scope_"}
    return [without_scope(child) for child in node] if isinstance(node, (list, tuple)) else node
