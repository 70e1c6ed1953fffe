"""A place in a running network whose values are compared."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

__all__ = ["Place", "Places"]


@dataclass(frozen=True)
class Place:
    """Where a running network is looked at.

    Args:
        module: whose calls are seen.
        take: picks what is compared out of the arguments and the output of a call. It may give it another shape, but
            computes nothing: a block that is computed again in the backward pass must do the same without it.
    """

    module: nn.Module
    take: Callable[[tuple, Any], Tensor] = lambda args, output: output


Places = dict[str, Place]
