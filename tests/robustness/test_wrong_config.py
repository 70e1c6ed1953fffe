"""Wrong settings of everything that users configure: refused when it is built, in one line that names the key."""

import re

import pytest
import torch
from mmengine.registry import DATA_SAMPLERS, HOOKS, METRICS, MODELS, TRANSFORMS, DefaultScope
from mmengine.runner import Runner
from torch import nn

from mmbivit.apis import user_errors
from mmbivit.apis.config import load_config
from mmbivit.checks import check_keys, check_number, did_you_mean
from mmbivit.distill.taps import check_blocks_match
from mmbivit.models import BinarySwinTransformer
from tests.engine.toy import make_runner
from tests.tools.test_tools import call

NAN, INF = float("nan"), float("inf")
ARCH = dict(embed_dims=8, depths=(1, 1), num_heads=(1, 2))
BACKBONE = dict(type="mmbivit.BinarySwinTransformer", arch=ARCH, out_indices=(1,))
CLASSIFIER = dict(type="mmbivit.ImageClassifier", num_classes=3, backbone=BACKBONE)
PREPROCESSOR = dict(type="mmbivit.ClassificationPreprocessor", num_classes=3)
NOT_INTEGERS = ("4", True, None, 2.5, NAN, INF, [4], {})
NOT_NUMBERS = ("0.5", True, None, NAN, [0.5], {})
NOT_FLAGS = ("False", None, 0, 1, [])
NOT_DICTS = (5, "x", [1], True)


def cases(key: str, values: tuple, **others: object) -> list[tuple[dict, str]]:
    """Each value for a key, alone or in nested dicts (``arch.depths``), with the name that the message has to have."""
    made = []
    for value in values:
        setting = value
        for name in reversed(key.split(".")[1:]):
            setting = {name: setting}
        made.append(({**others, key.partition(".")[0]: setting}, key))
    return made


def arch(key: str, values: tuple) -> list[tuple[dict, str]]:
    return [(dict(arch=ARCH | {key: value}), f"arch.{key}") for value in values]


BACKBONE_CASES = [
    *cases("arch", ("huge", "tiny ", 5, None, [8], dict(embed_dims=8), ARCH | dict(depth=1), True)),
    *arch("embed_dims", (*NOT_INTEGERS, 0, -8, 10**9)),
    *arch(
        "depths", (2, "11", None, (), (0, 1), (-1, 1), (1.5, 1), (True, 1), (1, "1"), (1, NAN), (10**9, 1), (1,) * 9)
    ),
    *arch("num_heads", (2, "12", None, (), (0, 1), (3, 2), (1.0, 1), (True, 2), (1, 5), (1,), (16, 16))),
    *cases("recipe", ("sibvit", "", 5, None, [], True, dict(nrom="ln"))),
    *cases("recipe.base", ("x", None, ["sibivit"], 1)),
    *cases("recipe.norm", ("gn", None, ["ln"], 1)),
    *cases("recipe.linear", ("ternary", True)),
    *cases("recipe.mask_padding", (*NOT_FLAGS, "x")),
    *cases("recipe.downsample", ("ternary", None, True)),
    *cases("recipe.input_quantizer", ("rsign", 1)),
    *cases("recipe.sign_ste", ("square", None, 1)),
    *cases("recipe.weight_center", ("column", None, 1)),
    *cases("mask_padding", ("False", 0, 1, [], "x")),
    *cases("downsample", ("ternary", True, [])),
    *cases("spatial_interaction", (True, 1.0, "on", {}, dict(ratios=1), dict(ratio=1, x=1), [1])),
    *cases("spatial_interaction.ratio", (*NOT_NUMBERS, 0, -1, 0.001, 1e9, INF)),
    *cases("spatial_interaction.axis", ("tokens", 1, None, True), spatial_interaction=dict(ratio=1.0)),
    *cases("spatial_interaction.per", ("row", 1, None), spatial_interaction=dict(ratio=1.0)),
    *cases("spatial_interaction.alpha_init", (*NOT_NUMBERS, 1e9, INF), spatial_interaction=dict(ratio=1.0)),
    *cases("stage1", ("both", 1, [])),
    *cases("training_stages", (1, "attn", {}, [1], [dict(weight=True)], [dict(weights="attn")], [dict(weights=["x"])])),
    *cases("mlp_ratio", (*NOT_NUMBERS, 0, -1, INF, 1e30, 10**9, 1.3, 0.01)),
    *cases("pretrain_img_size", (*NOT_INTEGERS, 0, -4, 10**9, (224,), (224, "x"), (1, 2, 3))),
    *cases("in_channels", (*NOT_INTEGERS, 0, -3, 10**9)),
    *cases("patch_size", (*NOT_INTEGERS, 0, -4, 10**9)),
    *cases("window_size", (*NOT_INTEGERS, 0, -7, 10**9)),
    *cases("out_indices", (0, None, "01", (), (2,), (-1,), (0.0,), (True,), (0, 0), (1, 0), {})),
    *cases("frozen_stages", ("0", True, None, 1.5, NAN, -2, 3)),
    *cases("qk_scale", ("x", True, 0, -1, NAN, INF, [1])),
    *[
        case
        for key in ("drop_rate", "attn_drop_rate", "drop_path_rate")
        for case in cases(key, (*NOT_NUMBERS, -0.1, 1, 1.5, INF))
    ],
    *[
        case
        for key in ("qkv_bias", "patch_norm", "use_abs_pos_embed", "with_cp")
        + ("shift_single_window", "convert_weights", "norm_eval")
        for case in cases(key, NOT_FLAGS)
    ],
    *cases("init_cfg", ("x.pth", {}, [], 5, dict(type="Pretrained"), dict(checkpoint="x"))),
    *cases("init_cfg.type", ("Kaiming", "pretrained", None)),
    *cases("init_cfg", (dict(type="Pretrained", checkpoint="x", prefx="backbone."),)),
    *[
        (dict(init_cfg=dict(type="Pretrained") | change), key)
        for change, key in (
            (dict(checkpoint=5), "init_cfg.checkpoint"),
            (dict(checkpoint=""), "init_cfg.checkpoint"),
            (dict(checkpoint="x", prefix=5), "init_cfg.prefix"),
        )
    ],
]

CLASSIFIER_CASES = [
    *cases("num_classes", (*NOT_INTEGERS, 1, 0, -1, 10**12)),
    *cases("topk", (*NOT_INTEGERS, 0, -1)),
    *cases("label_smoothing", (*NOT_NUMBERS, -0.1, 1, 2)),
    *cases("drop_rate", (*NOT_NUMBERS, -0.1, 1, 2)),
    *cases("backbone", (*NOT_DICTS, None, dict(type="mmdet.ResNet", depth=18))),
    *cases("data_preprocessor", NOT_DICTS),
    *cases("init_cfg", ("x.pth", dict(type="Kaiming"), dict(type="Pretrained"))),
]

PREPROCESSOR_CASES = [
    *cases("mean", (None, 5, "abc", [], [0.5], [0.5] * 2, [NAN] * 3, ["a"] * 3, [123.7, 0.5, 0.5], [True] * 3)),
    *cases("std", (None, 5, "abc", [], [0.2], [0.2] * 2, [NAN] * 3, [0.2, 0.2, 0], [-1] * 3, [58.4] * 3)),
    *cases("mixup", (*NOT_DICTS, dict(mixup_alfa=1), dict(num_classes=3), dict(mixup_alpha=0))),
    *cases("mixup.mixup_alpha", ("1", True, NAN, -1, INF)),
    *cases("mixup.cutmix_alpha", ("1", NAN, -1)),
    *cases("mixup.cutmix_minmax", (5, (0.5,), (0.5, 2), ("a", "b"))),
    *cases("mixup.prob", ("1", NAN, -1, 2)),
    *cases("mixup.switch_prob", ("1", NAN, -1, 5)),
    *cases("mixup.mode", ("half", None, 1)),
    *cases("mixup.correct_lam", ("no", 1)),
    *cases("num_classes", ("3", True, 2.5, 0, -3, NAN), mixup={}),
    *cases("random_erasing", (*NOT_DICTS, dict(prob=1), dict(device="cpu"))),
    *cases("random_erasing.probability", ("a", NAN, -1, 2)),
    *cases("random_erasing.mode", ("pixels", 5)),
    *cases("random_erasing.min_area", ("a", 5, NAN)),
    *cases("random_erasing.min_count", ("a", 0, 1.5)),
    *cases("random_erasing.max_count", ("a", 0)),
    *cases("label_smoothing", (*NOT_NUMBERS, -1, 1), mixup={}),
    *cases("non_blocking", NOT_FLAGS),
]

HOOK_CASES = [
    *cases("switch_epoch", ("1", 0, -1, 1.5, True, NAN, [2, 1], [1, "2"])),
    *cases("switch_iter", ("1", 0, -1, 1.5, True, NAN)),
    *cases("distill_weight", (*NOT_NUMBERS, -1, INF), switch_epoch=1),
    *cases("distill_loss", (*NOT_DICTS, {}, dict(normalize=True)), switch_epoch=1),
    *cases("reset_lr", NOT_FLAGS, switch_epoch=1),
    *cases("reset_optimizer", NOT_FLAGS, switch_epoch=1),
    *cases("teacher", (*NOT_DICTS, {}, dict(init_cfg=dict(checkpoint="x.pth"))), switch_epoch=1),
    *cases("teacher.init_cfg", (*NOT_DICTS, None, {}, dict(checkpoint="x", strict=1)), switch_epoch=1),
]
for setting, key in HOOK_CASES:
    if key == "teacher.init_cfg":
        setting["teacher"]["type"] = "mmbivit.BinarySwinTransformer"

TRANSFORM_CASES = [
    *cases("input_size", (*NOT_INTEGERS, 0, -4, 10**9, (224,), (1, 2, 3), (0, 4))),
    *cases("is_training", NOT_FLAGS),
    *cases("crop_pct", ("a", True, NAN, 0, -0.5, 1.5)),
    *cases("crop_mode", ("x", 1)),
    *cases("hflip", ("a", True, NAN, -1, 5), is_training=True),
    *cases("scale", (0.5, "a", (2, 1), (0, 1), (NAN, 1), ("a", 1), (1,)), is_training=True),
    *cases("ratio", (1, (1, 0.5), (-1, 1)), is_training=True),
]

SAMPLER_CASES = [
    *cases("num_repeats", (*NOT_NUMBERS, 0, 0.5, 1e12)),
    *cases("selected_round", (*NOT_INTEGERS, -1)),
    *cases("selected_ratio", (*NOT_NUMBERS, -1, INF)),
    *cases("shuffle", NOT_FLAGS),
    *cases("seed", ("1", 1.5, -1, True)),
]

OTHER_CASES = [
    *[(HOOKS, dict(type="mmbivit.DecoupledTrainingHook", **setting), key) for setting, key in HOOK_CASES],
    *[(HOOKS, dict(type="mmbivit.NonFiniteHook", **setting), key) for setting, key in (
        cases("max_skipped", (*NOT_INTEGERS, -1))
    )],
    *[(TRANSFORMS, dict(type="mmbivit.TimmTransform", **setting), key) for setting, key in TRANSFORM_CASES],
    *[(DATA_SAMPLERS, dict(type="mmbivit.RepeatAugSampler", dataset=range(512), **setting), key)
      for setting, key in SAMPLER_CASES],
    *[(METRICS, dict(type="mmbivit.TopKAccuracy", **setting), key) for setting, key in (
        *cases("topk", (5, "1", None, (), (0,), (-1,), ("1",), (1.5,), (NAN,), (True,))),
        *cases("collect_device", ("tpu", None, 1)),
    )],
    *[(MODELS, dict(type="mmbivit.BlockMSELoss", **setting), key) for setting, key in cases("normalize", NOT_FLAGS)],
]  # fmt: skip

TABLE = [
    *((MODELS, {**BACKBONE, "out_indices": (0, 1), **setting}, key) for setting, key in BACKBONE_CASES),
    *((MODELS, {**CLASSIFIER, **setting}, key) for setting, key in CLASSIFIER_CASES),
    *((MODELS, {**PREPROCESSOR, **setting}, key) for setting, key in PREPROCESSOR_CASES),
    *OTHER_CASES,
]


def test_every_wrong_value_is_refused_when_it_is_built():
    """One test of some 550 cases, as each takes a millisecond."""
    wrong = []
    for registry, cfg, key in TABLE:
        before = repr(cfg)
        try:
            registry.build(cfg)
            wrong.append(f"{cfg} is accepted")
        except ValueError as error:
            message, (first, *_) = str(error), key.split(".")
            if "\n" in message or len(message) > 400 or (key not in message and not message.startswith(first)):
                wrong.append(f"{cfg}: {message}")
            if not re.search("allowed|expected|needs|divide|whole|leaves|mixes|one entry", message):
                wrong.append(f"{cfg} does not say what is allowed: {message}")
        except Exception as error:
            wrong.append(f"{cfg}: {type(error).__name__}: {error}")
        assert repr(cfg) == before
    assert not wrong, "\n".join(wrong)
    assert len(TABLE) > 500


def test_the_same_settings_are_accepted_where_they_are_right():
    """The table is of wrong values, not of keys that are refused anyway."""
    rights = dict(
        mlp_ratio=3, recipe=dict(base="float", norm="bn"), spatial_interaction=dict(ratio=0.5), stage1="weights"
    )
    rights |= dict(
        pretrain_img_size=[64, 32], in_channels=1, patch_size=2, window_size=4, frozen_stages=1, qk_scale=0.5
    )
    rights |= dict(drop_rate=0, attn_drop_rate=0.5, drop_path_rate=0.99, use_abs_pos_embed=True, norm_eval=True)
    rights |= dict(init_cfg=dict(type="Pretrained", checkpoint="x.pth", prefix=None), out_indices=range(2))
    assert BinarySwinTransformer(arch=ARCH, **rights)(torch.zeros(2, 1, 16, 16))[1].shape == (2, 16, 4, 4)
    MODELS.build({**CLASSIFIER, "topk": 100, "label_smoothing": 0.0, "init_cfg": None})
    mixup = dict(cutmix_minmax=[0.2, 0.8], prob=1, mode="elem", correct_lam=False)
    MODELS.build(
        {**PREPROCESSOR, "mixup": mixup, "random_erasing": dict(probability=1, max_count=None), "std": [1] * 3}
    )


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (dict(type="mmbivit.BinarySwinTransfomer"), "not in the .*; did you mean 'mmbivit.BinarySwinTransformer'"),
        (dict(type="BinarySwinTransformer"), "not in the .*; did you mean 'mmbivit.BinarySwinTransformer'?"),
        (dict(type="zzzz"), "zzzz is not in the .* registry: check its spelling"),
        (BACKBONE | dict(archh="tiny"), r"argument 'archh'; allowed: arch, recipe, .*; did you mean 'arch'\?"),
        (CLASSIFIER | dict(num_class=3), r"'num_class'; allowed: .*; did you mean 'num_classes'\?"),
        (dict(type="mmbivit.ImageClassifier", backbone=BACKBONE), "missing 1 required .*: 'num_classes'"),
        (dict(type="mmdet.SwinTransformer", embed_dim=96), r"'embed_dim'.*; did you mean 'embed_dims'\?"),
        (dict(backbone=BACKBONE), "must contain the key \"type\""),
        (dict(type=5), "type must be a str or valid type"),
    ],
)  # fmt: skip
def test_unknown_types_and_keys_are_one_line_through_the_tools(cfg, message, capsys):
    with pytest.raises(SystemExit), user_errors(), DefaultScope.overwrite_default_scope("mmdet"):
        MODELS.build(cfg)
    error = capsys.readouterr().err
    assert re.match("error: .*" + message, error) and error.count("\n") == 1, error


def test_an_unknown_key_of_a_data_loader_is_one_line(capsys):
    loader = dict(dataset=[1, 2], sampler=dict(type="DefaultSampler", shuffle=False), batchsize=3)
    with pytest.raises(SystemExit), user_errors():
        Runner.build_dataloader(loader)
    assert re.match(r"error: DataLoader.* unexpected keyword argument 'batchsize'", capsys.readouterr().err)


class Defective:
    """A part whose own code has the defects that look most like a wrong config."""

    def __init__(self, how: str):
        if how == "key":
            {}["is not in the registry. Please check"]
        if how == "value":
            float("x")
        if how == "layer":
            nn.Linear("x", "y")
        (lambda: None)(**{how: 1})


@pytest.mark.parametrize(
    ("how", "error"), [("key", KeyError), ("argument", TypeError), ("value", ValueError), ("layer", TypeError)]
)
def test_defects_inside_a_part_keep_their_traceback(how, error):
    MODELS.register_module(module=Defective, force=True)
    try:
        with pytest.raises(error), user_errors():
            MODELS.build(dict(type="Defective", how=how))
    finally:
        del MODELS.module_dict["Defective"]


HOOK = dict(type="mmbivit.DecoupledTrainingHook", switch_epoch=1)
TEACHER = dict(type="mmbivit.BinarySwinTransformer", arch=ARCH, recipe="float")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (dict(switch_epoch=None), "switch_epoch"),
        (dict(switch_iter=3), "exactly one of switch_epoch and switch_iter"),
        (dict(distill_weight=-1), "distill_weight"),
        (dict(teacher=TEACHER), "teacher.init_cfg"),
    ],
)
def test_wrong_settings_of_the_two_stages(setting, message):
    with pytest.raises(ValueError, match=message):
        HOOKS.build({**HOOK, **setting})


@pytest.mark.parametrize(
    "switch", [dict(switch_epoch=2), dict(switch_epoch=9), dict(switch_epoch=0), dict(switch_iter=0)]
)
def test_a_switch_before_the_start_or_after_the_end_stops_before_the_first_iteration(tmp_path, switch):
    name = next(iter(switch))
    with pytest.raises(ValueError, match=rf"{name}={switch[name]}.*; allowed: "):
        make_runner(tmp_path, switch, length=2).train()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(embed_dims=16), "first stages.0.blocks.0: channels of the student 8, of the teacher 16"),
        (dict(depths=(2, 1)), "first stages.0.blocks.1: channels of the student no such block, of the teacher 8"),
        (
            dict(depths=(1,), num_heads=(1,)),
            "first stages.1.blocks.0: channels of the student 16, of the teacher no",
        ),
    ],
)
def test_a_teacher_of_other_blocks_is_named(change, message):
    student = BinarySwinTransformer(arch=ARCH, out_indices=(0,))
    teacher = BinarySwinTransformer(arch=ARCH | change, recipe="float", out_indices=(0,))
    with pytest.raises(ValueError, match=message):
        check_blocks_match(student, teacher)
    check_blocks_match(student, BinarySwinTransformer(arch=ARCH, recipe="float", out_indices=(0,)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modle.backbone.recipe": "float"}, "--cfg-options modle.backbone.recipe: neither .*; did you mean 'model'?"),
        ({"load_form": "x.pth"}, "has 'load_form'; did you mean 'load_from'?"),
        ({"zzz": 1}, "neither config .* nor MMEngine's runner has 'zzz'$"),
        ({"train_dataloader.sampler": "x"}, "train_dataloader.sampler is 'x', expected a dict"),
        ({"train_dataloader.dataset.pipeline": 5}, "train_dataloader.dataset.pipeline is 5, expected a list"),
        ({"train_dataloader.dataset.pipeline": ["x"]}, "train_dataloader.dataset.pipeline is .* expected a list"),
        ({"model": 5}, "model is a int, expected a dict"),
        ({"model": None}, "has no model"),
        ({"model.backbone": "tiny"}, "'tiny' is where the config of a backbone or a hook belongs"),
        ({"custom_hooks": 5}, "custom_hooks is a int, expected a list"),
        ({"custom_hooks": ["x"]}, "'x' is where the config of a backbone or a hook belongs"),
        ({"custom_hooks.0": 7}, "--cfg-options do not fit|7 is where the config"),
        ({"custom_hooks.9.switch_epoch": 1}, "--cfg-options do not fit"),
        ({"model.type.x": 1}, "--cfg-options do not fit"),
        ({"train_dataloader": [1]}, "train_dataloader is a list, expected a dict"),
        ({"val_dataloader.dataset": None}, "val_dataloader.dataset is missing, or no dict"),
        ({"load_from": 5}, "load_from is a int, expected a str"),
        ({"work_dir": True}, "work_dir is a bool, expected a str"),
        ({"optim_wrapper": "AdamW"}, "optim_wrapper is a str, expected a dict"),
        ({"test_evaluator": "x"}, "test_evaluator is a str, expected a dict or list"),
        ({"resume": "yes"}, "resume is a str, expected a bool"),
        ({"randomness": 3}, "randomness is a int, expected a dict"),
    ],
)
def test_options_that_do_not_fit_are_refused(classifier_configs, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_config(classifier_configs["binary"], options)
    assert "\n" not in str(caught.value)


def test_known_options_that_the_config_does_not_set_pass(classifier_configs):
    cfg = load_config(classifier_configs["float"], {"randomness.seed": 1, "sync_bn": "torch", "work_dir": "w"})
    assert (cfg.randomness.seed, cfg.sync_bn, cfg.work_dir) == (1, "torch", "w")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no model"),
        ("model = 5", "model is a int, expected a dict"),
        ("raise SystemExit(0)", "cannot be read: SystemExit"),
        ("model = dict(", "cannot be read: SyntaxError"),
        ("model = dict(type=undefined)", "cannot be read: NameError"),
        ("from math import no_such_name\nmodel = no_such_name()", "cannot be read: "),
        ("_base_ = './no_such_base.py'", "cannot be read: .*no_such_base.py"),
        ("model = dict(type='x')\ntrain_dataloader = dict(batch_size=1)", "train_dataloader.dataset is missing"),
    ],
)
def test_broken_configs_are_one_line(tmp_path, text, message):
    (tmp_path / "config.py").write_text(text)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        load_config(tmp_path / "config.py")
    assert "\n" not in str(caught.value) and str(tmp_path / "config.py") in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "model.backbone.recipe=flaot",
            "'bit', 'bi-vit'; did you mean 'float'?",
        ),
        ("model.backbone.recipee=float", "unexpected keyword argument 'recipee'; allowed: arch, "),
        ("model.backbone.mlp_ratio=1.3", "mlp_ratio=1.3 times 8 channels is 10.4, not a whole positive width"),
        ("model.backbone.arch.num_heads=3,2", "arch.num_heads[0]=3 does not divide the 8 channels of stage 0"),
        ("model.backbone.type=mmbivit.Swin", "mmbivit.Swin is not in the "),
        ("model.topk=five", "topk='five'; allowed: an integer"),
        ("optim_wrapper.optimizer.lrr=1", "unexpected keyword argument 'lrr'"),
        ("train_dataloader.batchsize=1", "unexpected keyword argument 'batchsize'"),
        ("train_dataloader.sampler.type=NoSampler", "NoSampler is not in the "),
        ("train_cfg.max_epoch=1", "unexpected keyword argument 'max_epoch'"),
    ],
)
def test_tools_print_one_line(monkeypatch, capsys, classifier_configs, tmp_path, options, message):
    line = ["--work-dir", tmp_path, "--cfg-options", options, f"experiment_name={tmp_path.name}"]
    assert call(monkeypatch, "train.py", classifier_configs["float"], *line) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in error


def test_messages_stay_short_and_on_one_line():
    with pytest.raises(ValueError) as caught:
        check_number("key", "a\nb" * 1000, 0, 1)
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"^key has no key 5; allowed: a, b$"):
        check_keys("key", {"a": 1, 5: 1}, ("a",), ("b",))
    assert did_you_mean("recipe", ["recipes", 5]) == "; did you mean 'recipes'?"
    assert did_you_mean(5, ["recipes"]) == did_you_mean("x", ["recipes"]) == ""
