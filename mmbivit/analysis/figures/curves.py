"""Curves of a training run."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mmbivit.analysis.training_log import Series, TrainingLog

from .style import ACCENT, DARK, GREY, LIGHT, new_figure, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["curves_figure", "mark_stages", "running_mean", "share_iterations"]

# Names and units of what is drawn by default; anything else is called as in the log.
_LABELS = {
    "loss": "total loss",
    "loss_distill": "distillation loss\n(part of the total)",
    "lr": "learning rate",
    "coco": "average precision\n(0 to 1)",
    "accuracy": "accuracy (%)",
}
_STAGE = "0.9"  # grey behind all stages but the last
_SMOOTH = 20  # a running mean is over this part of a stage's points
_STYLES = (("-", "o", DARK), ("--", "s", ACCENT), (":", "^", GREY), ("-.", "D", DARK))


def curves_figure(log: TrainingLog, keys: Sequence[str] | None = None) -> "Figure":
    """Draw what was logged over the iterations, one panel below another, all training stages but the last shaded.

    What training logs is drawn light, with its running mean over a twentieth of a stage's points dark, if there are 40
    points or more. Losses that span more than a decade have a logarithmic axis.

    Args:
        log: what was logged.
        keys: a panel for each; by default total and distillation loss, learning rate and the main metrics.

    Raises:
        ValueError: for a key that is not in the log, or if there is nothing to draw by default.
    """
    panels = [(key, [key]) for key in dict.fromkeys(keys)] if keys else _default_panels(log)
    if not panels:
        log.series("loss")  # raises
    figure = new_figure(7.5, 1.1 + 1.7 * len(panels))
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (name, names) in zip(axes, panels, strict=True):
        series = {key: log.series(key) for key in names}
        if all(key in log.validation for key in names):
            _draw_metrics(axis, series)
        else:
            _draw_training(axis, series[names[0]], log.switches, smooth=not name.endswith("lr"))
        if "loss" in name and _spans_decade(series[names[0]].values):
            axis.set_yscale("log")
        else:
            axis.ticklabel_format(axis="y", scilimits=(-2, 4))
        axis.set_ylabel(_LABELS.get(name, plain(name)))
        axis.grid(color="0.85", linewidth=0.5)
        mark_stages(axis, log)
    share_iterations(axes, log)
    figure.align_ylabels(axes)
    handles = {text: handle for axis in axes for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    metrics = {plain(key) for key in log.validation}
    shared = {text: handle for text, handle in handles.items() if text not in metrics}
    if shared:
        figure.legend(shared.values(), shared.keys(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def _default_panels(log: TrainingLog) -> list[tuple[str, list[str]]]:
    """Choose names and keys of the panels: of each group of metrics the main ones, else the first four."""
    panels = [(key, [key]) for key in ("loss", "loss_distill", "lr") if key in log.train]
    for group in dict.fromkeys(key.partition("/")[0] for key in log.validation):
        keys = [key for key in log.validation if key.partition("/")[0] == group]
        panels.append((group, ([key for key in keys if key.endswith("mAP")] or keys)[: len(_STYLES)]))
    return panels


def _draw_training(axis: "Axes", series: Series, switches: Sequence[int], smooth: bool) -> None:
    values = np.where(np.isfinite(series.values), series.values, np.nan)
    if len(values) < 2 * _SMOOTH or not smooth:
        axis.plot(series.steps, values, color=DARK, linewidth=1.2, marker="." if len(values) < 2 * _SMOOTH else "")
        return
    axis.plot(series.steps, values, color=LIGHT, linewidth=0.8, label="as logged")
    starts = np.searchsorted(series.steps, switches, side="right")
    for steps, part in zip(np.split(series.steps, starts), np.split(values, starts), strict=True):
        if len(steps):
            mean = running_mean(part, len(steps) // (2 * _SMOOTH) * 2 + 1)
            axis.plot(steps, mean, color=DARK, linewidth=1.4, label="running mean")


def _draw_metrics(axis: "Axes", metrics: dict[str, Series]) -> None:
    for (key, series), (line, marker, color) in zip(metrics.items(), _STYLES, strict=False):
        axis.plot(series.steps, series.values, line, marker=marker, color=color, markersize=4, label=plain(key))
    axis.legend(fontsize=8)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Average each value with its neighbours that are numbers, fewer at the ends.

    Args:
        values: ``(n,)``; NaN where there is none.
        window: how many values are averaged, odd.

    Returns:
        ``(n,)``, NaN where no neighbour is a number.
    """
    known = np.isfinite(values)
    ends = np.arange(len(values))[:, None] + [-(window // 2), window // 2 + 1]
    first, end = ends.clip(0, len(values)).T
    counts, totals = (np.r_[0, np.cumsum(part)] for part in (known, np.where(known, values, 0.0)))
    count = counts[end] - counts[first]
    return np.divide(totals[end] - totals[first], count, out=np.full(len(values), np.nan), where=count > 0)


def _spans_decade(values: np.ndarray) -> bool:
    finite = values[np.isfinite(values)]
    return len(finite) > 0 and finite.min() > 0 and finite.max() > 10 * finite.min()


def mark_stages(axis: "Axes", log: TrainingLog) -> None:
    """Shade all training stages but the last and mark the switches, with labels for a legend, if there are stages."""
    if not log.switches:
        return
    end = min(log.switches[-1], log.last_step)
    count = len(log.switches)
    label = "training stage 1" if count == 1 else f"training stages 1 to {count}"
    axis.axvspan(0, end, color=_STAGE, zorder=0, linewidth=0, label=label)
    for stage, switch in enumerate(log.switches, 2):
        if switch <= log.last_step:
            epoch = f" (epoch {switch / log.epoch_length:g})" if log.epoch_length else ""
            text = f"switch to stage {stage} after iteration {switch}{epoch}"
            axis.axvline(switch, color="black", linestyle="--", linewidth=1, label=text)


def share_iterations(axes: Sequence["Axes"], log: TrainingLog) -> None:
    """Let panels end at the last iteration, named below the last one, with epochs above the first one if known."""
    from matplotlib.ticker import MaxNLocator

    axes[0].set_xlim(0, 1.01 * max(log.last_step, 1))  # room for half a marker
    axes[-1].set_xlabel("iteration")
    if length := log.epoch_length:
        epochs = axes[0].secondary_xaxis("top", functions=(lambda x: x / length, lambda x: x * length))
        epochs.set_xlabel("epoch")
        epochs.xaxis.set_major_locator(MaxNLocator(integer=True))
