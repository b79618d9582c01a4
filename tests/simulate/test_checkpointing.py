"""Checkpoint intervals and expected times against the published ones, and the simulation against these."""

from __future__ import annotations

import math
from statistics import fmean

import pytest

from btx_megatron.simulate.assumptions import Assumptions
from btx_megatron.simulate.checkpointing import daly_interval, expected_time, young_interval
from btx_megatron.simulate.cluster import simulate
from btx_megatron.simulate.jobs import make_job

# A job of 10 nodes that fails every 12.5 hours, and nothing but failures.
NODES = 10
BASE = {"gpu_mtbf_hours": 1000.0, "queue_minutes": 0.0, "restart_minutes": 20.0, "slow_node_share": 0.0}
MTBF, RESTART, CHECKPOINT = 12.5, 1 / 3, 0.1


def mean_hours(seeds: int, hours: float, **settings: float | None) -> float:
    """Mean time of the job from its first start to its end, without that start."""
    assumptions = Assumptions(**(BASE | {"checkpoint_seconds": 360.0} | settings))  # type: ignore[arg-type]
    job = make_job("job", (), NODES, hours, assumptions)
    records = [simulate([job], NODES, assumptions, seed)["job"] for seed in range(seeds)]
    return fmean(record.end - record.begin for record in records) - assumptions.restart_hours


@pytest.mark.parametrize(("mtbf", "optimum"), [(24.0, 117), (6.0, 57), (0.25, 9.1)])
def test_optimum_of_daly_s_figures(mtbf: float, optimum: float) -> None:
    """Captions of figures 3 to 5: 5 minutes a dump."""
    assert 60 * daly_interval(mtbf, 5 / 60) == pytest.approx(optimum, rel=0.006)


def test_where_intervals_end() -> None:
    assert daly_interval(1.0, 2.0) == 1.0
    assert daly_interval(math.inf, 0.1) == math.inf
    assert young_interval(8.0, 1.0) == 4.0
    assert daly_interval(1e6, 1e-3) == pytest.approx(young_interval(1e6, 1e-3), rel=1e-3)


@pytest.mark.parametrize("interval", [0.4, 1.5, 6.0])
def test_simulated_mean_is_daly_s_expected_time(interval: float) -> None:
    """His formula, written out: M exp(R/M) (exp((t + d)/M) - 1) Ts / t."""
    hours = 300.0
    daly = MTBF * math.exp(RESTART / MTBF) * (math.exp((interval + CHECKPOINT) / MTBF) - 1) * hours / interval
    assert mean_hours(400, hours, checkpoint_interval_minutes=60 * interval) == pytest.approx(daly, rel=0.015)
    closed = expected_time(hours, round(hours / interval), CHECKPOINT, RESTART, 0.0, MTBF)
    assert closed == pytest.approx(daly, rel=1e-9)


def test_simulated_mean_with_a_queue() -> None:
    """A wait before each restart, in which nothing fails, comes once a failure."""
    closed = expected_time(300.0, 150, CHECKPOINT, RESTART, 1.5, MTBF)
    simulated = mean_hours(400, 300.0, checkpoint_interval_minutes=120.0, queue_minutes=90.0)
    assert simulated == pytest.approx(closed, rel=0.015)


def test_the_least_time_is_at_the_optimum() -> None:
    """Of intervals from a quarter to four times Daly's his is the best, and the default."""
    optimum = 60 * daly_interval(MTBF, CHECKPOINT)
    times = {
        factor: mean_hours(300, 300.0, checkpoint_interval_minutes=factor * optimum)
        for factor in (0.25, 0.5, 1.0, 2.0, 4.0)
    }
    assert min(times, key=times.__getitem__) == 1.0
    assert mean_hours(300, 300.0, checkpoint_interval_minutes=None) == pytest.approx(times[1.0], rel=0.005)


def test_a_first_start_fails_too() -> None:
    """Restart as long as the mean time between failures: exp(1) - 1 of them, instead of one."""
    short = {"checkpoint_interval_minutes": 1.0, "checkpoint_seconds": 1e-6, "restart_minutes": 60 * MTBF}
    start = mean_hours(4000, 1e-6, **short) + MTBF
    assert start == pytest.approx(MTBF * (math.e - 1), rel=0.05)
