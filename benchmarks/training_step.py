"""How fast a training step is, beside transformers' Llama with fused AdamW and beside bare Megatron-Core.

    python benchmarks/training_step.py --size 5M 25M --precision fp32 bf16 --rounds 30

All contestants live in one process, hold the same initial weights, and take one step each in turn, another
one first every time, on the same tokens; so a slow moment hits all. A step is forward, backward, gradient
clipping at 1, AdamW with decay on matrices alone, and the schedule. bf16 means for all: weights and
activations in bf16, master weights, gradients and moments in fp32.

- btx: our training loop (``Trainer.step``);
- Megatron-Core: the same model and optimizer driven by its own calls, nothing of ours around them;
- transformers: LlamaForCausalLM with SDPA attention, torch.optim.AdamW(fused=True).

That all three do the same is checked, not assumed: their losses must agree after the rounds (1 % in bf16).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import commit, machine, versions

ROOT = Path(__file__).resolve().parents[1]
SEQUENCE, VOCAB = 256, 4096
LR, WARM_UP = 3e-4, 3


@dataclass(frozen=True)
class Size:
    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int


SIZES = {"5M": Size(4, 256, 640, 4, 2), "25M": Size(6, 512, 1536, 8, 4)}


@dataclass
class Contestant:
    name: str
    step: Callable[[Any], float]
    """Takes tokens [B, S + 1], returns the loss."""


def recipe_of(size: Size, bf16: bool, batch: int, steps: int) -> Any:
    from btx_megatron.recipe import Model, Recipe, Stage, Training

    model = Model(
        num_layers=size.layers,
        hidden_size=size.hidden,
        ffn_hidden_size=size.ffn,
        num_attention_heads=size.heads,
        num_query_groups=size.groups,
        seq_length=SEQUENCE,
    )
    training = Training(
        train_iters=steps,
        micro_batch_size=batch,
        global_batch_size=batch,
        lr=LR,
        lr_warmup_iters=WARM_UP,
        bf16=bf16,
    )
    recipe = Recipe(model=model, training=training)
    recipe.stages.seed = Stage(training=training)
    return recipe


def batch_of(tokens: Any, step: int) -> dict[str, Any]:
    import torch

    inputs = tokens[:, :-1].contiguous()
    return {
        "tokens": inputs,
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": torch.ones(inputs.shape),
        "position_ids": torch.arange(inputs.shape[1]).expand_as(inputs),
        "sample_index": torch.arange(len(inputs)),
        "step": step,
    }


def ours(recipe: Any) -> tuple[Contestant, Any]:
    from btx_megatron.training.trainer import Trainer

    trainer = Trainer(recipe, recipe.stages.seed, padded_vocab_size=VOCAB, num_experts=None)
    return Contestant("btx", lambda tokens: trainer.step(iter([batch_of(tokens, 0)])).lm_loss), trainer


def bare_megatron(recipe: Any, weights: Any) -> Contestant:
    """What a user of Megatron-Core would write for one rank."""
    import torch
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_model_config

    from btx_megatron.model.build import build_model, unwrap
    from btx_megatron.training.optimizer import build_optimizer, build_scheduler

    stage = recipe.stages.seed
    (inner,) = build_model(recipe, stage, VOCAB)
    unwrap(inner).load_state_dict(weights)
    config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    model = DistributedDataParallel(get_model_config(inner), config, inner)
    optimizer = build_optimizer([model], stage)
    scheduler = build_scheduler(optimizer, stage.training, stage.training.train_iters)
    get_model_config(model).finalize_model_grads_func = finalize_model_grads
    get_model_config(model).grad_scale_func = optimizer.scale_loss
    run = get_forward_backward_func()

    def forward_step(batches: Any, model: Any) -> Any:
        batch = next(batches)
        losses = model(batch["tokens"], batch["position_ids"], attention_mask=None, labels=batch["labels"])

        def loss(output: Any) -> Any:
            total, count = output.float().sum(), torch.tensor(output.numel(), dtype=torch.int)
            return total, count, torch.stack([total.detach(), count.float()])

        return losses, loss

    def step(tokens: Any) -> float:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        losses = run(
            forward_step_func=forward_step,
            data_iterator=iter([batch_of(tokens, 0)]),
            model=[model],
            num_microbatches=1,
            seq_length=SEQUENCE,
            micro_batch_size=len(tokens),
            forward_only=False,
        )
        optimizer.step()
        scheduler.step(increment=len(tokens))
        return float(losses[0][0] / losses[0][1])

    return Contestant("Megatron-Core", step)


def transformers_llama(recipe: Any, folder: Path) -> Contestant:
    """The same weights (through our converter), SDPA and fused AdamW."""
    import torch
    from transformers import LlamaForCausalLM

    training = recipe.training
    dtype = torch.bfloat16 if training.bf16 else torch.float32
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").train()
    parameters = list(model.parameters())
    masters = [p.detach().float().requires_grad_() for p in parameters] if training.bf16 else parameters
    groups = [
        {"params": [p for p in masters if p.dim() > 1], "weight_decay": training.weight_decay},
        {"params": [p for p in masters if p.dim() == 1], "weight_decay": 0.0},
    ]
    betas = (training.adam_beta1, training.adam_beta2)
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=betas, eps=training.adam_eps, fused=True)
    steps = 0

    def step(tokens: Any) -> float:
        nonlocal steps
        logits = model(tokens[:, :-1], use_cache=False).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        if training.bf16:
            for master, parameter in zip(masters, parameters, strict=True):
                master.grad, parameter.grad = parameter.grad.float(), None  # type: ignore[union-attr]
        torch.nn.utils.clip_grad_norm_(masters, training.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(training, steps)
        optimizer.step()
        optimizer.zero_grad()
        if training.bf16:
            with torch.no_grad():
                torch._foreach_copy_(parameters, masters)
        steps += 1
        return loss.item()

    return Contestant("transformers", step)


def learning_rate(training: Any, steps_done: int) -> float:
    """Linear from 0, then a cosine to a tenth, as the recipe's schedule."""
    import math

    if steps_done < WARM_UP:
        return LR * steps_done / WARM_UP
    share = (steps_done - WARM_UP) / (training.train_iters - WARM_UP)
    return LR * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share)))


def contestants(recipe: Any, folder: Path) -> list[Contestant]:
    """Everyone, from one model: ours makes it, and it travels as a checkpoint."""
    from btx_megatron.mixing.mix import Output, convert
    from btx_megatron.model.build import unwrap
    from btx_megatron.training.checkpoint import TrainingState
    from btx_megatron.training.saver import save

    mine, trainer = ours(recipe)
    state = TrainingState(trainer.model, trainer.optimizer, trainer.scheduler, recipe.stages.seed.layout)
    from btx_megatron.recipe_file import recipe_to_dict

    save(folder / "ours", state, {"recipe": recipe_to_dict(recipe), "vocab_size": VOCAB}, keep=1)
    convert(folder / "ours", Output(folder / "llama", to="hf"))
    state_dict = unwrap(trainer.model[0]).state_dict()
    weights = {key: value.clone() for key, value in state_dict.items() if value is not None}
    return [mine, bare_megatron(recipe, weights), transformers_llama(recipe, folder / "llama")]


def measure(recipe: Any, rounds: int, folder: Path) -> dict[str, Any]:
    """Seconds of every step of everyone, and the losses of the last."""
    import torch

    taking_part = contestants(recipe, folder)
    generator = torch.Generator().manual_seed(1)
    seconds: dict[str, list[float]] = {one.name: [] for one in taking_part}
    losses: dict[str, float] = {}
    batch = recipe.training.micro_batch_size
    for number in range(WARM_UP + rounds):
        # an alphabet that shrinks the loss quickly, so that a wrong update would show
        tokens = torch.randint(0, 64, (batch, SEQUENCE + 1), generator=generator)
        first = number % len(taking_part)
        for one in taking_part[first:] + taking_part[:first]:
            started = time.perf_counter()
            losses[one.name] = one.step(tokens)
            if number >= WARM_UP:
                seconds[one.name].append(time.perf_counter() - started)
    spread = max(losses.values()) - min(losses.values())
    if spread > (0.01 if recipe.training.bf16 else 1e-3) * losses["btx"]:
        sys.exit(f"they do not compute the same: losses of the last step {losses}")
    return {"seconds": seconds, "losses": losses}


def ratios(seconds: dict[str, list[float]]) -> list[str]:
    """Rows: everyone's step, and how many times as fast ours is, by round."""
    rows = []
    for name, its in seconds.items():
        ratio = [theirs / mine for theirs, mine in zip(its, seconds["btx"], strict=True)]
        low, _, high = statistics.quantiles(ratio, n=4)
        middle, mine = statistics.median(ratio), 1000 * statistics.median(its)
        rows.append(f"| {name} | {mine:.1f} | {middle:.3f} | {low:.3f}-{high:.3f} |")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)

    import tempfile

    from btx_megatron.runtime import ranks

    told = machine(ROOT, ROOT) | {"commit": commit(ROOT), "rounds": str(options.rounds)}
    told["versions"] = versions(sys.executable, ["torch", "megatron-core", "transformers"])
    told["step"] = f"{options.batch} x {SEQUENCE} tokens, {options.threads} threads, 1 process"
    print("\n".join(f"- {key}: {value}" for key, value in told.items()))
    report: dict[str, Any] = {"told": told, "results": {}}
    with ranks.joined_ranks():
        for name in options.size:
            for precision in options.precision:
                recipe = recipe_of(SIZES[name], precision == "bf16", options.batch, WARM_UP + options.rounds)
                ranks.set_layout(recipe.stages.seed.layout, seed=1)
                with tempfile.TemporaryDirectory() as folder:
                    result = measure(recipe, options.rounds, Path(folder))
                report["results"][f"{name} {precision}"] = result
                print(f"\n{name} {precision}\n")
                print("| | ms a step | btx is faster by | quartiles |\n|---|---|---|---|")
                print("\n".join(ratios(result["seconds"])), flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
