from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from btx_megatron.data.folder import token_prefix
from btx_megatron.data.held_out import held_out_windows, proportional, stream_windows
from btx_megatron.data.indexed import IndexedTokens
from btx_megatron.errors import UserError


def whole_stream(data_folder: Path, domain: str, sources: list[str]) -> list[int]:
    readers = [IndexedTokens(token_prefix(data_folder, "held_out", domain, source)) for source in sources]
    return [int(token) for reader in readers for i in range(len(reader)) for token in reader[i]]


@given(st.lists(st.integers(1, 1000), max_size=300), st.integers(1, 70))
def test_every_token_but_the_first_is_predicted_once(stream: list[int], seq_length: int) -> None:
    windows = list(stream_windows(np.array(stream, dtype=np.int64), seq_length))
    inputs = [t for tokens, _, mask in windows for t in tokens[mask == 1]]
    labels = [t for _, labels, mask in windows for t in labels[mask == 1]]
    assert labels == stream[1:]
    assert inputs == stream[: max(len(stream) - 1, 0)]
    for tokens, targets, mask in windows:
        assert tokens.shape == targets.shape == mask.shape == (seq_length,)
        assert (tokens.dtype, targets.dtype, mask.dtype) == (np.int64, np.int64, np.float32)
    assert all(mask.all() for _, _, mask in windows[:-1])
    assert all(mask.any() for _, _, mask in windows)


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=8), st.floats(0, 1))
def test_shares_are_whole_proportional_and_complete(totals: list[int], part: float) -> None:
    count = int(part * sum(totals))
    shares = proportional(count, totals)
    assert sum(shares) == count
    for share, total in zip(shares, totals, strict=True):
        assert share <= total
        assert abs(share - count * total / sum(totals)) < 1


def test_windows_of_a_domain_are_its_documents_in_file_order(data_folder: Path) -> None:
    stream = whole_stream(data_folder, "formats", ["json", "email"])
    windows = list(held_out_windows(data_folder, "formats", 100))
    assert [int(t) for _, labels, mask in windows for t in labels[mask == 1]] == stream[1:]


def test_max_tokens_takes_the_first_of_every_source(data_folder: Path) -> None:
    parts = {name: whole_stream(data_folder, "formats", [name]) for name in ("json", "email")}
    windows = list(held_out_windows(data_folder, "formats", 100, max_tokens=500))
    labels = [int(t) for _, labels, mask in windows for t in labels[mask == 1]]
    json, email = proportional(501, [len(part) for part in parts.values()])
    assert labels == (parts["json"][:json] + parts["email"][:email])[1:]
    assert len(labels) == 500
    assert json > 0
    assert email > 0
    # More than there is: all of it.
    everything = list(held_out_windows(data_folder, "formats", 100, max_tokens=10**9))
    assert sum(int(mask.sum()) for _, _, mask in everything) == sum(map(len, parts.values())) - 1


def test_an_unknown_domain_is_refused(data_folder: Path) -> None:
    with pytest.raises(UserError, match="no domain 'poems' here, only formats, loops"):
        list(held_out_windows(data_folder, "poems", 100))
