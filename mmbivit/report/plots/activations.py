"""Picture of activations before they are binarized."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmbivit.analysis.activations import activation_distributions
from mmbivit.analysis.figures.activations import activations_figure
from mmbivit.engine.decoupled_training_hook import find_staged_backbone
from mmbivit.report.inputs import load_images, load_stage2_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_activations"]


def plot_activations(
    config: str | Path, checkpoint: str | Path, images: Sequence[str | Path], block: str | None = None
) -> "Figure":
    """Draw what reaches the thresholds of each layer of a block, and the thresholds.

    Args:
        config: the config file of a detector or classifier.
        checkpoint: file or URL of its weights, of training stage 2.
        images: files, folders and glob patterns; more of them take more time, not more memory.
        block: such as ``stages.0.blocks.1``, by default the last block of the first stage.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: if they do not fit, or there is no such block.
    """
    cfg, model = load_stage2_model(config, checkpoint)
    count = 0

    def inputs():
        nonlocal count
        for _, image in load_images(cfg, model, images):
            count += 1
            yield image

    name, distributions = activation_distributions(find_staged_backbone(model), inputs(), block)
    return activations_figure(
        f"{name}: values before they are binarized, {count} image{'s' if count != 1 else ''}", distributions
    )
