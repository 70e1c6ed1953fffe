"""Checks of what is packed, with errors that name the module."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from mmbivit.binary import ActivationQuantizer, BinaryLinear, Quantizer
from mmbivit.checks import UserError
from mmbivit.models import Backbone

__all__ = ["check_backbone", "expect", "named"]


@contextmanager
def named(name: str) -> Iterator[None]:
    """Put the name of a module in front of errors."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{name} {error}") from None


def expect(module: nn.Module, name: str, *types: type) -> None:
    """Raise a ValueError for a module of another class."""
    if type(module) not in types:
        expected = " or ".join(t.__name__ for t in types)
        raise UserError(f"{name} is {type(module).__name__}; only {expected} can be packed here")


def check_backbone(backbone: Backbone, known: tuple[type, ...]) -> None:
    """Raise a ValueError for a backbone in an earlier stage, and for modules that packing would leave out silently.

    Args:
        backbone: what is to be packed.
        known: the classes of modules that its packer packs, or may leave out in evaluation.
    """
    kind = type(backbone).__name__
    if backbone.stage != backbone.last_stage:
        raise UserError(
            f"{kind} is in training stage {backbone.stage}; train on to stage {backbone.last_stage}, then pack"
        )
    if not any(isinstance(module, BinaryLinear) for module in backbone.modules()):
        raise UserError(f"{kind} has no binary layer; pack() takes a binary recipe")
    for name, module in backbone.named_modules():
        if isinstance(module, ActivationQuantizer):
            with named(name):
                module.fold()  # it may refuse
        elif not isinstance(module, Quantizer) and type(module) not in known:
            raise UserError(f"{name} is {type(module).__name__}, which pack() does not know")
