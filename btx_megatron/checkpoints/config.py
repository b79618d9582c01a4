"""What a model is beyond its tensors' shapes; and what a run's recipe says of it."""

from __future__ import annotations

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
        known = megatron_rope(self)
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
        rope_scaling=llama3(model["rope_scaling_factor"]) if model.get("use_rope_scaling") else None,
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


def llama3(factor: float) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(_LLAMA3.items() | {("factor", float(factor))}))


_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def megatron_rope(config: ModelConfig) -> dict[str, Any]:
    if config.rope_scaling is None:
        return {"use_rope_scaling": False}
    scaling = dict(config.rope_scaling)
    if any(scaling.get(key) != value for key, value in _LLAMA3.items()):
        raise UserError(
            f"rope_scaling {scaling}: Megatron knows Llama 3's alone (low 1, high 4, original length 8192); "
            "convert to Hugging Face instead"
        )
    return {"use_rope_scaling": True, "rope_scaling_factor": scaling["factor"]}


def token_ids(value: Any) -> TokenIds:
    """The number, or numbers, of a special token; what is none says nothing."""
    if isinstance(value, list | tuple):
        numbers = tuple(number for number in value if isinstance(number, int))
        return numbers if len(numbers) == len(value) else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def plain_ids(ids: TokenIds) -> int | list[int] | None:
    return list(ids) if isinstance(ids, tuple) else ids
