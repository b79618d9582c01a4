"""Memory by formula: what must hold between layouts, and Llama-2 7B by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from btx_megatron.errors import UserError
from btx_megatron.estimate import parameter_counts
from btx_megatron.estimate_comm import Setup
from btx_megatron.estimate_memory import (
    checkpoint_bytes,
    expert_data_parallel_size,
    fullest_rank,
    rank_memory,
    trained_weights,
)
from btx_megatron.gpus import gpu_named
from btx_megatron.recipe import Layout, Model

LLAMA_2_7B = Model(
    num_layers=32, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32, seq_length=4096
)
DENSE = Setup(LLAMA_2_7B, Layout(), padded_vocab_size=32_000, micro_batch_size=1, global_batch_size=1024)
MOE = replace(DENSE, num_experts=4)
FULL = Layout(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)


def test_llama_2_7b_on_one_rank() -> None:
    """18 bytes a weight (bf16, fp32 gradient, fp32 master and moments), and 41.5 s b h a layer.

    Korthikanti et al. 2022 (arXiv 2205.05198, eq. 2) have 34 s b h for a layer of GPT whose scores are not
    kept: a feed-forward of 4 h with GELU (16 of the 34 with its input, here 21.5 of SwiGLU's 2.69 h), dropout
    masks (not here), and an attention that keeps no second copy of queries and keys.
    """
    memory = fullest_rank(DENSE)
    weights = parameter_counts(LLAMA_2_7B, 32_000, 1, 1).dense
    assert (memory.weights, memory.gradients, memory.optimizer) == (2 * weights, 4 * weights, 12 * weights)
    tokens, hidden = 4096, 4096
    layer = (8 + 12 + 8 * 11008 / 4096) * tokens * hidden + tokens * (2 * 4 + 32 * 4)
    head = 4 * tokens * hidden + 4 * tokens * 32_000
    tables = 2 * tokens * 128 * 2
    assert memory.activations == 32 * (layer + tables) + head
    assert layer / (tokens * hidden) == pytest.approx(41.5, abs=0.1)
    assert memory.working == 8 * tokens * 32_000


def test_full_recomputation_keeps_inputs_and_one_layer() -> None:
    kept = fullest_rank(replace(DENSE, layout=FULL)).activations
    rows = 32 * 4096 * 4096 * 2
    one = (fullest_rank(DENSE).activations - rows) / 32
    assert rows + 0.8 * one < kept < rows + 1.3 * one


@pytest.mark.parametrize("setup", [DENSE, MOE])
def test_places_of_a_pipeline_hold_the_whole_model(setup: Setup) -> None:
    whole = sum(trained_weights(setup, 0))
    uneven = Layout(pipeline_model_parallel_size=4, decoder_first_pipeline_num_layers=5)
    for layout in (Layout(pipeline_model_parallel_size=4), uneven):
        cut = replace(setup, layout=layout)
        assert sum(sum(trained_weights(cut, place)) for place in range(4)) == whole


def test_the_first_place_keeps_the_most_micro_batches() -> None:
    setup = replace(DENSE, layout=Layout(pipeline_model_parallel_size=4))
    kept = [rank_memory(setup, place).activations for place in range(4)]
    assert kept[0] / kept[2] == pytest.approx(2, rel=0.02)  # 4 in flight and 2
    few = replace(setup, global_batch_size=2)
    assert rank_memory(few, 0).activations == rank_memory(few, 2).activations


def test_experts_over_their_own_ranks() -> None:
    layout = Layout(
        tensor_model_parallel_size=2,
        data_parallel_size=8,
        expert_model_parallel_size=4,
        expert_tensor_parallel_size=1,
        sequence_parallel=True,
        use_distributed_optimizer=True,
    )
    setup = replace(MOE, layout=layout)
    assert expert_data_parallel_size(setup) == 4
    dense, experts = trained_weights(setup, 0)
    assert rank_memory(setup, 0).optimizer == 12 * (dense / 8 + experts / 4)
    assert experts == 32 * 3 * 4096 * 11008


@pytest.mark.parametrize("part", ["experts", "router", "shared"])
@pytest.mark.parametrize("setup", [DENSE, MOE])
def test_frozen_weights_have_no_gradient(setup: Setup, part: str) -> None:
    if part == "router" and setup.num_experts is None:
        return
    all_trained, frozen = rank_memory(setup, 0), rank_memory(replace(setup, freeze=(part,)), 0)
    assert frozen.weights == all_trained.weights
    assert frozen.gradients < all_trained.gradients
    assert frozen.optimizer == 3 * frozen.gradients
    assert frozen.activations <= all_trained.activations


@given(
    st.sampled_from([DENSE, MOE]),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 4]),
)
def test_more_of_a_cut_never_needs_more(setup: Setup, tp: int, pp: int, dp: int) -> None:
    layout = Layout(tp, pp, dp, sequence_parallel=tp > 1, use_distributed_optimizer=True)
    here = fullest_rank(replace(setup, layout=layout)).total
    for name in ("tensor_model_parallel_size", "data_parallel_size"):
        more = replace(
            layout, **{name: 2 * getattr(layout, name), "sequence_parallel": tp > 1 or name[0] == "t"}
        )
        assert fullest_rank(replace(setup, layout=more)).total < here
    recomputed = replace(
        layout, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
    )
    selective = replace(layout, recompute_granularity="selective")
    totals = [fullest_rank(replace(setup, layout=one)).total for one in (layout, selective, recomputed)]
    assert totals == sorted(totals, reverse=True)


def test_checkpoints() -> None:
    weights = parameter_counts(LLAMA_2_7B, 32_000, 1, 1).dense
    assert checkpoint_bytes(DENSE) == (2 * weights, 14 * weights)
    fp32 = replace(DENSE, bf16=False)
    assert checkpoint_bytes(fp32) == (4 * weights, 12 * weights)
    distributed = replace(fp32, layout=Layout(data_parallel_size=2, use_distributed_optimizer=True))
    assert checkpoint_bytes(distributed) == (4 * weights, 16 * weights)
    assert checkpoint_bytes(replace(DENSE, freeze=("experts",)))[1] < 14 * weights


def test_gpus() -> None:
    h100 = gpu_named("h100")
    assert (h100.name, h100.memory, h100.flops) == ("H100", 80e9, 989e12)
    with pytest.raises(UserError, match="one of A100, H100"):
        gpu_named("h1000")
