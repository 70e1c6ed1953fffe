"""Float, binary, binary with spatial interaction, and the two stages on cluttered digits: runs, table and plot."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from mmengine.registry import MODELS, DefaultScope

from mmbivit import get_config
from mmbivit.analysis import model_size

from .repeated_runs import check_runs, mean_and_deviation, train_once

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ARMS", "Arm", "draw_curves", "markdown_table", "run_arms"]

METRIC = "accuracy/top1"


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Args:
        label: how the table and the plot call it.
        config: name of its config.
        taught: starts from the float network of the same seed, which is the teacher too if there is one.
    """

    label: str
    config: str
    taught: bool = False


FLOAT = Arm("float", "classification/digits_swin_float")
ARMS = (
    FLOAT,
    Arm("binary, no SI", "classification/digits_binary_no_si"),
    Arm("binary, SI from the start", "classification/digits_sibivit_single_stage"),
    Arm("the same, from float weights", "classification/digits_sibivit_from_float", taught=True),
    Arm("two stages, from float weights", "classification/digits_sibivit", taught=True),
)


def run_arms(
    seeds: Sequence[int], out: Path, train_tool: Path, data: Path, jobs: int
) -> dict[Arm, list[list[dict[str, float]]]]:
    """Train every arm with every seed, unless that is done already.

    Args:
        seeds: seeds of initialisation, order and augmentation.
        out: a folder per run, named ``<config>_seed<n>``.
        train_tool: path of ``tools/train.py``.
        data: the digit folders.
        jobs: runs at a time, one thread each.

    Returns:
        For each arm and seed the evaluations: dicts with ``step`` (epoch) and ``accuracy/top1`` (percent).

    Raises:
        RuntimeError: if a run fails; it names the log.
        ValueError: for an impossible seed, or less than one job.
    """
    check_runs(seeds, jobs)

    def train(arm: Arm, seed: int, teacher: Future | None) -> list[dict[str, float]]:
        work_dir = out / f"{Path(arm.config).name}_seed{seed}"
        line = ["--data-root", data, "--seed", seed]
        if teacher is not None:
            teacher.result()
            float_dir = out / f"{Path(FLOAT.config).name}_seed{seed}"
            line += ["--float-checkpoint", float_dir / (float_dir / "last_checkpoint").read_text().strip()]
        return train_once(train_tool, arm.config, work_dir, line, METRIC)

    with ThreadPoolExecutor(jobs) as pool:
        # The float runs are first in the queue, so nobody waits for one that has not begun.
        teachers = {seed: pool.submit(train, FLOAT, seed, None) for seed in seeds}
        futures = {
            arm: [
                teachers[seed]
                if arm is FLOAT
                else pool.submit(train, arm, seed, teachers[seed] if arm.taught else None)
                for seed in seeds
            ]
            for arm in ARMS
        }
        return {arm: [future.result() for future in runs] for arm, runs in futures.items()}


def final_accuracies(runs: Sequence[Sequence[dict[str, float]]]) -> list[float]:
    """Return the last accuracy of each run in percent."""
    return [evaluations[-1][METRIC] for evaluations in runs]


def markdown_table(results: dict[Arm, list[list[dict[str, float]]]]) -> str:
    """Format the accuracy after the last epoch, with the sample standard deviation over seeds, as Markdown."""
    lines = ["| | top-1, % | each seed | parameters | size, 1-bit weights |", "|---|---|---|---|---|"]
    for arm, runs in results.items():
        accuracies = final_accuracies(runs)
        with DefaultScope.overwrite_default_scope("mmengine"):
            size = model_size(MODELS.build(get_config(arm.config).model))
        packed = (
            f"{size.packed_bytes / 1e3:.0f} kB" if size.binary_weights else f"(float {size.float_bytes / 1e3:.0f} kB)"
        )
        each = ", ".join(f"{accuracy:.1f}" for accuracy in accuracies)
        lines.append(
            f"| {arm.label} | {mean_and_deviation(accuracies, 1)} | {each} | {size.params / 1e3:.0f} k | {packed} |"
        )
    return "\n".join(lines)


def draw_curves(results: dict[Arm, list[list[dict[str, float]]]]) -> "Figure":
    """Draw the mean accuracy of each arm over epochs, in a band from the worst to the best seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    styles = zip(
        ("-", "--", ":", (0, (5, 1, 1, 1)), "-."),
        "os^vD",
        ("black", "tab:orange", "tab:green", "tab:red", "tab:blue"),
        strict=True,
    )
    for (arm, runs), (line, marker, color) in zip(results.items(), styles, strict=True):
        epochs = [evaluation["step"] for evaluation in runs[0]]
        by_epoch = list(zip(*([evaluation[METRIC] for evaluation in run] for run in runs), strict=True))
        label = f"{arm.label}: {mean_and_deviation(final_accuracies(runs), 1)} %"
        axes.plot(epochs, [mean(values) for values in by_epoch], ls=line, marker=marker, ms=4, color=color, label=label)
        low, high = [min(values) for values in by_epoch], [max(values) for values in by_epoch]
        axes.fill_between(epochs, low, high, color=color, alpha=0.15, lw=0)
        for hook in get_config(arm.config).get("custom_hooks", []):
            axes.axvline(hook.switch_epoch, color="0.5", lw=1)
            top = dict(xycoords=("data", "axes fraction"), textcoords="offset points", va="top")
            axes.annotate("switch to stage 2", (hook.switch_epoch, 1), xytext=(4, -4), **top)
    axes.set(xlabel="epoch", ylabel="validation accuracy, %", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", title=f"mean of {len(runs)} seeds; bands: all seeds")
    return figure
