"""What a step tells beside its loss: FLOPs as torch counts them, routes of all experts; into a JSON file.

torchrun --nproc-per-node 1 telling_worker.py FOLDER     one process, and the initial checkpoints
torchrun --nproc-per-node 2 telling_worker.py FOLDER     the layouts of two ranks
"""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from layout_worker import EP2, LAYOUTS, MODEL, PP2, STEPS, TP2_SP, VOCABULARY, RandomSamples, Run

from btx_megatron.data.blend import batches
from btx_megatron.recipe import Layout, Model, Moe, Recipe, Stage, Training
from btx_megatron.runtime import ranks

DENSE = replace(MODEL, num_layers=2, hidden_size=48, ffn_hidden_size=80, num_query_groups=None)
EXPERTS = 4
CASES: dict[str, tuple[Model, int | None, int, list[Any]]] = {
    "dense": (DENSE, None, 1, []),
    "wide heads": (replace(DENSE, kv_channels=32), None, 1, []),
    "GQA": (MODEL, None, 1, []),
    "tied": (replace(MODEL, untie_embeddings_and_output_weights=False), None, 1, []),
    "MoE": (MODEL, EXPERTS, 2, []),
    "MoE, top-3": (replace(MODEL, num_query_groups=None), EXPERTS, 3, []),
    "MoE, experts frozen": (MODEL, EXPERTS, 2, ["experts"]),
    "MoE, shared frozen": (MODEL, EXPERTS, 2, ["shared"]),
    "dense, shared frozen": (DENSE, None, 1, ["shared"]),
}
"""Model, experts, top-k, what is frozen."""
LOADS = {"EP2": EP2, "TP2+SP": TP2_SP, "TP2+SP+EP2": LAYOUTS["moe"]["TP2+SP+EP2"], "PP2": PP2}
LOADS |= {"DP2": Layout(data_parallel_size=2)}


def counted(name: str, attention: AbstractContextManager[Any]) -> dict[str, int]:
    """FLOPs of one optimizer step, as torch's counter has them, and its tokens."""
    from torch.utils.flop_counter import FlopCounterMode

    model, experts, topk, freeze = CASES[name]
    training = Training(train_iters=1, micro_batch_size=2, global_batch_size=4, freeze=freeze)
    ranks.set_layout(Layout(), seed=7)
    from btx_megatron.training.trainer import Trainer

    recipe = Recipe(model=model, training=training, moe=Moe(moe_router_topk=topk))
    trainer = Trainer(recipe, Stage(training=training), padded_vocab_size=VOCABULARY, num_experts=experts)
    stream = batches(
        RandomSamples(),  # type: ignore[arg-type]
        consumed_samples=0,
        micro_batch_size=2,
        global_batch_size=4,
        data_parallel_rank=0,
        data_parallel_size=1,
    )
    counter = FlopCounterMode(display=False)
    with attention, counter:
        result = trainer.step(stream)
    return {"flops": counter.get_total_flops(), "tokens": result.tokens}


def routes(layout: Layout, folder: Path, seen: bool = False) -> dict[str, Any]:
    """What two readings tell, each after two steps; and what the routers themselves returned (``seen``)."""
    from btx_megatron.model.routers import routers_of
    from btx_megatron.training.gauges import memory_bytes, read_gauges

    run = Run("moe", layout, folder)
    own = torch.zeros(2, MODEL.num_layers, EXPERTS, dtype=torch.int64)
    now = 0
    for layer, router in routers_of(run.trainer.model).items():

        def note(module: Any, inputs: Any, output: Any, layer: int = layer) -> None:
            own[now, layer] += output[1].sum(dim=0)

        router.register_forward_hook(note)
    told = []
    for reading in range(2):
        now = reading
        run.steps(2)
        told.append(read_gauges(run.trainer.model, MODEL.num_layers, EXPERTS))
    result = {
        "routes": [gauges.routes for gauges in told],
        "memory": told[1].memory_bytes,
        "own memory": memory_bytes(),
        "dense": read_gauges([], 2, None).routes,
    }
    return result | ({"seen": own.tolist()} if seen else {})


def main() -> None:
    folder = Path(sys.argv[1])
    ranks.start_ranks()
    world = torch.distributed.get_world_size()
    result: dict[str, Any]
    if world == 1:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        result = {name: counted(name, sdpa_kernel(SDPBackend.MATH)) for name in CASES}
        result["GQA, fused attention"] = counted("GQA", nullcontext())
        result["routes"] = routes(Layout(), folder, seen=True)
    else:
        result = {name: routes(layout, folder) for name, layout in LOADS.items()}
    if torch.distributed.get_rank() == 0:
        (folder / f"telling-{world}.json").write_text(json.dumps(result))
    ranks.stop_ranks()


if __name__ == "__main__":
    assert STEPS >= 4
    main()
