"""What every operator of packed networks does with its arguments: checks, addresses, and its registration.

The native kernels derive every size from the shapes that are checked here, so a wrong one must not get through.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import kernels
from .packing import LANES, num_blocks, num_words

__all__ = [
    "MOST_TOKENS",
    "SELECTIONS",
    "Layout",
    "check_inputs",
    "check_layout",
    "check_pair",
    "check_positive",
    "check_selection",
    "check_tensor",
    "check_weight",
    "define",
    "fake_in_place",
    "large_windows",
    "native_path",
    "read_layout",
    "register",
]

MOST_TOKENS = 128 * 128  # 16,384 of a window: an image of 512 pixels in patches of 4
FEW_TOKENS = 100  # of a window; where one has more, threads share its channels
MOST_HEAD_CHANNELS = 31 * 32  # whose differing bits the kernels count in bytes
# The order of `enum SelectionKind` in csrc/kernels.h.
SELECTIONS = ("below_best", "above", "share")
OTHER_DEVICE = "the first argument is on the CPU and another one is not; move them to one device"
ELSEWHERE = -1  # in place of the address of a tensor that is not in the memory of the CPU


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> int:
    """Raise unless a tensor has the shape and dtype and is contiguous; returns its address, if that is ours to read."""
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)}; expected {dtype} {shape} to fit the other arguments"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous; call .contiguous() first")
    return tensor.data_ptr() if tensor.is_cpu else ELSEWHERE


def check_inputs(x: Tensor, normed: Tensor | None) -> tuple[int, int]:
    """Check what an operator changes in place, and what it signs; returns both addresses."""
    address = check_tensor("x", x, tuple(x.shape))
    return address, address if normed is None else check_tensor("normed", normed, tuple(x.shape))


def check_pair(name: str, tensor: Tensor, size: int, dtype: torch.dtype = torch.float32) -> tuple[int, int]:
    """Check a ``(2, size)`` tensor; returns the addresses of both rows."""
    start = check_tensor(name, tensor, (2, size), dtype)
    return start, ELSEWHERE if start == ELSEWHERE else start + size * tensor.element_size()


def check_weight(name: str, weight: Tensor, n: int, k: int) -> int:
    """Check the packed weight of a layer ``k -> n``; returns its address."""
    return check_tensor(name, weight, (num_blocks(n), num_words(k), LANES), torch.int32)


def check_positive(**sizes: int) -> None:
    """Raise unless all sizes are 1 or more."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size}; allowed: 1 or more")


@dataclass(frozen=True)
class Layout:
    """How tokens lie in windows, as operators are told by a list of numbers.

    Args:
        height: of the grid of tokens.
        width: of the grid.
        window_height: tokens along a window.
        shift: cyclic shift of the windows, in tokens; of square windows alone.
        mask_padding: whether real tokens do not see padding.
        window_width: where windows are not square.
    """

    height: int
    width: int
    window_height: int
    shift: int
    mask_padding: int
    window_width: int

    @property
    def tokens(self) -> int:
        """Tokens of a window."""
        return self.window_height * self.window_width

    @property
    def windows(self) -> int:
        """Windows of an image."""
        return -(-self.height // self.window_height) * -(-self.width // self.window_width)

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers in the order of `struct Layout`, without the batch."""
        return self.height, self.width, self.window_height, self.window_width, self.shift, self.mask_padding


def read_layout(layout: Sequence[int]) -> Layout:
    """Read height, width, window, shift, mask_padding, and where windows are not square, their width."""
    if len(layout) not in (5, 6):
        raise ValueError(f"layout has {len(layout)} numbers; expected 5, or 6")
    return Layout(*layout, *(layout[2:3] if len(layout) == 5 else ()))


def check_layout(x: Tensor, layout: Sequence[int]) -> Layout:
    """Raise unless tokens ``(B, height * width, C)`` lie as ``layout`` says, in windows that are not too large."""
    if x.ndim != 3:
        raise ValueError(f"x has {x.ndim} axes; expected 3")
    found = read_layout(layout)
    if x.shape[1] != found.height * found.width or min(found.height, found.width) < 1:
        raise ValueError(f"x has {x.shape[1]} tokens; layout says {found.height} x {found.width}")
    sides = found.window_height, found.window_width
    if min(sides) < 1 or found.tokens > MOST_TOKENS or not 0 <= found.shift < min(sides):
        raise ValueError(
            f"window {sides[0]} x {sides[1]} and shift {found.shift}; expected 0 <= shift < window, and up to "
            f"{MOST_TOKENS} tokens"
        )
    if found.shift and sides[0] != sides[1]:
        raise ValueError(f"window {sides[0]} x {sides[1]} and shift {found.shift}; expected 0 where it is not square")
    return found


def check_selection(selection: str, step: Tensor, limit: Tensor, heads: int, head_dim: int) -> tuple[int, int, int]:
    """Check how keys are selected; returns what the kernels take: two addresses, and the number of ``selection``."""
    if head_dim > MOST_HEAD_CHANNELS:
        raise ValueError(f"head_dim={head_dim}; allowed: up to {MOST_HEAD_CHANNELS}")
    if selection not in SELECTIONS:
        raise ValueError(f"selection={selection!r}; allowed: {', '.join(SELECTIONS)}")
    return (
        check_tensor("step", step, (heads,)),
        check_tensor("limit", limit, (heads,)),
        SELECTIONS.index(selection),
    )


def large_windows(x: Tensor, layout: Layout, rows: int, dtype: torch.dtype) -> Tensor | None:
    """Make room ``(windows, pairs of blocks, 2, rows, 16)`` for the hidden layer of large windows; ``None`` if small.

    Where windows are so large that whole ones are too few to share out, or fewer than threads, threads share their
    channels.
    """
    windows = len(x) * layout.windows
    if layout.tokens <= FEW_TOKENS and windows >= torch.get_num_threads():
        return None
    return x.new_empty((windows, (num_blocks(x.shape[2]) + 1) // 2, 2, rows, LANES), dtype=dtype)


def native_path(x: Tensor, addresses: Sequence[int | None]) -> int | None:
    """Return the native path for ``x``; raises if there is one and an argument is on another device."""
    path = kernels.KERNELS.path_for(x)
    if path is not None and ELSEWHERE in addresses:
        raise ValueError(OTHER_DEVICE)
    return path


def define(schema: str) -> None:
    """Define ``torch.ops.mmbivit.NAME`` by its schema."""
    name, arguments = schema.split("(", 1)
    torch.library.define(f"mmbivit::{name}", f"({arguments}", tags=(torch.Tag.pt2_compliant_tag,))


def fake_in_place(x: Tensor, *args: Any, **options: Any) -> None:
    """Stand for an operator that changes its first argument."""
    return None


def register(*operators: tuple[Callable, Callable]) -> None:
    """Register functions, each with the fake that says the shape of its result."""
    for function, fake in operators:
        name = f"mmbivit::{function.__name__}"
        torch.library.impl(name, "CompositeExplicitAutograd", function)
        torch.library.register_fake(name, _checked(fake))


def _checked(fake: Callable) -> Callable:
    """Refuse what torch hands to a fake although the first argument is real: a mixture with tensors on meta."""

    def checked(x: Tensor, *args: Any, **options: Any) -> Any:
        if type(x) is Tensor and not x.is_meta:
            raise ValueError(OTHER_DEVICE)
        return fake(x, *args, **options)

    return checked
