"""What is pretrained is what is fine-tuned: a classifier that was trained here, in the configs that fine-tune it."""

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope

from mmbivit import config_path
from mmbivit.apis import export_packed, load_config, train, train_config
from mmbivit.deploy import pack
from mmbivit.models import load_checkpoint_file, load_pretrained

ARCH = dict(embed_dims=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))
# As the configs that carry the paper's name: token mixing over the grid of the pretraining size.
NETWORK = {
    "model.backbone.arch": ARCH,
    "model.backbone.spatial_interaction.axis": "grid",
    "model.backbone.pretrain_img_size": 112,
    "model.backbone.downsample": "float",
    "model.backbone.window_size": 4,
}


@pytest.fixture(scope="module")
def trained(classifier_configs, tmp_path_factory):
    """Checkpoints of a classifier of four stages and images of 112 pixels in training stage 1 and 2; its backbone."""
    work_dir = tmp_path_factory.mktemp("pretraining")
    options = {
        **NETWORK,
        "experiment_name": "pretraining",
        "model.backbone.out_indices": (3,),
        "custom_hooks.0.switch_epoch": 1,
    }
    for loader in ("train", "val", "test"):
        options[f"{loader}_dataloader.dataset.pipeline.0.input_size"] = 112
    arguments = dict(work_dir=str(work_dir), seed=0, float_checkpoint="none", cfg_options=options)
    model = train(train_config(classifier_configs["binary"], **arguments))
    return [work_dir / f"epoch_{stage}.pth" for stage in (1, 2)], model.backbone


@pytest.mark.parametrize("name", ["mask_rcnn_sibivit_swin_t_finetune", "cascade_mask_rcnn_sibivit_swin_t_finetune"])
def test_it_becomes_the_backbone_with_its_stage(name, trained):
    checkpoints, backbone = trained
    for stage, checkpoint in enumerate(checkpoints, start=1):
        cfg = load_config(config_path(name), backbone_checkpoint=str(checkpoint))
        cfg.model.backbone.update(arch=ARCH, window_size=4, pretrain_img_size=112)
        cfg.model.neck.in_channels = [8, 16, 32, 64]
        with DefaultScope.overwrite_default_scope("mmdet"):
            detector = MODELS.build(cfg.model)
        detector.backbone.init_weights()
        assert detector.backbone.stage == stage
        assert load_pretrained(detector.backbone, load_checkpoint_file(checkpoint), prefix="backbone.") == ([], [])

    # The last checkpoint is the network that training returned, and computes the same features.
    state = detector.backbone.state_dict()
    assert all(torch.equal(state[key], value) for key, value in backbone.state_dict().items())
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(detector.backbone.eval()(images)[-1], backbone.eval()(images)[-1])


def test_a_backbone_of_the_grid_fine_tunes_and_packs_at_another_size(trained, configs, tmp_path):
    checkpoints, _ = trained
    options = {**NETWORK, "train_cfg.max_epochs": 1, "experiment_name": "grid"}
    cfg = train_config(
        configs["finetune"],
        work_dir=str(tmp_path / "run"),
        backbone_checkpoint=str(checkpoints[1]),
        cfg_options=options,
    )
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        for step in loader.dataset.pipeline:
            if step.type == "Resize":
                step.update(scale=(224, 160), keep_ratio=False)
    model = train(cfg).eval()
    assert [block.module.mixing_side for block in model.backbone.blocks()] == [28, 14, 7, 4]
    images = torch.randn(1, 3, 160, 224)
    with torch.no_grad():
        for packed, simulated in zip(pack(model.backbone)(images), model.backbone(images), strict=True):
            assert (packed - simulated).abs().max() <= 1e-4 * simulated.abs().max()
    cfg.dump(tmp_path / "config.py")
    exported = export_packed(tmp_path / "config.py", tmp_path / "run" / "epoch_1.pth", tmp_path / "grid.safetensors")
    assert exported.kind == "detector" and exported.difference <= 1e-4
