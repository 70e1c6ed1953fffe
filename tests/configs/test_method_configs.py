"""Configs of the other methods: each is built and takes a step in each of its stages, and has its paper's values."""

import re

import pytest
import torch
from mmengine.optim import build_optim_wrapper

from mmbivit.binary import RECIPES
from mmbivit.distill import Distiller
from mmbivit.engine.decoupled_training_hook import DecoupledTrainingHook
from tests.configs.test_configs import FOLDER, build, load

METHODS = ("bireal", "reactnet", "bibert", "bivit", "bit", "bi_vit")
NAMES = [path.relative_to(FOLDER).as_posix() for path in sorted((FOLDER / "classification" / "methods").glob("*.py"))]
VIT_NAMES = [
    path.relative_to(FOLDER).as_posix()
    for folder in ("vit", "nest")
    for path in sorted((FOLDER / "classification" / folder).glob("*.py"))
]
TINY = {
    "mmbivit.BinarySwinTransformer": dict(arch=dict(embed_dims=8, depths=(1, 2), num_heads=(1, 2)), out_indices=(1,)),
    "mmbivit.BinaryNesT": dict(arch=dict(embed_dims=8, depths=(1, 1), num_heads=(1, 2)), out_indices=(1,)),
    "mmbivit.BinaryVisionTransformer": dict(arch=dict(embed_dims=16, depths=(2,), num_heads=(2,)), patch_size=8),
}


def test_every_method_has_both_data_sets_with_and_without_spatial_interaction():
    ends = [f"{data}{si}" for data in ("imagenet", "tiny_imagenet") for si in ("", "_no_si")]
    assert set(NAMES) == {f"classification/methods/{method}_swin_t_{end}.py" for method in METHODS for end in ends}
    assert {method.replace("_", "-") for method in METHODS} | {"sibivit", "float"} == set(RECIPES)


@pytest.mark.parametrize("name", [*NAMES, *(name for name in VIT_NAMES if not name.endswith("float.py"))])
def test_it_takes_a_step_in_each_stage(name):
    cfg = load(name)
    torch.manual_seed(0)
    backbone = cfg.model.backbone
    assert (backbone.mlp_ratio, backbone.spatial_interaction is None) in ((3, False), (4, True))
    assert (backbone.spatial_interaction is None) == name.endswith("no_si.py")
    recipe = backbone.recipe if isinstance(backbone.recipe, str) else backbone.recipe["base"]
    assert recipe.replace("-", "_") == re.split("_swin|_vit_[tsb]_|_deit|_nest", name.split("/")[-1])[0]
    tiny = dict(TINY[backbone.type], pretrain_img_size=32)
    model = build({**cfg.model, "backbone": {**backbone, **tiny}}).train()
    options = {key: value for key, value in cfg.custom_hooks[0].items() if key not in ("type", "teacher")}
    hook = DecoupledTrainingHook(**options)
    assert len(hook.switches) + 1 == model.backbone.last_stage
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    teacher = cfg.custom_hooks[0].teacher
    if teacher is not None:
        inner = {**teacher.backbone, **tiny}
        if "window_size" in backbone:
            inner["window_size"] = backbone.window_size
        teacher = build(dict(type=teacher.type, num_classes=teacher.num_classes, backbone=inner))
    for stage in range(1, model.backbone.last_stage + 1):
        model.backbone.set_stage(stage)
        distiller = None
        if teacher is not None:
            distiller = Distiller(model, model.backbone, teacher, hook.terms, hook.task_weights[stage - 1])
        inputs = dict(inputs=torch.randn(2, 3, 32, 32), labels=torch.tensor([1, 5]))
        losses = model(**inputs, mode="loss")
        assert {term.log_name for term in hook.terms if teacher is not None} <= set(losses)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        wrapper.update_params(sum(losses.values()))
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        if distiller is not None:
            distiller.remove()


# Of papers that state how they train ViTs: optimizer, rate, decay, batch; weights of distillation and of the task.
STATED = {
    "bireal": ("timm.optim.Lamb", 5e-4, 0.0, 512, {"loss_distill_hard": 0.5}, 0.5),  # Bi-ViT 5.1
    "bi_vit": ("timm.optim.Lamb", 5e-4, 0.0, 512, {"loss_distill_hard": 0.5, "loss_distill_ranking": 10.0}, 0.5),
    "reactnet": ("Adam", 5e-4, 0.0, 512, {"loss_distill_logits": 1.0}, 0.0),  # BinaryViT, Appendix A
}


@pytest.mark.parametrize("method", STATED)
def test_values_that_papers_state(method):
    cfg = load(f"classification/methods/{method}_swin_t_imagenet.py")
    optimizer, (schedule,) = cfg.optim_wrapper.optimizer, cfg.param_scheduler
    hook = DecoupledTrainingHook(**{k: v for k, v in cfg.custom_hooks[0].items() if k not in ("type", "teacher")})
    weights = {term.log_name: term.weight for term in hook.terms}
    found = (optimizer.type, optimizer.lr, optimizer.weight_decay, cfg.auto_scale_lr.base_batch_size, weights)
    assert (*found, hook.task_weights[0]) == STATED[method]
    assert cfg.train_dataloader.batch_size * 8 == 512
    # 300 epochs without warm-up.
    assert (schedule.type, schedule.begin, schedule.end, cfg.train_cfg.max_epochs) == ("CosineAnnealingLR", 0, 300, 300)


def test_reactnet_has_crops_and_flips_alone():
    cfg = load("classification/methods/reactnet_swin_t_imagenet.py")
    (transform,) = cfg.train_dataloader.dataset.pipeline
    preprocessor = cfg.model.data_preprocessor
    assert transform.get("auto_augment") is None and transform.color_jitter is None
    assert (preprocessor.mixup, preprocessor.random_erasing, cfg.model.backbone.drop_path_rate) == (None, None, 0.0)


def test_bivits_rate_falls_once():
    (hook,) = load("classification/methods/bivit_swin_t_imagenet.py").custom_hooks
    assert (hook.switch_epoch, hook.reset_lr, hook.reset_optimizer) == ([150], False, True)
