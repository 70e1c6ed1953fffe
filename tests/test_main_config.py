"""The main configs as they are, full Swin-T and full heads, on a COCO-shaped folder of eight scenes."""

from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope

from mmbivit import get_config
from mmbivit.apis import train, train_config
from mmbivit.datasets import make_digit_scenes
from tests.analysis.logs import logged

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Scenes in ``coco``, and in ``float.pth`` a random float Mask R-CNN Swin-T, as the model zoo's would be."""
    folder = tmp_path_factory.mktemp("main_config")
    make_digit_scenes(folder / "coco", train=4, val=4, size=(120, 160), layout="coco")
    cfg = get_config("mask_rcnn_sibivit_swin_t")
    cfg.model.backbone = dict(type="mmdet.SwinTransformer", init_cfg=None)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmdet"):
        torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), folder / "float.pth")
    return folder


# Binary linear layers of the blocks and of patch merging, and convolutions and the linear layer of neck and heads.
@pytest.mark.slow
@pytest.mark.parametrize(("name", "layers"), [("mask_rcnn_sibivit_swin_t", 75), ("mask_rcnn_sibivit_swin_t_full", 85)])
def test_an_iteration_in_each_stage_and_an_evaluation(name, layers, folder, tmp_path):
    # One iteration an epoch. Only the size of the images and the number of detections in an evaluation, batch size,
    # data loader and log are fitted to so few of them.
    sizes = "train_dataloader.dataset.pipeline.3.transforms"
    options = {
        "experiment_name": name,
        "train_cfg.max_epochs": 2,
        "train_cfg.val_begin": 2,
        f"{sizes}.0.0.scales": [(128, 256)],
        f"{sizes}.1.2.scales": [(128, 256)],
        "val_dataloader.dataset.pipeline.1.scale": (128, 256),
        "custom_hooks.0.switch_epoch": 1,
        "train_dataloader.num_workers": 0,
        "val_dataloader.num_workers": 0,
        "train_dataloader.persistent_workers": False,
        "val_dataloader.persistent_workers": False,
        "model.test_cfg.rcnn.score_thr": 0.0,  # so that there is something to evaluate
        "model.test_cfg.rcnn.max_per_img": 10,
        "default_hooks.logger.interval": 1,
        "train_dataloader.batch_size": 1,
        "train_dataloader.dataset.indices": 1,
        "val_dataloader.dataset.indices": 1,
    }
    cfg = train_config(
        ROOT / "configs" / f"{name}.py",
        work_dir=str(tmp_path / "run"),
        data_root=str(folder / "coco"),
        float_checkpoint=str(folder / "float.pth"),
        cfg_options=options,
    )
    train(cfg)

    lines = logged(tmp_path / "run")
    losses = [line for line in lines if "loss" in line]
    assert [line["step"] for line in losses] == [1, 2]
    assert ["loss_distill" in line for line in losses] == [True, False]
    assert all(line["loss_mask"] > 0 and line["loss_bbox"] >= 0 for line in losses)
    assert "coco/segm_mAP_50" in lines[-1] and "coco/bbox_mAP" in lines[-1]
    (log,) = (tmp_path / "run").glob("*/*.log")
    awake = f"{layers} layers have binary weights now, 12 spatial interaction branches are awake, teacher freed"
    assert awake in log.read_text()
    saved = torch.load(tmp_path / "run" / "epoch_2.pth", weights_only=False)["state_dict"]
    assert {int(value) for key, value in saved.items() if key.endswith("training_stage")} == {2}
