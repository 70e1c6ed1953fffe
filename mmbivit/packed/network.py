"""What packed networks share: plain values that rebuild them, and a name by which a file asks for their class."""

from dataclasses import asdict, fields
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from mmbivit.checks import UserError

from .kernels import KERNELS
from .plan import MOST_VALUES, Part, Plans

__all__ = ["NETWORKS", "PackedConfig", "PackedNetwork", "check_images", "packed_network"]

NETWORKS: dict[str, type["PackedNetwork"]] = {}  # by the name of the class, which packed files hold

Network = TypeVar("Network", bound=type["PackedNetwork"])


class PackedConfig:
    """Base of the configuration of a packed network: a frozen dataclass, whose ``__post_init__`` checks all values.

    Values are numbers, words, booleans and tuples of them. Lists, as JSON has them, become tuples. One of the fields is
    ``in_channels``, the channels of an image.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]  # subclasses are dataclasses

    def __post_init__(self) -> None:
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(value))


class PackedNetwork(nn.Module):
    """Base of packed networks; ``type(network)(**network.options)`` is an empty one for the same ``state_dict``.

    Args:
        options: the fields of ``Config``.

    Attributes:
        Config: the class's :class:`PackedConfig`.
        config: the network's.
    """

    Config: ClassVar[type[PackedConfig]]

    def __init__(self, **options: Any):
        super().__init__()
        self.config = self.Config(**options)
        self._plans: Plans | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": None}  # they hold addresses

    def planned(self, part: Part, x: Tensor, *sizes: int) -> tuple[Tensor, ...]:
        """Return ``part(x, *sizes)``, where possible by one native call.

        Args:
            part: a method that takes images, or tokens that it may change in place, and computes by operators of ours
                alone, whose results it returns. What else computes with them there is noticed by its result, if that is
                handed to one of our operators: then, and where ``x`` is large, forward hooks are registered, or the
                kernels do not run, the part runs operator by operator.
            x: images or tokens, contiguous.
            sizes: further arguments.
        """
        if (
            torch.compiler.is_compiling()
            or type(x) is not Tensor
            or not 0 < x.numel() <= MOST_VALUES
            or KERNELS.path_for(x) is None
        ):
            return part(x, *sizes)
        if self._plans is None or not self._plans.are_valid():
            self._plans = Plans(self)
        return self._plans.run(part, x, sizes)

    @property
    def options(self) -> dict[str, Any]:
        """The configuration as keyword arguments."""
        return asdict(self.config)


def packed_network(cls: Network) -> Network:
    """Let packed files and configs name a class of packed networks (a decorator)."""
    NETWORKS[cls.__name__] = cls
    return cls


def check_images(images: Tensor, channels: int) -> None:
    """Raise a ValueError for anything but float32 images ``(B, channels, H, W)``."""
    if images.ndim != 4 or images.shape[1] != channels or min(images.shape[2:]) < 1:
        raise UserError(f"images have shape {tuple(images.shape)}; expected (B, {channels}, H, W)")
    if images.dtype != torch.float32:
        raise UserError(f"images are {images.dtype}; packed networks take torch.float32 (normalised pixels)")
