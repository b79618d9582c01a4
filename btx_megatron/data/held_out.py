"""Held-out windows: every held-out token of a domain predicted once, in windows of fixed length.

The documents of a domain's sources stand end to end, in file order, as one stream t_0 .. t_n. Window
w holds tokens t[ws : ws+s] and labels t[ws+1 : ws+s+1], so each of t_1 .. t_n is a label exactly once,
under every layout and batch size; only t_0 is not predicted. The last window is padded, and its mask
is 0 there. The first tokens of a window have little context: the loss is a little above what
overlapping windows would give, for every model alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from btx_megatron.data.folder import read_statistics, token_prefix
from btx_megatron.data.indexed import IndexedTokens, Tokens
from btx_megatron.errors import UserError

Window = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]


def held_out_windows(
    data_folder: Path, domain: str, seq_length: int, max_tokens: int | None = None
) -> Iterator[Window]:
    """Windows (tokens [s], labels [s], loss_mask [s]) of a domain's held-out text, in order.

    ``max_tokens`` predicts so many tokens at most: the first ones of each source, in proportion to
    the sources' held-out tokens. Raises UserError for a folder or domain that is not there.
    """
    domains = read_statistics(data_folder)["domains"]
    if domain not in domains:
        raise UserError(f"{data_folder}: no domain '{domain}' here, only {', '.join(domains)}")
    prefixes = [token_prefix(data_folder, "held_out", domain, source) for source in domains[domain]]
    return stream_windows(_stream([IndexedTokens(prefix) for prefix in prefixes], max_tokens), seq_length)


def stream_windows(stream: Tokens, seq_length: int) -> Iterator[Window]:
    """Cut a stream of n + 1 tokens into ceil(n / seq_length) windows that predict n tokens."""
    for start in range(0, len(stream) - 1, seq_length):
        tokens = stream[start : start + seq_length + 1].astype(np.int64)
        missing = seq_length + 1 - len(tokens)
        mask = np.ones(seq_length, dtype=np.float32)
        mask[seq_length - missing :] = 0.0
        padded = np.pad(tokens, (0, missing))
        yield padded[:-1], padded[1:], mask


def _stream(sources: list[IndexedTokens], max_tokens: int | None) -> Tokens:
    totals = [source.total_tokens for source in sources]
    count = sum(totals) if max_tokens is None else min(sum(totals), max_tokens + 1)
    shares = proportional(count, totals)
    parts = [source.first(share) for source, share in zip(sources, shares, strict=True)]
    return np.concatenate(parts)


def proportional(count: int, totals: list[int]) -> list[int]:
    """Whole shares of ``count`` in proportion to ``totals`` (largest remainder first), summing to it."""
    whole = sum(totals)
    shares = [count * total // whole for total in totals]
    by_remainder = sorted(range(len(totals)), key=lambda i: -(count * totals[i] % whole))
    for i in by_remainder[: count - sum(shares)]:
        shares[i] += 1
    return shares
