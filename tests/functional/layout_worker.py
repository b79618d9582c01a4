"""Train one tiny model under many layouts in one torchrun; the losses go to a file.

    torchrun --nproc-per-node 1 layout_worker.py FOLDER      reference, and the initial checkpoints
    torchrun --nproc-per-node 2 layout_worker.py FOLDER      the layouts, from those checkpoints
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from btx_megatron.recipe import Layout, Model, Moe, Recipe, Stage, Training
from btx_megatron.runtime import ranks

STEPS, VOCABULARY, EXPERTS = 20, 128, 4

MODEL = Model(num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2, seq_length=32)
TRAINING = Training(train_iters=STEPS, micro_batch_size=2, global_batch_size=8, lr=1e-2, lr_warmup_iters=2)

TWO = {
    "dense": {
        "TP2+SP": Layout(tensor_model_parallel_size=2, sequence_parallel=True),
        "TP2": Layout(tensor_model_parallel_size=2),
        "PP2": Layout(pipeline_model_parallel_size=2),
        "DP2": Layout(data_parallel_size=2),
        "DP2+distributed": Layout(data_parallel_size=2, use_distributed_optimizer=True),
        "DP2+distributed+overlap": Layout(
            data_parallel_size=2,
            use_distributed_optimizer=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
        ),
    },
    "moe": {
        "EP2": Layout(data_parallel_size=2, expert_model_parallel_size=2),
        "EP2+distributed": Layout(
            data_parallel_size=2, expert_model_parallel_size=2, use_distributed_optimizer=True
        ),
        "TP2+SP+EP2": Layout(
            tensor_model_parallel_size=2,
            sequence_parallel=True,
            expert_model_parallel_size=2,
            expert_tensor_parallel_size=1,
        ),
        "TP2+SP": Layout(tensor_model_parallel_size=2, sequence_parallel=True),
    },
}
ONE = {kind: {"1 process": Layout()} for kind in TWO}


class RandomSamples:
    """Samples that depend on their number alone, with some structure to learn."""

    def __len__(self) -> int:
        return STEPS * TRAINING.global_batch_size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        steps = torch.randint(1, 4, (MODEL.seq_length + 1,), generator=generator)
        tokens = steps.cumsum(0) % VOCABULARY
        return {"tokens": tokens[:-1], "labels": tokens[1:]}


def train(kind: str, layout: Layout, folder: Path, balancing: str = "btx", bf16: bool = False) -> dict[str, Any]:
    """Losses of STEPS steps and the gradient norms, from the initial checkpoint of ``kind``."""
    ranks.set_layout(layout, seed=7)
    from megatron.core import parallel_state

    from btx_megatron.data.blend import batches
    from btx_megatron.training.checkpoint import TrainingState, load_weights, save
    from btx_megatron.training.trainer import Trainer

    training = replace(TRAINING, bf16=bf16)
    recipe = Recipe(model=MODEL, training=training, moe=Moe(moe_router_load_balancing_type=balancing))
    stage = Stage(training=training, layout=layout)
    experts = EXPERTS if kind == "moe" else None
    trainer = Trainer(recipe, stage, padded_vocab_size=VOCABULARY, num_experts=experts)
    state = TrainingState(trainer.model, trainer.optimizer, trainer.scheduler, layout)
    initial = folder / f"initial-{kind}"
    if not initial.exists():
        save(initial, state, {}, keep=1)
    load_weights(initial, trainer.model)
    trainer.optimizer.reload_model_params()
    stream = batches(
        RandomSamples(),
        consumed_samples=0,
        micro_batch_size=training.micro_batch_size,
        global_batch_size=training.global_batch_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
    )
    results = [trainer.step(stream) for _ in range(STEPS)]
    return {"loss": [r.lm_loss for r in results], "grad_norm": [r.grad_norm for r in results]}


def main() -> None:
    folder = Path(sys.argv[1])
    ranks.start_ranks()
    world = torch.distributed.get_world_size()
    results: dict[str, Any] = {}
    for kind, layouts in (ONE if world == 1 else TWO).items():
        for name, layout in layouts.items():
            results[f"{kind} {name}"] = train(kind, layout, folder)
    if torch.distributed.get_rank() == 0:
        (folder / f"losses-{world}.json").write_text(json.dumps(results, indent=1))
    ranks.stop_ranks()


if __name__ == "__main__":
    main()
