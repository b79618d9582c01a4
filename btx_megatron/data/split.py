"""Which documents are held out: by document, by bytes, and never the same text on both sides.

A document's turn follows from a keyed hash of its text, so it does not depend on names or order.
Within a source a text occurs once (see corpus). Two sources may share texts, as web text may serve
two domains: what an earlier source of the recipe decided for a text holds for the later ones.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from btx_megatron.data.document import Document


@dataclass(frozen=True)
class Sides:
    """The documents of one source, each side in the source's order."""

    train: list[Document]
    held_out: list[Document]


class Splitter:
    """Splits one source after the other, and remembers the side of every text."""

    def __init__(self, held_out_fraction: float, random_seed: int) -> None:
        self._fraction = held_out_fraction
        self._key = str(random_seed).encode()
        self._held_out: set[bytes] = set()
        self._train: set[bytes] = set()

    def split(self, documents: list[Document]) -> Sides:
        """Hold out about ``held_out_fraction`` of the bytes.

        Of two documents or more that no earlier source has, each side gets at least one. Otherwise a
        side may come out empty: the caller says so.
        """
        decided = self._held_out | self._train
        free = sorted((d for d in documents if d.digest not in decided), key=self._turn)
        held_bytes = sum(d.size for d in documents if d.digest in self._held_out)
        target = self._fraction * sum(d.size for d in documents)
        chosen = _fill(free, target - held_bytes)
        if not chosen and free and not held_bytes:
            chosen = [min(free, key=lambda d: d.size)]
        if len(chosen) == len(free) > 1:
            chosen.remove(max(chosen, key=lambda d: d.size))
        held_out = {d.digest for d in chosen}
        self._held_out |= held_out
        self._train |= {d.digest for d in free} - held_out
        return Sides(
            train=[d for d in documents if d.digest in self._train],
            held_out=[d for d in documents if d.digest in self._held_out],
        )

    def _turn(self, document: Document) -> bytes:
        return hashlib.blake2b(document.digest, key=self._key, digest_size=16).digest()


def _fill(documents: list[Document], target: float) -> list[Document]:
    """Documents in their turn that bring the sum of sizes as near to ``target`` as they can.

    One that would overshoot by more than it fills is passed over, so that one long document among
    short ones does not become the whole held-out text.
    """
    chosen, size = [], 0
    for document in documents:
        if size + document.size / 2 <= target:
            chosen.append(document)
            size += document.size
    return chosen
