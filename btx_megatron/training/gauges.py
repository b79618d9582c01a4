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
    dropped = torch.zeros(num_layers + 1, dtype=torch.int64, device=device())  # last: whether there are any
    for layer, router in routers_of(model).items():
        routes[layer] = router.take_load()
        if router.has_capacity:
            dropped[layer], dropped[-1] = router.take_drops(), 1
    memory = torch.zeros(torch.distributed.get_world_size(), dtype=torch.int64, device=device())
    memory[torch.distributed.get_rank()] = memory_bytes()  # each rank in its place: a sum keeps them apart
    parts = [routes.flatten(), memory, dropped]
    whole = torch.cat(parts)
    torch.distributed.all_reduce(whole)
    routes, memory, dropped = whole.split([len(part) for part in parts])
    return Gauges(
        int(memory.max()),
        routes.view(num_layers, -1).tolist() if num_experts else [],
        dropped[:-1].tolist() if dropped[-1] else [],
    )


def memory_bytes() -> int:
    """What this rank takes: resident memory on a CPU, the peak of torch's allocations on a GPU."""
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    return int(psutil.Process().memory_info().rss)
