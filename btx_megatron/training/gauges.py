"""Memory and expert load, read over all ranks once a log interval, in one small collective.

Every rank counts the routes of its own tokens in its own layers. The tokens of a layer are dealt out over DP,
and over TP where the sequence is cut, and no rank counts what another does: so the sum over all ranks is
right under every layout.
"""

from __future__ import annotations

from collections.abc import Sequence

import psutil  # type: ignore[import-untyped]
import torch

from btx_megatron.model.routers import routers_of
from btx_megatron.runtime.ranks import device
from btx_megatron.training.metrics import Gauges


def read_gauges(model: Sequence[torch.nn.Module], num_layers: int, num_experts: int | None) -> Gauges:
    """Read, and begin to count routes anew. A collective over all ranks; equal on all of them.

    ``model``: this rank's chunks of a model of ``num_layers`` and ``num_experts`` (None: dense).
    """
    routes = torch.zeros(num_layers, num_experts or 0, dtype=torch.int64, device=device())
    for layer, router in routers_of(model).items():
        routes[layer] = router.take_load()
    memory = torch.zeros(torch.distributed.get_world_size(), dtype=torch.int64, device=device())
    memory[torch.distributed.get_rank()] = memory_bytes()  # each rank in its place: a sum keeps them apart
    both = torch.cat([routes.flatten(), memory])
    torch.distributed.all_reduce(both)
    routes, memory = both[: routes.numel()].view_as(routes), both[routes.numel() :]
    return Gauges(int(memory.max()), routes.tolist() if num_experts else [])


def memory_bytes() -> int:
    """What this rank takes: resident memory on a CPU, the peak of torch's allocations on a GPU."""
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    return int(psutil.Process().memory_info().rss)
