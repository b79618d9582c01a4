"""Count the bytes that training keeps on each rank, part by part; what was counted goes to a JSON file.

torchrun --nproc-per-node 1 memory_worker.py FOLDER
torchrun --nproc-per-node 2 memory_worker.py FOLDER
"""

from __future__ import annotations

import json
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from btx_megatron.estimate_comm import Setup
from btx_megatron.recipe import Layout, Model, Moe, Recipe, Stage, Training
from btx_megatron.runtime import ranks

VOCABULARY, EXPERTS = 512, 4
MODEL = Model(
    num_layers=4,
    hidden_size=128,
    ffn_hidden_size=320,
    num_attention_heads=4,
    num_query_groups=2,
    seq_length=128,
)
TRAINING = Training(train_iters=2, micro_batch_size=2, global_batch_size=8)

FULL = Layout(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
SELECTIVE = Layout(recompute_granularity="selective")
PP2 = Layout(pipeline_model_parallel_size=2)
TP2_SP = Layout(tensor_model_parallel_size=2, sequence_parallel=True)
DP2_DISTRIBUTED = Layout(data_parallel_size=2, use_distributed_optimizer=True)
EP2 = Layout(data_parallel_size=2, expert_model_parallel_size=2)
KINDS: dict[str, tuple[dict[str, Any], Moe | None, list[str]]] = {
    "dense": ({}, None, []),
    "multihead": ({"num_query_groups": None}, None, []),
    "shared-frozen": ({}, None, ["shared"]),
    "moe": ({}, Moe(), []),
    "experts-frozen": ({}, Moe(), ["experts"]),
    "router-frozen": ({}, Moe(), ["router"]),
    "sampled": ({}, Moe(moe_router_type="sample_top1"), []),
    "switch": ({}, Moe(moe_router_type="switch"), []),
    "gathered": ({}, Moe(moe_token_dispatcher_type="allgather"), []),
    "soft": ({}, Moe(moe_router_type="soft"), []),
}
"""Name -> what is other in the model, its mixture, what is frozen."""
PRECISIONS = dict.fromkeys(("dense", "moe"), (False, True))
ONE = {
    "1": Layout(),
    "full": FULL,
    "full, pairs": replace(FULL, recompute_num_layers=2),
    "block of 3": replace(FULL, recompute_method="block", recompute_num_layers=3),
    "core_attn": SELECTIVE,
}
TWO = {
    "TP2+SP": TP2_SP,
    "PP2": PP2,
    "PP2 interleaved": replace(PP2, num_layers_per_virtual_pipeline_stage=1),
    "PP2 full": replace(FULL, pipeline_model_parallel_size=2),
    "DP2+distributed": DP2_DISTRIBUTED,
}
CASES: dict[int, dict[str, Layout]] = {
    1: {
        **{f"dense {name}": layout for name, layout in ONE.items()},
        "dense mlp": replace(SELECTIVE, recompute_modules=["mlp"]),
        **{f"moe {name}": layout for name, layout in ONE.items()},
        "moe moe": replace(SELECTIVE, recompute_modules=["moe"]),
        "multihead core_attn": SELECTIVE,
        **{f"{kind} 1": Layout() for kind in [*list(KINDS)[4:], "multihead", "shared-frozen"]},
    },
    2: {
        **{f"dense {name}": layout for name, layout in TWO.items()},
        "dense PP2 first 3": replace(PP2, decoder_first_pipeline_num_layers=3),
        "experts-frozen EP2+distributed": replace(EP2, use_distributed_optimizer=True),
        "gathered EP2": EP2,
        "gathered TP2+SP": TP2_SP,
        "dense CP2": Layout(context_parallel_size=2),
        "multihead CP2": Layout(context_parallel_size=2),
        "moe CP2": Layout(context_parallel_size=2),
        "dense CP2 core_attn": replace(SELECTIVE, context_parallel_size=2),
        "dense TP2": Layout(tensor_model_parallel_size=2),
        **{f"moe {name}": layout for name, layout in TWO.items() if name.startswith(("TP", "PP"))},
        "moe EP2": EP2,
        "moe EP2+distributed": replace(EP2, use_distributed_optimizer=True),
        "moe TP2+SP EP2 ETP1": replace(TP2_SP, expert_model_parallel_size=2, expert_tensor_parallel_size=1),
    },
}
"""Ranks -> name (its first word the kind of model) -> layout."""


SAVED = {1: ["dense 1", "experts-frozen 1"], 2: ["dense DP2+distributed", "moe EP2+distributed"]}
"""Ranks -> cases whose checkpoint is written."""


class Kept:
    """A tensor that autograd keeps; when the graph lets go of it this goes too."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class SavedBytes:
    """Bytes of the storages that autograd keeps for the backward pass, each once, without parameters."""

    def __init__(self, parameters: set[int]) -> None:
        self.parameters = parameters
        self.holders: Counter[int] = Counter()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def keep(self, tensor: torch.Tensor) -> Kept:
        kept, storage = Kept(tensor), tensor.untyped_storage()
        place = storage.data_ptr()
        if place in self.parameters or not storage.nbytes():
            return kept
        if not self.holders[place]:
            self.sizes[place] = storage.nbytes()
            self.now += storage.nbytes()
        self.holders[place] += 1
        self.peak = max(self.peak, self.now)
        weakref.finalize(kept, self.release, place)
        return kept

    def release(self, place: int) -> None:
        self.holders[place] -= 1
        if not self.holders[place]:
            self.now -= self.sizes[place]

    def counting(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(self.keep, lambda kept: kept.tensor)


def setup_of_case(name: str, layout: Layout, bf16: bool) -> Setup:
    """The formulas' setup of a case."""
    changes, moe, freeze = KINDS[name.split()[0]]
    return Setup(
        model=replace(MODEL, **changes),
        layout=layout,
        padded_vocab_size=VOCABULARY,
        micro_batch_size=TRAINING.micro_batch_size,
        global_batch_size=TRAINING.global_batch_size,
        bf16=bf16,
        num_experts=EXPERTS if moe else None,
        moe=moe or Moe(),
        freeze=tuple(freeze),
    )


def trainer_of(setup: Setup) -> Any:
    ranks.set_layout(setup.layout, seed=7)
    from btx_megatron.training.trainer import Trainer

    training = replace(TRAINING, bf16=setup.bf16, freeze=list(setup.freeze))
    recipe = Recipe(model=setup.model, training=training, moe=setup.moe)
    return Trainer(
        recipe,
        Stage(training=training, layout=setup.layout),
        padded_vocab_size=VOCABULARY,
        num_experts=setup.num_experts,
    )


def stream() -> Iterator[dict[str, Any]]:
    """Micro-batches of random tokens."""
    size, generator = (TRAINING.micro_batch_size, MODEL.seq_length), torch.Generator().manual_seed(5)
    while True:
        tokens = torch.randint(VOCABULARY, size, generator=generator)
        yield {
            "step": 0,
            "sample_index": torch.arange(size[0]),
            "tokens": tokens,
            "labels": tokens,
            "loss_mask": torch.ones(size),
            "position_ids": torch.arange(size[1]).expand(size),
        }


def bytes_of(tensors: Any) -> int:
    """Of their storages, each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def optimizer_tensors(trainer: Any) -> Iterator[torch.Tensor]:
    """Moments, and master weights where they are not the weights themselves."""
    weights = {p.untyped_storage().data_ptr() for chunk in trainer.model for p in chunk.parameters()}
    for inner in trainer.optimizer.chained_optimizers:
        for group in inner.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.untyped_storage().data_ptr() not in weights:
                    yield parameter
        for state in inner.optimizer.state.values():
            yield from (value for value in state.values() if torch.is_tensor(value))


def allocated_by(work: Callable[[], Any]) -> int:
    """Bytes that torch's allocator has given out at most during a call, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes))


def counted(setup: Setup) -> dict[str, int]:
    """Bytes of each part on this rank."""
    trainer = trainer_of(setup)
    parameters = [p for chunk in trainer.model for p in chunk.parameters()]
    buffers = [b for chunk in trainer.model for b in chunk.buffers + chunk.expert_parallel_buffers]
    saved = SavedBytes({p.untyped_storage().data_ptr() for p in parameters})
    with saved.counting():  # the first step makes the optimizer's state too
        trainer.step(stream())
    step = allocated_by(lambda: trainer.step(stream()))
    assert saved.now == 0, saved.now
    return {
        "weights": bytes_of(parameters),
        "gradients": bytes_of(b.grad_data for b in buffers),
        "optimizer": bytes_of(optimizer_tensors(trainer)),
        "activations": saved.peak,
        "step": step,
    }


def on_disk(setup: Setup, folder: Path) -> int:
    """Bytes of a checkpoint after a step."""
    from btx_megatron.training.checkpoint import TrainingState
    from btx_megatron.training.saver import save

    trainer = trainer_of(setup)
    trainer.step(stream())
    state = TrainingState(trainer.model, trainer.optimizer, trainer.scheduler, setup.layout)
    path = save(folder, state, {}, keep=1)
    dist.barrier()
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def main() -> None:
    folder = Path(sys.argv[1])
    ranks.start_ranks()
    world = dist.get_world_size()
    result: dict[str, list[dict[str, int]]] = {}
    for name, layout in CASES[world].items():
        for bf16 in PRECISIONS.get(name.split()[0], (False,)):
            mine = counted(setup_of_case(name, layout, bf16))
            of_all: list[Any] = [None] * world
            dist.all_gather_object(of_all, mine)
            result[f"{name}, {'bf16' if bf16 else 'fp32'}"] = of_all
    checkpoints = {
        f"{name}, {'bf16' if bf16 else 'fp32'}": on_disk(
            setup_of_case(name, CASES[world][name], bf16), folder / f"{world}-{number}-{bf16}"
        )
        for number, name in enumerate(SAVED[world])
        for bf16 in (False, True)
    }
    if dist.get_rank() == 0:
        (folder / f"memory-{world}.json").write_text(
            json.dumps(result | {"checkpoints": checkpoints}, indent=1)
        )
    ranks.stop_ranks()


if __name__ == "__main__":
    main()
