"""Packers by class of network."""

from collections.abc import Callable
from typing import TypeVar

from torch import nn

__all__ = ["PACKERS", "packs"]

Packer = TypeVar("Packer", bound=Callable[..., nn.Module])

# By the exact class: a subclass may compute something else.
PACKERS: dict[type[nn.Module], Callable[[nn.Module], nn.Module]] = {}


def packs(cls: type[nn.Module]) -> Callable[[Packer], Packer]:
    """Register what packs networks of a class (a decorator).

    It gets the trained network, does not change it, and returns the packed one, or raises a ``ValueError`` that names
    the module that cannot be packed. A backbone becomes a :class:`mmbivit.packed.PackedNetwork`.
    """

    def register(packer: Packer) -> Packer:
        PACKERS[cls] = packer
        return packer

    return register
