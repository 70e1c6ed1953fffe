"""How much of a float layer's output the signs of its input and of its weights explain, inside and at the border."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.nn import functional as F

from mmbivit.apis.checkpoints import load_trained_model
from mmbivit.binary import binarize_weight, sign
from mmbivit.models.observation import observed

__all__ = ["LayerSigns", "PADDINGS", "explained", "layer_signs", "markdown_tables", "measure", "measure_config"]

# What a packed kernel can pad signs with, one bit a channel or bits of the map, beside zeros, which it cannot.
PADDINGS: Mapping[str, Callable[[Tensor, int], Tensor]] = {
    "+1": lambda signs, size: F.pad(signs, (size,) * 4, value=1.0),
    "-1": lambda signs, size: F.pad(signs, (size,) * 4, value=-1.0),
    "replicate": lambda signs, size: F.pad(signs, (size,) * 4, mode="replicate"),
    "reflect": lambda signs, size: F.pad(signs, (size,) * 4, mode="reflect"),
    "0 (not a bit)": lambda signs, size: F.pad(signs, (size,) * 4),
}
LAYERS = re.compile(
    r"neck\.fpn_convs\.\d+\.conv|rpn_head\.rpn_conv|roi_head\.(bbox_head\.shared_fcs\.\d+|mask_head\.convs\.\d+\.conv)"
)


@dataclass(frozen=True)
class LayerSigns:
    """Shares of the variance of a float layer's output, mean over its channels, that a linear fit explains.

    Args:
        input: by the input of the same channel, which a shortcut adds; ``None`` where widths differ.
        signs: by the product of the input's signs with the float weights.
        binary: by the product of both signs.
        binary_centred: the same, where inputs are compared with the mean of their channel instead of 0.
        border: by the product of both signs, at the border alone, by what the signs are padded with.
    """

    input: float | None
    signs: float
    binary: float
    binary_centred: float
    border: Mapping[str, float]


def measure_config(cfg: Config, checkpoint: str, images: int) -> dict[str, LayerSigns]:
    """Look at the float detector of a config while it runs on its first validation images; see :func:`measure`."""
    init_default_scope(cfg.get("default_scope", "mmdet"))
    model = load_trained_model(cfg, checkpoint)
    loader = dict(cfg.val_dataloader, batch_size=images, num_workers=0, persistent_workers=False)
    batch = model.data_preprocessor(next(iter(Runner.build_dataloader(loader, seed=0))))
    return measure(model, lambda: model(**batch, mode="predict"))


def measure(detector: nn.Module, run: Callable[[], object]) -> dict[str, LayerSigns]:
    """Look at the large layers of a float detector's neck and heads while it runs.

    Args:
        detector: of MMDetection, float.
        run: lets it run once, on a batch; of a layer that runs on several levels the first is taken.
    """
    layers = {name: layer for name, layer in detector.named_modules() if LAYERS.fullmatch(name)}
    inputs: dict[str, Tensor] = {}

    def see(name: str, args: tuple, output: Tensor) -> None:
        inputs.setdefault(name, args[0].clone())

    with torch.no_grad(), observed(layers, see):
        run()
    with torch.no_grad():
        return {name: layer_signs(layer, inputs[name]) for name, layer in layers.items()}


def layer_signs(layer: nn.Conv2d | nn.Linear, x: Tensor) -> LayerSigns:
    """Measure one layer on an input ``(B, C, H, W)`` or ``(B, C)``."""
    weight = layer.weight
    binary = binarize_weight(weight.flatten(1)).view_as(weight)
    axes = (0, 2, 3) if x.ndim == 4 else (0,)
    centred = sign(x - x.mean(axes, keepdim=True))
    if isinstance(layer, nn.Linear):
        y = F.linear(x, weight)
        products = [F.linear(signs, w) for signs, w in ((sign(x), weight), (sign(x), binary), (centred, binary))]
        border = {}
    else:
        size = layer.padding[0]
        y = F.conv2d(x, weight, None, layer.stride, size)
        pairs = ((sign(x), weight), (sign(x), binary), (centred, binary))
        products = [F.conv2d(signs, w, None, layer.stride, size) for signs, w in pairs]
        at_border = torch.ones(y.shape[2:], dtype=torch.bool)
        at_border[size:-size, size:-size] = False
        border = {
            name: explained(y, F.conv2d(pad(sign(x), size), binary, None, layer.stride), at_border)
            for name, pad in PADDINGS.items()
        }
    itself = explained(y, x) if x.shape == y.shape else None
    return LayerSigns(itself, *(explained(y, product) for product in products), border)


def explained(y: Tensor, z: Tensor, where: Tensor | None = None) -> float:
    """Return the share of the variance of ``y`` that ``a z + b`` explains, with the best a and b of each channel.

    Args:
        y: ``(B, C, ...)``.
        z: of the same shape.
        where: of the last two axes, where the share is taken; a and b are those of all places.
    """
    y, z = (t.transpose(0, 1).flatten(2) if t.ndim == 4 else t.T[:, :, None] for t in (y.double(), z.double()))
    centred_y, centred_z = (t - t.mean((1, 2), keepdim=True) for t in (y, z))
    slope = (centred_y * centred_z).sum((1, 2), keepdim=True) / centred_z.square().sum((1, 2), keepdim=True).clamp(
        1e-12
    )
    rest = centred_y - slope * centred_z
    if where is not None:
        places = where.flatten()
        rest, centred_y = rest[:, :, places], (y - y[:, :, places].mean((1, 2), keepdim=True))[:, :, places]
    return float((1 - rest.square().mean((1, 2)) / centred_y.square().mean((1, 2))).mean())


def markdown_tables(found: Mapping[str, LayerSigns]) -> str:
    """Format what was measured as two Markdown tables."""
    lines = ["| layer | input itself | signs, float weights | both signs | both, centred |", "|---|---|---|---|---|"]
    for name, row in found.items():
        itself = "" if row.input is None else f"{row.input:.2f}"
        lines.append(f"| `{name}` | {itself} | {row.signs:.2f} | {row.binary:.2f} | {row.binary_centred:.2f} |")
    lines += ["", f"| at the border, padded with | {' | '.join(PADDINGS)} |", f"|---|{'---|' * len(PADDINGS)}"]
    for name, row in found.items():
        if row.border:
            lines.append(f"| `{name}` | {' | '.join(f'{row.border[padding]:.2f}' for padding in PADDINGS)} |")
    return "\n".join(lines)
