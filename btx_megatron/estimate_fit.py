"""Whether a training stage fits the memory of its GPUs, and layouts of it that do.

The search keeps what the recipe says of the batch and the number of ranks, and where that cannot be, doubles
the ranks. It goes through tensor parallelism within a node (with sequence parallelism), pipelines, expert
parallelism with whole and cut experts, data parallelism over the rest with the distributed optimizer, and of
each takes the least recomputation that fits: none, the attention's core, whole layers.

The best come first, by the seconds that a token takes of all GPUs together if nothing overlaps: the model's
FLOPs at 0.4 of an H100, a third more where whole layers are recomputed, the pipeline's bubble of (P - 1) / m
with m micro-batches a step; and bytes on the wire at 450 GB/s inside a node and 50 GB/s between nodes, an
H100 node's NVLink and InfiniBand for each GPU and direction. That is rough, and good enough for an order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from btx_megatron.columns import short_number
from btx_megatron.errors import UserError
from btx_megatron.estimate_comm import Setup, step_traffic
from btx_megatron.estimate_flops import forward_flops
from btx_megatron.estimate_memory import Memory, fullest_rank
from btx_megatron.recipe import Layout, Recipe
from btx_megatron.recipe_layout_checks import layout_problems

_RECOMPUTE: tuple[dict[str, Any], ...] = (
    {},
    {"recompute_granularity": "selective"},
    {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
)
_FLOPS, _INSIDE, _BETWEEN = 0.4 * 989e12, 450e9, 50e9  # a second and GPU
_MOST_TIMES_THE_RANKS = 64


def check_fit(recipe: Recipe, key: str, setup: Setup, memory: float, ranks_per_node: int) -> None:
    """Raises UserError, with layouts that fit, where a stage's fullest rank needs more than ``memory`` bytes.

    ``key``: where the stage stands in the recipe.
    """
    needed = fullest_rank(setup)
    if needed.total <= memory:
        return
    parts = ", ".join(f"{part} {_gigabytes(size)}" for part, size in vars(needed).items())
    fitting = [
        f"{layout_text(layout)} ({_gigabytes(fullest_rank(replace(setup, layout=layout)).total)} GB)"
        for layout in fitting_layouts(recipe, setup, memory, ranks_per_node)
    ]
    if fitting:
        remedy = f"these fit: {'; '.join(fitting)}"
    elif setup.micro_batch_size > 1:
        remedy = "no layout fits; lower training.micro_batch_size"
    else:
        remedy = f"no layout fits on up to {_MOST_TIMES_THE_RANKS} times the GPUs; take larger ones"
    raise UserError(
        f"{key}.layout {layout_text(setup.layout)} needs {_gigabytes(needed.total)} GB a GPU ({parts}), and "
        f"there are {_gigabytes(memory)}; {remedy}"
    )


def _gigabytes(size: float) -> str:
    return short_number(size / 1e9)


def layout_text(layout: Layout) -> str:
    """``TP2 DP4 SP, recompute full``."""
    granularity = layout.recompute_granularity
    return f"{layout}, recompute {granularity}" if granularity else str(layout)


def fitting_layouts(
    recipe: Recipe, setup: Setup, memory: float, ranks_per_node: int, count: int = 3
) -> list[Layout]:
    """The best layouts that fit ``memory`` bytes, on as many ranks as the setup's or the least multiple."""
    ranks = setup.layout.world_size
    for times in (2**n for n in range(_MOST_TIMES_THE_RANKS.bit_length())):
        fitting = list(_fitting(recipe, setup, ranks * times, memory, ranks_per_node))
        if fitting:
            costs = [_cost(replace(setup, layout=layout), ranks_per_node) for layout in fitting]
            order = sorted(range(len(fitting)), key=costs.__getitem__)
            return [fitting[number] for number in order[:count]]  # layouts themselves have no order
    return []


def _cost(setup: Setup, ranks_per_node: int) -> float:
    """Seconds a token."""
    model, moe, layout = setup.model, setup.moe, setup.layout
    topk = moe.mean_topk(setup.num_experts or 0, model.num_layers)
    flops = forward_flops(
        model, setup.padded_vocab_size, setup.num_experts, topk, expert_width=setup.expert_width
    )
    more = 1 / 3 if layout.recompute_granularity == "full" else 0
    more += (layout.pipeline_model_parallel_size - 1) / setup.micro_batches
    traffic = step_traffic(setup, ranks_per_node).total()
    wire = traffic.inside / _INSIDE + traffic.between / _BETWEEN
    return flops.training() * (1 + more) / _FLOPS + wire / setup.tokens


def _fitting(
    recipe: Recipe, setup: Setup, ranks: int, memory: float, ranks_per_node: int
) -> Iterator[Layout]:
    """Of each way to cut the model the one that recomputes the least."""
    for layout in _cuts(recipe, setup, ranks, ranks_per_node):
        for recompute in _RECOMPUTE:
            chosen = replace(layout, **recompute)
            if _fits(replace(setup, layout=chosen), memory):
                yield chosen
                break


def _fits(setup: Setup, memory: float) -> bool:
    needed: Memory = fullest_rank(setup)
    return needed.total <= memory


def _cuts(recipe: Recipe, setup: Setup, ranks: int, ranks_per_node: int) -> Iterator[Layout]:
    """Layouts of so many ranks that the recipe could have for the setup's model and batch."""
    is_moe = setup.num_experts is not None
    for tp in _divisors(ranks_per_node):
        for pp in _divisors(setup.model.num_layers):
            dp, rest = divmod(ranks, tp * pp)
            if rest or not _batch_can_be_cut(setup, dp):
                continue
            for ep, etp in _expert_cuts(setup, tp):
                layout = Layout(
                    tensor_model_parallel_size=tp,
                    pipeline_model_parallel_size=pp,
                    data_parallel_size=dp,
                    expert_model_parallel_size=ep,
                    expert_tensor_parallel_size=etp,
                    sequence_parallel=tp > 1,
                    use_distributed_optimizer=dp > 1,
                )
                if not any(layout_problems("layout", layout, recipe, is_moe)):
                    yield layout


def _batch_can_be_cut(setup: Setup, dp: int) -> bool:
    return dp > 0 and setup.global_batch_size % (setup.micro_batch_size * dp) == 0


def _expert_cuts(setup: Setup, tp: int) -> list[tuple[int, int | None]]:
    """EP and ETP."""
    if setup.num_experts is None:
        return [(1, None)]
    widths: list[int | None] = [None] if tp == 1 else [1, tp]
    return [(ep, etp) for ep in _divisors(setup.num_experts) for etp in widths]


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
