"""Megatron's token files: ``PREFIX.bin``, the tokens of all sequences, and ``PREFIX.idx``, its index.

Written here without Megatron, byte for byte as its IndexedDatasetBuilder writes them, so that preparing
data needs no training install. Layout of the index, little-endian:

    magic "MMIDIDX\\0\\0" | version u64 = 1 | dtype code u8 | sequences u64 | documents + 1 u64
    | length of each sequence i32, in tokens | its offset in the .bin i64, in bytes
    | for each document the number of its first sequence i64, and at the end the number of sequences

Here a sequence is a document. The reader believes nothing: an index that points outside its ``.bin``
would make a memory map read other memory or stop a training run days later.
"""

from __future__ import annotations

import array
import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from btx_megatron.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    8: np.dtype(np.uint16),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}

Tokens = NDArray[np.integer[Any]]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type that Megatron's tools take for so many pieces (its DType.optimal_dtype)."""
    return np.dtype(np.uint16) if vocab_size < 65500 else np.dtype(np.int32)


def bin_path(prefix: Path) -> Path:
    """Path of the tokens."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """Path of the index."""
    return prefix.with_name(prefix.name + ".idx")


class IndexedWriter:
    """Writes documents one after the other; both files appear, whole, at the end of a ``with`` block."""

    def __init__(self, prefix: Path, dtype: np.dtype[Any]) -> None:
        self.prefix, self.dtype = prefix, dtype
        self._lengths = array.array("i")

    def __enter__(self) -> Self:
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._tokens = open(_temporary(bin_path(self.prefix)), "wb")
        return self

    def add(self, tokens: Tokens, lengths: list[int]) -> None:
        """Documents of ``lengths`` tokens, end to end in ``tokens``, which has this writer's dtype."""
        if tokens.dtype != self.dtype or sum(lengths) != len(tokens):
            raise ValueError(f"{len(tokens)} {tokens.dtype} tokens for lengths {lengths}, {self.dtype}")
        self._tokens.write(tokens.tobytes())
        self._lengths.extend(lengths)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._tokens.close()
        if error is None:
            _temporary(idx_path(self.prefix)).write_bytes(self._index())
            os.replace(_temporary(bin_path(self.prefix)), bin_path(self.prefix))
            os.replace(_temporary(idx_path(self.prefix)), idx_path(self.prefix))
        else:
            _temporary(bin_path(self.prefix)).unlink()

    def _index(self) -> bytes:
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        ends = np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
        documents = np.arange(len(lengths) + 1, dtype=np.int64)
        header = HEADER.pack(MAGIC, VERSION, CODES[self.dtype], len(lengths), len(documents))
        offsets = ends - lengths.astype(np.int64) * self.dtype.itemsize
        return header + lengths.tobytes() + offsets.tobytes() + documents.tobytes()


class IndexedTokens:
    """Reads ``PREFIX.bin`` through a memory map. ``lengths[i]``: tokens of sequence i.

    Raises UserError for files that are missing, truncated, or do not belong together.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        index = _read(idx_path(prefix))
        self.dtype, sequences, documents = _parse_header(index, idx_path(prefix))
        parts = np.split(
            np.frombuffer(index, dtype=np.uint8, offset=HEADER.size),
            np.cumsum([4 * sequences, 8 * sequences]),
        )
        self.lengths = parts[0].view("<i4")
        self.offsets = parts[1].view("<i8")
        self.document_starts = parts[2].view("<i8")
        assert len(self.document_starts) == documents
        self._bytes = _map(bin_path(prefix))
        self._check()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> Tokens:
        """Tokens of sequence i."""
        start = int(self.offsets[i])
        return self._bytes[start : start + int(self.lengths[i]) * self.dtype.itemsize].view(self.dtype)

    @property
    def total_tokens(self) -> int:
        """Tokens of all sequences."""
        return int(self.lengths.sum(dtype=np.int64))

    def first(self, count: int) -> Tokens:
        """The first ``count`` tokens of all sequences end to end, or all where there are fewer."""
        ends = np.cumsum(self.lengths, dtype=np.int64)
        needed = min(int(np.searchsorted(ends, count)) + 1, len(self))
        sequences = [self[i] for i in range(needed)] if count > 0 else []
        return np.concatenate([np.empty(0, self.dtype), *sequences])[:count]

    def _check(self) -> None:
        size = self.dtype.itemsize
        if (self.lengths < 0).any():
            raise _broken(idx_path(self.prefix), "a sequence has a negative length")
        room = len(self._bytes) - self.lengths.astype(np.int64) * size
        if ((self.offsets < 0) | (self.offsets > room)).any():
            end = f"the {len(self._bytes)} bytes of {bin_path(self.prefix).name}"
            raise _broken(idx_path(self.prefix), f"a sequence lies outside {end}")
        starts = self.document_starts
        if starts[0] != 0 or starts[-1] != len(self) or (starts[1:] < starts[:-1]).any():
            raise _broken(idx_path(self.prefix), "the documents do not cover the sequences")


def _parse_header(index: bytes, path: Path) -> tuple[np.dtype[Any], int, int]:
    """Token type, sequences, entries of the document table; sizes are checked before they are used."""
    if len(index) < HEADER.size:
        raise _broken(path, f"{len(index)} bytes are too few for a header")
    magic, version, code, sequences, documents = HEADER.unpack_from(index)
    if magic != MAGIC or version != VERSION:
        raise _broken(path, "it does not begin like an index of Megatron's, version 1")
    if code not in DTYPES:
        raise _broken(path, f"its token type {code} is none of {sorted(DTYPES)}")
    expected = HEADER.size + 12 * sequences + 8 * documents
    if len(index) != expected or documents < 1:
        raise _broken(path, f"{len(index)} bytes where its header says {expected}")
    return DTYPES[code], sequences, documents


def _broken(path: Path, why: str) -> UserError:
    return UserError(f"{path}: broken index: {why}; copy it again or prepare the data again")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); prepare the data first") from None


def _map(path: Path) -> NDArray[np.uint8]:
    try:
        if path.stat().st_size == 0:  # nothing to map
            return np.empty(0, dtype=np.uint8)
        return np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); prepare the data first") from None


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".partial")
