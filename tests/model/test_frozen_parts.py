"""Which part of the mixture a weight belongs to, by the names of either build."""

from __future__ import annotations

import pytest

LAYER = "decoder.layers.0"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("embedding.word_embeddings.weight", "shared"),
        (f"{LAYER}.self_attention.linear_qkv.layer_norm_weight", "shared"),
        (f"{LAYER}.pre_mlp_layernorm.weight", "shared"),
        (f"{LAYER}.mlp.linear_fc1.layer_norm_weight", "shared"),  # Transformer Engine's dense build
        (f"{LAYER}.mlp.linear_fc1.weight", "experts"),
        (f"{LAYER}.mlp.linear_fc2.weight", "experts"),
        (f"{LAYER}.mlp.experts.local_experts.0.linear_fc1.weight", "experts"),
        (f"{LAYER}.mlp.experts.linear_fc1.weight3", "experts"),  # Transformer Engine's grouped experts
        (f"{LAYER}.mlp.router.weight", "router"),
    ],
)
def test_part_of_the_mixture(name: str, part: str) -> None:
    from btx_megatron.model.freeze import part_of

    assert part_of(name) == part
