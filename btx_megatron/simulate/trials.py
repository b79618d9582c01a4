"""Many seeds of one graph of jobs: medians and spread of what it took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from btx_megatron.simulate.assumptions import Assumptions
from btx_megatron.simulate.attempt import Spent
from btx_megatron.simulate.cluster import JobRecord, simulate
from btx_megatron.simulate.jobs import SimulatedJob


@dataclass(frozen=True)
class Outcome:
    """What one run of a graph took."""

    wall_hours: float
    """From the first request to the end of the last job."""
    useful: float
    """GPU-hours of training that the result rests on, at full speed."""
    allocated: float
    """GPU-hours that jobs held nodes."""
    reserved: float
    """GPU-hours of the whole cluster, spare nodes too, from begin to end."""
    failures: int
    spent: Spent
    """GPU-hours that were allocated and not useful, by what they went to."""

    @property
    def goodput(self) -> float:
        """Useful GPU-hours over allocated ones."""
        return self.useful / self.allocated

    @property
    def goodput_of_reserved(self) -> float:
        """Useful GPU-hours over those of a cluster that nobody else uses meanwhile."""
        return self.useful / self.reserved

    @property
    def lost(self) -> float:
        """GPU-hours that were allocated and not useful."""
        return self.allocated - self.useful


@dataclass(frozen=True)
class Spread:
    """Of one figure, over the seeds."""

    median: float
    low: float
    """5 % are smaller."""
    high: float
    """5 % are larger."""


def run_trials(
    jobs: Sequence[SimulatedJob], nodes: int, assumptions: Assumptions, seeds: int
) -> list[Outcome]:
    """The outcome with each of the seeds 0, 1, ..."""
    return [outcome_of(simulate(jobs, nodes, assumptions, seed), nodes, assumptions) for seed in range(seeds)]


def outcome_of(records: dict[str, JobRecord], nodes: int, assumptions: Assumptions) -> Outcome:
    """The sums over a run's jobs."""
    gpus = assumptions.gpus_per_node
    spent = Spent()
    for record in records.values():
        spent.add(record.spent, times=gpus * record.job.nodes)
    wall = max(record.end for record in records.values())
    return Outcome(
        wall_hours=wall,
        useful=gpus * sum(record.job.nodes * record.job.hours for record in records.values()),
        allocated=gpus * sum(record.node_hours for record in records.values()),
        reserved=gpus * (nodes + (assumptions.spare_nodes or 0)) * wall,
        failures=sum(record.failures for record in records.values()),
        spent=spent,
    )


def spread(values: Sequence[float]) -> Spread:
    """Median and 5-95 %, between the values in straight lines."""
    ordered = sorted(values)

    def quantile(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return Spread(median(ordered), quantile(0.05), quantile(0.95))
