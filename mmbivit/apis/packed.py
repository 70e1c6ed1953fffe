"""Packed files for the tools: export of a trained checkpoint, predictions and evaluation without it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DefaultScope
from rich.table import Table
from torch import Tensor, nn

from mmbivit.checks import UserError, check_integer
from mmbivit.deploy import load, pack, save
from mmbivit.deploy.header import SUFFIX, read_header
from mmbivit.engine.quiet import quiet
from mmbivit.files import check_writable

from .checkpoints import load_trained_model
from .classify import classify_files
from .config import load_config
from .images import MAX_PIXELS
from .predict import (
    check_out_dir,
    check_run_options,
    check_score_thr,
    find_images,
    is_packed_file,
    make_inferencer,
    write_detections,
)

__all__ = [
    "Export",
    "classify_packed",
    "detect_packed",
    "export_packed",
    "export_table",
    "load_into",
    "load_packed",
    "packed_kind",
    "use_packed_backbone",
]

BACKBONE = "backbone."


@dataclass(frozen=True)
class Export:
    """What an export made of a checkpoint.

    Attributes:
        kind: ``backbone``, ``classifier`` or ``detector``.
        float_bytes: weights and statistics of the checkpoint's network.
        float_backbone_bytes: those of its backbone.
        packed_bytes: the packed tensors.
        packed_backbone_bytes: those of the backbone.
        file_bytes: the packed file.
        difference: largest difference of the reloaded backbone's features from the simulated ones on a random image,
            relative to their largest value.
    """

    kind: str
    float_bytes: int
    float_backbone_bytes: int
    packed_bytes: int
    packed_backbone_bytes: int
    file_bytes: int
    difference: float


@quiet()
def export_packed(
    config: str | Path,
    checkpoint: str | Path,
    out: str | Path,
    backbone_only: bool = False,
    cfg_options: dict[str, Any] | None = None,
) -> Export:
    """Pack a trained detector or classifier into a file, reload that, and compare it with the simulated network.

    Args:
        config: the config file that the network was trained with.
        checkpoint: file or URL of the weights, from training stage 2.
        out: the packed file, ``*.safetensors``.
        backbone_only: leave the classifier's head or the detector's neck and heads out.
        cfg_options: changes of the config by dotted key.

    Raises:
        FileNotFoundError: if config or checkpoint does not exist.
        OSError: if ``out`` cannot be written, before anything is loaded.
        ValueError: if the checkpoint is of another network or of stage 1, or the network cannot be packed or stored.
    """
    if Path(out).suffix != SUFFIX:
        raise UserError(f"OUT {out}: a packed file is written in safetensors; expected a name that ends in {SUFFIX}")
    if is_packed_file(checkpoint):
        raise UserError(f"{checkpoint} is packed already; expected a checkpoint that tools/train.py wrote")
    check_writable("OUT", out)
    cfg = load_config(config, cfg_options)
    model = load_trained_model(cfg, checkpoint)
    packed = pack(model)
    save(packed.backbone if backbone_only else packed, out, cfg)
    reloaded = load(out)
    simulated, state = model.state_dict(), reloaded.state_dict()
    return Export(
        kind=read_header(out).kind,
        float_bytes=_bytes(simulated),
        float_backbone_bytes=_bytes(simulated, BACKBONE),
        packed_bytes=_bytes(state),
        packed_backbone_bytes=_bytes(state, "" if backbone_only else BACKBONE),
        file_bytes=Path(out).stat().st_size,
        difference=_difference(model.backbone, reloaded if backbone_only else reloaded.backbone),
    )


def export_table(export: Export) -> Table:
    """Make a table of the sizes that :func:`export_packed` returns, in MB (10^6 bytes)."""
    table = Table("MB", "float32", "packed", "smaller by")
    rows = [("backbone", export.float_backbone_bytes, export.packed_backbone_bytes)]
    whole = export.float_backbone_bytes
    if export.kind != "backbone":
        rest = export.packed_bytes - export.packed_backbone_bytes
        name = "head" if export.kind == "classifier" else "neck and heads"
        rows.append((f"{name}, as they are", export.float_bytes - export.float_backbone_bytes, rest))
        whole = export.float_bytes
    rows.append(("file", whole, export.file_bytes))
    for name, before, after in rows:
        table.add_row(name, f"{before / 1e6:.2f}", f"{after / 1e6:.2f}", f"{before / max(after, 1):.1f}x")
    for column in table.columns[1:]:
        column.justify = "right"
    table.caption = f"difference from simulated: {export.difference:.1e} (relative)"
    return table


def packed_kind(file: str | Path, **options: Any) -> str:
    """Return whether a packed file is of a ``classifier`` or a ``detector``, for tools that predict with it.

    Args:
        file: the packed file.
        options: value by ``<kind>_<name>`` of each option that only one kind has; ``None`` means that it is not given.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is of a backbone alone, or an option is for the other kind.
    """
    kind = read_header(file).kind
    if kind == "backbone":
        raise UserError(
            f"{file} is of a backbone alone, which predicts nothing; export the whole model, without --backbone-only"
        )
    for option, value in options.items():
        owner, _, name = option.partition("_")
        if owner != kind and value is not None:
            raise UserError(f"--{name.replace('_', '-')} is for {owner}s, and {file} is of a {kind}")
    return kind


@quiet()
def detect_packed(
    file: str | Path,
    images: Sequence[str | Path],
    out_dir: str | Path | None = None,
    score_thr: float = 0.3,
    batch_size: int = 1,
    max_pixels: int = MAX_PIXELS,
) -> list[Path]:
    """Detect objects with a packed detector on the CPU and write pictures and JSON, as :func:`predict` does.

    Raises:
        FileNotFoundError: if the file or an image does not exist.
        UnusableImagesError: after all others were predicted, if images cannot be read or have too many pixels.
        ValueError: if the file is of anything else or an option has no sense.
    """
    check_run_options(None, batch_size, max_pixels)
    check_score_thr(score_thr)
    check_out_dir(out_dir)
    files = find_images(images)
    model = load_packed(file, "detector")
    loader = dict(dataset=dict(pipeline=_pipeline(model, file)))
    cfg = Config(dict(test_dataloader=loader, visualizer=dict(type="DetLocalVisualizer", name="packed")))
    inferencer = make_inferencer(model, cfg, "cpu", max_pixels)
    return write_detections(inferencer, files, out_dir, score_thr, batch_size)


@quiet()
def classify_packed(
    file: str | Path,
    images: Sequence[str | Path],
    out_dir: str | Path | None = None,
    topk: int = 5,
    batch_size: int = 1,
    max_pixels: int = MAX_PIXELS,
) -> list[dict[str, Any]]:
    """Classify images with a packed classifier on the CPU and return what :func:`classify` does.

    Raises:
        FileNotFoundError: if the file or an image does not exist.
        UnusableImagesError: after all others were predicted, if images cannot be read or have too many pixels.
        ValueError: if the file is of anything else or an option has no sense.
    """
    check_integer("--topk", topk, 1)
    check_run_options(None, batch_size, max_pixels)
    if out_dir is not None:
        check_out_dir(out_dir)
    files = find_images(images, unique_names=out_dir is not None)
    model = load_packed(file, "classifier")
    model.topk = min(topk, model.head.out_features)
    with DefaultScope.overwrite_default_scope("mmengine"):
        transform = Compose(_pipeline(model, file))
    return classify_files(model, transform, files, out_dir, batch_size, max_pixels)


def load_packed(file: str | Path, kind: str) -> nn.Module:
    """Load a packed file of a certain kind.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it cannot be loaded, or is of another kind.
    """
    found = read_header(file).kind
    if found != kind:
        raise UserError(f"{file} is a packed {found}; expected a packed {kind}")
    return load(file)


def use_packed_backbone(cfg: Config, packed: nn.Module) -> None:
    """Replace the backbone in a model's config by that of a packed model."""
    cfg.model.backbone = dict(packed.backbone.options, type=f"mmbivit.{type(packed.backbone).__name__}")


def load_into(model: nn.Module, packed: nn.Module, file: str | Path) -> None:
    """Copy the tensors of a packed model into one that a config describes, and stay on the CPU, as the kernels do.

    Raises:
        ValueError: if the config's model is another one; the message names the first tensor that does not fit.
    """
    try:
        model.load_state_dict(packed.state_dict())
    except (RuntimeError, ValueError) as error:  # torch's list of all that does not fit, or of our own checks
        lines = [line.strip() for line in str(error).splitlines()]
        reason = lines[1] if len(lines) > 1 else lines[0]
        raise UserError(f"{file} does not fit the config's model: {reason[:300]}") from error
    model.dataset_meta = packed.dataset_meta
    model.to("cpu")


def _bytes(state: dict[str, Tensor], prefix: str = "") -> int:
    return sum(tensor.nbytes for name, tensor in state.items() if name.startswith(prefix))


@torch.no_grad()
def _difference(simulated: nn.Module, packed: nn.Module) -> float:
    images = torch.randn(
        1, simulated.patch_embed.proj.in_channels, 224, 224, generator=torch.Generator().manual_seed(0)
    )
    pairs = zip(simulated(images), packed(images), strict=True)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


def _pipeline(model: nn.Module, file: str | Path) -> list[dict[str, Any]]:
    if not model.cfg.test_dataloader:
        raise UserError(f"{file} has no transforms of test images; export it with a config that has a test_dataloader")
    return model.cfg.test_dataloader.dataset.pipeline
