"""TiMoE: who may answer, and that nobody else is heard."""

from __future__ import annotations

import math
from datetime import date

import numpy as np
import pytest
from ensemble_cases import SEEDS, log_probabilities, random_mask
from hypothesis import given
from hypothesis import strategies as st

from btx_megatron.ensembles.mixture import mix
from btx_megatron.ensembles.posterior import posterior_weights
from btx_megatron.ensembles.time_windows import Merge, allowed_experts, time_weights
from btx_megatron.errors import UserError
from btx_megatron.times import TimeWindow, parse_time, parse_time_window

YEARS = {
    "y13": TimeWindow(2013.0, 2014.0),
    "y17": TimeWindow(2017.0, 2018.0),
    "y15": TimeWindow(2015.0, 2016.0),
}
ENDS = [2014, 2018, 2016]
MERGES = st.sampled_from(["uniform", "posterior"])


@given(st.floats(2014, 2030))
def test_experts_answer_from_the_end_of_their_window_on(time: float) -> None:
    assert allowed_experts(YEARS, time).tolist() == [end <= time for end in ENDS]


def test_the_end_belongs_to_the_window_to_the_day() -> None:
    windows = {
        "a": parse_time_window("2013-01-01", "2014-12-31", "a"),
        "b": TimeWindow(date(2015, 1, 1), date(2016, 2, 29)),
    }
    assert allowed_experts(windows, date(2014, 12, 31)).tolist() == [True, False]
    assert allowed_experts(windows, date(2016, 2, 28)).tolist() == [True, False]
    assert allowed_experts(windows, date(2016, 2, 29)).tolist() == [True, True]
    with pytest.raises(UserError, match=r"time 2014-12-30: every expert's window ends later.*a 2014-12-31"):
        allowed_experts(windows, date(2014, 12, 30))


@given(SEEDS, st.lists(st.sampled_from([2014.0, 2016.5, 2020.0]), min_size=3, max_size=3), MERGES)
def test_the_merge_is_that_of_the_allowed_experts_alone(seed: int, times: list[float], merge: Merge) -> None:
    log_p, mask = log_probabilities(seed, windows=3), random_mask(seed, windows=3)
    mixed = mix(log_p, time_weights(log_p, mask, YEARS, times, merge), mask)
    for w, s in np.ndindex(mask.shape):
        experts = [e for e in range(3) if ENDS[e] <= times[w]]
        belief = [1 / len(experts)] * len(experts)
        if merge == "posterior":
            said = [math.exp((log_p[e, w, :s] * mask[w, :s]).sum()) for e in experts]
            belief = [value / sum(said) for value in said]
        plain = sum(b * math.exp(log_p[e, w, s]) for b, e in zip(belief, experts, strict=True))
        assert mixed[w, s] == pytest.approx(math.log(plain) if mask[w, s] else 0)


@given(
    SEEDS, st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1e300]), MERGES, st.sampled_from([None, 1, 2])
)
def test_no_masked_expert_influences_an_output(
    seed: int, garbage: float, merge: Merge, top_k: int | None
) -> None:
    """What the masked experts said is replaced; weights and outputs are the same to the bit."""
    log_p, mask = log_probabilities(seed, windows=3), random_mask(seed, windows=3)
    times = [2014.0, 2016.0, 2018.0]
    spoilt = log_p.copy()
    for w, time in enumerate(times):
        spoilt[[end > time for end in ENDS], w] = garbage
    outputs = []
    for p in (log_p, spoilt):
        log_w = time_weights(p, mask, YEARS, times, merge, top_k)
        outputs.append((log_w.tobytes(), mix(p, log_w, mask).tobytes()))
    assert outputs[0] == outputs[1]


@given(SEEDS, MERGES)
def test_an_allowed_expert_does_influence(seed: int, merge: Merge) -> None:
    """The counterpart: the test above would see it."""
    log_p, mask = log_probabilities(seed, windows=1), np.ones((1, 5))
    changed = log_p - np.array([0, 0, 0.5]).reshape(3, 1, 1)
    a, b = (mix(p, time_weights(p, mask, YEARS, [2016.0], merge), mask) for p in (log_p, changed))
    assert not np.array_equal(a, b)


@given(SEEDS, MERGES)
def test_with_all_allowed_it_is_the_plain_ensemble(seed: int, merge: Merge) -> None:
    log_p, mask = log_probabilities(seed), random_mask(seed)
    log_w = time_weights(log_p, mask, YEARS, [2030.0, 2018.0], merge)
    plain = np.full(log_p.shape, -math.log(3)) if merge == "uniform" else posterior_weights(log_p, mask)
    assert log_w == pytest.approx(plain)
    order = [1, 2, 0]
    turned = {name: YEARS[name] for name in np.array(list(YEARS))[order]}
    assert time_weights(log_p[order], mask, turned, [2030.0, 2018.0], merge) == pytest.approx(log_w[order])


def test_top_k_of_fewer_allowed_keeps_all_of_them() -> None:
    log_w = time_weights(log_probabilities(0), random_mask(0), YEARS, [2014.0, 2020.0], top_k=2)
    assert (np.exp(log_w) > 0).sum(axis=0)[:, 0].tolist() == [1, 2]


def test_all_masked_says_what_to_do() -> None:
    with pytest.raises(UserError, match=r"time 2013: .* \(y13 2014, y17 2018, y15 2016\); give a later time"):
        time_weights(log_probabilities(0), random_mask(0), YEARS, [2020.0, 2013.0])


@pytest.mark.parametrize(
    ("value", "time"),
    [
        (2014, 2014.0),
        ("2014", 2014.0),
        (2014.5, 2014.5),
        ("2014-12-31", date(2014, 12, 31)),
        (date(2014, 12, 31), date(2014, 12, 31)),
    ],
)
def test_times(value: object, time: object) -> None:
    assert parse_time(value, "here") == time
    assert type(parse_time(value, "here")) is type(time)


@pytest.mark.parametrize("value", ["soon", "2014-13-01", "nan", "inf", True, None, ""])
def test_no_times(value: object) -> None:
    with pytest.raises(UserError, match=r"here: .* is no time; give a number"):
        parse_time(value, "here")


def test_windows_that_cannot_be() -> None:
    with pytest.raises(UserError, match="math: starts at 2016 and ends at 2015"):
        parse_time_window(2016, 2015, "math")
    with pytest.raises(UserError, match="math: 2016 and 2017-01-01 cannot be compared"):
        parse_time_window(2016, "2017-01-01", "math")
    with pytest.raises(UserError, match="expert y13: end: 2014 and 2020-01-01 cannot be compared"):
        allowed_experts(YEARS, date(2020, 1, 1))
    with pytest.raises(ValueError, match="3 time windows, 1 times"):
        time_weights(log_probabilities(0), random_mask(0), YEARS, [2020.0])
