"""What signs explain of float layers, against NumPy's regression, and that all large layers are looked at."""

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from torch import nn
from torch.nn import functional as F

from mmbivit import get_config
from mmbivit_benchmarks.signs import explained, layer_signs, markdown_tables, measure

from ..test_detectors import sample


def test_the_share_is_that_of_a_regression_for_each_channel():
    y, z = torch.randn(3, 2, 5, 4), torch.randn(3, 2, 5, 4)
    z[:, 1] = 2 * y[:, 1] + 0.5 * z[:, 1] + 1
    expected = np.mean([np.corrcoef(y[:, c].flatten(), z[:, c].flatten())[0, 1] ** 2 for c in range(2)])
    assert explained(y, z) == pytest.approx(expected)
    assert explained(y, -3 * y + 2) == pytest.approx(1)
    edge = torch.zeros(5, 4, dtype=torch.bool)
    edge[0] = True
    errors = []
    for c in range(2):
        slope, intercept = np.polyfit(z[:, c].flatten(), y[:, c].flatten(), 1)
        rest = y[:, c, 0] - (slope * z[:, c, 0] + intercept)
        errors.append(1 - float(rest.square().mean() / y[:, c, 0].var(correction=0)))
    assert explained(y, z, edge) == pytest.approx(np.mean(errors))


def test_signs_of_signs_explain_all():
    layer = nn.Conv2d(3, 3, 3, padding=1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.where(torch.randn_like(layer.weight) > 0, 0.5, -0.5))
        layer.weight[:, 0, 0] = torch.tensor([0.5, -0.5, 0.5])
    x = torch.where(torch.randn(2, 3, 6, 6) > 0, 1.0, -1.0)
    with torch.no_grad():
        found = layer_signs(layer, x)
        minus = explained(F.conv2d(x, layer.weight, padding=1), F.conv2d(F.pad(x, (1,) * 4, value=-1.0), layer.weight))
    assert found.signs == pytest.approx(1) and found.border["0 (not a bit)"] <= 1 + 1e-9
    assert found.border["-1"] < 1 and minus < 1


def test_all_large_layers_of_a_float_detector_are_looked_at():
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(get_config("digits/mask_rcnn_swin_float").model).eval()
    data = sample([])
    data.set_metainfo(dict(img_shape=(112, 112), ori_shape=(112, 112), scale_factor=(1.0, 1.0)))
    model.test_cfg.rcnn.score_thr = model.roi_head.test_cfg.score_thr = 0.0
    found = measure(model, lambda: model(torch.randn(1, 3, 112, 112), [data], mode="predict"))
    assert len(found) == 4 + 1 + 2 + 4
    table = markdown_tables(found)
    assert table.count("roi_head.bbox_head.shared_fcs.1") == 1 and table.count("rpn_head.rpn_conv") == 2
