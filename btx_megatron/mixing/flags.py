"""The Megatron-LM flags that load a checkpoint, exactly."""

from __future__ import annotations

from pathlib import Path

from btx_megatron.checkpoints.config import ModelConfig
from btx_megatron.checkpoints.formats import Format, Parallel, vocabulary_divisor
from btx_megatron.checkpoints.megatron_args import whole_rotary_base


def megatron_flags(
    config: ModelConfig, padded_vocab_size: int, output: Path, to: Format, parallel: Parallel
) -> list[str]:
    """Flags of ``pretrain_gpt.py`` for the model in ``output``, one an item.

    Megatron-LM pads the tokenizer's vocabulary to a multiple of ``--make-vocab-size-divisible-by`` x TP: the
    flag is chosen so that this gives the checkpoint's rows.
    """
    flags = [
        f"--load {output}",
        "--finetune",
        f"--ckpt-format {'torch_dist' if to == 'megatron' else 'torch'}",
        "--transformer-impl transformer_engine",
        f"--num-layers {config.num_layers}",
        f"--hidden-size {config.hidden_size}",
        f"--ffn-hidden-size {config.ffn_hidden_size}",
        f"--num-attention-heads {config.num_attention_heads}",
        f"--kv-channels {config.kv_channels}",
        f"--seq-length {config.seq_length}",
        f"--max-position-embeddings {config.seq_length}",
        "--position-embedding-type rope",
        f"--rotary-base {whole_rotary_base(config)}",
        "--normalization RMSNorm",
        f"--norm-epsilon {config.norm_epsilon}",
        "--swiglu",
        "--disable-bias-linear",
        f"--make-vocab-size-divisible-by {vocabulary_divisor(config, padded_vocab_size, parallel)}",
    ]
    if config.num_query_groups != config.num_attention_heads:
        flags += ["--group-query-attention", f"--num-query-groups {config.num_query_groups}"]
    if not config.tied:
        flags.append("--untie-embeddings-and-output-weights")
    if config.rope_scaling is not None:
        flags += ["--use-rope-scaling", f"--rope-scaling-factor {dict(config.rope_scaling)['factor']}"]
    if config.num_experts is not None:
        flags += [
            f"--num-experts {config.num_experts}",
            f"--moe-router-topk {config.moe_router_topk}",
            "--moe-router-dtype fp32",
            *(["--moe-router-pre-softmax"] if config.moe_router_pre_softmax else []),
            *capacity_flags(config),
        ]
    if to == "megatron":
        # each layer's empty _extra_state is asked for and not written: by default Megatron stops at that
        flags.append("--dist-ckpt-strictness log_all")
    if to == "megatron-legacy":
        flags += [
            f"--tensor-model-parallel-size {parallel.tensor}",
            f"--pipeline-model-parallel-size {parallel.pipeline}",
            f"--expert-model-parallel-size {parallel.expert}",
        ]
    return flags


def capacity_flags(config: ModelConfig) -> list[str]:
    """What Megatron-LM has for an expert's capacity. Its choice of tokens is another (docs/log.md)."""
    factor = dict(config.moe_router).get("moe_expert_capacity_factor")
    if factor is None:
        return []
    return [f"--moe-expert-capacity-factor {factor}", "--moe-token-drop-policy position"]
