"""Train one tiny model under many layouts in one torchrun; what happened goes to a JSON file.

torchrun --nproc-per-node 1 layout_worker.py FOLDER      the reference, and the initial checkpoints
torchrun --nproc-per-node 2 layout_worker.py FOLDER      the layouts of two ranks, from those checkpoints
torchrun --nproc-per-node 4 layout_worker.py FOLDER      and of four

With --losses after FOLDER only the losses of 20 steps under each layout.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from btx_megatron.checkpoints.tracker import find_checkpoint, latest_checkpoint
from btx_megatron.recipe import Layout, Model, Moe, Recipe, Stage, Training
from btx_megatron.runtime import ranks

STEPS, VOCABULARY, EXPERTS = 20, 128, 4

MODEL = Model(
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    num_query_groups=2,
    seq_length=32,
)
TRAINING = Training(train_iters=STEPS, micro_batch_size=2, global_batch_size=8, lr=1e-2, lr_warmup_iters=2)

TP2_SP = Layout(tensor_model_parallel_size=2, sequence_parallel=True)
DP2_DISTRIBUTED = Layout(data_parallel_size=2, use_distributed_optimizer=True)
EP2 = Layout(data_parallel_size=2, expert_model_parallel_size=2)
PP2 = Layout(pipeline_model_parallel_size=2)
CP2 = Layout(context_parallel_size=2)
OVERLAP = replace(DP2_DISTRIBUTED, overlap_grad_reduce=True, overlap_param_gather=True)
INTERLEAVED = replace(PP2, num_layers_per_virtual_pipeline_stage=1)
FIRST_3 = replace(PP2, decoder_first_pipeline_num_layers=3)
TP2_EP2 = replace(TP2_SP, data_parallel_size=2, expert_model_parallel_size=2)

LAYOUTS = {
    "dense": {
        "TP2+SP": TP2_SP,
        "TP2": replace(TP2_SP, sequence_parallel=False),
        "PP2": PP2,
        "DP2": Layout(data_parallel_size=2),
        "DP2+distributed": DP2_DISTRIBUTED,
        "DP2+distributed+overlap": OVERLAP,
        "CP2": CP2,
    },
    "deep": {
        "PP2 interleaved": INTERLEAVED,
        "PP2 first 3": FIRST_3,
        "PP2 last 3": replace(PP2, decoder_last_pipeline_num_layers=3),
    },
    "moe": {
        "EP2": EP2,
        "EP2+distributed": replace(EP2, use_distributed_optimizer=True),
        "TP2+SP": TP2_SP,
        "TP2+SP+EP2": replace(TP2_SP, expert_model_parallel_size=2, expert_tensor_parallel_size=1),
        "PP2": PP2,
        "CP2": CP2,
        "CP2+EP2": replace(CP2, expert_model_parallel_size=2),
    },
    "gathered": {
        "EP2": EP2,
        "TP2+SP+EP2": replace(TP2_SP, expert_model_parallel_size=2, expert_tensor_parallel_size=1),
    },
    "switch": {"EP2": EP2, "TP2+SP": TP2_SP},
}
ON_4_RANKS = {
    "dense": {
        "TP2PP2": replace(PP2, tensor_model_parallel_size=2),
        "CP2+TP2+SP": replace(TP2_SP, context_parallel_size=2),
        "CP2+PP2": replace(PP2, context_parallel_size=2),
        "CP2+DP2+distributed": replace(DP2_DISTRIBUTED, context_parallel_size=2),
        "CP4": Layout(context_parallel_size=4),
    },
    "deep": {
        "TP2+SP, PP2 interleaved": replace(INTERLEAVED, tensor_model_parallel_size=2, sequence_parallel=True),
        "DP2+overlap, PP2 interleaved": replace(
            OVERLAP, pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1
        ),
    },
    "moe": {
        "TP2+SP+EP2, ETP1": replace(TP2_EP2, expert_tensor_parallel_size=1),
        "TP2+SP+EP2, ETP2": replace(TP2_EP2, expert_tensor_parallel_size=2),
        "PP2+EP2": replace(EP2, pipeline_model_parallel_size=2),
        "CP2+TP2+SP+EP2, ETP1": replace(
            TP2_SP, context_parallel_size=2, expert_model_parallel_size=2, expert_tensor_parallel_size=1
        ),
        "EP2, DP4+distributed": replace(EP2, data_parallel_size=4, use_distributed_optimizer=True),
    },
    "gathered": {"TP2+SP+EP2, ETP2": replace(TP2_EP2, expert_tensor_parallel_size=2)},
}
MOE = Moe(moe_router_load_balancing_type="btx")
MOES = {
    "dense": None,
    "deep": None,
    "moe": MOE,
    "gathered": replace(MOE, moe_token_dispatcher_type="allgather"),
    "switch": Moe(moe_router_load_balancing_type="aux_loss"),
    "unbalanced": Moe(moe_router_load_balancing_type="none"),
}
"""The kinds of model; None: dense. ``deep`` has four layers, the others two."""

FULL = Layout(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
RECOMPUTE = {
    "dense": {
        "full": FULL,
        "full, pairs": replace(FULL, recompute_num_layers=2),
        "block": replace(FULL, recompute_method="block"),
        "selective": Layout(recompute_granularity="selective"),
        "mlp, core_attn": Layout(recompute_granularity="selective", recompute_modules=["mlp", "core_attn"]),
    },
    "moe": {
        "full": FULL,
        "selective": Layout(recompute_granularity="selective"),
        "moe": Layout(recompute_granularity="selective", recompute_modules=["moe"]),
    },
}
RESHARDS: dict[str, tuple[str, Layout | None, Layout]] = {
    "dense DP2 to TP2+SP, distributed": (
        "dense",
        DP2_DISTRIBUTED,
        replace(TP2_SP, use_distributed_optimizer=True),
    ),
    "dense DP2 to PP2, distributed": ("dense", DP2_DISTRIBUTED, replace(PP2, use_distributed_optimizer=True)),
    "dense PP2 to TP2+SP": ("dense", PP2, TP2_SP),
    "dense 1 process to DP2": ("dense", None, Layout(data_parallel_size=2)),
    "moe 1 process to TP2+SP": ("moe", None, TP2_SP),
    "dense CP2 to TP2+SP": ("dense", CP2, TP2_SP),
    "moe 1 process to CP2": ("moe", None, CP2),
    "moe TP2+SP to PP2": ("moe", TP2_SP, PP2),
    "deep 1 process to PP2 interleaved": ("deep", None, INTERLEAVED),
    "deep PP2 interleaved to PP2 first 3": (
        "deep",
        replace(INTERLEAVED, use_distributed_optimizer=True),
        replace(FIRST_3, use_distributed_optimizer=True),
    ),
    "moe TP2+SP+EP2 to EP2": ("moe", LAYOUTS["moe"]["TP2+SP+EP2"], EP2),
}
"""Kind of model, the layout that was saved (None: one process), the one that goes on; with the same EP."""


class RandomSamples:
    """Samples that depend on their number alone, with some structure to learn."""

    def __len__(self) -> int:
        return STEPS * TRAINING.global_batch_size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        steps = torch.randint(1, 4, (MODEL.seq_length + 1,), generator=generator)
        tokens = steps.cumsum(0) % VOCABULARY
        return {"tokens": tokens[:-1], "labels": tokens[1:]}


class Run:
    """One training run of a kind of model under a layout, from the kind's initial checkpoint."""

    def __init__(self, kind: str, layout: Layout, folder: Path, **options: Any) -> None:
        ranks.set_layout(layout, seed=7)
        from btx_megatron.training.checkpoint import TrainingState, load_weights
        from btx_megatron.training.saver import save
        from btx_megatron.training.trainer import Trainer

        dropout = options.get("dropout", 0.0)
        model = replace(MODEL, hidden_dropout=dropout, attention_dropout=dropout)
        model.num_layers = 4 if kind == "deep" else MODEL.num_layers
        self.training = replace(
            TRAINING, bf16=options.get("bf16", False), freeze=list(options.get("freeze", []))
        )
        moe = MOES[kind]
        self.masked = moe is not None and moe.moe_router_time_mask
        self.trainer = Trainer(
            Recipe(model=model, training=self.training, moe=moe or Moe()),
            Stage(training=self.training, layout=layout),
            padded_vocab_size=VOCABULARY,
            num_experts=EXPERTS if moe else None,
        )
        t = self.trainer
        self.state = TrainingState(t.model, t.optimizer, t.scheduler, layout, adaptive=t.adaptive)
        initial = folder / f"initial-{kind}"
        missing = not initial.exists()
        torch.distributed.barrier()  # all have looked before one of them makes it
        if missing:
            save(initial, self.state, {}, keep=1)
        load_weights(initial, t.model)
        t.optimizer.reload_model_params()

    def steps(self, count: int) -> dict[str, list[Any]]:
        """Losses and gradient norms of the next ``count`` steps."""
        stream = self._batches()
        results = [self.trainer.step(stream) for _ in range(count)]
        self.state.iteration += count
        self.state.consumed_samples += count * self.training.global_batch_size
        return {
            "loss": [r.lm_loss for r in results],
            "grad_norm": [r.grad_norm for r in results],
            "balancing": [r.balancing_loss for r in results],
        }

    def _batches(self) -> Iterator[dict[str, Any]]:
        from megatron.core import parallel_state

        from btx_megatron.data.blend import batches

        stream = batches(
            RandomSamples(),  # type: ignore[arg-type]
            consumed_samples=self.state.consumed_samples,
            micro_batch_size=self.training.micro_batch_size,
            global_batch_size=self.training.global_batch_size,
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
        )
        return _masked(stream) if self.masked else stream


def _masked(batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Sample i may take the first i % EXPERTS + 1 experts."""
    for batch in batches:
        allowed = torch.arange(EXPERTS) <= batch["sample_index"][:, None] % EXPERTS
        yield batch | {"allowed_experts": allowed}


def resumed(kind: str, first: Layout, second: Layout, folder: Path, name: str, **options: Any) -> list[float]:
    """Losses of the second half of a run that was saved under one layout and goes on under another."""
    save_half_way(kind, first, folder / f"resume-{name}", folder, **options)
    return second_half(kind, second, folder / f"resume-{name}", folder, **options)


def save_half_way(kind: str, layout: Layout, path: Path, folder: Path, **options: Any) -> None:
    """Half a run, saved while training goes on: nothing is written before two more steps are done."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    from btx_megatron.training.saver import CheckpointSaver, Retention

    run = Run(kind, layout, folder, **options)
    run.steps(STEPS // 2)
    go, write = threading.Event(), FileSystemWriterAsync.write_preloaded_data
    FileSystemWriterAsync.write_preloaded_data = staticmethod(lambda *a, **k: go.wait(60) and write(*a, **k))
    saver = CheckpointSaver(path, Retention(), asynchronous=True)
    saver.save(run.state, {})
    run.steps(2)
    assert not saver.poll()
    assert latest_checkpoint(path) is None
    go.set()
    saver.wait()
    FileSystemWriterAsync.write_preloaded_data = staticmethod(write)
    saver = CheckpointSaver(path.with_name(f"{path.name}-last"), Retention(), asynchronous=True)
    saver.save(run.state, {}, last=True)  # is there when this returns
    assert find_checkpoint(saver.folder).name == f"iter_{STEPS // 2 + 2:07d}"


def second_half(kind: str, layout: Layout, path: Path, folder: Path, **options: Any) -> list[float]:
    """Losses of a run that goes on from what save_half_way has saved."""
    from btx_megatron.training.checkpoint import resume

    run, half = Run(kind, layout, folder, **options), STEPS // 2
    assert resume(path, run.state)
    assert (run.state.iteration, run.state.consumed_samples) == (half, half * 8)
    return run.steps(STEPS - half)["loss"]


def resumes(folder: Path) -> dict[str, Any]:
    """Interrupted runs beside whole ones: same layout (bit for bit), and another layout."""
    cases = {
        "dense DP2+distributed, dropout": ("dense", DP2_DISTRIBUTED, {"dropout": 0.1}),
        "dense DP2+overlap": ("dense", LAYOUTS["dense"]["DP2+distributed+overlap"], {}),
        "dense TP2+SP, dropout": ("dense", TP2_SP, {"dropout": 0.1}),
        "dense DP2+distributed, bf16": ("dense", DP2_DISTRIBUTED, {"bf16": True}),
        "dense PP2, bf16": ("dense", PP2, {"bf16": True}),
        "moe EP2+distributed": ("moe", replace(EP2, use_distributed_optimizer=True), {}),
        "moe EP2, bf16": ("moe", EP2, {"bf16": True}),
    }
    result: dict[str, Any] = {}
    for number, (name, (kind, layout, options)) in enumerate(cases.items()):
        whole = Run(kind, layout, folder, **options).steps(STEPS)["loss"]
        after = resumed(kind, layout, layout, folder, f"same-{number}", **options)
        result[name] = {"whole": whole[STEPS // 2 :], "resumed": after}
    for name, (kind, first, second) in RESHARDS.items():
        if first is None:
            after = second_half(kind, second, folder / f"half-{kind}", folder)
        else:
            after = resumed(kind, first, second, folder, f"other-{name}")
        result[f"reshard {name}"] = after
    return result


def recomputed(folder: Path) -> dict[str, Any]:
    """Losses and gradient norms with dropout, activations kept and recomputed."""
    return {
        f"{kind} {name}": Run(kind, layout, folder, dropout=0.1).steps(5)
        for kind, layouts in RECOMPUTE.items()
        for name, layout in {"kept": Layout(), **layouts}.items()
    }


def damaged(folder: Path) -> str:
    """What is said of a checkpoint whose first file was cut short."""
    from btx_megatron.errors import UserError
    from btx_megatron.training.checkpoint import resume
    from btx_megatron.training.saver import save

    run = Run("dense", DP2_DISTRIBUTED, folder)
    run.steps(1)
    path = save(folder / "damaged", run.state, {}, keep=1)
    if torch.distributed.get_rank() == 0:
        os.truncate(min(path.glob("*.distcp")), 1000)
    torch.distributed.barrier()
    try:
        resume(folder / "damaged", run.state)
    except UserError as error:
        return str(error)
    return "nothing"


def of_another_build(folder: Path) -> dict[str, list[float]]:
    """The second half of a run, and the same from a checkpoint that holds another build's extra state."""
    path = folder / "half-moe"
    losses = {"same": second_half("moe", Layout(), path, folder)}
    told = {"transformer_impl": "transformer_engine", "fp8": "hybrid"}
    with mock.patch("btx_megatron.training.checkpoint._precision", return_value=told):
        losses["other"] = second_half("moe", Layout(), path, folder)
    return losses


def held_out(layout: Layout, folder: Path) -> dict[str, Any]:
    """Loss and routes of the MoE on three windows, the last one all but empty, eight to a micro-batch."""
    import numpy as np

    from btx_megatron.data.held_out import stream_windows
    from btx_megatron.evaluation.loss import held_out_loss, shares, take_load

    run = Run("moe", layout, folder)
    stream = np.concatenate([RandomSamples()[number]["tokens"].numpy() for number in range(3)])
    windows = list(stream_windows(stream[: 2 * MODEL.seq_length + 4], MODEL.seq_length))
    stage = Stage(training=replace(TRAINING, micro_batch_size=8), layout=layout)
    loss = held_out_loss(run.trainer.model, windows, stage, MODEL.seq_length)
    return {"loss": loss, "share": shares(take_load(run.trainer.model, MODEL.num_layers)).tolist()}


def balancing_gradients() -> dict[str, Any]:
    """Value and logit gradient of the soft balancing loss on two skewed shards, and on the whole."""
    from btx_megatron.model.balancing import soft_balancing_loss

    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(64, EXPERTS, generator=generator, dtype=torch.float64)
    logits[:32, 0] += 4.0  # the first shard prefers expert 0: a naive per-shard loss is far off
    logits = logits.float()
    rank = torch.distributed.get_rank()
    shard = logits[32 * rank : 32 * rank + 32].clone().requires_grad_()
    group = torch.distributed.group.WORLD
    value = soft_balancing_loss(gates_of(shard), shard.softmax(-1), group)
    value.backward()
    assert shard.grad is not None
    gradients = [torch.empty_like(shard.grad) for _ in range(2)]
    torch.distributed.all_gather(gradients, shard.grad)
    return {"value": value.item(), "gradient": torch.cat(gradients).tolist(), "logits": logits.tolist()}


def gates_of(logits: torch.Tensor) -> torch.Tensor:
    """SoftMax(TopK), k = 2, as a dense [tokens, experts] tensor."""
    top = logits.topk(2, dim=-1)
    return torch.zeros_like(logits).scatter(-1, top.indices, top.values.softmax(-1))


def main() -> None:
    folder = Path(sys.argv[1])
    ranks.start_ranks()
    world = torch.distributed.get_world_size()
    result: dict[str, Any] = {}
    layouts = {1: {kind: {"1 process": Layout()} for kind in LAYOUTS}, 2: LAYOUTS, 4: ON_4_RANKS}[world]
    for kind in layouts:
        for name, layout in layouts[kind].items():
            result[f"{kind} {name}"] = Run(kind, layout, folder).steps(STEPS)
    if "--losses" not in sys.argv:
        result |= more_than_losses(folder, world)
    if torch.distributed.get_rank() == 0:
        (folder / f"result-{world}.json").write_text(json.dumps(result, indent=1))
    ranks.stop_ranks()


def more_than_losses(folder: Path, world: int) -> dict[str, Any]:
    """Held-out losses, interrupted runs and the like, on so many ranks."""
    result: dict[str, Any] = {}
    held_outs = {1: {"1": Layout()}, 2: {"EP2": EP2, "TP2+SP": TP2_SP, "PP2": PP2}}
    for name, layout in held_outs.get(world, {}).items():
        result[f"held out {name}"] = held_out(layout, folder)
    if world == 1:
        result["recomputed"] = recomputed(folder)
        for kind in ("dense", "deep", "moe"):
            save_half_way(kind, Layout(), folder / f"half-{kind}", folder)
        result["of another build"] = of_another_build(folder)
    if world == 2:
        result["damaged"] = damaged(folder)
        result["resumes"] = resumes(folder)
        result["balancing"] = balancing_gradients()
    return result


if __name__ == "__main__":
    main()
