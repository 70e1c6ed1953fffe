"""The configs that tutorials show: they load, build what the page says, and fit the data that it describes."""

import json
import re
from pathlib import Path

import pytest
import torch
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


def test_larq_layer_computes_what_larqs_computes():
    text = (ROOT / "docs" / "migrate.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(block, names)
    layer = names["layer"]
    x = torch.randn(8, 64)
    with torch.no_grad():
        layer.weight.copy_(1.5 * torch.randn(32, 64))
        x[0, 0] = layer.weight[0, 0] = 0
    # magnitude_aware_sign and ste_sign: the mean magnitude of each output times the sign, gradients within -1 and 1
    signs, scale = (torch.where(t >= 0, 1.0, -1.0) for t in (x, layer.weight)), layer.weight.abs().mean(1, keepdim=True)
    input_signs, weight_signs = signs
    torch.testing.assert_close(layer(x), input_signs @ (scale * weight_signs).T)
    layer(x).sum().backward()
    expected = scale * input_signs.sum(0).expand(32, 64) * (layer.weight.abs() <= 1)
    torch.testing.assert_close(layer.weight.grad, expected)
