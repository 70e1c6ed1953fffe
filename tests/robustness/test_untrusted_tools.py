"""No tool runs code from a checkpoint, on whichever way it gets there, unless ``--trust-checkpoint`` says so."""

import contextlib
import os
import shutil
from pathlib import Path

import pytest
import torch
from mmengine.runner import CheckpointLoader

from mmbivit.apis import (
    export_onnx,
    export_packed,
    load_config,
    predict,
    train,
    train_config,
    use_safe_loading,
)
from tests.swin_weights import make_timm_swin
from tests.tools.test_tools import call

PRETRAINED = "dict(type='Pretrained', checkpoint='{bad}')"
# Configs that load one more checkpoint than those of tests/tiny.py.
EXTRA = {
    "detector": f"_base_ = '{{detector}}'\nmodel = dict(init_cfg={PRETRAINED})",
    "backbone": f"_base_ = '{{detector}}'\nmodel = dict(backbone=dict(init_cfg={PRETRAINED}))",
    "mmdet's backbone": f"""_base_ = '{{detector}}'
model = dict(backbone=dict(_delete_=True, type='SwinTransformer', embed_dims=8, depths=(1, 1), num_heads=(1, 2),
    strides=(4, 2), out_indices=(0, 1), convert_weights=True, init_cfg={PRETRAINED}))""",
    "classifier": f"_base_ = '{{classifier}}'\nmodel = dict(init_cfg={PRETRAINED})",
    "mmdet's teacher": f"""_base_ = '{{binary}}'
load_from = None
custom_hooks = [dict(type='mmbivit.DecoupledTrainingHook', switch_epoch=1, teacher=dict(type='mmdet.SwinTransformer',
    embed_dims=8, depths=(1, 1), num_heads=(1, 2), strides=(4, 2), out_indices=(0, 1), init_cfg={PRETRAINED}))]""",
    "classifier's teacher": """_base_ = '{binary_classifier}'\nload_from = None""",
}


class MakeFolder:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def trap(tmp_path) -> Path:
    """A folder that nothing may make."""
    return tmp_path / "trap"


@pytest.fixture
def bad(tmp_path, trap) -> Path:
    """A checkpoint with weights of a Swin that makes that folder."""
    path = tmp_path / "bad.pth"
    torch.save(dict(state_dict=make_timm_swin().state_dict(), meta=dict(made=MakeFolder(str(trap)))), path)
    return path


@pytest.fixture(autouse=True)
def _mmengines_loaders(monkeypatch):
    """Start from MMEngine's own loaders, which other tests have replaced."""
    from mmengine.runner import checkpoint

    loaders = {**CheckpointLoader._schemes, "": checkpoint.load_from_local}
    monkeypatch.setattr(CheckpointLoader, "_schemes", loaders)


@pytest.fixture
def places(configs, classifier_configs, coco, image_folders, bad, tmp_path) -> dict[str, str]:
    """What stands for what in command lines and configs."""
    image = next((coco / "val2017").iterdir())
    return dict(
        detector=configs["float"],
        binary=configs["binary"],
        finetune=configs["finetune"],
        classifier=classifier_configs["float"],
        binary_classifier=classifier_configs["binary"],
        bad=bad,
        image=image,
        out=tmp_path / "out",
    )


def words(line: str, places: dict[str, str]) -> list[str]:
    return [word.format(**places) for word in line.split()]


# The rest of each command line is shared; {bad} is named by all of them.
NAMED = {
    "predict.py detector": "{detector} {bad} {image} --out-dir {out} --device cpu",
    "predict.py classifier": "{classifier} {bad} {image} --device cpu",
    "test.py detector": "{detector} {bad}",
    "test.py classifier": "{classifier} {bad}",
    "deployment/export_packed.py detector": "{binary} {bad} {out}/x.safetensors",
    "deployment/export_packed.py classifier": "{binary_classifier} {bad} {out}/x.safetensors",
    "deployment/export_onnx.py": "{classifier} {bad} {out}/x.onnx --size 32 32",
    "model_converters/swin_to_mmbivit.py": "{bad} {out}/x.pth",
    "train.py student": "{binary} --float-checkpoint {bad}",
    "train.py fine-tuned": "{finetune} --backbone-checkpoint {bad}",
    "train.py resumed": "{detector} --resume {bad}",
    "train.py classifier": "{binary_classifier} --float-checkpoint {bad}",
    "train.py options": "{detector} --cfg-options load_from={bad}",
}


def run_tool(monkeypatch, name: str, places: dict, *options: str) -> int:
    """Run a tool on the checkpoint; training and evaluation need a place and a name of their own."""
    tool = name.split()[0]
    line = words(NAMED[name], places)
    if tool in ("train.py", "test.py"):
        given = [] if "--cfg-options" in line else ["--cfg-options"]
        line += [*given, f"experiment_name={Path(places['out']).parent.name}", "--work-dir", str(places["out"])]
    return call(monkeypatch, tool, *line, *options)


@pytest.mark.parametrize("name", NAMED)
def test_tools_refuse_it_in_one_line_and_run_nothing(name, places, bad, trap, monkeypatch, capsys):
    assert run_tool(monkeypatch, name, places) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert str(bad) in error and "is no checkpoint that can be loaded safely" in error
    assert "--trust-checkpoint loads it with any code in it" in error
    assert not trap.exists()


# Detectors need seconds to be built; of each tool but for those, one is enough here.
TRUSTING = [
    name for name in NAMED if "detector" not in name and name.split()[-1] not in ("student", "options", "fine-tuned")
]


@pytest.mark.parametrize("name", TRUSTING)
def test_tools_load_it_where_the_command_line_trusts_it(name, places, bad, trap, monkeypatch):
    warnings = []
    monkeypatch.setattr("mmbivit.checkpoints.safe_loading.print_log", lambda text, *args: warnings.append(text))
    with contextlib.suppress(Exception):  # what is in the file beside code is not of this model
        run_tool(monkeypatch, name, places, "--trust-checkpoint")
    assert trap.is_dir()
    assert len(warnings) == 1
    assert warnings[0].startswith(f"--trust-checkpoint: {bad} is loaded with all that it holds")


def test_a_trusted_checkpoint_is_used(places, bad, trap, monkeypatch):
    assert run_tool(monkeypatch, "model_converters/swin_to_mmbivit.py", places, "--trust-checkpoint") == 0
    assert trap.is_dir()
    loaded = torch.load(places["out"] / "x.pth", weights_only=True)["state_dict"]
    original = make_timm_swin().state_dict()
    assert loaded["backbone.patch_embed.proj.weight"].shape == original["patch_embed.proj.weight"].shape


@pytest.mark.parametrize("kind", EXTRA)
def test_checkpoints_inside_configs_run_nothing(kind, places, bad, trap, tmp_path, monkeypatch):
    config = tmp_path / "config.py"
    config.write_text(EXTRA[kind].format(**places))
    monkeypatch.setenv("MMBIVIT_FLOAT_CHECKPOINT", str(bad))
    cfg = train_config(config, work_dir=str(tmp_path / "work"), cfg_options={"experiment_name": tmp_path.name})
    with pytest.raises(ValueError, match=f"{bad} is no checkpoint that can be loaded safely"):
        train(cfg)
    assert not trap.exists()


@pytest.fixture
def victims(tmp_path) -> list[Path]:
    """Files and a folder of others that nothing may remove."""
    folder = tmp_path / "others"
    folder.mkdir()
    for name in ("best_acc_epoch_1.pth", "epoch_1.pth", "thesis.txt"):
        (folder / name).write_text("precious")
    return [*folder.iterdir(), folder]


@pytest.fixture
def claiming(float_checkpoint, float_classifier, trap, victims, tmp_path):
    """Make checkpoints of weights and plain data, loaded without a question, whose texts would run and remove."""

    def make(kind: str, path: Path) -> Path:
        content = torch.load(float_checkpoint if "detector" in kind else float_classifier, weights_only=False)
        code = f"import os\nos.mkdir({str(trap)!r})"
        content["meta"] |= dict(config=code, cfg=code)
        # The best and the last score so badly that the run's own next one replaces them.
        info = dict(cfg=code, best_score=-1.0, best_ckpt=str(victims[0]), last_ckpt=str(victims[1]))
        content["message_hub"]["runtime_info"] |= info | dict(keep_ckpt_ids=[1, 2, 3])
        torch.save(content, path)
        return path

    return make


CLAIMING = {
    **{name: line for name, line in NAMED.items() if "options" not in name},
    "train.py resumed classifier": "{classifier} --resume {bad}",
    "train.py in the work dir": "{classifier} --resume",
    "analysis_tools/plot.py detector": "balancing {binary} {bad} --out {out}/x.png",
    "analysis_tools/report.py classifier": "{out} --no-eval --images 1",
}
SAVING = "train_cfg.max_epochs={} train_cfg.val_interval=1 default_hooks.checkpoint.interval=1"
SAVING += " default_hooks.checkpoint.max_keep_ckpts=1 default_hooks.checkpoint.save_best=auto"


@pytest.mark.parametrize("name", CLAIMING)
def test_no_tool_runs_or_removes_what_a_checkpoint_names(
    name, places, claiming, bad, trap, victims, float_classifier, monkeypatch
):
    """It is loaded, as it holds no code in pickle's sense; what becomes of the tool depends on the route."""
    is_classifier = "classifier" in name or name in ("deployment/export_onnx.py", "train.py in the work dir")
    claiming("classifier" if is_classifier else "detector", bad)
    succeeds = "resumed" in name or "work dir" in name or "report.py" in name
    options = ["--cfg-options", *SAVING.format(3 if succeeds else 2).split()] if "train.py" in name else []
    if "work dir" in name:
        places["out"].mkdir()
        bad.rename(places["out"] / "epoch_2.pth")
    if "report.py" in name:
        shutil.copytree(float_classifier.parent, places["out"])
        bad.rename(places["out"] / "epoch_2.pth")
    monkeypatch.setitem(NAMED, name, CLAIMING[name])
    code = run_tool(monkeypatch, name, places, *options)
    assert code == 0 if succeeds else code in (0, 1)
    assert not trap.exists()
    assert sorted(victims[-1].iterdir()) == sorted(victims[:-1])
    assert all(path.read_text() == "precious" for path in victims[:-1])


def test_an_inferencer_takes_no_config_out_of_a_checkpoint(claiming, bad, trap):
    from mmdet.apis import DetInferencer

    use_safe_loading()
    with pytest.raises(ValueError, match="Cannot find the config in the checkpoint"):
        DetInferencer(weights=str(claiming("detector", bad)))
    assert not trap.exists()


def test_trust_does_not_reach_files_that_only_the_config_names(places, bad, trap, tmp_path, monkeypatch, capsys):
    named, config = tmp_path / "named.pth", tmp_path / "config.py"
    torch.save(dict(state_dict={}), named)
    config.write_text(EXTRA["backbone"].format(**places))
    options = ["--cfg-options", f"experiment_name={tmp_path.name}", f"load_from={named}", "--trust-checkpoint"]
    assert call(monkeypatch, "train.py", config, "--work-dir", tmp_path / "work", *options) == 1
    assert f"error: {bad} is no checkpoint that can be loaded safely" in capsys.readouterr().err
    assert not trap.exists()


def test_resume_auto_does_not_trust_what_lies_in_the_work_dir(places, bad, trap, tmp_path, monkeypatch):
    work_dir = tmp_path / "work"
    work_dir.mkdir()
    shutil.copy(bad, work_dir / "epoch_1.pth")
    (work_dir / "last_checkpoint").write_text("epoch_1.pth")
    options = ["--resume", "--trust-checkpoint", "--cfg-options", f"experiment_name={tmp_path.name}"]
    assert call(monkeypatch, "train.py", places["detector"], "--work-dir", work_dir, *options) == 1
    assert not trap.exists()


def test_functions_refuse_it_too(places, bad, trap):
    out = places["out"]
    for function in (
        lambda: predict(places["detector"], bad, [places["image"]], out, device="cpu"),
        lambda: predict(places["classifier"], bad, [places["image"]], device="cpu"),
        lambda: export_packed(places["binary"], bad, out / "x.safetensors"),
        lambda: export_onnx(places["classifier"], bad, out / "x.onnx", size=(32, 32)),
    ):
        with pytest.raises(ValueError, match="is no checkpoint that can be loaded safely"):
            function()
        assert not trap.exists()


def test_packed_files_are_never_unpickled(places, bad, trap, tmp_path, monkeypatch, capsys):
    renamed = tmp_path / "bad.safetensors"
    shutil.copy(bad, renamed)
    assert call(monkeypatch, "deployment/predict_packed.py", renamed, places["image"]) == 1
    assert f"error: {renamed} is no packed file" in capsys.readouterr().err
    line = [places["classifier"], renamed, "--work-dir", tmp_path / "work", "--trust-checkpoint"]
    assert call(monkeypatch, "test.py", *line) == 1
    assert f"error: {renamed} is no packed file" in capsys.readouterr().err
    assert not trap.exists()


def test_yaml_is_data(tmp_path, trap):
    config = tmp_path / "config.yaml"
    for attack in (f"a: !!python/object/apply:os.mkdir ['{trap}']", f"!!python/object/new:os.mkdir ['{trap}']: 1"):
        config.write_text(f"model: {{type: x}}\n{attack}\n")
        with pytest.raises(ValueError, match=r"config.yaml cannot be read: ConstructorError: .*python/object"):
            load_config(config)
        (tmp_path / "child.json").write_text('{"_base_": "./config.yaml"}')
        with pytest.raises(ValueError, match=r"child.json cannot be read: ConstructorError"):
            load_config(tmp_path / "child.json")
    assert not trap.exists()
    config.write_text("model: {type: x, size: !!python/tuple [1, 2]}\n")  # which MMEngine writes itself
    assert load_config(config).model.size == (1, 2)
