import numpy as np
import pytest
import torch
from matplotlib.patches import StepPatch

from mmbivit.report.plots.activations import plot_activations
from tests.packed_files import trained
from tests.report.plots.test_attention import seen_by_network


def test_shares_of_an_input(configs, detector, images):
    model, checkpoint = detector
    figure = plot_activations(configs["binary"], checkpoint, images, "stages.1.blocks.0")
    assert figure.get_suptitle().startswith("stages.1.blocks.0") and "2 images" in figure.get_suptitle()
    panel = next(axes for axes in figure.axes if axes.get_title().startswith("mlp.fc1\n"))
    fc1, values = model.backbone.stages[1].blocks[0].mlp.fc1, []
    handle = fc1.register_forward_pre_hook(lambda _, args: values.append(args[0]))
    with torch.no_grad():
        for file in images:
            model.backbone(seen_by_network(file))
    handle.remove()
    x, gamma = torch.cat(values), fc1.input_quantizer.gamma.detach()
    positive, inside = (100 * share.float().mean().item() for share in (x >= gamma, (x - gamma).abs() <= 1))
    assert panel.get_title() == f"mlp.fc1\n+1: {positive:.1f}%,  $|x - \\gamma| \\leq 1$: {inside:.1f}%"
    (bars,) = [patch for patch in panel.patches if isinstance(patch, StepPatch)]
    density, edges, _ = bars.get_data()
    counts = np.histogram(x.numpy(), edges)[0]
    # A value next to an edge may fall on the other side of it, as images are normalised in another order here.
    np.testing.assert_allclose(density * np.diff(edges) * x.numel(), counts, atol=3)


def test_one_image_of_a_classifier(classifier_configs, classifier, image_folders):
    file = image_folders / "val" / "red" / "red_0.png"
    figure = plot_activations(classifier_configs["binary"], classifier[1], [file])
    assert figure.get_suptitle().startswith("stages.0.blocks.0") and figure.get_suptitle().endswith(" 1 image")
    assert sum(axes.axison for axes in figure.axes) == 9


def test_float_network(configs, images, tmp_path):
    trained(configs["float"], tmp_path / "float.pth", ("person",), "mmdet")
    with pytest.raises(ValueError, match="nothing in block stages.0.blocks.0 is binarized with a threshold"):
        plot_activations(configs["float"], tmp_path / "float.pth", images)
