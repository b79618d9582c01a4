"""What benchmarks/gpu_training.py measures: models, and those who train them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

WARM_UP = 3
BASE = "te"
FP8 = {
    "te-delayed": {"fp8": "hybrid", "fp8_recipe": "delayed"},
    "te-tensorwise": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    "te-blockwise": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
}
CONTESTANTS = ["local", *FP8, "transformers"]


@dataclass(frozen=True)
class Case:
    """A model. ``experts`` 0: dense; a token takes two of them."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    experts: int = 0
    vocabulary: int = 32_000
    sequence: int = 4096
    lr: float = 3e-4


CASES = {
    # minutes may end: the paper's own shapes come first
    "dense-7b-layers": Case(6, 4096, 11_008, 32, 32),  # Llama 2 7B, 6 of 32 layers
    "moe-4": Case(2, 4096, 11_008, 32, 32, experts=4),  # BTX of four Llama 2 7B, 2 of 32 layers
    "dense-1b": Case(16, 2048, 8192, 32, 8),  # Llama 3.2 1B with a smaller vocabulary
    "moe-8": Case(3, 2048, 8192, 32, 8, experts=8),
}
TINY = {
    "dense-tiny": Case(2, 64, 128, 4, 2, vocabulary=256, sequence=64, lr=3e-3),
    "moe-tiny": Case(2, 64, 128, 4, 2, experts=4, vocabulary=256, sequence=64, lr=3e-3),
}


@dataclass
class Contestant:
    """One that takes steps, and what it holds."""

    step: Callable[[list[Any]], float]
    """Takes micro-batches of tokens [1, S + 1], returns the mean loss."""
    owner: Any


def recipe_of(case: Case, name: str, micro_batches: int) -> Any:
    from btx_megatron.recipe import Launch, Model, Moe, Recipe, Stage, Training

    training = Training(
        train_iters=10_000,
        global_batch_size=micro_batches,
        lr=case.lr,
        lr_warmup_iters=WARM_UP,
        bf16=True,
        **FP8.get(name, {}),  # type: ignore[arg-type]
    )
    recipe = Recipe(
        model=Model(
            num_layers=case.layers,
            hidden_size=case.hidden,
            ffn_hidden_size=case.ffn,
            num_attention_heads=case.heads,
            num_query_groups=case.groups,
            seq_length=case.sequence,
        ),
        training=training,
        moe=Moe(moe_aux_loss_coeff=0.01),
        launch=Launch(transformer_impl="local" if name == "local" else "transformer_engine"),
    )
    recipe.stages.seed = Stage(training=training)
    return recipe


def ours(case: Case, name: str, micro_batches: int, tiny: bool) -> Contestant:
    import torch

    from btx_megatron.runtime.ranks import device
    from btx_megatron.training.trainer import Trainer

    recipe = recipe_of(case, name, micro_batches)
    if tiny:
        recipe.launch.transformer_impl = None
    # a billion weights from the CPU's generator would take longer than the steps; the GPU's follow below
    with mock.patch("torch.nn.init.normal_", lambda tensor, *_, **__: tensor):
        trainer = Trainer(
            recipe,
            recipe.stages.seed,
            padded_vocab_size=case.vocabulary,
            num_experts=case.experts or None,
        )
    generator = torch.Generator(device()).manual_seed(1)
    with torch.no_grad():
        for chunk in trainer.model:
            for parameter in chunk.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.02, generator=generator)
    trainer.optimizer.reload_model_params()

    def step(tokens: list[Any]) -> float:
        return trainer.step(iter([micro_batch(sample) for sample in tokens])).lm_loss

    return Contestant(step, trainer)


def micro_batch(tokens: Any) -> dict[str, Any]:
    import torch

    inputs = tokens[:, :-1].contiguous()
    return {
        "tokens": inputs,
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": torch.ones(inputs.shape, device=inputs.device),
        "position_ids": torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs),
        "sample_index": torch.arange(len(inputs)),
        "step": 1,
    }


def transformers_model(case: Case) -> Contestant:
    """Weights of its own: what is compared is time, and that its loss falls."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    from btx_megatron.runtime.ranks import device

    shape: dict[str, Any] = {
        "vocab_size": case.vocabulary,
        "hidden_size": case.hidden,
        "intermediate_size": case.ffn,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.groups,
        "max_position_embeddings": case.sequence,
        "attn_implementation": "sdpa",
    }
    with torch.device(device()):
        model: Any = (
            MixtralForCausalLM(
                MixtralConfig(
                    **shape,
                    num_local_experts=case.experts,
                    num_experts_per_tok=2,
                    output_router_logits=True,
                    sliding_window=None,
                )
            )
            if case.experts
            else LlamaForCausalLM(LlamaConfig(**shape))
        )
    model = model.to(torch.bfloat16).train()
    parameters = list(model.parameters())
    masters = [parameter.detach().float().requires_grad_() for parameter in parameters]
    groups = [
        {"params": [p for p in masters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in masters if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=case.lr, betas=(0.9, 0.95), eps=1e-5, fused=True)

    def step(tokens: list[Any]) -> float:
        total = torch.zeros((), device=device())
        for master in masters:
            master.grad = torch.zeros_like(master) if master.grad is None else master.grad.zero_()
        for sample in tokens:
            output = model(sample[:, :-1], use_cache=False)
            logits = output.logits.float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), sample[:, 1:].flatten())
            balancing = 0.01 * output.aux_loss if case.experts else 0.0
            ((loss + balancing) / len(tokens)).backward()
            torch._foreach_add_([master.grad for master in masters], [p.grad.float() for p in parameters])
            for parameter in parameters:
                parameter.grad = None
            total += loss.detach() / len(tokens)
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(parameters, masters)
        return total.item()

    return Contestant(step, model)


def build(case: Case, name: str, micro_batches: int, tiny: bool) -> Contestant:
    if name == "transformers":
        return transformers_model(case)
    return ours(case, name, micro_batches, tiny)


def samples(case: Case, micro_batches: int) -> Iterator[list[Any]]:
    """Tokens with something to learn (an eighth of the vocabulary: few of them would load few experts)."""
    import torch

    from btx_megatron.runtime.ranks import device

    generator = torch.Generator().manual_seed(1)
    while True:
        tokens = torch.randint(
            0, case.vocabulary // 8, (micro_batches, 1, case.sequence + 1), generator=generator
        )
        yield list(tokens.to(device()))
