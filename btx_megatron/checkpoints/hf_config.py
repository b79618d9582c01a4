"""``config.json`` of a Llama or a Mixtral: read, and written as transformers 4, 5 and vLLM read it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from btx_megatron.checkpoints.config import ModelConfig, plain_ids, token_ids
from btx_megatron.errors import UserError

# what a key that is not in config.json stands for, by model_type, in transformers 4 and 5
_HF_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "sliding_window": None},
    "mistral": {
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "mixtral": {
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "sliding_window": None,
    },
}
_HF_ROPE_THETA = {"llama": 10_000.0, "mistral": 10_000.0, "mixtral": 1_000_000.0}


def from_hf(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The model of a ``config.json``. Raises UserError for what is no plain Llama or Mixtral."""
    kind = str(config.get("model_type"))
    if kind not in _HF_DEFAULTS:
        raise UserError(f"{where}: model_type '{kind}' is not supported; llama and mixtral are")
    config = {**_HF_DEFAULTS[kind], **config}
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise UserError(f"{where}: {key} is true; models with biases are not supported")
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: hidden_act '{config['hidden_act']}' is not supported; silu is")
    if config["sliding_window"] is not None and (
        _get(config, "sliding_window", where) < _get(config, "max_position_embeddings", where)
    ):
        raise UserError(
            f"{where}: sliding_window is {config['sliding_window']}, less than max_position_embeddings; "
            "attention through a window is not supported"
        )
    rope = _object(config, "rope_scaling", where) or _object(config, "rope_parameters", where)
    turned = {**rope, **config}.get("partial_rotary_factor", 1.0)
    if turned not in (None, 1.0):
        raise UserError(f"{where}: partial_rotary_factor is {turned}; only whole heads are turned here")
    scaling = {
        key: _hashable(value)
        for key, value in rope.items()
        if key not in ("rope_theta", "partial_rotary_factor")
    }
    if scaling.get("rope_type", scaling.get("type", "default")) == "default":
        scaling = {}
    elif scaling.get("rope_type") == "llama3":
        _positive(scaling, "factor", f"{where}: rope_scaling")
    heads = _get(config, "num_attention_heads", where)
    groups = _get({"num_key_value_heads": heads} | _said(config), "num_key_value_heads", where)
    if heads % groups:
        raise UserError(
            f"{where}: num_key_value_heads is {groups}; it must divide num_attention_heads {heads}"
        )
    hidden = _get(config, "hidden_size", where)
    # as transformers does: what stands beside the scaling goes before what stands alone
    theta = {"rope_theta": _HF_ROPE_THETA[kind]} | _said(config) | _said(rope)
    return ModelConfig(
        num_layers=_get(config, "num_hidden_layers", where),
        hidden_size=hidden,
        ffn_hidden_size=_get(config, "intermediate_size", where),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=_get({"head_dim": max(1, hidden // heads)} | _said(config), "head_dim", where),
        seq_length=_get(config, "max_position_embeddings", where),
        rotary_base=_positive(theta, "rope_theta", where),
        norm_epsilon=_positive(config, "rms_norm_eps", where),
        tied=bool(config.get("tie_word_embeddings", False)),
        vocab_size=_get(config, "vocab_size", where),
        rope_scaling=tuple(sorted(scaling.items())) if scaling else None,
        num_experts=_get(config, "num_local_experts", where) if kind == "mixtral" else None,
        moe_router_topk=_get({"num_experts_per_tok": 2} | _said(config), "num_experts_per_tok", where),
        bos_token_id=token_ids(config.get("bos_token_id")),
        eos_token_id=token_ids(config.get("eos_token_id")),
    )


def _get(config: Mapping[str, Any], key: str, where: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{where}: {key} is {value}; it must be a whole number above 0")
    return value


def _positive(config: Mapping[str, Any], key: str, where: str) -> float:
    value = config.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UserError(f"{where}: {key} is {value}; it must be a number above 0")
    return float(value)


def _object(config: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(f"{where}: {key} is {value}; it must be an object of names and values")
    return value


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _said(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without the keys that say nothing: null stands for the default, too."""
    return {key: value for key, value in config.items() if value is not None}


def to_hf(config: ModelConfig, vocab_size: int, dtype: str) -> dict[str, Any]:
    """``config.json`` of the model: Llama, or Mixtral with what transformers 4, 5 and vLLM read."""
    moe = config.num_experts is not None
    rope = dict(config.rope_scaling or {"rope_type": "default"})
    content: dict[str, Any] = {
        "architectures": ["MixtralForCausalLM" if moe else "LlamaForCausalLM"],
        "model_type": "mixtral" if moe else "llama",
        "vocab_size": vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.kv_channels,
        "hidden_act": "silu",
        "max_position_embeddings": config.seq_length,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rotary_base,
        "rope_scaling": dict(config.rope_scaling) if config.rope_scaling else None,
        "rope_parameters": {**rope, "rope_theta": config.rotary_base},
        "tie_word_embeddings": config.tied,
        "attention_bias": False,
        "bos_token_id": plain_ids(config.bos_token_id),
        "eos_token_id": plain_ids(config.eos_token_id),
        "torch_dtype": dtype,
        "dtype": dtype,
        "use_cache": True,
    }
    if moe:
        content |= {
            "num_local_experts": config.num_experts,
            "num_experts_per_tok": config.moe_router_topk,
            "router_aux_loss_coef": 0.0,
            "output_router_logits": False,
            "router_jitter_noise": 0.0,
            "sliding_window": None,
        }
    return content
