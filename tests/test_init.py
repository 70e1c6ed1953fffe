"""The package's entry: light, with configs that are found, and helpful where something is missing."""

import subprocess
import sys

import pytest

import mmbivit


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_importing_mmbivit_is_light():
    heavy = "('torch', 'mmengine', 'mmcv', 'mmdet', 'timm', 'matplotlib', 'numpy')"
    result = run(f"import sys, mmbivit; print([name for name in {heavy} if name in sys.modules])")
    assert result.stdout.strip() == "[]", result.stderr


def test_missing_mmdetection_is_explained_on_first_use():
    code = (
        "import importlib.metadata as m, mmbivit.compat.requirements as r\n"
        "r.is_importable = lambda name: name not in ('mmdet', 'timm')\n"
        "r.providers = lambda name: []\n"
        "import mmbivit.models\n"
    )
    result = run(code)
    assert result.returncode and "mmbivit cannot use this environment" in result.stderr
    assert "mmdet is not installed" in result.stderr and "python -m mmbivit.doctor" in result.stderr


def test_configs_are_found_by_name():
    cfg = mmbivit.get_config("mask_rcnn_sibivit_swin_t")
    assert cfg.model.backbone.type == "mmbivit.BinarySwinTransformer"
    assert mmbivit.config_path("digits/mask_rcnn_sibivit.py").is_file()
    assert mmbivit.config_path("single_stage_si").is_file()
    with pytest.raises(FileNotFoundError) as error:
        mmbivit.get_config("mask_rcnn_sibivit_swint")
    assert "Did you mean mask_rcnn_sibivit_swin_t" in str(error.value)
