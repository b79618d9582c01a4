"""``training.log_communication``: what the ranks of a stage sent each other, in comm.json and in the log."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from btx_megatron.durable import replace_file
from btx_megatron.job import Job
from btx_megatron.recipe import Stage
from btx_megatron.runtime.comm_meter import CommMeter
from btx_megatron.traffic import Traffic, amounts, table

COMMUNICATION_FILE = "comm.json"


class CommunicationLog:
    """Counts the steps of a stage from this start of it on; idle where the recipe does not ask for it."""

    def __init__(self, job: Job, stage: Stage) -> None:
        self._job, self._stage = job, stage
        self._meter = CommMeter().__enter__() if stage.training.log_communication else None

    def step(self) -> AbstractContextManager[None]:
        """Around each step."""
        return self._meter.step() if self._meter else nullcontext()

    def close(self) -> None:
        """At the end: rank 0 writes comm.json and prints a table. A collective where counting is on."""
        if self._meter is None:
            return
        self._meter.__exit__(None, None, None)
        traffic = self._meter.over_ranks()
        if self._meter.steps and torch.distributed.get_rank() == 0:
            self._tell(self._meter, traffic)

    def _tell(self, meter: CommMeter, traffic: Traffic) -> None:
        tokens = self._stage.training.global_batch_size * self._job.recipe.model.seq_length
        ranks = torch.distributed.get_world_size()
        report = report_of(traffic, meter, tokens)
        report = {"layout": str(self._stage.layout), "ranks": ranks} | report
        replace_file(self._job.work_folder / COMMUNICATION_FILE, json.dumps(report, indent=1))
        print(
            f"communication of a step, summed over {ranks} ranks, {meter.ranks_per_node} a node:\n"
            + table(traffic, meter.steps, tokens * meter.steps),
            flush=True,
        )


def report_of(traffic: Traffic, meter: CommMeter, tokens_per_step: int) -> dict[str, Any]:
    """What comm.json holds: bytes and calls of a mean step, summed over the ranks."""
    total = amounts(traffic.total(), meter.steps)
    return {
        "ranks_per_node": meter.ranks_per_node,
        "steps": meter.steps,
        "tokens_per_step": tokens_per_step,
        "wire_bytes_per_token": total["wire"] / tokens_per_step,
        "per_step": total,
        "lines": traffic.rows(meter.steps),
    }
