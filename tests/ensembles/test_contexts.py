"""Contexts end before the labels that they route."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from btx_megatron.data.held_out import stream_windows
from btx_megatron.ensembles.contexts import contexts_of
from btx_megatron.errors import UserError


def decode(tokens: Sequence[int]) -> str:
    return " ".join(map(str, tokens))


@given(st.integers(2, 60), st.integers(1, 12), st.integers(1, 14))
def test_a_position_is_routed_by_what_stood_before_its_block(length: int, seq: int, block: int) -> None:
    """Tokens are all different, so that a label in its own context would be seen."""
    windows = list(stream_windows(np.arange(1, length + 1), seq))
    tokens, labels, mask = (np.stack(part) for part in zip(*windows, strict=True))
    contexts = contexts_of(tokens, mask, decode, block)
    numbers = np.arange(len(contexts.flat), dtype=np.float64)[None]  # [1, N]: each text's number as a weight
    text_of = contexts.spread(numbers)[0]
    assert text_of.shape == tokens.shape
    for w, s in zip(*np.nonzero(mask), strict=True):
        context = [int(word) for word in contexts.flat[int(text_of[w, s])].split()]
        start = s - s % block
        assert context == tokens[w, : start + 1].tolist()
        assert labels[w, s] not in context
        assert max(context) < labels[w, s]  # later tokens are larger


def test_what_only_fills_a_window_up_is_not_read() -> None:
    contexts = contexts_of([[7, 8, 0, 0, 0]], [[1, 1, 0, 0, 0]], decode, 2)
    assert contexts.texts == [["7", "", ""]]


def test_a_block_of_none() -> None:
    with pytest.raises(UserError, match="block 0"):
        contexts_of([[1]], [[1]], decode, 0)
