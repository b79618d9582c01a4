"""What a model is beyond its tensors' shapes: read from, and written as, what each format keeps of it."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from btx_megatron.errors import UserError
from btx_megatron.recipe import Moe

TokenIds = int | tuple[int, ...] | None
"""The number of a special token; a few models have several that end a text."""


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-shaped model, dense or (``num_experts``) a mixture; Megatron's names."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    seq_length: int
    rotary_base: float
    norm_epsilon: float
    tied: bool
    """The output layer is the embedding."""
    vocab_size: int | None = None
    """Rows of the embedding that stand for a token; None: not known, all of them."""
    rope_scaling: tuple[tuple[str, Any], ...] | None = None
    """Hugging Face's ``rope_scaling`` as sorted pairs; None: plain RoPE."""
    num_experts: int | None = None
    moe_router_topk: int = 2
    moe_router_pre_softmax: bool = False
    moe_router: tuple[tuple[str, Any], ...] = ()
    """The recipe's ``moe`` keys of a router that is more than top-k, as sorted pairs: what neither
    Megatron-LM nor Mixtral knows of it."""
    bos_token_id: TokenIds = None
    eos_token_id: TokenIds = None

    def difference(self, other: ModelConfig) -> tuple[str, Any, Any] | None:
        """First thing, with both values, in which two models differ so that they cannot be mixed."""
        for name in (*_SHAPE, "rotary_base", "norm_epsilon", "tied", "rope_scaling"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return name, mine, theirs
        return None

    def rope_scaling_factor(self) -> float | None:
        """Llama 3's factor; None: plain RoPE. Raises UserError for a scaling that Megatron does not know."""
        known = _megatron_rope(self)
        return float(known["rope_scaling_factor"]) if known["use_rope_scaling"] else None

    def as_moe(self, num_experts: int, ffn_hidden_size: int, topk: int, pre_softmax: bool) -> ModelConfig:
        """The mixture of such models."""
        return replace(
            self,
            num_experts=num_experts,
            ffn_hidden_size=ffn_hidden_size,
            moe_router_topk=topk,
            moe_router_pre_softmax=pre_softmax,
        )


_SHAPE = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"
)  # fmt: skip


# Hugging Face

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
    rope = _object(config, "rope_parameters", where)
    scaling = _object(config, "rope_scaling", where) or {k: v for k, v in rope.items() if k != "rope_theta"}
    if scaling.get("rope_type", scaling.get("type", "default")) == "default":
        scaling = {}
    heads = _get(config, "num_attention_heads", where)
    groups = _get({"num_key_value_heads": heads} | _said(config), "num_key_value_heads", where)
    if heads % groups:
        raise UserError(
            f"{where}: num_key_value_heads is {groups}; it must divide num_attention_heads {heads}"
        )
    hidden = _get(config, "hidden_size", where)
    theta = {"rope_theta": _HF_ROPE_THETA[kind]} | _said(rope) | _said(config)
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
        bos_token_id=_token_ids(config.get("bos_token_id")),
        eos_token_id=_token_ids(config.get("eos_token_id")),
    )


def _token_ids(value: Any) -> TokenIds:
    """The number, or numbers, of a special token; what is none says nothing."""
    if isinstance(value, list | tuple):
        numbers = tuple(number for number in value if isinstance(number, int))
        return numbers if len(numbers) == len(value) else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _plain_ids(ids: TokenIds) -> int | list[int] | None:
    return list(ids) if isinstance(ids, tuple) else ids


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
        "bos_token_id": _plain_ids(config.bos_token_id),
        "eos_token_id": _plain_ids(config.eos_token_id),
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


# Megatron


def from_recipe(recipe: Mapping[str, Any], num_experts: int | None, vocab_size: int | None) -> ModelConfig:
    """The model of a resolved recipe, as it lies in our checkpoints."""
    model, moe = recipe["model"], recipe["moe"]
    heads = model["num_attention_heads"]
    chunks = recipe.get("mix", {}).get("chunks", 1)  # that a feed-forward was cut into for the mixture
    return ModelConfig(
        num_layers=model["num_layers"],
        hidden_size=model["hidden_size"],
        ffn_hidden_size=model["ffn_hidden_size"] // (chunks if num_experts else 1),
        num_attention_heads=heads,
        num_query_groups=model["num_query_groups"] or heads,
        kv_channels=model["kv_channels"] or model["hidden_size"] // heads,
        seq_length=model["seq_length"],
        rotary_base=float(model["rotary_base"]),
        norm_epsilon=model["norm_epsilon"],
        tied=not model["untie_embeddings_and_output_weights"],
        vocab_size=vocab_size,
        num_experts=num_experts,
        **(_router(moe, num_experts) if num_experts else {}),
        rope_scaling=_llama3(model["rope_scaling_factor"]) if model.get("use_rope_scaling") else None,
    )


_ROUTER_KEYS = (
    "moe_router_type", "moe_expert_capacity_factor", "moe_router_logit_norm_scale",
    "moe_router_one_per_group", "moe_router_inference", "moe_router_seed", "moe_router_time_mask",
)  # fmt: skip


def _router(moe: Mapping[str, Any], num_experts: int) -> dict[str, Any]:
    """Soft is top-k of all experts; Switch, but for what it drops, top-1 behind the softmax."""
    known = {field.name for field in fields(Moe)}
    settings = Moe(**{key: value for key, value in moe.items() if key in known})
    topk, plain = settings.topk(num_experts), Moe()
    special = {key: getattr(settings, key) for key in _ROUTER_KEYS}
    special["moe_expert_capacity_factor"] = settings.capacity_factor
    if settings.moe_router_type == "soft":
        special["moe_router_type"] = "top_k"
    differs = {key: value for key, value in special.items() if value != getattr(plain, key)}
    return {
        "moe_router_topk": topk,
        "moe_router_pre_softmax": settings.moe_router_pre_softmax or settings.moe_router_type == "switch",
        "moe_router": tuple(sorted(differs.items())),
    }


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
            bos_token_id=_token_ids(getattr(args, "bos_token_id", None)),
            eos_token_id=_token_ids(getattr(args, "eos_token_id", None)),
        )
    except AttributeError as error:
        raise UserError(
            f"{where}: its saved arguments lack '{error.name}'; save it with Megatron-LM"
        ) from None


def _rope_scaling(args: Any) -> tuple[tuple[str, Any], ...] | None:
    """Megatron-LM's --use-rope-scaling: Llama 3's, with everything but the factor fixed."""
    if not getattr(args, "use_rope_scaling", False):
        return None
    return _llama3(getattr(args, "rope_scaling_factor", 8.0))


def _llama3(factor: float) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(_LLAMA3.items() | {("factor", float(factor))}))


_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


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
        "bos_token_id": _plain_ids(config.bos_token_id),  # ours: Megatron-LM does not look at these two
        "eos_token_id": _plain_ids(config.eos_token_id),
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
    return Namespace(**values, **_megatron_rope(config))


def _megatron_rope(config: ModelConfig) -> dict[str, Any]:
    if config.rope_scaling is None:
        return {"use_rope_scaling": False}
    scaling = dict(config.rope_scaling)
    if any(scaling.get(key) != value for key, value in _LLAMA3.items()):
        raise UserError(
            f"rope_scaling {scaling}: Megatron knows Llama 3's alone (low 1, high 4, original length 8192); "
            "convert to Hugging Face instead"
        )
    return {"use_rope_scaling": True, "rope_scaling_factor": scaling["factor"]}
