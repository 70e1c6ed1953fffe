import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import MODELS

from mmbivit.analysis.attention import attention_map
from mmbivit.report.plots.attention import plot_attention
from tests.packed_files import trained


@pytest.fixture(scope="module")
def teacher(configs, tmp_path_factory):
    """A float detector, and its checkpoint."""
    path = tmp_path_factory.mktemp("teacher") / "float.pth"
    return trained(configs["float"], path, ("person",), "mmdet"), path


def drawn_maps(figure, networks):
    """Return the weights drawn of each network, ``(heads, H', W')``, from panels in rows of heads."""
    panels = figure.axes[1:]
    heads = len(panels) // networks
    weights = [np.ma.filled(panel.images[1].get_array(), np.nan) for panel in panels]
    return [np.stack(weights[i * heads : (i + 1) * heads]) for i in range(networks)]


def seen_by_network(file):
    rgb = cv2.imread(str(file))[..., ::-1].astype(np.float32)
    mean, std = np.array([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]])
    return torch.tensor((rgb - mean) / std, dtype=torch.float32).permute(2, 0, 1)[None]


@pytest.mark.parametrize("block, query", [(None, None), ("stages.1.blocks.0", (50, 3))])
def test_student_and_teacher(configs, detector, teacher, images, block, query):
    model, checkpoint = detector
    figure = plot_attention(configs["binary"], checkpoint, images[0], block, query, teacher_checkpoint=teacher[1])
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), cv2.imread(str(images[0]))[..., ::-1])
    inputs = seen_by_network(images[0])
    names = [panel.get_ylabel() for panel in figure.axes[1:] if panel.get_ylabel()]
    assert names == ["student", "teacher"]
    for drawn, network in zip(drawn_maps(figure, 2), (model.backbone, teacher[0].backbone), strict=True):
        expected = attention_map(network, inputs, block or "stages.0.blocks.0", query or (32, 32))
        np.testing.assert_allclose(drawn, expected.weights, atol=1e-5)
    assert "keys" in figure.axes[1].get_title() and "up to" in figure.axes[-1].get_title()


def test_classifier_with_a_teacher_of_mmdet(classifier_configs, classifier, image_folders, tmp_path, monkeypatch):
    options = dict(embed_dims=8, depths=(1, 1), num_heads=(1, 2), strides=(4, 2), window_size=4, out_indices=(1,))
    theirs = MODELS.build(dict(type="mmdet.SwinTransformer", **options))
    torch.save(dict(state_dict=theirs.state_dict()), tmp_path / "theirs.pth")
    config = tmp_path / "config.py"
    config.write_text(
        f'_base_ = "{classifier_configs["binary"].as_posix()}"\n'
        "hook = _base_.custom_hooks[0]\n"
        f"hook.teacher = dict(type='mmdet.SwinTransformer', {', '.join(f'{k}={v}' for k, v in options.items())},\n"
        f"    init_cfg=dict(type='Pretrained', checkpoint='{(tmp_path / 'theirs.pth').as_posix()}'))\n"
        "custom_hooks = [hook]\n"
    )
    file = image_folders / "val" / "red" / "red_0.png"
    figure = plot_attention(config, classifier[1], file, "stages.1.blocks.0")
    _, drawn = drawn_maps(figure, 2)
    np.testing.assert_allclose(np.nansum(drawn, axis=(1, 2)), 1, atol=1e-5)
    assert drawn.shape == (2, 4, 4)


def test_errors(configs, detector, images, monkeypatch, tmp_path):
    monkeypatch.setenv("MMBIVIT_FLOAT_CHECKPOINT", str(tmp_path / "float.pth"))
    config, checkpoint = configs["binary"], detector[1]
    with pytest.raises(FileNotFoundError, match="float.pth does not exist; give its weights with --teacher-checkpoint"):
        plot_attention(config, checkpoint, images[0])
    with pytest.raises(ValueError, match="there is no block 'stages.0.block.0'.*did you mean 'stages.0.blocks.0'"):
        plot_attention(config, checkpoint, images[0], "stages.0.block.0")
    with pytest.raises(FileNotFoundError, match="does not exist, or is no file"):
        plot_attention(config, checkpoint, images[0].parent)


def test_teacher_of_another_grid(configs, detector, images, tmp_path):
    theirs = MODELS.build(
        dict(
            type="mmdet.SwinTransformer",
            embed_dims=8,
            depths=(1, 1),
            num_heads=(1, 2),
            strides=(2, 2),
            patch_size=2,
            out_indices=(0, 1),
        )
    )
    torch.save(dict(state_dict=theirs.state_dict()), tmp_path / "theirs.pth")
    config = tmp_path / "config.py"
    config.write_text(
        f'_base_ = "{configs["binary"].as_posix()}"\n'
        "hook = _base_.custom_hooks[0]\n"
        "hook.teacher = dict(type='mmdet.SwinTransformer', embed_dims=8, depths=(1, 1), num_heads=(1, 2),\n"
        "    strides=(2, 2), patch_size=2, out_indices=(0, 1), init_cfg=dict(checkpoint=''))\n"
        "custom_hooks = [hook]\n"
    )
    with pytest.raises(ValueError, match=r"the student has 16 x 16 tokens, the teacher 32 x 32"):
        plot_attention(config, detector[1], images[0], teacher_checkpoint=tmp_path / "theirs.pth")
