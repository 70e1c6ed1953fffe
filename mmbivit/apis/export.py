"""Export of trained networks: packed files, and ONNX."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from mmbivit.checks import UserError
from mmbivit.deploy import load, pack, save
from mmbivit.deploy.header import SUFFIX, read_header
from mmbivit.deploy.onnx_export import OnnxComparison, check_options, write_onnx
from mmbivit.engine.quiet import quiet
from mmbivit.files import check_writable
from mmbivit.packed.modules import PackedModule

from .checkpoints import load_trained_model
from .config import is_classifier, load_config
from .route import is_packed_file

__all__ = ["Export", "export_onnx", "export_packed", "export_table"]

BACKBONE = "backbone."


@dataclass(frozen=True)
class Part:
    """What an export made of the backbone, the neck or a head.

    Attributes:
        name: of the module.
        float_bytes: its weights and statistics before.
        packed_bytes: its tensors in the packed model.
        packed_layers: how many of its layers run on bits; ``None`` for a backbone, which is packed as a whole.
        float_layers: how many run in float.
    """

    name: str
    float_bytes: int
    packed_bytes: int
    packed_layers: int | None
    float_layers: int


@dataclass(frozen=True)
class Export:
    """What an export made of a checkpoint.

    Attributes:
        kind: ``backbone``, ``classifier`` or ``detector``.
        float_bytes: weights and statistics of the checkpoint's network.
        float_backbone_bytes: those of its backbone.
        packed_bytes: the packed tensors.
        packed_backbone_bytes: those of the backbone.
        parts: backbone, neck and heads.
        file_bytes: the packed file.
        difference: largest difference of the reloaded backbone's features from the simulated ones on a random image,
            relative to their largest value.
    """

    kind: str
    float_bytes: int
    float_backbone_bytes: int
    packed_bytes: int
    packed_backbone_bytes: int
    parts: tuple[Part, ...]
    file_bytes: int
    difference: float


@quiet()
def export_packed(
    config: str | Path,
    checkpoint: str | Path,
    out: str | Path,
    backbone_only: bool = False,
    cfg_options: dict[str, Any] | None = None,
    half: bool = False,
) -> Export:
    """Pack a trained detector or classifier into a file, reload that, and compare it with the simulated network.

    Args:
        config: the config file that the network was trained with.
        checkpoint: file or URL of the weights, from training stage 2.
        out: the packed file, ``*.safetensors``.
        backbone_only: leave the classifier's head or the detector's neck and heads out.
        cfg_options: changes of the config by dotted key.
        half: store the weights of float layers in neck and heads in 16 bits.

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
    save(packed.backbone if backbone_only else packed, out, cfg, half)
    reloaded = load(out)
    simulated, state = model.state_dict(), reloaded.state_dict()
    return Export(
        kind=read_header(out).kind,
        float_bytes=_bytes(simulated),
        float_backbone_bytes=_bytes(simulated, BACKBONE),
        packed_bytes=_bytes(state),
        packed_backbone_bytes=_bytes(state, "" if backbone_only else BACKBONE),
        parts=_parts(model, packed, backbone_only),
        file_bytes=Path(out).stat().st_size,
        difference=_difference(model.backbone, reloaded if backbone_only else reloaded.backbone),
    )


def export_table(export: Export) -> Table:
    """Make a table of the sizes that :func:`export_packed` returns, in MB (10^6 bytes), and of what runs how."""
    table = Table("MB", "float32", "packed", "smaller by", "layers on bits", "in float")
    for part in export.parts:
        layers = ("all", "") if part.packed_layers is None else (f"{part.packed_layers}", f"{part.float_layers}")
        table.add_row(*_size_row(part.name.removeprefix("roi_head."), part.float_bytes, part.packed_bytes), *layers)
    whole = export.float_bytes if len(export.parts) > 1 else export.float_backbone_bytes
    table.add_row(*_size_row("file", whole, export.file_bytes))
    for column in table.columns[1:]:
        column.justify = "right"
    table.caption = f"backbone's difference from simulated: {export.difference:.1e} (relative)"
    return table


def _size_row(name: str, before: int, after: int) -> tuple[str, ...]:
    return name, f"{before / 1e6:.2f}", f"{after / 1e6:.2f}", f"{before / max(after, 1):.1f}x"


def _parts(model: nn.Module, packed: nn.Module, backbone_only: bool) -> tuple[Part, ...]:
    """Describe backbone, neck and heads before and after packing."""
    names = ["backbone"]
    for name, child in model.named_children() if not backbone_only else ():
        inner = [
            f"{name}.{part}" for part, module in child.named_children() if name == "roi_head" and _has_layers(module)
        ]
        names += inner or ([name] if name not in names and _has_layers(child) else [])
    found = []
    for name in names:
        before, after = model.get_submodule(name), packed.get_submodule(name)
        layers = [module for module in after.modules() if not list(module.children())]
        on_bits = None if name == "backbone" else sum(isinstance(layer, PackedModule) for layer in layers)
        in_float = sum(any(True for _ in layer.parameters()) for layer in layers)
        found.append(Part(name, _bytes(before.state_dict()), _bytes(after.state_dict()), on_bits, in_float))
    return tuple(found)


def _has_layers(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _bytes(state: dict[str, Tensor], prefix: str = "") -> int:
    return sum(tensor.nbytes for name, tensor in state.items() if name.startswith(prefix))


@torch.no_grad()
def _difference(simulated: nn.Module, packed: nn.Module) -> float:
    images = torch.randn(1, simulated.in_channels, 224, 224, generator=torch.Generator().manual_seed(0))
    pairs = zip(simulated(images), packed(images), strict=True)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


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
