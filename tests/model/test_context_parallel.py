"""Cutting a sequence over ranks and joining it again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from btx_megatron.runtime import cpu_backend

sizes, lengths = st.integers(1, 9), st.integers(1, 5)


@pytest.fixture(autouse=True, scope="module")
def behind_the_cpu_backend() -> None:
    cpu_backend.install()


@given(sizes, lengths)
def test_parts_join_to_the_whole(size: int, length: int) -> None:
    from btx_megatron.model.context_parallel import part_of, whole_of

    whole = torch.arange(2 * size * length * 3).view(-1, 3)
    parts = [part_of(whole, rank, size) for rank in range(size)]
    assert {len(part) for part in parts} == {2 * length}
    assert torch.equal(whole_of(parts), whole)


@given(sizes, lengths)
def test_every_rank_has_as_much_causal_attention(size: int, length: int) -> None:
    from btx_megatron.model.context_parallel import part_of

    keys_seen = torch.arange(2 * size * length) + 1
    work = {int(part_of(keys_seen, rank, size).sum()) for rank in range(size)}
    assert len(work) == 1


@pytest.mark.parametrize("size", [2, 3])
def test_it_is_megatrons_order(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.utils import get_batch_on_this_cp_rank

    from btx_megatron.model.context_parallel import part_of

    tokens = torch.arange(2 * 6 * size).view(2, -1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: size)
    for rank in range(size):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group, rank=rank: rank)
        theirs = get_batch_on_this_cp_rank({"tokens": tokens.clone()}, is_hybrid_cp=False)["tokens"]
        assert torch.equal(part_of(tokens, rank, size, dim=1), theirs)
