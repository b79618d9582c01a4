"""Intervals against SciPy's Student distribution, and verdicts against what they are said to mean."""

from __future__ import annotations

import math
import statistics
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from btx_megatron.comparison.statistics import Spread, difference, verdict

values = st.lists(st.floats(-10, 10).map(lambda x: round(x, 3)), min_size=2, max_size=16)


@given(values)
def test_the_interval_is_students(numbers: list[float]) -> None:
    spread = Spread(tuple(numbers))
    deviation = statistics.stdev(numbers)
    assert spread.mean == pytest.approx(statistics.mean(numbers), abs=1e-12)
    assert spread.deviation == pytest.approx(deviation, abs=1e-9)
    quantile = stats.t.ppf(0.975, len(numbers) - 1)
    assert spread.half_width == pytest.approx(
        quantile * deviation / math.sqrt(len(numbers)), rel=1e-3, abs=1e-9
    )


def test_many_random_seeds_have_an_interval_that_is_too_wide_not_too_narrow() -> None:
    spread = Spread(tuple(float(i % 2) for i in range(40)))
    assert spread.deviation is not None
    exact = stats.t.ppf(0.975, 39) * spread.deviation / math.sqrt(40)
    assert exact <= spread.half_width < 1.06 * exact


def test_one_random_seed_decides_nothing() -> None:
    spread = Spread((-5.0,))
    assert spread.deviation is None
    assert spread.half_width == math.inf
    assert verdict(spread, "lower") == verdict(spread, "higher") == "undecided"
    assert verdict(spread, "equal", within=100) == "undecided"


@pytest.mark.parametrize(
    ("numbers", "expect", "within", "told"),
    [
        ((-1.0, -1.1, -0.9), "lower", 0, "seen"),
        ((-1.0, -1.1, -0.9), "higher", 0, "not seen"),
        ((-1.0, -1.1, -0.9), "equal", 0.5, "not seen"),
        ((-1.0, -1.1, -0.9), "equal", 1.1, "undecided"),
        ((-1.0, -1.1, -0.9), "equal", 2, "seen"),
        ((1.0, 1.1, 0.9), "lower", 0, "not seen"),
        ((1.0, 1.1, 0.9), "higher", 0, "seen"),
        ((1.0, -1.0, 0.1), "lower", 0, "undecided"),
        ((1.0, -1.0, 0.1), "equal", 0.5, "undecided"),
        ((0.0, 0.0, 0.0), "lower", 0, "undecided"),
        ((0.0, 0.001, -0.001), "equal", 0.01, "seen"),
    ],
)
def test_verdicts(numbers: tuple[float, ...], expect: str, within: float, told: str) -> None:
    assert verdict(Spread(numbers), expect, within) == told  # type: ignore[arg-type]


@given(values, st.floats(0.001, 5))
def test_a_prediction_and_its_opposite(numbers: list[float], within: float) -> None:
    spread, mirrored = Spread(tuple(numbers)), Spread(tuple(-number for number in numbers))
    assert verdict(spread, "lower") == verdict(mirrored, "higher")
    assert verdict(spread, "equal", within) == verdict(mirrored, "equal", within)
    if verdict(spread, "lower") == "seen":
        assert verdict(spread, "higher") == "not seen"


@pytest.mark.parametrize("expect", ["lower", "higher", "equal"])
def test_one_model_under_every_random_seed_decides_nothing(
    expect: Literal["lower", "higher", "equal"],
) -> None:
    """Imported models are the same under all: nothing was drawn."""
    assert verdict(Spread((-0.1, -0.1, -0.1)), expect, 0.2) == "undecided"


def test_differences_are_within_each_random_seed() -> None:
    assert difference([1.0, 2.0], [0.5, 3.0]).values == (0.5, -1.0)
    with pytest.raises(ValueError, match="zip"):
        difference([1.0], [1.0, 2.0])
