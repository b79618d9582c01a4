"""Megatron-LM's saved arguments of a model: read, and written as its checkpoints keep them."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from btx_megatron.checkpoints.config import ModelConfig, llama3, megatron_rope, plain_ids, token_ids
from btx_megatron.errors import UserError


def from_args(args: Any, where: str) -> ModelConfig:
    """The model of Megatron-LM's saved arguments."""
    try:
        heads = args.num_attention_heads
        grouped = getattr(args, "group_query_attention", False)
        return ModelConfig(
            num_layers=args.num_layers,
            hidden_size=args.hidden_size,
            ffn_hidden_size=args.ffn_hidden_size,
            num_attention_heads=heads,
            num_query_groups=args.num_query_groups if grouped else heads,
            kv_channels=args.kv_channels,
            seq_length=getattr(args, "max_position_embeddings", None) or args.seq_length,
            rotary_base=float(args.rotary_base),
            norm_epsilon=getattr(args, "norm_epsilon", 1e-5),
            tied=not args.untie_embeddings_and_output_weights,
            vocab_size=getattr(args, "vocab_size", None),
            rope_scaling=_rope_scaling(args),
            num_experts=getattr(args, "num_experts", None),
            moe_router_topk=getattr(args, "moe_router_topk", 2),
            moe_router_pre_softmax=getattr(args, "moe_router_pre_softmax", False),
            moe_router=tuple(sorted((getattr(args, "btx_moe_router", None) or {}).items())),
            bos_token_id=token_ids(getattr(args, "bos_token_id", None)),
            eos_token_id=token_ids(getattr(args, "eos_token_id", None)),
        )
    except AttributeError as error:
        raise UserError(
            f"{where}: its saved arguments lack '{error.name}'; save it with Megatron-LM"
        ) from None


def _rope_scaling(args: Any) -> tuple[tuple[str, Any], ...] | None:
    """Megatron-LM's --use-rope-scaling: Llama 3's, with everything but the factor fixed."""
    if not getattr(args, "use_rope_scaling", False):
        return None
    return llama3(getattr(args, "rope_scaling_factor", 8.0))


def to_args(config: ModelConfig, padded_vocab_size: int) -> Namespace:
    """Megatron-LM's arguments of the model, as its checkpoints keep them (parallel sizes all 1).

    Raises UserError for a RoPE scaling that Megatron cannot express.
    """
    values: dict[str, Any] = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "group_query_attention": config.num_query_groups != config.num_attention_heads,
        "num_query_groups": config.num_query_groups,
        "kv_channels": config.kv_channels,
        "seq_length": config.seq_length,
        "max_position_embeddings": config.seq_length,
        "position_embedding_type": "rope",
        "rotary_base": int(config.rotary_base),
        "rotary_percent": 1.0,
        "normalization": "RMSNorm",
        "norm_epsilon": config.norm_epsilon,
        "swiglu": True,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": not config.tied,
        "padded_vocab_size": padded_vocab_size,
        "vocab_size": config.vocab_size,
        "bos_token_id": plain_ids(config.bos_token_id),  # ours: Megatron-LM does not look at these two
        "eos_token_id": plain_ids(config.eos_token_id),
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "num_experts": config.num_experts,
        "transformer_impl": "transformer_engine",
    }
    if config.num_experts:
        values |= {
            "moe_router_topk": config.moe_router_topk,
            "moe_router_pre_softmax": config.moe_router_pre_softmax,
            "moe_ffn_hidden_size": config.ffn_hidden_size,
        }
        if config.moe_router:
            values["btx_moe_router"] = dict(config.moe_router)  # ours: Megatron-LM does not look at it
    return Namespace(**values, **megatron_rope(config))
