"""The text that a router may see: what comes before a label in its window, renewed every few tokens.

Routing by text would be exact with a context of its own for every token, and a window of s tokens would then
be read s times. So a window is cut into blocks of ``block`` positions, and all positions of a block are
routed by what was there at its first one: tokens[: start + 1], which ends right before the first label of the
block. No label of a block, nor anything after it, is in the block's context. What this costs is freshness:
the last position of a block does not see the block - 1 tokens before it.

The context of a window's first block is a single token, which says next to nothing: a small block makes that
block short.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from btx_megatron.ensembles.mixture import Floats
from btx_megatron.errors import UserError

BLOCK = 64


@dataclass(frozen=True)
class Contexts:
    """What each block of each window is routed by: ``texts`` [windows][blocks]."""

    texts: list[list[str]]
    block: int
    positions: int

    @property
    def flat(self) -> list[str]:
        """All texts, window by window."""
        return [text for window in self.texts for text in window]

    def spread(self, log_w_EN: Floats) -> Floats:
        """Weights of the flat texts [E, N], N = W * B, as weights of the positions [E, W, S]."""
        log_w_EWB = log_w_EN.reshape(len(log_w_EN), len(self.texts), -1)
        return np.repeat(log_w_EWB, self.block, axis=2)[:, :, : self.positions]


def contexts_of(
    tokens_WS: ArrayLike,
    mask_WS: ArrayLike,
    decode: Callable[[Sequence[int]], str],
    block: int = BLOCK,
) -> Contexts:
    """Contexts of windows whose label at position s is the token after tokens[s] (``data.held_out``).

    ``decode`` turns tokens into text. A block without a counted position gets an empty text: it holds only
    what fills a window up. Raises UserError for a ``block`` below 1.
    """
    if block < 1:
        raise UserError(f"block {block}: a context is renewed every 1 token or more; give at least 1")
    tokens: NDArray[np.int64] = np.asarray(tokens_WS)
    counted = np.asarray(mask_WS) != 0
    starts = range(0, tokens.shape[1], block)
    texts = [
        [decode(row[: start + 1].tolist()) if seen[start : start + block].any() else "" for start in starts]
        for row, seen in zip(tokens, counted, strict=True)
    ]
    return Contexts(texts, block, tokens.shape[1])
