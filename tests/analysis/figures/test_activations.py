import numpy as np
import pytest
from matplotlib.patches import StepPatch

from mmbivit.analysis.activations import ActivationDistribution
from mmbivit.analysis.figures.activations import activations_figure
from tests.analysis.figures.drawing import assert_texts_readable


def make_distribution(layer="mlp.fc1", bins=512, limit=8.0, channels=16):
    rng = np.random.default_rng(0)
    counts, edges = np.histogram(rng.normal(0.5, 1.0, 20000).clip(-limit, limit), bins, (-limit, limit))
    return ActivationDistribution(layer, edges, counts, rng.normal(0.25, 0.3, channels), 0.604, 0.7)


def bars_of(axes):
    (bars,) = [patch for patch in axes.patches if isinstance(patch, StepPatch)]
    values, edges, _ = bars.get_data()
    return values, edges


def test_panel():
    distribution = make_distribution()
    (axes, *empty) = activations_figure("stages.0.blocks.1, 4 images", [distribution]).axes
    assert not any(other.axison for other in empty)
    assert axes.get_title() == "mlp.fc1\n+1: 60.4%,  $|x - \\gamma| \\leq 1$: 70.0%"
    values, edges = bars_of(axes)
    low, high = axes.get_xlim()
    assert 50 <= ((edges >= low) & (edges <= high)).sum() <= 70
    np.testing.assert_allclose(values @ np.diff(edges), 1)
    assert set(edges) <= set(distribution.edges)
    of_bars = [
        distribution.counts[(distribution.edges[:-1] >= left) & (distribution.edges[:-1] < right)].sum()
        for left, right in zip(edges, edges[1:], strict=False)
    ]
    np.testing.assert_allclose(values * np.diff(edges) * 20000, of_bars)
    (window,) = [patch for patch in axes.patches if not isinstance(patch, StepPatch)]
    median = np.median(distribution.gamma)
    assert (window.get_x(), window.get_x() + window.get_width()) == pytest.approx((median - 1, median + 1))
    assert window.get_hatch()
    thresholds = next(line for line in axes.lines if line.get_marker() == "|")
    np.testing.assert_array_equal(thresholds.get_xdata(), distribution.gamma)


def test_axis_holds_all_windows_and_nearly_all_values():
    distribution = make_distribution()
    low, high = activations_figure("", [distribution]).axes[0].get_xlim()
    assert low < distribution.gamma.min() - 1 and high > distribution.gamma.max() + 1
    below, above = distribution.edges[1:] <= low, distribution.edges[:-1] >= high
    for outside in (below, above):
        assert 0 < distribution.counts[outside].sum() <= 20  # 0.1 %


def test_values_that_are_all_alike():
    counts = np.zeros(512, dtype=int)
    counts[-1] = 10
    distribution = ActivationDistribution("mlp.fc2", np.linspace(-1, 1, 513), counts, np.zeros(4), 1.0, 1.0)
    axes = activations_figure("", [distribution]).axes[0]
    values, edges = bars_of(axes)
    assert np.count_nonzero(values) == 1
    assert values[-1] == pytest.approx(1 / (edges[-1] - edges[-2]))
    assert axes.get_xlim() == pytest.approx((-1.2, 1.2))


@pytest.mark.parametrize("layers", [1, 7, 9])
def test_texts_can_be_read(layers):
    distributions = [make_distribution(f"mlp.si.fc{i}", limit=2.0**i, channels=384) for i in range(1, layers + 1)]
    figure = activations_figure("stages.2.blocks.17, 100 images", distributions)
    assert sum(axes.axison for axes in figure.axes) == layers
    assert_texts_readable(figure)
