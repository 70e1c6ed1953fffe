"""Sign flips of a work dir as training leaves it."""

import numpy as np
import pytest

from mmbivit.report.plots.flips import plot_flips
from tests.analysis.logs import logged
from tests.engine.toy import make_runner


def test_flips_of_a_run_are_drawn_for_all_its_layers(tmp_path):
    make_runner(tmp_path, dict(switch_epoch=1), length=2, hooks=[dict(type="mmbivit.SignFlipsHook")]).train()
    entries = logged(tmp_path, "sign_flips")
    top, bottom, _ = plot_flips(tmp_path).axes
    assert top.get_lines()[0].get_xdata().tolist() == [4, 8]
    assert top.get_lines()[0].get_ydata() == pytest.approx([100 * entry["sign_flips"] for entry in entries])
    (mesh,) = bottom.collections
    names = [text.get_text() for text in bottom.get_yticklabels()]
    drawn = mesh.get_array().reshape(len(names), 2)
    for name, row in zip(names, drawn, strict=True):
        np.testing.assert_allclose(row, [100 * entry[f"sign_flips/backbone.{name}"] for entry in entries])
    assert len(names) == sum(key.startswith("sign_flips/") for key in entries[0])


def test_a_run_without_the_hook_names_it(tmp_path):
    make_runner(tmp_path, None, length=1).train()
    with pytest.raises(ValueError, match="mmbivit.SignFlipsHook"):
        plot_flips(tmp_path)
