"""How experts moved away from their base: distances, cosines and sign conflicts, in one pass.

All of it follows from sums over entries: the Gram matrix of base and task vectors (``A - base``), and how
many entries had how many movers. Sums add up over parts, layers and kinds, so memory is a few blocks a
thread, whatever the model's size.

A large model is sampled: of every matrix the same evenly spaced runs of whole rows, so that little is read
and what is read lies together on disk; a part's sums are then scaled up to all of its rows. Vectors and
small matrices are read whole. The choice depends on shapes alone: two runs give the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import torch
import xxhash
from torch import Tensor

from btx_megatron.checkpoints.names import ROUTER, has_layer_axis
from btx_megatron.checkpoints.pieces import Index, Source, indices_of, matrix_shape, part_info
from btx_megatron.checkpoints.stream import Rows, rows_of
from btx_megatron.runtime.cores import available_cores

Kind = Literal["attention", "feed-forward", "norms", "router", "embedding", "head"]
KINDS: tuple[Kind, ...] = ("attention", "feed-forward", "norms", "router", "embedding", "head")
MATRICES: tuple[Kind, ...] = ("attention", "feed-forward", "router", "embedding", "head")
"""Without the norms: their gains near 1 would outweigh matrices of entries near 0.02."""

RUN = 1 << 16
"""Entries of a run of rows, about: 128 KB of bf16, long enough to be read at the speed of the disk."""
LEAST_RUNS = 4
"""A matrix is never seen through fewer."""
BUDGET = 1 << 28
"""Entries, over all models, that are read where no share is asked for: half a GB of bf16."""


def kind_of(name: str) -> Kind:
    """What a weight is for, by its (stacked) name."""
    if name == ROUTER:
        return "router"
    if "norm" in name:
        return "norms"
    if name.startswith("embedding."):
        return "embedding"
    if name.startswith("output_layer."):
        return "head"
    return "attention" if ".self_attention." in name else "feed-forward"


@dataclass(frozen=True)
class Moments:
    """Sums over entries of base b and task vectors d_1 .. d_N; those of disjoint sets of entries add up."""

    entries: float
    """Entries that the sums stand for,"""
    read: float
    """and entries that were looked at."""
    gram: Tensor
    """[N + 1, N + 1] fp64: inner products of b, d_1, .., d_N."""
    moved: Tensor
    """[N] fp64: entries of d_i that are not 0."""
    movers: Tensor
    """[N + 1] fp64: entries that 0, 1, .., N experts moved."""
    conflicts: float
    """Entries that one expert raised and another lowered."""
    equal: Tensor
    """[N, N] bool: the experts are alike in all that was read."""

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.entries + other.entries,
            self.read + other.read,
            self.gram + other.gram,
            self.moved + other.moved,
            self.movers + other.movers,
            self.conflicts + other.conflicts,
            self.equal & other.equal,
        )

    def distance(self, expert: int) -> float:
        """||A - b|| / ||b||; infinite where b is 0 and A is not."""
        return _ratio(self._norm2(expert + 1), self._norm2(0))

    def scale(self, expert: int) -> float:
        """||A|| / ||b||."""
        return _ratio(self._model_norm2(expert), self._norm2(0))

    def cosine_with_base(self, expert: int) -> float:
        """Cosine of A and b; 1 where they are equal, NaN where one of them is 0."""
        inner = self._norm2(0) + float(self.gram[0, expert + 1])
        return _cosine(inner, self._norm2(0), self._model_norm2(expert))

    def cosine(self, first: int, second: int) -> float:
        """Cosine of two task vectors; NaN where one of them is 0."""
        i, j = first + 1, second + 1
        return _cosine(float(self.gram[i, j]), self._norm2(i), self._norm2(j))

    def moved_share(self, expert: int) -> float:
        """Share of the entries that the expert changed."""
        return float(self.moved[expert]) / self.entries

    @property
    def shared(self) -> float:
        """Entries that at least two experts moved."""
        return float(self.movers[2:].sum())

    @property
    def conflict_share(self) -> float:
        """Share of conflicts among the entries that at least two experts moved; NaN where there is none."""
        return self.conflicts / self.shared if self.shared else math.nan

    @property
    def chance(self) -> float:
        """What that share is where each sign is a coin's toss: 1 - 2^(1 - m) at an entry of m movers."""
        tosses = torch.tensor([1 - 2.0 ** (1 - m) for m in range(2, len(self.movers))], dtype=torch.float64)
        return float((self.movers[2:] * tosses).sum()) / self.shared if self.shared else math.nan

    def _norm2(self, row: int) -> float:
        return float(self.gram[row, row])

    def _model_norm2(self, expert: int) -> float:
        row = expert + 1
        return max(self._norm2(0) + 2 * float(self.gram[0, row]) + self._norm2(row), 0.0)  # NaN stays


def _ratio(above: float, below: float) -> float:
    if below == 0:
        return math.inf if above else 0.0
    return math.sqrt(above / below)


def _cosine(inner: float, first: float, second: float) -> float:
    return inner / math.sqrt(first * second) if first * second else math.nan


Place = tuple[Kind, int | None]
"""A kind and its layer; None outside the layers."""


def measure(
    base: Source, experts: Sequence[Source], names: Iterable[str], share: float, workers: int = 0
) -> dict[Place, Moments]:
    """Sums over the weights ``names``, by kind and layer; of ``share`` (0 to 1] of their entries.

    All sources must hold them in the same shapes (dtypes may differ). Raises UserError for files that are
    cut short.
    """
    torch.set_num_threads(1)  # threads work on parts
    jobs = [(name, index) for name in names for index in indices_of(name, base.tensors[name])]
    with ThreadPoolExecutor(workers or available_cores()) as pool:
        try:
            found = list(pool.map(lambda job: _measure_part(base, experts, job[0], job[1], share), jobs))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    places: dict[Place, Moments] = {}
    for (name, index), moments in zip(jobs, found, strict=True):
        place = (kind_of(name), index[0] if has_layer_axis(name) else None)
        places[place] = places[place] + moments if place in places else moments
    return dict(sorted(places.items(), key=_in_order))


def _in_order(item: tuple[Place, Moments]) -> tuple[bool, int, int]:
    (kind, layer), _ = item
    return layer is None, layer or 0, KINDS.index(kind)


def total(
    places: Mapping[Place, Moments], kinds: Sequence[Kind] = KINDS, layer: int | None = None
) -> Moments | None:
    """The sums over some kinds, in one layer or everywhere (None); None where there are none such."""
    found = [
        moments for (kind, at), moments in places.items() if kind in kinds and (layer is None or at == layer)
    ]
    return reduce(Moments.__add__, found) if found else None


def default_share(entries: int) -> float:
    """The share that reads about ``BUDGET`` of so many entries, all models counted; at most 1."""
    return min(1.0, BUDGET / max(1, entries))


def row_runs(rows: int, cols: int, share: float) -> list[tuple[int, int]]:
    """The runs of rows to read, [start, stop): evenly spaced, none twice; all rows where share is 1.

    A matrix of few entries and a vector are read whole.
    """
    length = max(1, RUN // cols)
    if share >= 1 or cols == 1 or rows * cols <= RUN:
        return [(start, min(rows, start + length)) for start in range(0, rows, length)]
    most = rows // length
    count = min(most, max(LEAST_RUNS, round(share * rows / length)))
    starts = (int((i + 0.5) * rows / count - length / 2) for i in range(count))  # each amid its stretch
    return [(start, start + length) for start in starts]


def _measure_part(base: Source, experts: Sequence[Source], name: str, index: Index, share: float) -> Moments:
    rows, cols = matrix_shape(part_info(base.tensors[name], index).shape)
    readers = [rows_of(source, name, index) for source in (base, *experts)]
    runs = row_runs(rows, cols, share)
    found = reduce(Moments.__add__, (_measure_rows(readers, start, stop) for start, stop in runs))
    factor = rows * cols / found.read
    return Moments(
        rows * cols, found.read, found.gram * factor, found.moved * factor, found.movers * factor,
        found.conflicts * factor, found.equal,
    )  # fmt: skip


def _measure_rows(readers: Sequence[Rows], start: int, stop: int) -> Moments:
    first = readers[0](start, stop).reshape(-1)
    stacked = torch.empty((len(readers), len(first)), dtype=torch.float32)
    stacked[0] = first
    for row, reader in zip(stacked[1:], readers[1:], strict=True):
        row.copy_(reader(start, stop).reshape(-1))
    tasks = stacked[1:].sub_(stacked[0])
    changed = tasks != 0
    movers = torch.bincount(changed.sum(0, dtype=torch.int16), minlength=len(readers))
    conflicts = (tasks.amax(0) > 0).logical_and_(tasks.amin(0) < 0).sum()
    digests = [xxhash.xxh3_64_digest(row.numpy()) for row in tasks]
    return Moments(
        entries=len(first),
        read=len(first),
        gram=(stacked @ stacked.T).double(),
        moved=changed.sum(1).double(),
        movers=movers.double(),
        conflicts=int(conflicts),
        equal=torch.tensor([[one == other for other in digests] for one in digests]),
    )
