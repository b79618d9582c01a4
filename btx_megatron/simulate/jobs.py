"""A recipe's stages as jobs of so many nodes and hours, and one synchronous run of the same work.

What is compared starts at the finished seed and ends with the MoE: the same for both sides. The synchronous
run does the work of all these stages, token by token and FLOP by FLOP, as one job on all nodes, so that what
differs is the shape of the job graph alone and not the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from btx_megatron.errors import UserError
from btx_megatron.estimate import recipe_parameter_counts
from btx_megatron.estimate_flops import stage_flops
from btx_megatron.pipeline import stages_of
from btx_megatron.recipe import Recipe
from btx_megatron.simulate.assumptions import Assumptions
from btx_megatron.simulate.checkpointing import daly_interval, expected_time

_MOST_FAILURES = 1e5  # of one job; more take minutes to simulate, and nobody would wait for its end
_BYTES_PER_WEIGHT = 2  # checkpoints that are mixed hold bf16


@dataclass(frozen=True)
class SimulatedJob:
    """One job of the graph."""

    name: str
    """Of the stage, or ``one run``."""
    inputs: tuple[str, ...]
    """Jobs that end before it starts."""
    nodes: int
    """GPU nodes; 0: it runs on CPUs, starts at once and does not fail."""
    hours: float
    """What it takes without failures, checkpoints and slow nodes, once it is up."""
    segments: int = 1
    """Equal parts of its training, with a checkpoint after each."""


def btx_jobs(recipe: Recipe, assumptions: Assumptions, gpus: int) -> list[SimulatedJob]:
    """Experts side by side, then the mix, then the MoE on all nodes; what the recipe imports is left out.

    Raises UserError for a method without experts, GPUs that are no whole nodes, and jobs that never end.
    """
    if not recipe.expert_stages:
        raise UserError(f"method {recipe.method}: it is one job; --simulate compares experts apart with one")
    nodes = whole_nodes(gpus, assumptions)
    flops = _stage_flops(recipe)
    experts = [name for name in recipe.expert_stages if flops[name]]
    shares = share_nodes(nodes, [_weight(flops[name], assumptions) for name in experts])
    of_stage = dict(zip(experts, shares, strict=True)) | {"mix": 0}
    names = {name for name in flops if flops[name]} | {"mix"}
    jobs = []
    for stage in stages_of(recipe):
        if stage.name in names:
            inputs = tuple(name for name in stage.inputs if name in names)
            count = of_stage.get(stage.name, nodes)
            hours = mix_hours(recipe, assumptions)
            if count:
                hours = gpu_hours(flops[stage.name], assumptions) / (count * assumptions.gpus_per_node)
            jobs.append(make_job(stage.name, inputs, count, hours, assumptions))
    if not any(job.nodes for job in jobs):
        raise UserError("nothing trains: all experts are imported, and there is no MoE stage")
    return jobs


def synchronous_job(jobs: Sequence[SimulatedJob], assumptions: Assumptions, gpus: int) -> SimulatedJob:
    """The work of all these jobs as one on all nodes. Raises UserError if it never ends."""
    nodes = whole_nodes(gpus, assumptions)
    return make_job("one run", (), nodes, sum(job.nodes * job.hours for job in jobs) / nodes, assumptions)


def make_job(
    name: str, inputs: tuple[str, ...], nodes: int, hours: float, assumptions: Assumptions
) -> SimulatedJob:
    """A job with checkpoints at the interval that is assumed, or at its optimum.

    The interval is shortened so that equal ones make the whole. Raises UserError if the job never ends.
    """
    if not nodes:
        return SimulatedJob(name, inputs, nodes, hours)
    mtbf = assumptions.mtbf_hours(nodes)
    interval = daly_interval(mtbf, assumptions.checkpoint_hours)
    if assumptions.checkpoint_interval_minutes is not None:
        interval = assumptions.checkpoint_interval_minutes / 60
    # Against rounding: six hours at an interval of 0.1 hours are 60 parts, not 61.
    segments = max(1, math.ceil(hours / interval * (1 - 1e-12)))
    times = (assumptions.checkpoint_hours, assumptions.restart_hours, assumptions.queue_hours)
    slowest = hours * (1 + assumptions.slow_node_slowdown)
    if expected_time(slowest, segments, *times, mtbf) > _MOST_FAILURES * mtbf:
        raise UserError(
            f"{name} on {nodes} nodes fails every {60 * mtbf:.3g} minutes on the mean and would hardly ever "
            "end; assume a longer gpu_mtbf_hours, or shorter restart and checkpoint times"
        )
    return SimulatedJob(name, inputs, nodes, hours, segments)


def whole_nodes(gpus: int, assumptions: Assumptions) -> int:
    """Nodes of so many GPUs. Raises UserError where they are not whole."""
    nodes, rest = divmod(gpus, assumptions.gpus_per_node)
    if nodes < 1 or rest:
        raise UserError(
            f"--gpus {gpus}: must be a multiple of {assumptions.gpus_per_node}, the GPUs of a node "
            "(--assume gpus_per_node=N)"
        )
    return nodes


def share_nodes(nodes: int, weights: Sequence[float]) -> list[int]:
    """Whole nodes for each weight, in proportion, and at least one; all of them, where there are enough.

    Always the one gets the next node that has the most weight a node: the longest job is as short as it
    can be. With more weights than nodes each gets one, and they cannot all run at once.
    """
    counts = [1] * len(weights)
    if nodes <= len(weights):
        return counts
    # What each surely gets, then node by node: a large cluster has thousands.
    total = sum(weights)
    counts = [max(1, math.floor((nodes - len(weights)) * weight / total)) for weight in weights]
    for _ in range(nodes - sum(counts)):
        neediest = max(range(len(weights)), key=lambda index: weights[index] / counts[index])
        counts[neediest] += 1
    return counts


def gpu_hours(flops: float, assumptions: Assumptions) -> float:
    """GPU-hours of so many FLOPs, where nothing is lost."""
    return flops / (assumptions.peak_tflops * 1e12 * assumptions.mfu * 3600)


def mix_hours(recipe: Recipe, assumptions: Assumptions) -> float:
    """Of the mix: every expert is read and the MoE is written, once."""
    counts = recipe_parameter_counts(recipe)
    weights = len(recipe.source_names) * counts.dense + counts.moe_total
    return weights * _BYTES_PER_WEIGHT / (assumptions.mix_gigabytes_per_second * 1e9) / 3600


def _weight(flops: float, assumptions: Assumptions) -> float:
    return flops if assumptions.share_gpus_by == "flops" else 1.0


def _stage_flops(recipe: Recipe) -> dict[str, float]:
    """FLOPs of the experts and of the MoE stage, where the method has one."""
    ends = ["finetune"] if recipe.method == "btx" else []
    return {name: stage_flops(recipe, name) for name in (*recipe.expert_stages, *ends)}
