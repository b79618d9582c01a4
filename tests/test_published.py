"""The formulas against numbers that others have published. Each docstring names its source."""

from __future__ import annotations

from dataclasses import replace

import pytest

from btx_megatron.estimate import parameter_counts
from btx_megatron.estimate_comm import Setup
from btx_megatron.estimate_flops import forward_flops
from btx_megatron.estimate_memory import fullest_rank
from btx_megatron.gpus import gpu_named
from btx_megatron.recipe import Layout, Model

LLAMA_2_7B = Model(
    num_layers=32, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32, seq_length=4096
)
LLAMA_2_13B = Model(
    num_layers=40, hidden_size=5120, ffn_hidden_size=13824, num_attention_heads=40, seq_length=4096
)
LLAMA_2_70B = Model(
    num_layers=80,
    hidden_size=8192,
    ffn_hidden_size=28672,
    num_attention_heads=64,
    num_query_groups=8,
    seq_length=4096,
)
MIXTRAL_8X7B = replace(LLAMA_2_7B, ffn_hidden_size=14336, num_query_groups=8)
LLAMA_3_8B = replace(MIXTRAL_8X7B, seq_length=8192)

A_DAY = 86_400


@pytest.mark.parametrize(("topk", "billions"), [(1, 6.7), (2, 11.1), (4, 19.7)])
def test_active_parameters_of_the_paper(topk: int, billions: float) -> None:
    """Branch-Train-MiX (arXiv 2403.07816): four experts of Llama-2 7B, by experts a token."""
    counts = parameter_counts(LLAMA_2_7B, 32_000, 4, topk)
    assert round(counts.moe_active / 1e9, 1) == billions


@pytest.mark.parametrize(
    ("model", "vocabulary", "tokens", "tflops"),
    [
        (LLAMA_2_7B, 32_000, 16847, 776),
        (LLAMA_2_13B, 32_000, 8646, 754),
        (LLAMA_2_70B, 32_000, 1707, 759),
        (LLAMA_3_8B, 128_256, 12036, 697),
    ],
)
def test_flops_of_nemo_s_benchmarks(model: Model, vocabulary: int, tokens: int, tflops: int) -> None:
    """NVIDIA NeMo 24.07, docs/source/performance/performance_summary.md: tokens/s and TFLOP/s of one H100
    (FP8), whose quotient is FLOPs a token. They count the whole square of scores."""
    ours = forward_flops(model, vocabulary, causal=False).training()
    assert ours == pytest.approx(tflops * 1e12 / tokens, rel=0.001)


def test_mfu_of_mixtral_8x7b() -> None:
    """Megatron-Core's MoE documentation: Mixtral 8x7B in bf16 on H100, 468 TFLOP/s a GPU, 47 % MFU.

    By our FLOPs that is about 5,900 tokens/s a GPU (5,600 where the square of scores is counted). Mistral
    (arXiv 2401.04088) gives the model 47B parameters, 13B of them active.
    """
    assert round(468e12 / gpu_named("H100").flops, 2) == 0.47
    rates = [468e12 / forward_flops(MIXTRAL_8X7B, 32_000, 8, 2, c).training() for c in (True, False)]
    assert rates == pytest.approx([5871, 5643], abs=1)
    counts = parameter_counts(MIXTRAL_8X7B, 32_000, 8, 2)
    assert (round(counts.moe_total / 1e9), round(counts.moe_active / 1e9)) == (47, 13)


def test_gpu_days_of_the_paper() -> None:
    """Branch-Train-MiX, table of compute: BTX 926.1 GPU-days for 533B tokens, of which 80B and 23 % of the
    days are the MoE stage; sparse upcycling (compute-matched) 1007.1 GPU-days for 252B.

    What kind of GPU is not said. An A100 could not have done BTX (it would run at its peak), so both are
    H100s if they are one kind; then the same top-2 model trains at 30 % in one row and at 20 % in the other.
    """
    dense = forward_flops(LLAMA_2_7B, 32_000).training()
    moe = forward_flops(LLAMA_2_7B, 32_000, 4, 2).training()
    runs = {
        "BTX": (453e9 * dense + 80e9 * moe, 926.1),
        "its MoE stage": (80e9 * moe, 0.23 * 926.1),
        "sparse upcycling": (252e9 * moe, 1007.1),
    }
    a100, h100 = (
        {name: flops / (days * A_DAY * gpu_named(gpu).flops) for name, (flops, days) in runs.items()}
        for gpu in ("A100", "H100")
    )
    assert a100 == pytest.approx({"BTX": 0.998, "its MoE stage": 0.959, "sparse upcycling": 0.639}, abs=1e-3)
    assert h100 == pytest.approx({"BTX": 0.315, "its MoE stage": 0.303, "sparse upcycling": 0.202}, abs=1e-3)


@pytest.mark.parametrize(
    ("model", "layout", "batch", "experts"),
    [
        (LLAMA_2_7B, Layout(data_parallel_size=8), 128, None),
        (LLAMA_2_13B, Layout(1, 4, 4, num_layers_per_virtual_pipeline_stage=1), 128, None),
        (LLAMA_2_70B, Layout(4, 4, 4, num_layers_per_virtual_pipeline_stage=1), 128, None),
        (MIXTRAL_8X7B, Layout(1, 4, 16, 8), 256, 8),
    ],
)
def test_layouts_that_ran_fit(model: Model, layout: Layout, batch: int, experts: int | None) -> None:
    """Layouts that NeMo 24.07 (page above) and Megatron-Core's MoE documentation ran on H100s of 80 GB, with
    Transformer Engine. Ours keeps other activations, so this is no measurement; but it must not say no."""
    sequence_parallel = layout.tensor_model_parallel_size > 1
    layout = replace(layout, use_distributed_optimizer=True, sequence_parallel=sequence_parallel)
    setup = Setup(model, layout, 32_000, 1, batch, num_experts=experts)
    assert 60e9 < fullest_rank(setup).total < 80e9
