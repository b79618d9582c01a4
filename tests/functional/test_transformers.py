"""Our model against transformers': the same weights give the same logits, and learn the same way."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_worker import EXPERTS, MODEL, STEPS, TRAINING, VOCABULARY, RandomSamples
from torch import Tensor
from torchrun import torchrun
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

GROUPS, HEADS = MODEL.num_query_groups or MODEL.num_attention_heads, MODEL.num_attention_heads
WIDTH = MODEL.hidden_size // HEADS
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": MODEL.hidden_size,
    "intermediate_size": MODEL.ffn_hidden_size,
    "num_hidden_layers": MODEL.num_layers,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "rms_norm_eps": MODEL.norm_epsilon,
    "rope_theta": MODEL.rotary_base,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("logits")
    torchrun("logits_worker.py", 1, folder)
    return {path.stem: torch.load(path) for path in folder.glob("*.pt")}


def attention_weights(state: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    """Megatron interleaves per query group: [heads of the group | key | value]."""
    prefix = f"decoder.layers.{layer}."
    packed = state[prefix + "self_attention.linear_qkv.weight"].view(GROUPS, -1, WIDTH, MODEL.hidden_size)
    q, k, v = packed.split([HEADS // GROUPS, 1, 1], dim=1)
    return {
        "self_attn.q_proj.weight": q.reshape(-1, MODEL.hidden_size),
        "self_attn.k_proj.weight": k.reshape(-1, MODEL.hidden_size),
        "self_attn.v_proj.weight": v.reshape(-1, MODEL.hidden_size),
        "self_attn.o_proj.weight": state[prefix + "self_attention.linear_proj.weight"],
        "input_layernorm.weight": state[prefix + "input_layernorm.weight"],
        "post_attention_layernorm.weight": state[prefix + "pre_mlp_layernorm.weight"],
    }


def shared_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = {
        "model.embed_tokens.weight": state["embedding.word_embeddings.weight"],
        "model.norm.weight": state["decoder.final_layernorm.weight"],
        "lm_head.weight": state["output_layer.weight"],
    }
    for layer in range(MODEL.num_layers):
        for name, tensor in attention_weights(state, layer).items():
            weights[f"model.layers.{layer}.{name}"] = tensor
    return weights


def feed_forward(state: dict[str, Tensor], prefix: str) -> tuple[Tensor, Tensor, Tensor]:
    gate, up = state[prefix + "linear_fc1.weight"].chunk(2)
    return gate, up, state[prefix + "linear_fc2.weight"]


def logits_of(model: torch.nn.Module, case: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model.eval()(case["tokens"]).logits  # type: ignore[no-any-return]


def llama(state: dict[str, Tensor]) -> LlamaForCausalLM:
    """transformers' Llama with our weights."""
    weights = shared_weights(state)
    for layer in range(MODEL.num_layers):
        gate, up, down = feed_forward(state, f"decoder.layers.{layer}.mlp.")
        prefix = f"model.layers.{layer}.mlp."
        weights |= {f"{prefix}gate_proj.weight": gate, f"{prefix}up_proj.weight": up}
        weights[f"{prefix}down_proj.weight"] = down
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model.load_state_dict(weights)
    return model


def mixtral(state: dict[str, Tensor]) -> MixtralForCausalLM:
    """transformers' Mixtral with our weights."""
    weights = shared_weights(state)
    for layer in range(MODEL.num_layers):
        ours_prefix, prefix = f"decoder.layers.{layer}.mlp.", f"model.layers.{layer}.mlp."
        experts = [feed_forward(state, f"{ours_prefix}experts.local_experts.{e}.") for e in range(EXPERTS)]
        weights[f"{prefix}gate.weight"] = state[ours_prefix + "router.weight"]
        weights[f"{prefix}experts.gate_up_proj"] = torch.stack([torch.cat(e[:2]) for e in experts])
        weights[f"{prefix}experts.down_proj"] = torch.stack([e[2] for e in experts])
    config = MixtralConfig(
        **SHAPE, num_local_experts=EXPERTS, num_experts_per_tok=2, output_router_logits=False
    )
    model = MixtralForCausalLM(config)
    model.load_state_dict(weights)
    return model


def test_dense_logits_are_llamas(ours: dict[str, dict[str, Any]]) -> None:
    case = ours["dense"]
    torch.testing.assert_close(logits_of(llama(case["state"]), case), case["logits"], atol=1e-4, rtol=0)
    assert case["logits"].std() > 0.5


def test_moe_logits_are_mixtrals(ours: dict[str, dict[str, Any]]) -> None:
    case = ours["moe"]
    torch.testing.assert_close(logits_of(mixtral(case["state"]), case), case["logits"], atol=1e-4, rtol=0)


def learning_rate(step: int) -> float:
    """Of the step after ``step`` others: linear from 0, then a cosine to a tenth of the peak."""
    if step < TRAINING.lr_warmup_iters:
        return TRAINING.lr * step / TRAINING.lr_warmup_iters
    share = (step - TRAINING.lr_warmup_iters) / (STEPS - TRAINING.lr_warmup_iters)
    return TRAINING.lr * (0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2)


def losses_of_training(model: torch.nn.Module) -> list[float]:
    """Training as in transformers: torch's AdamW with decay on matrices alone, clipping, the whole batch at
    once."""
    weights = list(model.parameters())
    groups = [
        {"params": [w for w in weights if w.dim() > 1], "weight_decay": TRAINING.weight_decay},
        {"params": [w for w in weights if w.dim() == 1], "weight_decay": 0.0},
    ]
    betas = (TRAINING.adam_beta1, TRAINING.adam_beta2)
    optimizer = torch.optim.AdamW(groups, betas=betas, eps=TRAINING.adam_eps)
    samples, batch, losses = RandomSamples(), TRAINING.global_batch_size, []
    for step in range(STEPS):
        chosen = [samples[number] for number in range(step * batch, (step + 1) * batch)]
        logits = model(torch.stack([sample["tokens"] for sample in chosen])).logits
        labels = torch.stack([sample["labels"] for sample in chosen])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, TRAINING.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("kind", "reference"), [("dense", llama), ("moe", mixtral)])
def test_training_is_transformers(ours: dict[str, dict[str, Any]], kind: str, reference: Any) -> None:
    case = ours[f"{kind}-trained"]
    theirs = losses_of_training(reference(case["state"]).train())
    assert case["losses"] == pytest.approx(theirs, abs=1e-3)
    assert theirs[-1] < theirs[0] - 2
