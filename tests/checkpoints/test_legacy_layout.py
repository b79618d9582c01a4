"""The arithmetic of legacy checkpoints: slices, stages, ranks and keys."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from legacy_shards import (
    DENSE,
    EXPERT,
    LAYER,
    MOE,
)

from btx_megatron.checkpoints.legacy_layout import (
    Cut,
    Grid,
    Rank,
    Slot,
    boxes,
    first_layers,
    key_of,
    parse_key,
    slice_shape,
    whole_shape,
)

cuts = st.sampled_from(["whole", "rows", "gated", "cols"])


@given(cuts, st.integers(1, 6), st.integers(1, 6), st.integers(1, 5))
def test_slices_tile_the_part(kind: Cut, height: int, width: int, slices: int) -> None:
    rows = height * (2 if kind == "gated" else 1) * (1 if kind in ("whole", "cols") else slices)
    cols = width * (slices if kind == "cols" else 1)
    whole = torch.arange(rows * cols).view(rows, cols)
    shape = slice_shape(kind, (rows, cols), slices)
    assert whole_shape(kind, shape, slices) == (rows, cols)
    seen = torch.zeros_like(whole)
    for number in range(1 if kind == "whole" else slices):
        at = 0
        for box in boxes(kind, (rows, cols), number, slices):
            assert box.at == at
            assert box.cols == shape[1]
            seen[box.row : box.row + box.rows, box.col : box.col + box.cols] += 1
            at += box.rows
        assert at == shape[0]
    assert torch.all(seen == 1)


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4))
def test_even_stages_follow_megatrons_formula(stages: int, chunks: int, layers: int) -> None:
    places = itertools.product(range(chunks), range(stages))
    first = first_layers(dict.fromkeys(places, layers))
    for (chunk, stage), layer in first.items():
        assert layer == chunk * stages * layers + stage * layers


@given(
    st.integers(1, 4), st.integers(2, 5), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.booleans()
)
def test_embedding_and_loss_as_layers(
    per_chunk: int, stages: int, chunks: int, pad: int, embedding: bool, loss: bool
) -> None:
    """Megatron's formula where they count: one layer fewer in the first (last) chunk, offsets one less."""
    per_chunk += pad  # enough to take one away at both ends
    counts = dict.fromkeys(itertools.product(range(chunks), range(stages)), per_chunk)
    counts[0, 0] -= embedding
    counts[chunks - 1, stages - 1] -= loss
    for (chunk, stage), layer in first_layers(counts).items():
        formula = chunk * stages * per_chunk + stage * per_chunk
        assert layer == formula - (embedding and (chunk, stage) != (0, 0))


@settings(max_examples=60)
@given(st.integers(0, 3), st.integers(0, 3), st.integers(1, 8), st.integers(1, 4))
def test_every_expert_slice_has_a_file(log_tensor: int, log_cut: int, expert: int, data: int) -> None:
    tensor, expert_tensor = 2**log_tensor, 2 ** min(log_cut, log_tensor)
    grid = Grid(tensor, 1, expert, expert_tensor)
    world = math.lcm(tensor, expert * expert_tensor) * data
    wanted = {Rank(r % tensor, 0, r // expert_tensor % expert) for r in range(world)}
    ranks = list(grid.ranks())
    assert set(ranks) == wanted
    assert len(ranks) == len(wanted) == len(set(map(grid.folder, ranks)))
    slices = {(rank.expert, grid.slice_of(rank, True)[0]) for rank in ranks}
    assert slices == set(itertools.product(range(expert), range(expert_tensor)))
    for r in range(world):
        rank = Rank(r % tensor, 0, r // expert_tensor % expert)
        assert grid.slice_of(rank, True) == (r % expert_tensor, expert_tensor)


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_keys_go_there_and_back(moe: bool, local: bool, grouped: bool) -> None:
    for name in MOE if moe else DENSE:
        layer = 11 if name.startswith(LAYER) else None
        slot = Slot(name, layer, 12 if EXPERT in name else None)
        assert parse_key(key_of(slot, local, grouped), moe) == slot
