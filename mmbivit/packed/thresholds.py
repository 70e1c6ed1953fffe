"""Integer thresholds: a sign of any function of an accumulator, as a comparison of integers.

A hidden unit of a binary network is ``Sign(f(theta * acc + b) - gamma)`` with ``acc = K - 2 * count``: a function of
the number of differing bits ``count``, which takes K + 1 values. It is computed for all of them once, in float64, and
what is left is where the bit is 0: one range of counts, taken around the circle of 32-bit integers. That covers

* a positive scale (0 above a count) and a negative one (0 below a count), as from BatchNorm with negative gain,
* RPReLU with negative slope and GELU, which fall and rise (0 in between),
* a negative BatchNorm gain behind such a function (0 on both sides),
* units that are always 1 (an empty range) or always 0.
"""

import torch
from torch import Tensor

from mmbivit.checks import UserError

__all__ = ["bits_from_counts", "count_thresholds"]


def count_thresholds(fires: Tensor) -> Tensor:
    """Turn tables of bits into thresholds: the bit is ``count - low >= width`` in unsigned 32-bit arithmetic.

    Args:
        fires: booleans ``(N, K + 1)``; column ``count`` has the bit of each unit where ``count`` bits differ.

    Returns:
        int32 ``(2, N)``: the bit patterns of ``low`` and ``width``.

    Raises:
        ValueError: if a unit's zeros are not one range on the circle; its function has several hills.
    """
    before = fires.roll(1, dims=1)
    starts = before & ~fires
    if len(several := (starts.sum(dim=1) > 1).nonzero()):
        raise UserError(
            f"the sign of unit {int(several[0])} changes more than twice over its {fires.shape[1]} possible inputs; "
            "packed layers know functions with one hill or valley, such as PReLU, RPReLU and GELU"
        )
    low = starts.to(torch.int64).argmax(dim=1)  # 0 where the bit never changes
    ones = fires.sum(dim=1)
    zeros = fires.shape[1] - ones
    # Zeros that go on from the last count to the first one take the way over 2^32; -1 is the widest range.
    wraps = low + zeros > fires.shape[1]
    width = torch.where(wraps, -ones, zeros)
    width = torch.where(ones == 0, -1, width)
    return torch.stack([low, width]).to(torch.int32)


def bits_from_counts(counts: Tensor, thresholds: Tensor) -> Tensor:
    """Apply thresholds ``(2, N)`` to counts of differing bits ``(*, N)``; returns booleans."""
    low, width = thresholds.to(torch.int64)
    return (counts.to(torch.int64) - low) % 2**32 >= width % 2**32
