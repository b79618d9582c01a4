"""Log-probabilities, masks and texts to try ensembles on."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

SEEDS = st.integers(0, 2**32 - 1)


def log_probabilities(seed: int, experts: int = 3, windows: int = 2, positions: int = 5) -> np.ndarray:
    """[E, W, S], each the log of a number in (0, 1)."""
    return np.log(np.random.default_rng(seed).uniform(0.01, 0.99, (experts, windows, positions)))


def random_mask(seed: int, windows: int = 2, positions: int = 5) -> np.ndarray:
    """[W, S] of 0 and 1; the first position of all is counted."""
    mask = (np.random.default_rng(seed + 1).uniform(size=(windows, positions)) < 0.7).astype(np.float32)
    mask[0, 0] = 1
    return mask


WORDS = {
    "math": ["theorem", "proof", "lemma", "integral", "prime", "matrix", "vector", "limit", "group", "field"],
    "code": ["def", "return", "class", "import", "lambda", "yield", "async", "print", "self", "range"],
    "wiki": ["river", "century", "city", "battle", "king", "empire", "museum", "island", "church", "town"],
}


def texts_of(domain: str, count: int, seed: int = 0, length: int = 30) -> list[str]:
    rng = np.random.default_rng((seed, sorted(WORDS).index(domain)))
    return [" ".join(rng.choice(WORDS[domain], length)) for _ in range(count)]
