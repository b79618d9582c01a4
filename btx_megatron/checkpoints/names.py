"""The names of a model's tensors in Megatron's checkpoints, as tables to check by eye.

Names are Transformer Engine's (see model/build.py). A layer's tensors are stored stacked, one tensor with
a leading layer axis, or one key a layer; both are read, and everything here speaks of the stacked name.

Legend: L layers, E experts, V padded vocabulary, H hidden, F feed-forward width, Q packed q/k/v rows.
"""

from __future__ import annotations

import re
from typing import Literal

Kind = Literal["shared", "feed_forward"]

LAYERS = "decoder.layers."

# name -> (kind, shape)
DENSE: dict[str, tuple[Kind, str]] = {
    "embedding.word_embeddings.weight": ("shared", "V H"),
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight": ("shared", "L H"),
    "decoder.layers.self_attention.linear_qkv.weight": ("shared", "L Q H"),
    "decoder.layers.self_attention.linear_proj.weight": ("shared", "L H D"),
    "decoder.layers.mlp.linear_fc1.layer_norm_weight": ("shared", "L H"),
    "decoder.layers.mlp.linear_fc1.weight": ("feed_forward", "L 2F H"),  # all gate rows, then all up rows
    "decoder.layers.mlp.linear_fc2.weight": ("feed_forward", "L H F"),
    "decoder.final_layernorm.weight": ("shared", "H"),
    "output_layer.weight": ("shared", "V H"),  # absent where the embeddings are tied
}
MAY_BE_ABSENT = {"output_layer.weight"}

# dense name -> MoE name, where they differ; experts get an axis after the layers'
DENSE_TO_MOE = {
    "decoder.layers.mlp.linear_fc1.layer_norm_weight": "decoder.layers.pre_mlp_layernorm.weight",
    "decoder.layers.mlp.linear_fc1.weight": "decoder.layers.mlp.experts.experts.linear_fc1.weight",
    "decoder.layers.mlp.linear_fc2.weight": "decoder.layers.mlp.experts.experts.linear_fc2.weight",
}
ROUTER = "decoder.layers.mlp.router.weight"  # L E H
EXPERTS = "decoder.layers.mlp.experts."

_NOT_WEIGHTS = re.compile(r"(chained_\d+\.)?optimizer\.|rng_state|common_state|.*_extra_state")
_ONE_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


def is_weight(key: str) -> bool:
    """False for optimizer state (of one optimizer or of several, chained), generators, common state and the
    empty ``_extra_state`` of local layers."""
    return not _NOT_WEIGHTS.match(key)


def split_layer(key: str) -> tuple[str, int | None]:
    """Stacked name and layer of a key: layer None where the key is stacked itself, or in no layer."""
    match = _ONE_LAYER.fullmatch(key)
    return (LAYERS + match[2], int(match[1])) if match else (key, None)


def has_layer_axis(name: str) -> bool:
    """True where a (stacked) name has a leading layer axis."""
    return name.startswith(LAYERS)


def has_expert_axis(name: str) -> bool:
    """True where a (stacked) name has an expert axis, behind the layer axis."""
    return name.startswith(EXPERTS)
