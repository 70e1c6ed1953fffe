"""Reading configs."""

import os

import pytest

from mmbivit.apis.config import load_config, set_work_dir

FLOAT = "MMBIVIT_FLOAT_CHECKPOINT"


def checkpoints(cfg):
    teacher = cfg.custom_hooks[0].teacher
    return cfg.float_checkpoint, cfg.load_from, teacher and teacher.init_cfg.checkpoint


def test_float_checkpoint_goes_to_student_and_teacher_and_leaves_the_environment_alone(configs, monkeypatch):
    monkeypatch.delenv(FLOAT, raising=False)
    assert checkpoints(load_config(configs["binary"])) == ("https://unreachable.invalid/float.pth",) * 3
    assert checkpoints(load_config(configs["binary"], float_checkpoint="a/b.pth")) == ("a/b.pth",) * 3
    assert checkpoints(load_config(configs["binary"], float_checkpoint="https://x/y.pth")) == ("https://x/y.pth",) * 3
    assert checkpoints(load_config(configs["binary"], float_checkpoint="none")) == (None,) * 3
    assert FLOAT not in os.environ

    monkeypatch.setenv(FLOAT, "from_environment.pth")
    assert checkpoints(load_config(configs["binary"])) == ("from_environment.pth",) * 3
    assert checkpoints(load_config(configs["binary"], float_checkpoint="a.pth")) == ("a.pth",) * 3
    assert os.environ[FLOAT] == "from_environment.pth"


def test_checkpoint_option_for_a_config_without_one_is_an_error(configs):
    with pytest.raises(ValueError, match=r"--float-checkpoint: config .*tiny_float.py does not use a float checkpoint"):
        load_config(configs["float"], float_checkpoint="a.pth")
    with pytest.raises(ValueError, match=r"--backbone-checkpoint: config .*tiny_binary.py does not use a backbone"):
        load_config(configs["binary"], backbone_checkpoint="a.pth")
    assert load_config(configs["float"], float_checkpoint="none").load_from is None


def test_bad_paths_and_options_are_named(configs, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config no/such.py does not exist"):
        load_config("no/such.py")
    (tmp_path / "model.pth").touch()
    with pytest.raises(ValueError, match=r"model.pth is not a config file"):
        load_config(tmp_path / "model.pth")
    (tmp_path / "broken.py").write_text("model = dict(\n")
    with pytest.raises(ValueError, match=r"broken.py cannot be read: SyntaxError"):
        load_config(tmp_path / "broken.py")
    (tmp_path / "orphan.py").write_text("_base_ = './no_such_base.py'\n")
    with pytest.raises(FileNotFoundError, match=r"no_such_base.py"):
        load_config(tmp_path / "orphan.py")
    with pytest.raises(ValueError, match="--cfg-options do not fit"):
        load_config(configs["binary"], {"custom_hooks.5.switch_epoch": 1})


def test_cfg_options_change_dicts_and_lists(configs):
    options = {"custom_hooks.0.switch_epoch": 3, "model.backbone.with_cp": True}
    cfg = load_config(configs["binary"], options)
    assert cfg.custom_hooks[0].switch_epoch == 3
    assert cfg.custom_hooks[0].type == "mmbivit.DecoupledTrainingHook"
    assert cfg.model.backbone.with_cp is True


def test_work_dir_is_option_then_config_then_name(configs):
    cfg = load_config(configs["float"])
    set_work_dir(cfg, None)
    assert cfg.work_dir == os.path.join("work_dirs", "tiny_float")
    set_work_dir(cfg, None)
    cfg.work_dir = "from_config"
    set_work_dir(cfg, None)
    assert cfg.work_dir == "from_config"
    set_work_dir(cfg, "from_option")
    assert cfg.work_dir == "from_option"
