"""The engine of every conversion: parts go from sources to a target in blocks, in threads, hashed on the way.

A plan says for each weight of the target how its rows come to be; here they are made, looked at (finite?),
written where the target wants them, and hashed. Memory is a few blocks a thread, whatever the model's size;
a rule that needs a whole part at once says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import xxhash
from torch import Tensor

from btx_megatron.checkpoints.pieces import (
    Index,
    Piece,
    Source,
    Target,
    TensorInfo,
    bytes_of,
    check_cover,
    dtype_name,
    indices_of,
    leading_shape,
    matrix_shape,
    part_info,
    read_rows,
    write_rows,
)
from btx_megatron.checkpoints.scratch import as_dtype, contiguous, keep_buffers, return_freed_memory
from btx_megatron.errors import UserError
from btx_megatron.runtime.cores import available_cores

BLOCK_BYTES, SMALLEST_BLOCK = 1 << 20, 64 << 10
"""Bytes of the result that a thread makes at once. What it takes of the cache decides: 8 MB are slower."""

OWN_COPIES = 3
"""Copies of a block, in its own type, that a thread holds: a source's, one in another order, the result."""
PROCESS_BYTES, PART_BYTES = 64 << 20, 8 << 10
"""What a mix takes beside its blocks, measured with room: in all (40 MB of it are modules of torch that only
torch_dist's index needs), and for each part (its places in the files, its hash, the job)."""

Rows = Callable[[int, int], Tensor]
"""Rows ``start`` to ``stop`` of a part: [stop - start, cols], or [stop - start] of a vector."""


@dataclass(frozen=True)
class PlannedTensor:
    """One weight of the result."""

    name: str
    """Its (stacked) name."""
    info: TensorInfo
    """Its shape and dtype."""
    rule: str
    """How it comes to be: ``mean``, ``expert``, ``copy``, ``router:normal``, ..."""
    inputs: tuple[str, ...]
    """The sources that it is made from."""
    make: Callable[[Index], Rows]
    """The rows of the part at leading indices (layer, expert)."""
    whole: bool = False
    """The rule needs all rows of a part at once."""
    wide: float = 8
    """Bytes an entry that the rule holds beside ``OWN_COPIES``: by default two fp32 copies."""


class NotFinite(UserError):
    """A part of the result holds NaN or infinite values."""

    def __init__(self, name: str, index: Index, inputs: Iterable[str]) -> None:
        made_from = ", ".join(inputs) or "nothing"
        super().__init__(f"{name} {list(index)}: NaN or infinite values; it is made from {made_from}")
        self.name, self.index = name, index


class Reporter(Protocol):
    """Told how far the work is (``runtime.progress.Progress``)."""

    def update(self, phase: str, done: int, total: int, text: str = "") -> None:
        """``done`` of ``total`` parts."""
        ...


class PartHash:
    """XXH3 (128 bits) of a part's values in row-major order, fed block by block."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()

    def update(self, block: Tensor) -> None:
        """Feed the next rows."""
        self._hash.update(bytes_of(contiguous(block)))

    def digest(self) -> bytes:
        """16 bytes."""
        return self._hash.digest()


def tensor_hash(parts: Iterable[bytes]) -> str:
    """Hash of a weight: of the hashes of its parts, in row-major order; hex.

    By parts, so that threads may work on one weight and no cut on disk changes the hash.
    """
    return xxhash.xxh3_128(b"".join(parts)).hexdigest()


def is_finite(block: Tensor) -> bool:
    """No NaN and no infinity; by the bits, which is several times as fast as ``torch.isfinite``.

    A number whose exponent is all ones is none. As unsigned integers these are the largest of the
    negative half; as signed ones, the largest of the positive half.
    """
    bits = _BITS.get(block.dtype)
    if bits is None or not block.numel():
        return bool(torch.isfinite(block).all())
    kind, infinity = bits
    values = block.contiguous().reshape(-1).view(kind).numpy()
    sign = 1 << (8 * kind.itemsize - 1)
    return int(values.max()) < infinity and int(values.view(f"u{kind.itemsize}").max()) < sign + infinity


_BITS = {
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F800000),
}


@dataclass(frozen=True)
class Effort:
    """How much of the machine the engine takes."""

    workers: int = 0
    """Threads; 0: one a core."""
    max_memory: int | None = None
    """Bytes by which the process may grow; None: no bound beyond what blocks of the usual size take."""

    def fit(self, plan: Sequence[PlannedTensor]) -> tuple[int, int]:
        """Threads, and bytes of a block. Raises UserError where a rule needs more than there may be.

        Smaller blocks come before fewer threads: they cost less.
        """
        threads, block = self.workers or available_cores(), BLOCK_BYTES
        while self.max_memory is not None and peak_bytes(plan, threads, block) > self.max_memory:
            if block > SMALLEST_BLOCK:
                block //= 2
            elif threads > 1:
                threads -= 1
            else:
                raise UserError(self._too_little(plan))
        return threads, block

    def _too_little(self, plan: Sequence[PlannedTensor]) -> str:
        largest = max(plan, key=lambda tensor: job_bytes(tensor, SMALLEST_BLOCK))
        whole = ", which is made whole" if largest.whole else ""
        return (
            f"--max-memory {self.max_memory}: this takes {peak_bytes(plan, 1, SMALLEST_BLOCK)} bytes at "
            f"least, most of it for {largest.name} ({largest.rule}){whole}; raise it, or choose another rule"
        )


NO_BOUND = Effort()


def job_bytes(tensor: PlannedTensor, block: int) -> int:
    """Bytes that a thread holds while it makes a part of a weight, ``block`` bytes of it in one go."""
    rows, cols = matrix_shape(part_info(tensor.info, leading_shape(tensor.name, tensor.info)).shape)
    own = tensor.info.dtype.itemsize
    made = rows if tensor.whole else min(rows, block_rows(cols * own, block))
    return math.ceil(made * cols * (OWN_COPIES * own + tensor.wide))


def peak_bytes(plan: Sequence[PlannedTensor], threads: int, block: int) -> int:
    """Bytes by which the process grows at most: the largest jobs that can run at once, and the plan's own."""
    jobs: list[int] = []
    parts = 0
    for tensor in plan:
        count = math.prod(leading_shape(tensor.name, tensor.info))
        jobs += [job_bytes(tensor, block)] * min(count, threads)
        parts += count
    return PROCESS_BYTES + PART_BYTES * parts + sum(sorted(jobs)[-threads:])


def block_rows(row_bytes: int, block: int) -> int:
    """Rows of a block: one at least."""
    return max(1, block // max(1, row_bytes))


def stream(
    plan: list[PlannedTensor], target: Target, effort: Effort = NO_BOUND, progress: Reporter | None = None
) -> dict[str, dict[str, Any]]:
    """Make every weight of the plan and write it to the target; returns the table of the manifest.

    The table has ``rule``, ``inputs``, ``shape``, ``dtype`` and ``xxh3_128`` by name. The first error
    ends it: UserError for a source that is damaged or not finite, OSError for a full disk.
    """
    digests = _run(plan, target, effort, progress)
    return {tensor.name: _entry(tensor, digests) for tensor in plan}


def _run(
    plan: list[PlannedTensor], target: Target, effort: Effort, progress: Reporter | None
) -> dict[tuple[str, Index], bytes]:
    """The hash of every part, once all are written."""
    torch.set_num_threads(1)  # threads work on parts; inside one they would only wait for each other
    jobs = [(tensor, index) for tensor in plan for index in indices_of(tensor.name, tensor.info)]
    digests: dict[tuple[str, Index], bytes] = {}
    threads, block = effort.fit(plan)
    return_freed_memory()
    with ThreadPoolExecutor(threads, initializer=keep_buffers) as pool:
        futures = {pool.submit(_make_part, *job, target, block): job for job in jobs}
        waiting = set(futures)
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_EXCEPTION)
                for future in done:
                    tensor, index = futures[future]
                    digests[tensor.name, index] = future.result()
                if progress:
                    progress.update("mixing", len(jobs) - len(waiting), len(jobs))
        finally:
            pool.shutdown(cancel_futures=True)
    return digests


def _entry(tensor: PlannedTensor, digests: dict[tuple[str, Index], bytes]) -> dict[str, Any]:
    parts = (digests[tensor.name, index] for index in indices_of(tensor.name, tensor.info))
    return {
        "rule": tensor.rule,
        "inputs": list(tensor.inputs),
        "shape": list(tensor.info.shape),
        "dtype": dtype_name(tensor.info.dtype),
        "xxh3_128": tensor_hash(parts),
    }


def _make_part(tensor: PlannedTensor, index: Index, target: Target, block_bytes: int) -> bytes:
    info, make, pieces = part_info(tensor.info, index), tensor.make(index), target.pieces(tensor.name, index)
    rows, cols = matrix_shape(info.shape)
    step = rows if tensor.whole else block_rows(cols * info.dtype.itemsize, block_bytes)
    digest = PartHash()
    for start in range(0, rows, step):
        block = as_dtype(make(start, min(rows, start + step)), info.dtype)
        if not is_finite(block):
            raise NotFinite(tensor.name, index, tensor.inputs)
        write_rows(target.files, pieces, start, block)
        digest.update(block)
        del block  # before the next is made
    return digest.digest()


def rows_of(source: Source, name: str, index: Index) -> Rows:
    """The rows of a part of a source. Raises UserError unless its pieces tile the part."""
    info = part_info(source.tensors[name], index)
    pieces = source.pieces(name, index)
    check_cover(pieces, info.shape, f"{source.folder}: {name} {list(index)}")

    def rows(start: int, stop: int) -> Tensor:
        return read_rows(source.files, pieces, info, start, stop)

    return source.watch(name, index, rows) if isinstance(source, Watched) else rows


class Watched:
    """A source whose parts are hashed as they are read, so that its fingerprint costs no second reading."""

    def __init__(self, source: Source) -> None:
        self.source, self.folder, self.files, self.tensors = (
            source, source.folder, source.files, source.tensors
        )  # fmt: skip
        self._digests: dict[tuple[str, Index], bytes] = {}

    def pieces(self, name: str, index: Index) -> list[Piece]:
        """Where a part lies."""
        return self.source.pieces(name, index)

    def watch(self, name: str, index: Index, rows: Rows) -> Rows:
        """``rows``, hashed where they are read from the first to the last in order."""
        if (name, index) in self._digests:
            return rows
        digest, length, at = PartHash(), part_info(self.tensors[name], index).shape[0], 0

        def hashed(start: int, stop: int) -> Tensor:
            nonlocal at
            block = rows(start, stop)
            if start == at:
                digest.update(block)
                at = stop
                if at == length:
                    self._digests[name, index] = digest.digest()
            return block

        return hashed

    def fingerprint(self) -> str:
        """Hash of all weights by name, equal for every format; parts not yet read whole are read now."""
        whole = xxhash.xxh3_128()
        for name, info in sorted(self.tensors.items()):
            parts = []
            for index in indices_of(name, info):
                if (name, index) not in self._digests:
                    self._read(name, index)
                parts.append(self._digests[name, index])
            whole.update(
                f"{name} {list(info.shape)} {dtype_name(info.dtype)} {tensor_hash(parts)}\n".encode()
            )
        return whole.hexdigest()

    def _read(self, name: str, index: Index) -> None:
        rows, cols = matrix_shape(part_info(self.tensors[name], index).shape)
        step = block_rows(cols * self.tensors[name].dtype.itemsize, BLOCK_BYTES)
        read = rows_of(self, name, index)
        for start in range(0, rows, step):
            read(start, min(rows, start + step))


def copy_plan(source: Source) -> list[PlannedTensor]:
    """Every weight as it is."""
    where = (str(source.folder),)

    def rows(name: str) -> Callable[[Index], Rows]:
        return lambda index: rows_of(source, name, index)

    return [
        PlannedTensor(name, info, "copy", where, rows(name), wide=0) for name, info in source.tensors.items()
    ]


def hash_parts(source: Source) -> dict[str, dict[Index, bytes]]:
    """Hash of every part of every weight, found finite; by name and leading indices, in row-major order."""
    digests = _run(copy_plan(source), _Nowhere(), NO_BOUND, None)
    return {
        name: {index: digests[name, index] for index in indices_of(name, info)}
        for name, info in source.tensors.items()
    }


class _Nowhere:
    """A target that keeps nothing."""

    files: Any = None

    def pieces(self, name: str, index: Index) -> list[Any]:
        """No place."""
        return []
