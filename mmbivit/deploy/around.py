"""Packing of what is around a backbone: the binary layers of necks and heads, and float layers at their fastest."""

import copy
from collections.abc import Collection

import torch
from torch import Tensor, nn

from mmbivit.binary import BinaryLayer
from mmbivit.checks import UserError
from mmbivit.models import ImageClassifier
from mmbivit.packed.modules import PackedModule

from .packers.checks import named
from .packers.convolution import pack_started_linear
from .registry import PACKERS

__all__ = ["BACKBONE", "pack_around", "packed_layers"]

BACKBONE = "backbone"  # name of the part that is packed as a whole


def pack_around(model: nn.Module, backbone: nn.Module, layers: Collection[str] | None = None) -> nn.Module:
    """Return a copy of a model with a packed backbone and packed layers, in evaluation.

    What is float stays so, and so does a binary layer of a class that has no packer. Convolutions lay their maps out
    with channels last, as packed ones do, and regions of maps are pooled by a native kernel.

    Args:
        model: a classifier or detector; it is not changed.
        backbone: the packed one.
        layers: names of the layers to pack; all that can be, by default.

    Raises:
        ValueError: for a layer of an earlier training stage, or a name of none that can be packed.
    """
    found = _binary_layers(model)
    if unknown := sorted(set(layers or ()) - found.keys()):
        raise UserError(f"{unknown[0][:64]!r} is no layer of {type(model).__name__} that can be packed")
    orders = _map_orders(model)
    memo: dict[int, nn.Module] = {id(model.backbone): backbone}
    for name, layer in found.items():
        if layers is None or name in layers:
            with named(name):
                memo[id(layer)] = (
                    pack_started_linear(layer, orders[name]) if name in orders else PACKERS[type(layer)](layer)
                )
    # What is replaced is not copied, only to be thrown away.
    copied = copy.deepcopy(model, memo=memo).eval()
    if not isinstance(copied, ImageClassifier):
        from mmbivit.models.detection.native import use_native

        for name, part in copied.named_children():
            if name != BACKBONE:
                part.to(memory_format=torch.channels_last)
                use_native(part)
    return copied


def packed_layers(model: nn.Module) -> list[str]:
    """Return the names of the packed layers around the backbone of a model."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, PackedModule) and not name.startswith(f"{BACKBONE}.")
    ]


def _binary_layers(model: nn.Module) -> dict[str, BinaryLayer]:
    """Return the layers around the backbone that have a packer, by name."""
    if any(getattr(module, "is_part", False) for module in model.modules()):
        from .packers import staged  # noqa: F401  it registers a layer that needs MMDetection
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BinaryLayer) and type(module) in PACKERS and not name.startswith(f"{BACKBONE}.")
    }


def _map_orders(model: nn.Module) -> dict[str, Tensor]:
    """Return the order of inputs of linear layers that take flattened maps, by name."""
    heads = {name: module for name, module in model.named_modules() if hasattr(module, "map_order")}
    orders = {f"{name}.shared_fcs.0": head.map_order() for name, head in heads.items()}
    return {name: order for name, order in orders.items() if order is not None}
