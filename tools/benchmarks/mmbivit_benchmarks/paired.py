"""Paired comparisons: what a difference between two ways of training is worth over a few seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from statistics import mean, stdev

from scipy import stats

from mmbivit.checks import UserError

__all__ = ["PairedDifference", "compare_pairs"]


@dataclass(frozen=True)
class PairedDifference:
    """The difference of two arms over the same seeds.

    Attributes:
        each: difference of each seed.
        mean: their mean.
        half_width: of the 95 % interval of Student's t around the mean.
        p: of the sign-flip test: how many of all assignments of signs have a mean as far from 0. With n seeds it is
            never below ``2 / 2**n``.
    """

    each: tuple[float, ...]
    mean: float
    half_width: float
    p: float

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.mean + self.half_width


def compare_pairs(first: Sequence[float], second: Sequence[float]) -> PairedDifference:
    """Compare two arms, seed by seed: ``first - second``.

    Raises:
        ValueError: for different numbers of seeds, or fewer than two.
    """
    if len(first) != len(second) or len(first) < 2:
        raise UserError(f"{len(first)} and {len(second)} runs; a paired comparison needs as many of both, 2 or more")
    each = tuple(a - b for a, b in zip(first, second, strict=True))
    half_width = float(stats.t.ppf(0.975, len(each) - 1)) * stdev(each) / len(each) ** 0.5
    flips = [abs(mean(sign * value for sign, value in zip(signs, each, strict=True))) for signs in _signs(len(each))]
    observed = abs(mean(each))
    p = sum(flip >= observed * (1 - 1e-12) for flip in flips) / len(flips)
    return PairedDifference(each, mean(each), half_width, p)


def _signs(count: int) -> list[tuple[int, ...]]:
    return list(product((1, -1), repeat=count))
