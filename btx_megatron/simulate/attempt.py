"""One job's life from failure to failure.

Failures of a job of n nodes come as a Poisson process whose rate is n times a node's, so the time to the
next is one draw from an exponential distribution, whatever was before. So nothing has to be stepped through:
an attempt draws how long it lives, and what it got done follows by division. A job can fail while it
restarts, too; in the queue it does not run and cannot.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

from btx_megatron.simulate.assumptions import Assumptions
from btx_megatron.simulate.jobs import SimulatedJob


@dataclass
class Spent:
    """What a job's hours went to, from its first start on; with those of its training they are all."""

    checkpoints: float = 0.0
    """Training stood still for a checkpoint that was kept."""
    lost: float = 0.0
    """From the last checkpoint to a failure."""
    down: float = 0.0
    """Restarts, queues after a failure, waiting for a spare."""
    slow: float = 0.0
    """What slow nodes took longer."""

    @property
    def total(self) -> float:
        """All of them."""
        return self.checkpoints + self.lost + self.down + self.slow

    def add(self, other: Spent, times: float) -> None:
        """As many times what another job spent."""
        self.checkpoints += times * other.checkpoints
        self.lost += times * other.lost
        self.down += times * other.down
        self.slow += times * other.slow


@dataclass
class RunningJob:
    """A job and how far it is."""

    job: SimulatedJob
    assumptions: Assumptions
    random: random.Random
    """Its own: what happens to other jobs does not change what it draws."""
    saved: int = 0
    """Segments that are in a checkpoint."""
    failures: int = 0
    spent: Spent = field(default_factory=Spent)
    slow_nodes: int = field(init=False)

    def __post_init__(self) -> None:
        self.slow_nodes = self.random.binomialvariate(self.job.nodes, self.assumptions.slow_node_share)

    def attempt(self) -> tuple[float, bool]:
        """Restart and train, until the end or a failure: hours, and whether it is finished."""
        segment = self.job.hours / self.job.segments
        slow = segment * self.assumptions.slow_node_slowdown * (self.slow_nodes > 0)
        checkpoint, restart = self.assumptions.checkpoint_hours, self.assumptions.restart_hours
        life = self.random.expovariate() * self.assumptions.mtbf_hours(self.job.nodes)
        if life < restart:
            self.spent.down += life
            return life, False
        left = self.job.segments - self.saved
        part = segment + slow + checkpoint
        done = left if math.isinf(life) else min(left, math.floor((life - restart) / part))
        self.saved += done
        self.spent.down += restart
        self.spent.slow += done * slow
        self.spent.checkpoints += done * checkpoint
        if done == left:
            return restart + done * part, True
        self.spent.lost += life - restart - done * part
        return life, False

    def fail(self) -> None:
        """One of the nodes is gone, any with equal chance, and another takes its place."""
        self.failures += 1
        self.slow_nodes -= self.random.random() * self.job.nodes < self.slow_nodes
        self.slow_nodes += self.random.random() < self.assumptions.slow_node_share
