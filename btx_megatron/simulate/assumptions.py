"""What the simulation assumes of the cluster and its jobs. A default names its source, or is a guess."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from btx_megatron.errors import UserError


@dataclass
class Assumptions:
    """A cluster of equal nodes, and how jobs behave on it. Given as ``--assume KEY=VALUE``."""

    gpu_mtbf_hours: float = 50_700.0
    """GPU-hours between two failures that stop a job. Llama 3 (arXiv 2407.21783, section 3.3.4): 419
    unexpected interruptions in 54 days on 16,384 GPUs, 54 x 24 x 16,384 / 419 = 50,678. ``.inf``: nothing
    fails."""
    gpus_per_node: int = 8
    """GPUs of a node; a failure takes the whole node."""
    node_repair_hours: float = 24.0
    """Until a failed node comes back, as a spare. A guess; it counts only where spares run out."""
    spare_nodes: int | None = None
    """Nodes beside those of the jobs, shared by all of them. A job that loses a node takes one, or waits for
    the first that comes back from repair. Null: there is always one (and none is counted)."""
    queue_minutes: float = 2.0
    """From the request of a job's nodes until it starts, at its start and after each failure. Slurm holds a
    requeued job for about two minutes; a full queue takes longer."""
    restart_minutes: float = 5.0
    """From the start of a job until it trains: start-up, rendezvous, loading the checkpoint; after a failure
    also what it takes to notice it. A guess."""
    checkpoint_seconds: float = 30.0
    """How long training stands still for a checkpoint. A guess: asynchronous saving stalls for less,
    synchronous saving of a large model for more."""
    checkpoint_interval_minutes: float | None = None
    """Training between two checkpoints. Null: Daly's optimum, for each job's size."""
    slow_node_share: float = 0.005
    """Share of nodes that are slow; a failed node's replacement is drawn anew. A guess, of the size that
    MegaScale (arXiv 2402.15627) tells of before such machines were found and taken out."""
    slow_node_slowdown: float = 0.1
    """How much longer a step takes on a slow node, and so in every job that has one. A guess, as above."""
    peak_tflops: float = 989.0
    """TFLOP/s of a GPU at most; an H100 with bf16, by its data sheet."""
    mfu: float = 0.4
    """Share of that which training reaches, the same at every size of a job. Llama 3 reports 38-43 %."""
    mix_gigabytes_per_second: float = 1.0
    """Read and written by the mix, together; about what one machine with 2 cores did (docs/mix-speed.md)."""
    share_gpus_by: Literal["flops", "even"] = "flops"
    """How the experts share the nodes: by their FLOPs, so that all end together, or alike."""

    @property
    def restart_hours(self) -> float:
        """From a job's start until it trains."""
        return self.restart_minutes / 60

    @property
    def queue_hours(self) -> float:
        """From a request until the job starts."""
        return self.queue_minutes / 60

    @property
    def checkpoint_hours(self) -> float:
        """Training stands still for a checkpoint."""
        return self.checkpoint_seconds / 3600

    def mtbf_hours(self, nodes: int) -> float:
        """Mean time between failures of a job on so many nodes."""
        return self.gpu_mtbf_hours / (nodes * self.gpus_per_node)


_MAY_BE_ZERO = (
    "node_repair_hours",
    "spare_nodes",
    "queue_minutes",
    "restart_minutes",
    "slow_node_share",
    "slow_node_slowdown",
)


def parse_assumptions(settings: list[str]) -> Assumptions:
    """The defaults with each ``KEY=VALUE`` in its place.

    Raises UserError for an unknown key, a wrong type, or a value that cannot be.
    """
    for setting in settings:
        if "=" not in setting:
            raise UserError(f"--assume {setting}: write it as KEY=VALUE")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Assumptions), OmegaConf.from_dotlist(settings))
        assumptions = OmegaConf.to_object(merged)
    except yaml.YAMLError as error:
        raise UserError(f"--assume: {' '.join(str(error).split())}") from None
    except OmegaConfBaseException as error:
        known = ", ".join(field.name for field in fields(Assumptions))
        text = " ".join(str(error).split("\n    full_key:")[0].split())
        raise UserError(f"--assume: key '{error.full_key}': {text}; known here: {known}") from None
    assert isinstance(assumptions, Assumptions)
    check_assumptions(assumptions)
    return assumptions


def check_assumptions(assumptions: Assumptions) -> None:
    """Raises UserError for a value that cannot be."""
    for field in fields(assumptions):
        value = getattr(assumptions, field.name)
        if value is None or isinstance(value, str):
            continue
        least = "0 or more" if field.name in _MAY_BE_ZERO else "greater than 0"
        finite = math.isfinite(value) or (field.name == "gpu_mtbf_hours" and value > 0)
        if not finite or value < 0 or (value == 0 and field.name not in _MAY_BE_ZERO):
            raise UserError(f"--assume {field.name}={value:g}: must be a number {least}")
    for name in ("mfu", "slow_node_share"):
        if getattr(assumptions, name) > 1:
            raise UserError(f"--assume {name}={getattr(assumptions, name):g}: is a share, must be at most 1")
