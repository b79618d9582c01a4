"""Megatron-LM's saved arguments of a model: read, and written as its checkpoints keep them."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from btx_megatron.checkpoints.config import ModelConfig, llama3, megatron_rope, plain_ids, token_ids
from btx_megatron.errors import UserError


class SaysNothing(UserError):
    """Nothing says what model a checkpoint holds: its weights can be copied within Megatron's format."""


# What makes another model of the same weights, and the value that a Llama or a Mixtral has. An argument that
# an older Megatron-LM did not have yet has that value, too.
_LLAMA: dict[str, Any] = {
    "normalization": "RMSNorm",
    "layernorm_zero_centered_gamma": False,
    "apply_layernorm_1p": False,
    "apply_residual_connection_post_layernorm": False,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "no_rope_freq": None,
    "multi_latent_attention": False,
    "experimental_attention_variant": None,
    "attention_output_gate": False,
    "qk_layernorm": False,
    "qk_l2_norm": False,
    "softmax_type": "vanilla",
    "window_size": None,
    "swiglu": True,
    "quick_geglu": False,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "use_mup": False,
    "mtp_num_layers": None,
}
_MIXTRAL: dict[str, Any] = {
    "moe_router_score_function": "softmax",
    "moe_router_topk_scaling_factor": None,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_router_enable_expert_bias": False,
    "moe_apply_probs_on_input": False,
    "moe_shared_expert_intermediate_size": None,
    "moe_latent_size": None,
    "moe_mlp_glu_interleave_size": None,
}


def from_args(args: Any, where: str) -> ModelConfig:
    """The model of Megatron-LM's saved arguments.

    Raises SaysNothing if they lack one that is needed, UserError for a model that is no Llama or Mixtral.
    """
    moe = getattr(args, "num_experts", None) is not None
    for name, plain in (_LLAMA | _MIXTRAL if moe else _LLAMA).items():
        value = getattr(args, name, plain)
        if value != plain:
            raise UserError(
                f"{where}: its saved arguments say {name} {value}; only Llama-shaped models and mixtures of "
                f"them are supported, with {name} {plain}"
            )
    if moe and "sinkhorn" in str(getattr(args, "moe_router_load_balancing_type", "")):
        raise UserError(f"{where}: its saved arguments say sinkhorn, a router of its own; not supported")
    try:
        heads = args.num_attention_heads
        grouped = getattr(args, "group_query_attention", False)
        return ModelConfig(
            num_layers=args.num_layers,
            hidden_size=args.hidden_size,
            ffn_hidden_size=(getattr(args, "moe_ffn_hidden_size", None) if moe else None)
            or args.ffn_hidden_size,
            num_attention_heads=heads,
            num_query_groups=args.num_query_groups if grouped else heads,
            kv_channels=args.kv_channels,
            seq_length=getattr(args, "max_position_embeddings", None) or args.seq_length,
            rotary_base=float(args.rotary_base),
            # how --norm-epsilon is saved by newer Megatron-LM, and by older
            norm_epsilon=args.layernorm_epsilon if hasattr(args, "layernorm_epsilon") else args.norm_epsilon,
            tied=not args.untie_embeddings_and_output_weights,
            vocab_size=getattr(args, "vocab_size", None),
            rope_scaling=_rope_scaling(args),
            num_experts=getattr(args, "num_experts", None),
            moe_router_topk=getattr(args, "moe_router_topk", 2),
            moe_router_pre_softmax=getattr(args, "moe_router_pre_softmax", False),
            moe_router=_router(args) if moe else (),
            bos_token_id=token_ids(getattr(args, "bos_token_id", None)),
            eos_token_id=token_ids(getattr(args, "eos_token_id", None)),
        )
    except AttributeError as error:
        raise SaysNothing(
            f"{where}: its saved arguments lack '{error.name}'; save it with Megatron-LM"
        ) from None


def _router(args: Any) -> tuple[tuple[str, Any], ...]:
    """What of its router is more than top-k: ours, or Megatron-LM's capacity."""
    said = dict(getattr(args, "btx_moe_router", None) or {})
    capacity = getattr(args, "moe_expert_capacity_factor", None)
    if capacity is not None:
        said.setdefault("moe_expert_capacity_factor", capacity)
    return tuple(sorted(said.items()))


def _rope_scaling(args: Any) -> tuple[tuple[str, Any], ...] | None:
    """Megatron-LM's --use-rope-scaling: Llama 3's, with everything but the factor fixed."""
    if not getattr(args, "use_rope_scaling", False):
        return None
    return llama3(getattr(args, "rope_scaling_factor", 8.0))


def to_args(config: ModelConfig, padded_vocab_size: int) -> Namespace:
    """Megatron-LM's arguments of the model, as its checkpoints keep them (parallel sizes all 1).

    Raises UserError for a RoPE base or scaling that Megatron cannot express.
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
        "rotary_base": whole_rotary_base(config),
        "rotary_percent": 1.0,
        "normalization": "RMSNorm",
        "norm_epsilon": config.norm_epsilon,
        "layernorm_epsilon": config.norm_epsilon,  # the same, by newer Megatron-LM's name
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


def whole_rotary_base(config: ModelConfig) -> int:
    """``--rotary-base``, which Megatron-LM reads as a whole number. Raises UserError where it is none."""
    if not config.rotary_base.is_integer():
        raise UserError(
            f"rope_theta {config.rotary_base}: Megatron's --rotary-base is a whole number; convert to "
            "Hugging Face instead"
        )
    return int(config.rotary_base)
