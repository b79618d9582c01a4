"""Tokens an expert come in multiples of 16 where FP8 multiplies: Megatron pads our routers' routes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from btx_megatron.recipe_gpu_checks import FP8_ALIGNMENT
from btx_megatron.runtime import cpu_backend


@settings(max_examples=60)
@given(rows=st.integers(1, 6), experts=st.integers(2, 9), topk=st.integers(1, 9), seed=st.integers(0, 2**16))
def test_routes_are_padded_and_none_is_lost(rows: int, experts: int, topk: int, seed: int) -> None:
    """The recipe's check makes the tokens a multiple: even an expert that all take (soft) comes out even."""
    cpu_backend.install()
    from megatron.core.transformer.moe.moe_utils import pad_routing_map

    torch.manual_seed(seed)
    logits_TE = torch.randn(rows * FP8_ALIGNMENT, experts)
    taken = logits_TE.topk(min(topk, experts), dim=-1).indices
    routes_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, taken, True)
    padded_TE = pad_routing_map(routes_TE.clone(), FP8_ALIGNMENT).bool()
    assert (padded_TE | ~routes_TE).all()
    load, padded = routes_TE.sum(dim=0), padded_TE.sum(dim=0)
    assert (padded % FP8_ALIGNMENT == 0).all()
    assert (padded - load < FP8_ALIGNMENT).all()


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_the_alignment_is_megatrons(recipe: str) -> None:
    cpu_backend.install()
    from megatron.core.fp8_utils import get_fp8_align_size

    assert get_fp8_align_size(recipe) == FP8_ALIGNMENT
