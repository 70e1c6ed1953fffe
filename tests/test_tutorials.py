"""The configs that tutorials show: they load, build what the page says, and fit the data that it describes."""

import json
import re
from pathlib import Path

import pytest
from mmengine.registry import MODELS, DefaultScope

from mmbivit.apis import load_config
from mmbivit.datasets import check_coco_data
from mmbivit.models import BinarySwinTransformer
from tests.tiny import make_coco

ROOT = Path(__file__).parents[1]


def shown_config(page: str, folder: Path):
    """The config of a tutorial, which lies in the checkout there."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "tutorials" / page).read_text(), re.DOTALL)
    (text,) = (block for block in blocks if "_base_" in block)
    file = folder / "config.py"
    file.write_text(text.replace('"./configs/', f'"{ROOT.as_posix()}/configs/'))
    return load_config(file)


def build(cfg):
    with DefaultScope.overwrite_default_scope("mmdet"):
        return MODELS.build(cfg.model)


def make_pets(folder: Path) -> Path:
    """The folder that the tutorial describes."""
    coco = make_coco(folder)
    for split in ("train", "val"):
        (coco / f"{split}2017").rename(coco / split)
        file = (coco / "annotations" / f"instances_{split}2017.json").rename(coco / "annotations" / f"{split}.json")
        content = json.loads(file.read_text())
        content["categories"] = [dict(id=1, name="cat"), dict(id=2, name="dog")]
        file.write_text(json.dumps(content))
    return coco


def test_own_data_fits_the_heads_and_the_annotations(tmp_path, monkeypatch):
    cfg = shown_config("own_data.md", tmp_path)
    model = build(cfg)
    assert isinstance(model.backbone, BinarySwinTransformer)
    assert model.roi_head.bbox_head.num_classes == model.roi_head.mask_head.num_classes == 2
    assert 0 < cfg.custom_hooks[0].switch_epoch < cfg.train_cfg.max_epochs == cfg.param_scheduler[-1].end
    monkeypatch.chdir(tmp_path)
    make_pets(tmp_path / "data" / "pets")
    check_coco_data(cfg)
    cfg.train_dataloader.dataset.metainfo.classes = ("dog", "cat")
    with pytest.raises(ValueError, match="in another order"):
        check_coco_data(cfg)


def test_own_config_is_atss_with_a_binary_backbone(tmp_path):
    cfg = shown_config("own_config.md", tmp_path)
    model = build(cfg)
    assert type(model).__name__ == "ATSS" and isinstance(model.backbone, BinarySwinTransformer)
    assert model.neck.in_channels == [192, 384, 768] and cfg.find_unused_parameters
    assert 0 < cfg.custom_hooks[0].switch_epoch < cfg.train_cfg.max_epochs
    cfg.model.backbone.recipe = "reactnet"  # the page invites to other methods, which have learned scales
    names = [name for network in (model, build(cfg)) for name, _ in network.named_parameters()]
    for key in cfg.optim_wrapper.paramwise_cfg.custom_keys:
        assert any(key in name for name in names), key
