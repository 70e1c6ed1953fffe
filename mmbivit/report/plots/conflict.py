"""Gradient conflict of a trained network, from a config, its checkpoint and its training data."""

from pathlib import Path
from typing import TYPE_CHECKING

from mmengine.registry import HOOKS, DefaultScope
from rich.table import Table

from mmbivit.analysis.figures.conflict import conflict_figure
from mmbivit.analysis.gradient_conflict import GradientConflict, gradient_conflict
from mmbivit.checks import check_integer
from mmbivit.engine.seeded_batches import seed_all
from mmbivit.report.inputs import load_stage2_model, load_teacher, training_batches

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["conflict_table", "measure_conflict", "plot_conflict"]


def measure_conflict(
    config: str | Path,
    checkpoint: str | Path,
    batches: int = 4,
    seed: int = 0,
    data_root: str | None = None,
    teacher_checkpoint: str | None = None,
) -> GradientConflict:
    """Measure the gradient conflict (SI-BiViT, Eq. 10-11) of a network on batches of its training data.

    The distillation loss and its weight are those of the config's ``DecoupledTrainingHook``. The global random numbers
    are seeded, so equal arguments give equal results.

    Args:
        config: the config file of a detector or classifier with spatial interaction.
        checkpoint: file or URL of its weights, of training stage 2.
        batches: batches of training data.
        seed: of all random numbers: images, augmentation, and what the model draws.
        data_root: folder of the data set, as in ``tools/train.py``.
        teacher_checkpoint: file or URL of the teacher's weights; by default what the config names.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: if the config has no teacher or too little data, or as in :func:`gradient_conflict`.
    """
    check_integer("batches", batches, 1)
    check_integer("seed", seed, 0, 2**32 - 1)
    cfg, model = load_stage2_model(config, checkpoint, data_root)
    teacher = load_teacher(cfg, teacher_checkpoint)
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "mmengine"):
        hook = HOOKS.build(next(hook for hook in cfg.custom_hooks if hook.get("teacher")))
    seed_all("conflict", seed)
    data = training_batches(cfg, model, batches, seed)
    return gradient_conflict(model, teacher, data, [term for term in hook.terms if 1 in term.stages] or hook.terms)


def plot_conflict(
    config: str | Path,
    checkpoint: str | Path,
    batches: int = 4,
    seed: int = 0,
    data_root: str | None = None,
    teacher_checkpoint: str | None = None,
) -> "Figure":
    """Draw what :func:`measure_conflict` returns, like SI-BiViT's Figure 4(b); takes the same arguments."""
    return conflict_figure(measure_conflict(config, checkpoint, batches, seed, data_root, teacher_checkpoint))


def conflict_table(conflict: GradientConflict) -> Table:
    """Make the table of ``g+`` and ``g-`` of each block and of the network."""
    table = Table(
        title="Gradient of distillation in the SI weights",
        caption=f"g+ along the task's gradient, g- against it (Eq. 10-11); batches averaged: {conflict.batches}",
    )
    table.add_column("block")
    for column in ("g+", "g-", "against"):
        table.add_column(column, justify="right")
    for name, (harmonious, conflicting) in conflict.by_block().items():
        table.add_row(name, *_cells(harmonious, conflicting))
    table.add_section()
    table.add_row("all", *_cells(conflict.harmonious, conflict.conflicting))
    return table


def _cells(harmonious: float, conflicting: float) -> tuple[str, str, str]:
    total = harmonious + conflicting
    return f"{harmonious:.3g}", f"{conflicting:.3g}", f"{conflicting / total:.1%}" if total else "-"
