"""All jobs on one cluster, event by event: who may start, who fails, which node takes a lost one's place.

A job starts when its inputs have ended and its nodes are free, first come, first served in the graph's order.
It keeps its nodes until it ends, through its failures too: nobody takes the others while it waits in the
queue, and they count as allocated. So jobs that all find room side by side touch each other in one way only:
through the spare nodes, if these are few.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass

from btx_megatron.errors import UserError
from btx_megatron.simulate.assumptions import Assumptions
from btx_megatron.simulate.attempt import RunningJob, Spent
from btx_megatron.simulate.jobs import SimulatedJob


@dataclass(frozen=True)
class JobRecord:
    """How one job went. Hours count from the beginning of the run."""

    job: SimulatedJob
    begin: float
    """It had its nodes for the first time."""
    end: float
    failures: int
    spent: Spent

    @property
    def node_hours(self) -> float:
        """Node-hours allocated to it."""
        return self.job.nodes * (self.end - self.begin)


class Spares:
    """Nodes that wait to take a lost one's place, and those in repair."""

    def __init__(self, count: int | None, repair_hours: float) -> None:
        self._free = count
        self._repair_hours = repair_hours
        self._back: list[float] = []

    def replace(self, now: float) -> float:
        """When a node that is lost now has another in its place. To be asked in the order of time."""
        if self._free is None:
            return now
        while self._back and self._back[0] <= now:
            heapq.heappop(self._back)
            self._free += 1
        heapq.heappush(self._back, now + self._repair_hours)
        if self._free:
            self._free -= 1
            return now
        return heapq.heappop(self._back)


class Cluster:
    """One run of a graph of jobs. ``records`` is filled by ``run``."""

    def __init__(self, jobs: Sequence[SimulatedJob], nodes: int, assumptions: Assumptions, seed: int) -> None:
        self._assumptions = assumptions
        self._waiting = list(jobs)
        self._free_nodes = nodes
        self._spares = Spares(assumptions.spare_nodes, assumptions.node_repair_hours)
        self.running = {
            # By place and not by name: jobs alike have the same luck, whatever they are called.
            job.name: RunningJob(job, assumptions, random.Random(f"{seed} {place}"))
            for place, job in enumerate(jobs)
        }
        """By name, and how far each is."""
        self._events: list[tuple[float, str, bool]] = []
        """Hour, job, and whether it ends there; else it fails."""
        self._begins: dict[str, float] = {}
        self.records: dict[str, JobRecord] = {}

    def run(self) -> dict[str, JobRecord]:
        """All jobs to their end. Raises UserError if a job can never start."""
        self._start_what_can(0.0)
        while self._events:
            now, name, ends = heapq.heappop(self._events)
            if ends:
                self._end(name, now)
                self._start_what_can(now)
            else:
                self._fail(name, now)
        for job in self._waiting:
            raise UserError(f"{job.name} cannot start: it needs more nodes than there are, or its own output")
        return self.records

    def _start_what_can(self, now: float) -> None:
        ready = [job for job in self._waiting if set(job.inputs) <= self.records.keys()]
        for job in sorted(ready, key=lambda job: job.nodes > 0):  # what needs no nodes waits for none
            if job.nodes > self._free_nodes:
                break  # nobody overtakes: small jobs would keep a large one out for ever
            self._waiting.remove(job)
            self._free_nodes -= job.nodes
            if job.nodes:
                self._begins[job.name] = now + self._assumptions.queue_hours
                self._try(job.name, self._begins[job.name])
            else:
                self._begins[job.name] = now
                heapq.heappush(self._events, (now + job.hours, job.name, True))

    def _try(self, name: str, start: float) -> None:
        hours, ends = self.running[name].attempt()
        heapq.heappush(self._events, (start + hours, name, ends))

    def _fail(self, name: str, now: float) -> None:
        running = self.running[name]
        running.fail()
        start = self._spares.replace(now) + self._assumptions.queue_hours
        running.spent.down += start - now
        self._try(name, start)

    def _end(self, name: str, now: float) -> None:
        running = self.running[name]
        self._free_nodes += running.job.nodes
        self.records[name] = JobRecord(running.job, self._begins[name], now, running.failures, running.spent)


def simulate(
    jobs: Sequence[SimulatedJob], nodes: int, assumptions: Assumptions, seed: int
) -> dict[str, JobRecord]:
    """How each job of a graph goes, on a cluster of so many nodes. The same seed, the same figures."""
    return Cluster(jobs, nodes, assumptions, seed).run()
