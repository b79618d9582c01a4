"""All jobs on one cluster: who waits for whom, what the hours went to, spares, and the same seed again."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btx_megatron.errors import UserError
from btx_megatron.simulate.assumptions import Assumptions
from btx_megatron.simulate.cluster import Spares, simulate
from btx_megatron.simulate.jobs import SimulatedJob, make_job
from btx_megatron.simulate.trials import outcome_of, run_trials, spread

FRAGILE = Assumptions(gpu_mtbf_hours=400.0, slow_node_share=0.1)
STEADY = Assumptions(gpu_mtbf_hours=math.inf, slow_node_share=0.0)


def graph(hours: list[float], assumptions: Assumptions, nodes: int = 2) -> list[SimulatedJob]:
    """Experts of so many hours on ``nodes`` each, a mix, and a MoE on all of them."""
    names = [f"expert:{number}" for number in range(len(hours))]
    experts = [make_job(name, (), nodes, h, assumptions) for name, h in zip(names, hours, strict=True)]
    mix = make_job("mix", tuple(names), 0, 0.5, assumptions)
    return [*experts, mix, make_job("finetune", ("mix",), nodes * len(hours), 3.0, assumptions)]


hours_of_experts = st.lists(st.floats(0.1, 50.0), min_size=1, max_size=6)
clusters = st.builds(
    Assumptions,
    gpu_mtbf_hours=st.floats(200.0, 5000.0),
    spare_nodes=st.none() | st.integers(0, 3),
    node_repair_hours=st.floats(0.0, 30.0),
    slow_node_share=st.floats(0.0, 1.0),
)


def test_without_failures_the_wall_time_is_exact() -> None:
    """Queue 2 min, start 5 min, 30 s a checkpoint; the longest expert, the mix, the MoE."""
    assumptions = replace(STEADY, checkpoint_interval_minutes=60.0)
    records = simulate(graph([4.0, 7.0, 2.5], assumptions), 6, assumptions, 0)
    start, save = 7 / 60, 30 / 3600
    assert records["expert:0"].end == pytest.approx(start + 4 + 4 * save, abs=1e-12)
    assert records["expert:2"].end == pytest.approx(start + 2.5 + 3 * save, abs=1e-12)
    assert records["mix"].begin == pytest.approx(start + 7 + 7 * save, abs=1e-12)
    outcome = outcome_of(records, 6, assumptions)
    assert outcome.wall_hours == pytest.approx(2 * start + 7 + 0.5 + 3 + 10 * save, abs=1e-12)
    assert outcome.useful == pytest.approx(8 * (2 * 13.5 + 6 * 3))
    assert outcome.failures == 0


def test_all_nodes_slow() -> None:
    assumptions = replace(STEADY, slow_node_share=1.0, slow_node_slowdown=0.25)
    record = simulate([make_job("a", (), 2, 8.0, assumptions)], 2, assumptions, 0)["a"]
    assert record.end - record.begin == pytest.approx(5 / 60 + 8 * 1.25 + 30 / 3600)
    assert record.spent.slow == pytest.approx(2.0)


@settings(max_examples=60)
@given(hours_of_experts, clusters, st.integers(0, 99))
def test_a_stage_starts_after_all_its_inputs(hours: list[float], assumptions: Assumptions, seed: int) -> None:
    records = simulate(graph(hours, assumptions), 2 * len(hours), assumptions, seed)
    last = max(record.end for name, record in records.items() if name.startswith("expert"))
    assert records["mix"].begin == last
    assert records["finetune"].begin == records["mix"].end + assumptions.queue_hours


@settings(max_examples=60)
@given(hours_of_experts, clusters, st.integers(0, 99))
def test_every_hour_is_accounted_for(hours: list[float], assumptions: Assumptions, seed: int) -> None:
    for record in simulate(graph(hours, assumptions), 2 * len(hours), assumptions, seed).values():
        assert record.end - record.begin == pytest.approx(record.job.hours + record.spent.total)


@settings(max_examples=60)
@given(hours_of_experts, clusters, st.integers(0, 99), st.data())
def test_an_expert_that_fails_more_delays_no_other(
    hours: list[float], assumptions: Assumptions, seed: int, data: st.DataObject
) -> None:
    """Whatever becomes of one (here: it trains longer and so fails more), the others end when they did."""
    assumptions = replace(assumptions, spare_nodes=data.draw(st.sampled_from([None, 0])))
    unlucky = data.draw(st.integers(0, len(hours) - 1))
    longer = [*hours]
    longer[unlucky] *= 20
    before = simulate(graph(hours, assumptions), 2 * len(hours), assumptions, seed)
    after = simulate(graph(longer, assumptions), 2 * len(hours), assumptions, seed)
    for number in set(range(len(hours))) - {unlucky}:
        assert after[f"expert:{number}"] == before[f"expert:{number}"]


def test_one_expert_on_all_nodes_is_the_synchronous_run() -> None:
    expert = make_job("expert:a", (), 6, 40.0, FRAGILE)
    alone = make_job("one run", (), 6, 40.0, FRAGILE)
    assert run_trials([expert], 6, FRAGILE, 20) == run_trials([alone], 6, FRAGILE, 20)


def test_the_same_seed_gives_the_same_figures_and_others_do_not() -> None:
    jobs = graph([20.0, 30.0], FRAGILE)
    assert run_trials(jobs, 4, FRAGILE, 5) == run_trials(jobs, 4, FRAGILE, 5)
    assert len({outcome.wall_hours for outcome in run_trials(jobs, 4, FRAGILE, 5)}) == 5


def test_longer_between_failures_is_faster() -> None:
    means = []
    for mtbf in (20.0, 100.0, 1000.0, 10_000.0, math.inf):
        assumptions = replace(FRAGILE, gpu_mtbf_hours=mtbf)
        outcomes = run_trials(graph([20.0, 30.0], assumptions), 4, assumptions, 100)
        means.append(fmean(outcome.wall_hours for outcome in outcomes))
    assert means == sorted(means, reverse=True)
    assert means[0] > 1.2 * means[-1]


def test_failures_come_at_the_rate_of_the_nodes() -> None:
    """As many a GPU-hour that a job is up, at any size: 0.0025."""
    for nodes in (1, 20):
        job = make_job("a", (), nodes, 400.0 / nodes, FRAGILE)
        records = [simulate([job], nodes, FRAGILE, seed)["a"] for seed in range(200)]
        queue = FRAGILE.queue_hours
        up = sum(8 * nodes * (r.end - r.begin - queue * r.failures) for r in records)
        assert sum(record.failures for record in records) / up == pytest.approx(1 / 400, rel=0.06)


def test_a_spare_takes_the_place_and_the_lost_node_comes_back_as_one() -> None:
    spares = Spares(1, 10.0)
    assert spares.replace(0.0) == 0.0  # the spare
    assert spares.replace(4.0) == 10.0  # none left: the first to be mended
    assert spares.replace(5.0) == 14.0
    assert spares.replace(20.0) == 20.0  # that of 5.0 came back at 15
    assert spares.replace(21.0) == 30.0
    assert Spares(None, 10.0).replace(3.0) == 3.0
    assert [Spares(0, 10.0).replace(now) for now in (1.0, 2.0)] == [11.0, 12.0]


def test_without_spares_each_failure_waits_for_its_repair() -> None:
    job = make_job("a", (), 2, 300.0, FRAGILE)
    for seed in range(5):
        short = simulate([job], 2, FRAGILE, seed)["a"]
        none = simulate([job], 2, replace(FRAGILE, spare_nodes=0), seed)["a"]
        assert short.failures == none.failures > 0
        assert none.end - short.end == pytest.approx(24.0 * none.failures)


def test_more_experts_than_nodes_take_turns() -> None:
    jobs = [make_job(name, (), 1, 2.0, STEADY) for name in "abc"]
    records = simulate(jobs, 2, STEADY, 0)
    assert records["a"].begin == records["b"].begin == STEADY.queue_hours
    assert records["c"].begin == records["a"].end + STEADY.queue_hours


def test_nobody_overtakes_a_large_job() -> None:
    sizes = {"first": 1, "large": 2, "small": 1}
    jobs = [make_job(name, (), nodes, 1.0, STEADY) for name, nodes in sizes.items()]
    records = simulate(jobs, 2, STEADY, 0)
    assert records["large"].begin < records["small"].begin


def test_a_job_that_is_too_large_is_refused() -> None:
    with pytest.raises(UserError, match="a cannot start"):
        simulate([make_job("a", (), 3, 1.0, STEADY)], 2, STEADY, 0)


def test_spread() -> None:
    found = spread([float(value) for value in range(101)][::-1])
    assert (found.low, found.median, found.high) == (5.0, 50.0, 95.0)
    assert spread([7.0]) == spread([7.0, 7.0])
