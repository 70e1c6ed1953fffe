import pytest
import torch

from mmbivit.report.plots.balancing import plot_balancing
from tests.packed_files import trained


def test_factors_are_those_of_the_checkpoint(configs, detector):
    model, checkpoint = detector
    boxes, *grids = plot_balancing(configs["binary"], checkpoint).axes
    assert [label.get_text() for label in boxes.get_xticklabels()] == ["0.0", "1.0"]
    for stage, grid in zip(model.backbone.stages, grids, strict=True):
        alpha = stage.blocks[0].mlp.si.alpha.detach()
        drawn = grid.images[0].get_array().compressed()
        assert torch.equal(torch.tensor(drawn), alpha) and len(alpha.unique()) > 1


def test_network_without_spatial_interaction(configs, tmp_path):
    config = tmp_path / "plain.py"
    config.write_text(
        f'_base_ = "{configs["binary"].as_posix()}"\nmodel = dict(backbone=dict(spatial_interaction=None))'
    )
    trained(config, tmp_path / "plain.pth", ("person",), "mmdet")
    with pytest.raises(ValueError, match="has no spatial interaction, so there are no balancing factors"):
        plot_balancing(config, tmp_path / "plain.pth")
