"""A sample of the tokens that a stage trains on: pieces of many documents, drawn as the stage draws.

It serves to see what a text looks like to a model, so it is small, and made of pieces, since a few long
documents would not be the domain. Held-out text is never in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from btx_megatron.data.folder import token_prefix
from btx_megatron.data.indexed import IndexedTokens, Tokens
from btx_megatron.data.weights import source_weights
from btx_megatron.errors import UserError
from btx_megatron.recipe import Domain

PIECE = 512
"""Tokens taken of one document at most."""


def training_sample(
    data_folder: Path, domains: list[Domain], blend: dict[str, float], count: int, random_seed: int
) -> NDArray[np.int64]:
    """Up to ``count`` tokens [n] of the training text, each domain and source by its weight in ``blend``.

    Any first part of them has the weights as well. Raises UserError where there is not one prediction.
    """
    weights = source_weights(domains, blend)
    pieces = {key: _pieces(data_folder, *key, random_seed) for key in weights}
    taken = dict.fromkeys(weights, 0)
    parts: list[Tokens] = []
    while pieces and sum(taken.values()) < count:
        lagging = min(pieces, key=lambda key: taken[key] / weights[key])
        piece = next(pieces[lagging], None)
        if piece is None:
            del pieces[lagging]
            continue
        parts.append(piece)
        taken[lagging] += len(piece)
    tokens = np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int64)[:count]
    if len(tokens) < 2:
        raise UserError(f"{data_folder}: no training text of {', '.join(blend)}; give the domain more text")
    return tokens


def _pieces(data_folder: Path, domain: str, source: str, random_seed: int) -> Iterator[Tokens]:
    """A piece of each document of a source, in a random order."""
    documents = IndexedTokens(token_prefix(data_folder, "train", domain, source))
    random = np.random.default_rng([random_seed, *f"{domain}/{source}".encode()])
    for number in random.permutation(len(documents)):
        document = documents[int(number)]
        start = int(random.integers(max(0, len(document) - PIECE) + 1))
        yield document[start : start + PIECE]
