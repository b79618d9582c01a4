"""Where the bytes of a weight lie, and the one way in which they are read and written.

Every format stores a model cut in another way. To us a model is a set of *parts*: a weight without layer
and expert axes (``linear_fc1`` of layer 3, expert 1), a matrix [rows, cols] or a vector, which counts as a
matrix of one column. A format tells for each part which *pieces* of which files hold it; this module moves
the bytes. So a format is an index and nothing else, and every input works with every output.

Files are read with ``pread`` into buffers of our own and not through a memory map: a file that is cut short
is an error that can be told, not a SIGBUS; and memory stays what we ask for.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from btx_megatron.checkpoints.names import has_expert_axis, has_layer_axis
from btx_megatron.checkpoints.open_files import OPEN_FILES
from btx_megatron.checkpoints.scratch import contiguous, empty
from btx_megatron.errors import UserError

Index = tuple[int, ...]
"""Leading indices of a part: (), (layer,) or (layer, expert)."""


@dataclass(frozen=True)
class TensorInfo:
    """A weight, under its stacked name."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Piece:
    """A block of a part that lies in one file, row by row."""

    file: str
    """Path, relative to the checkpoint's folder."""
    offset: int
    """Byte of its first element."""
    rows: int
    cols: int
    row: int = 0
    """Where it lies in the part: its first row,"""
    col: int = 0
    """and its first column."""
    stride: int | None = None
    """Elements from one row to the next in the file; None: they follow one another."""


class Source(Protocol):
    """A checkpoint to read."""

    folder: Path
    files: Files
    tensors: dict[str, TensorInfo]

    def pieces(self, name: str, index: Index) -> list[Piece]:
        """Where a part lies."""
        ...


class Target(Protocol):
    """A checkpoint to write, laid out."""

    files: Files

    def pieces(self, name: str, index: Index) -> list[Piece]:
        """Where a part goes; a weight that several files hold has a piece in each."""
        ...


def indices_of(name: str, info: TensorInfo) -> list[Index]:
    """The parts of a weight, by its leading indices, in row-major order."""
    return list(itertools.product(*map(range, leading_shape(name, info))))


def leading_shape(name: str, info: TensorInfo) -> tuple[int, ...]:
    """How many layers, and experts, a weight is of: (), (layers,) or (layers, experts)."""
    return info.shape[: 2 if has_expert_axis(name) else 1 if has_layer_axis(name) else 0]


def part_info(info: TensorInfo, index: Index) -> TensorInfo:
    """Shape and dtype of a part."""
    return TensorInfo(info.shape[len(index) :], info.dtype)


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """[rows, cols] of a part: a vector is a matrix of one column."""
    rows, cols = shape if len(shape) == 2 else (*shape, 1)
    return rows, cols


def check_cover(pieces: Iterable[Piece], shape: tuple[int, ...], what: str) -> None:
    """Raise UserError unless the pieces tile the part: every element once."""
    rows, cols = matrix_shape(shape)
    taken: list[tuple[int, int, int, int]] = []
    area = 0
    for piece in pieces:
        box = (piece.row, piece.row + piece.rows, piece.col, piece.col + piece.cols)
        inside = 0 <= box[0] <= box[1] <= rows and 0 <= box[2] <= box[3] <= cols
        overlapping = any(
            box[0] < other[1] and other[0] < box[1] and box[2] < other[3] and other[2] < box[3]
            for other in taken
        )
        if not inside or overlapping:
            raise UserError(f"{what}: a stored block of it sticks out or overlaps another; restore the files")
        taken.append(box)
        area += piece.rows * piece.cols
    if area != rows * cols:
        raise UserError(f"{what}: {area} of {rows * cols} values are stored; restore what is missing")


class Files:
    """The files of one folder, shared by all threads: opened when they are asked for."""

    def __init__(self, folder: Path, flags: int = os.O_RDONLY) -> None:
        self.folder = folder
        self._flags = flags
        self._owner = OPEN_FILES.new_owner(self)
        self._used: set[str] = set()

    @contextlib.contextmanager
    def open(self, file: str) -> Iterator[int]:
        """Its descriptor. Raises UserError if one to read is missing, OSError if one cannot be written."""
        self._used.add(file)
        with contextlib.ExitStack() as stack:
            try:
                lent = OPEN_FILES.lent(self._owner, self.folder / file, self._flags)
                descriptor = stack.enter_context(lent)
            except OSError as error:
                if self._flags != os.O_RDONLY:  # the disk's fault, not the user's
                    raise
                raise UserError(
                    f"{self.folder / file}: cannot be opened ({error.strerror}); restore it"
                ) from None
            yield descriptor

    def preallocate(self, file: str, length: int) -> None:
        """Make a file in its whole length, so that a full disk shows before the work. Raises OSError."""
        with self.open(file) as descriptor:
            if length:
                os.posix_fallocate(descriptor, 0, length)

    def write(self, file: str, offset: int, content: bytes | memoryview) -> None:
        """Write bytes at a place."""
        done = 0
        with self.open(file) as descriptor:
            while done < len(content):
                done += os.pwrite(descriptor, content[done:], offset + done)

    def read(self, file: str, offset: int, into: memoryview) -> None:
        """Fill memory with what lies at a place. Raises UserError where the file ends before."""
        done = 0
        with self.open(file) as descriptor:
            while done < len(into):
                count = os.preadv(descriptor, [into[done:]], offset + done)
                if count == 0:
                    raise UserError(f"{self.folder / file}: ends too early, it is cut short; restore it")
                done += count

    def close(self) -> None:
        """Close all files."""
        OPEN_FILES.close(self._owner)

    def sync(self) -> None:
        """Bring all files to disk."""
        for file in sorted(self._used):
            with self.open(file) as descriptor:
                os.fsync(descriptor)


def read_part(source: Source, name: str, index: Index) -> Tensor:
    """A whole part."""
    info = part_info(source.tensors[name], index)
    pieces = source.pieces(name, index)
    check_cover(pieces, info.shape, f"{source.folder}: {name} {list(index)}")
    return read_rows(source.files, pieces, info, 0, info.shape[0])


def read_rows(files: Files, pieces: Iterable[Piece], info: TensorInfo, start: int, stop: int) -> Tensor:
    """Rows ``start`` to ``stop`` of a part: [stop - start, cols], or [stop - start] of a vector.

    ``info`` is the part's own shape and dtype. Raises UserError, naming the file, where bytes are missing.
    """
    _, cols = matrix_shape(info.shape)
    out = empty((stop - start, cols), info.dtype)
    for piece in pieces:
        first, last = max(start, piece.row), min(stop, piece.row + piece.rows)
        if first >= last:
            continue
        target = out[first - start : last - start, piece.col : piece.col + piece.cols]
        stride = piece.cols if piece.stride is None else piece.stride
        offset = piece.offset + (first - piece.row) * stride * info.dtype.itemsize
        whole = target.is_contiguous() and stride == piece.cols
        elements = (last - first - 1) * stride + piece.cols
        block = target if whole else empty((elements,), info.dtype)
        _read_into(files, piece.file, offset, block)
        if not whole:
            target.copy_(block.as_strided((last - first, piece.cols), (stride, 1)))
    return out if len(info.shape) == 2 else out.squeeze(1)


def write_rows(files: Files, pieces: Iterable[Piece], start: int, block: Tensor) -> None:
    """Write rows of a part from ``start`` on into every piece that they meet.

    Raises OSError where the disk is full.
    """
    matrix = block if block.dim() == 2 else block.unsqueeze(1)
    stop = start + len(matrix)
    for piece in pieces:
        first, last = max(start, piece.row), min(stop, piece.row + piece.rows)
        if first >= last:
            continue
        assert piece.stride is None  # what we write follows one another
        source = contiguous(matrix[first - start : last - start, piece.col : piece.col + piece.cols])
        offset = piece.offset + (first - piece.row) * piece.cols * block.dtype.itemsize
        files.write(piece.file, offset, bytes_of(source))


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor of any dtype."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def _read_into(files: Files, file: str, offset: int, block: Tensor) -> None:
    files.read(file, offset, bytes_of(block))
