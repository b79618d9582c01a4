"""Means over random seeds, and what a few seeds can say about a difference.

Two rows of one random seed share seed model, experts and order of the data, so differences are taken within
each random seed, and it is their spread that counts: with d_1 .. d_n and their standard deviation s (n - 1 in
the denominator), Student's interval mean +- t s / sqrt(n), which holds the expected difference with 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom; above the last, of the last: wider
_T = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
)

Verdict = Literal["seen", "not seen", "undecided"]


@dataclass(frozen=True)
class Spread:
    """A value over random seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean."""
        return sum(self.values) / len(self.values)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of one value, n - 1 in the denominator; None of a single one."""
        if len(self.values) < 2:
            return None
        return math.sqrt(sum((value - self.mean) ** 2 for value in self.values) / (len(self.values) - 1))

    @property
    def half_width(self) -> float:
        """Half of the 95 % interval of the mean; infinite where there is one value."""
        if self.deviation is None:
            return math.inf
        return _T[min(len(self.values) - 1, len(_T)) - 1] * self.deviation / math.sqrt(len(self.values))


def difference(first: Sequence[float], second: Sequence[float]) -> Spread:
    """First minus second, random seed by random seed."""
    return Spread(tuple(a - b for a, b in zip(first, second, strict=True)))


def verdict(spread: Spread, expect: Literal["lower", "higher", "equal"], within: float = 0.0) -> Verdict:
    """What a difference (the first row's value minus the second's) says of a prediction.

    lower, higher: seen where the whole 95 % interval has that sign, not seen where it has the other. equal:
    seen where the interval is inside +-``within``, not seen where it is outside. Else undecided, and so where
    all random seeds say exactly the same: they are no samples then.
    """
    if len(spread.values) > 1 and len(set(spread.values)) == 1:
        return "undecided"
    low, high = spread.mean - spread.half_width, spread.mean + spread.half_width
    if expect == "equal":
        if -within <= low and high <= within:
            return "seen"
        return "not seen" if low > within or high < -within else "undecided"
    if expect == "higher":
        low, high = -high, -low
    if high < 0:
        return "seen"
    return "not seen" if low > 0 else "undecided"
