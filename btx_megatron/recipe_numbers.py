"""What a recipe's numbers must satisfy one by one; ``key`` is where they stand in it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence


def at_least(key: str, values: object, least: int, names: Sequence[str]) -> Iterator[str]:
    """A problem for each of the named fields of ``values`` that is below ``least``; None is none."""
    for name in names:
        value = getattr(values, name)
        if value is not None and not value >= least:  # not >=: refuses nan too
            yield f"{key}.{name} {value}: must be at least {least}"


def positive(key: str, values: object, names: Sequence[str]) -> Iterator[str]:
    """A problem for each of the named fields of ``values`` that is not a number above 0; None is none."""
    for name in names:
        value = getattr(values, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            yield f"{key}.{name} {value}: must be above 0"


def divisors(number: int) -> str:
    """``1, 2, 3, 6`` of 6."""
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
