"""Export of trained networks."""

from pathlib import Path

from mmbivit.deploy.onnx_export import OnnxComparison, check_options, write_onnx
from mmbivit.engine.quiet import quiet

from .checkpoints import load_trained_model
from .config import is_classifier, load_config

__all__ = ["export_onnx"]


@quiet()
def export_onnx(
    config: str | Path,
    checkpoint: str | Path,
    out: str | Path,
    *,
    size: tuple[int, int],
    batch_size: int | None = None,
    check: bool = True,
) -> OnnxComparison | None:
    """Write a trained classifier, or the backbone of a trained detector, as an ONNX file of standard operators.

    Args:
        config: the config file.
        checkpoint: file or URL of the weights, of training stage 2.
        out, size, batch_size, check: see :func:`mmbivit.deploy.onnx_export.write_onnx`, which raises for these.

    Returns:
        The comparison of the file with torch, or ``None`` without ``check``.

    Raises:
        FileNotFoundError: if config or checkpoint does not exist.
        ValueError: if the checkpoint is of stage 1 or of another model, or the backbone is none of ours.
    """
    check_options(out, size, batch_size, check)
    cfg = load_config(config)
    model = load_trained_model(cfg, checkpoint)
    network = model if is_classifier(cfg) else getattr(model, "backbone", model)
    return write_onnx(network, out, size=size, batch_size=batch_size, check=check)
