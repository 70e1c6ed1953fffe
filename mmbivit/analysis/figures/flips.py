"""How many weights flip their sign while a network trains."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mmbivit.analysis.training_log import TrainingLog
from mmbivit.checks import UserError
from mmbivit.engine.sign_flips_hook import PREFIX

from .curves import mark_stages, share_iterations
from .style import DARK, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["flips_figure"]

_MAX_NAMES = 40  # rows that are named one by one


def flips_figure(log: TrainingLog) -> "Figure":
    """Draw the share of binary weights that flipped their sign between two looks of the hook.

    Above that of all weights over the iterations, all training stages but the last shaded; below that of each layer as
    a grey, from the input of the network at the top to its output.

    Args:
        log: of a run with :class:`mmbivit.SignFlipsHook`.

    Raises:
        ValueError: if the log has no sign flips; the message names the hook.
    """
    if PREFIX not in log.flips:
        raise UserError(
            f"the log in {log.work_dir} has no {PREFIX}: add dict(type='mmbivit.SignFlipsHook') to custom_hooks of the "
            "config, with interval=ITERATIONS for a run by iterations, and train again"
        )
    total = log.flips[PREFIX]
    layers = {key.removeprefix(f"{PREFIX}/"): series for key, series in log.flips.items() if key != PREFIX}
    shares = np.full((len(layers), len(total.steps)), np.nan)  # of layers that another run in the folder lacks
    for row, series in zip(shares, layers.values(), strict=True):
        row[np.searchsorted(total.steps, series.steps)] = 100 * series.values
    edges = np.r_[max(2 * total.steps[0] - total.steps[1], 0) if len(total.steps) > 1 else 0, total.steps]
    unit = f"flipped signs (%)\nin {np.median(np.diff(edges)):g} iterations"
    height = np.clip(0.17 * len(layers), 1.5, 7)
    figure = new_figure(8, 3.4 + height)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, height])
    top.plot(total.steps, 100 * total.values, color=DARK, marker="." if len(total.steps) < 40 else "", linewidth=1.4)
    top.set_ylabel(f"all layers: {unit}")
    top.set_ylim(bottom=0)
    top.grid(color="0.85", linewidth=0.5)
    mark_stages(top, log)
    if (marks := top.get_legend_handles_labels())[0]:
        figure.legend(*marks, loc="outside lower center", ncols=2, frameon=False)
    image = bottom.pcolormesh(edges, np.arange(len(layers) + 1), shares, cmap="Greys", vmin=0, rasterized=True)
    bottom.invert_yaxis()
    for switch in (switch for switch in log.switches if switch <= log.last_step):
        for color, style, width in (("white", "-", 2.5), ("black", "--", 1)):  # seen on any grey
            bottom.axvline(switch, color=color, linestyle=style, linewidth=width)
    _name_layers(bottom, [name.removeprefix("backbone.") for name in layers])
    figure.colorbar(image, ax=bottom, label=unit, pad=0.01)
    share_iterations((top, bottom), log)
    return figure


def _name_layers(axis: "Axes", names: Sequence[str]) -> None:
    """Name rows, or, where there are too many, the blocks that they belong to, with lines between these."""
    if len(names) <= _MAX_NAMES:
        axis.set_yticks(np.arange(len(names)) + 0.5, names, fontsize=7)
        return
    blocks = [match[0] if (match := re.match(r".*\.\d+(?=\.)", name)) else name for name in names]
    starts = [row for row, block in enumerate(blocks) if row == 0 or block != blocks[row - 1]]
    ends = [*starts[1:], len(names)]
    axis.set_yticks(starts, minor=True, labels=[])
    axis.grid(axis="y", which="minor", color="0.7", linewidth=0.4)
    middles = [(start + end) / 2 for start, end in zip(starts, ends, strict=True)]
    labels = [blocks[start] if end - start > 1 else names[start] for start, end in zip(starts, ends, strict=True)]
    axis.set_yticks(middles, labels, fontsize=7)
    axis.tick_params(axis="y", which="major", length=0)
