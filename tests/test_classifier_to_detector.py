"""What is pretrained is what is fine-tuned: a classifier that was trained here, in the configs that fine-tune it."""

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope

from mmbivit import config_path
from mmbivit.apis import load_config, train, train_config
from mmbivit.models import load_checkpoint_file, load_pretrained

ARCH = dict(embed_dims=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))


@pytest.fixture(scope="module")
def trained(classifier_configs, tmp_path_factory):
    """Checkpoints of a classifier of four stages in training stage 1 and 2, and its backbone."""
    work_dir = tmp_path_factory.mktemp("pretraining")
    options = {
        "experiment_name": "pretraining",
        "model.backbone.arch": ARCH,
        "model.backbone.out_indices": (3,),
        "custom_hooks.0.switch_epoch": 1,
    }
    arguments = dict(work_dir=str(work_dir), seed=0, float_checkpoint="none", cfg_options=options)
    model = train(train_config(classifier_configs["binary"], **arguments))
    return [work_dir / f"epoch_{stage}.pth" for stage in (1, 2)], model.backbone


@pytest.mark.parametrize("name", ["mask_rcnn_sibivit_swin_t_finetune", "cascade_mask_rcnn_sibivit_swin_t_finetune"])
def test_it_becomes_the_backbone_with_its_stage(name, trained):
    checkpoints, backbone = trained
    for stage, checkpoint in enumerate(checkpoints, start=1):
        cfg = load_config(config_path(name), backbone_checkpoint=str(checkpoint))
        cfg.model.backbone.update(arch=ARCH, window_size=4)
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
