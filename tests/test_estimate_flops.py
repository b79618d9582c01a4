"""FLOPs by formula, against known models and against each other; torch's counter is asked elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from btx_megatron.estimate import parameter_counts
from btx_megatron.estimate_flops import (
    forward_flops,
    known_peak_tflops,
    stage_flops,
    training_flops_per_token,
)
from btx_megatron.recipe import Model, Recipe
from btx_megatron.recipe_file import parse_recipe

LLAMA_2_7B = Model(
    num_layers=32, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32, seq_length=4096
)


def test_llama_2_7b() -> None:
    """6 FLOPs a weight that is multiplied with; attention 6 L S h, where half of the square is counted."""
    weights = parameter_counts(LLAMA_2_7B, 32000, 1, 1).dense - 32000 * 4096 - 65 * 4096
    attention = 6 * 32 * 4096 * 4096
    assert forward_flops(LLAMA_2_7B, 32000).training() == 6 * weights + attention
    square = forward_flops(LLAMA_2_7B, 32000, causal=False)
    assert square.training() == 6 * weights + 2 * attention


@given(st.integers(1, 8), st.integers(1, 64), st.integers(2, 16), st.sampled_from([1, 2, 4]))
def test_six_flops_for_every_active_weight(layers: int, ffn: int, experts: int, groups: int) -> None:
    model = Model(
        num_layers=layers, hidden_size=32, ffn_hidden_size=ffn, num_attention_heads=4, num_query_groups=groups
    )
    counts = parameter_counts(model, 128, experts, 2)
    unused = 128 * 32 + 32 * (2 * layers + 1)  # the embedding is looked up; norms are no matrices
    moe = forward_flops(model, 128, experts, 2)
    assert moe.training() - 3 * moe.attention == 6 * (counts.moe_active - unused)
    everything = moe.training(["experts", "router", "shared"])
    assert everything == pytest.approx(moe.training() - (moe.total - moe.attention))


@pytest.fixture
def recipe() -> Recipe:
    domains = [{"name": name, "sources": [{"path": "x"}]} for name in ("a", "b")]
    training = {"train_iters": 10, "global_batch_size": 4}
    tree = {"data": {"domains": domains}, "tokenizer": {"vocab_size": 300}, "training": training}
    return parse_recipe(tree)


def test_stages(recipe: Recipe) -> None:
    assert training_flops_per_token(recipe, "seed") == forward_flops(recipe.model, 384).training()
    assert training_flops_per_token(recipe, "seed", 512) == forward_flops(recipe.model, 512).training()
    moe = forward_flops(recipe.model, 384, 3, 2)  # two domains and the seed
    assert stage_flops(recipe, "finetune") == moe.training() * 10 * 4 * 256
    finetune = recipe.stages.finetune
    finetune.training = replace(finetune.training, freeze=["experts"])
    assert training_flops_per_token(recipe, "finetune") == moe.training() - moe.feed_forward
    recipe.stages.experts["a"].pretrained_checkpoint = "elsewhere"
    assert stage_flops(recipe, "expert:a") == 0 < stage_flops(recipe, "expert:b")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA GH200 480GB", 989.0),
        ("NVIDIA GeForce RTX 3090", None),
        ("NVIDIA A10", None),
    ],
)
def test_peaks_by_torchs_name_of_the_device(name: str, peak: float | None) -> None:
    assert known_peak_tflops(name) == peak
