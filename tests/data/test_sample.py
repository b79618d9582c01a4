"""A sample of the training text: by weight, in pieces, the same each time, and nothing that is held out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from btx_megatron.data.folder import token_prefix
from btx_megatron.data.indexed import IndexedWriter
from btx_megatron.data.sample import PIECE, training_sample
from btx_megatron.errors import UserError
from btx_megatron.recipe import Domain, Source


def write_source(folder: Path, domain: str, source: str, token: int, lengths: list[int]) -> None:
    """Documents that are one token over and over on the training side; held out is token + 100."""
    for side, value in (("train", token), ("held_out", token + 100)):
        with IndexedWriter(token_prefix(folder, side, domain, source), np.dtype(np.uint16)) as writer:
            writer.add(np.full(sum(lengths), value, dtype=np.uint16), lengths)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_source(tmp_path, "a", "x", 1, [10] * 2000)
    write_source(tmp_path, "a", "y", 2, [5000] * 30)
    write_source(tmp_path, "b", "z", 3, [100] * 300)
    return tmp_path


DOMAINS = [
    Domain("a", [Source("x", weight=1.0), Source("y", weight=3.0)]),
    Domain("b", [Source("z")]),
]


def shares(tokens: np.ndarray) -> dict[int, float]:
    values, counts = np.unique(tokens, return_counts=True)
    return dict(zip(values.tolist(), (counts / len(tokens)).tolist(), strict=True))


def test_domains_and_sources_have_their_weights_in_every_first_part(folder: Path) -> None:
    tokens = training_sample(folder, DOMAINS, {"a": 1.0, "b": 1.0}, 12_000, 1)
    assert tokens.shape == (12_000,)
    for count in (6_000, 12_000):
        found = shares(tokens[:count])
        assert found == pytest.approx({1: 0.125, 2: 0.375, 3: 0.5}, abs=PIECE / count)


def test_a_long_document_gives_one_piece(folder: Path) -> None:
    tokens = training_sample(folder, DOMAINS, {"a": 1.0}, 10**6, 1)
    assert shares(tokens) == pytest.approx({1: 20_000 / 35_360, 2: 30 * PIECE / 35_360})


def test_the_same_each_time_and_another_with_another_seed(tmp_path: Path) -> None:
    with IndexedWriter(token_prefix(tmp_path, "train", "a", "x"), np.dtype(np.uint16)) as writer:
        writer.add(np.arange(60_000, dtype=np.uint16), [600] * 100)
    domains = [Domain("a", [Source("x")])]
    first, again, other = (training_sample(tmp_path, domains, {"a": 1.0}, 4000, seed) for seed in (1, 1, 2))
    assert (first == again).all()
    assert not (first == other).all()
    starts = first[:-1][np.diff(first) != 1]
    assert len({int(token) // 600 for token in first[::PIECE]}) == 8  # eight documents
    assert len(starts) == 7


def test_too_little_text_is_named(tmp_path: Path) -> None:
    write_source(tmp_path, "a", "x", 1, [1])
    with pytest.raises(UserError, match="no training text of a"):
        training_sample(tmp_path, [Domain("a", [Source("x")])], {"a": 1.0}, 100, 1)
