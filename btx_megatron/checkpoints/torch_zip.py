"""Files of ``torch.save``, read and planned without running what is in them or holding their tensors.

torch saves an object as a zip archive: ``data.pkl``, a pickle in which each tensor is a reference, and one
uncompressed record a storage. Reading gives the object with a ``StoredArray`` (where the bytes lie) in the
place of each tensor; the bytes themselves are read by pieces.py. Writing goes the other way: ``plan_object``
lays out a file whose tensors are still to come.

A pickle can name any function of the interpreter and have it called. Here only the names below stand for
something; classes of torch, numpy and Megatron that carry no weights become inert ``Opaque`` values; any
other name stops the reading.

The records of tensors carry no checksum (zeros in its place, as with torch's ``set_crc32_options(False)``):
``torch.load`` does not look at it, other zip tools complain.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Buffer
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from btx_megatron.errors import UserError

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_STORAGES = {dtype: name for name, dtype in _DTYPES.items()}
_INERT = ("torch", "numpy", "megatron", "transformer_engine")
PATHS = {
    (module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath")
}
"""Of paths, as Python up to 3.12 and Python 3.13 pickle them."""
_HARMLESS = {("signal", "Signals"), *PATHS}  # in saved arguments
_ALIGNMENT = 64  # as torch's own files, so that they can be memory-mapped
_LARGE = 0xFFFFFFFF  # sizes from here on need zip64


@dataclass(frozen=True)
class StoredArray:
    """A tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """In elements."""
    offset: int
    """Byte of its first element in the file."""


@dataclass(frozen=True)
class PlannedArray:
    """A tensor that a file will hold, row-major."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ZipPlan:
    """A file of ``torch.save``, all but its tensors' bytes."""

    length: int
    """Bytes of the whole file."""
    blobs: list[tuple[int, bytes]] = field(default_factory=list)
    """What to write where."""
    offsets: dict[int, int] = field(default_factory=dict)
    """Byte of the first element of each planned array, by the array's ``id``."""


class Opaque:
    """Stands for an object of no interest; keeps nothing and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, item: Any) -> None:
        """Ignored."""


# reading


def read_object(path: Path, start: int = 0, length: int | None = None) -> Any:
    """The object of a torch-saved file, or of ``length`` bytes from ``start`` on in a larger one.

    Raises UserError for a file that is missing, truncated, not a zip archive, or that names what it may not.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END) - start if length is None else length
            return _read_archive(_Slice(file, start, size), start)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); restore it") from None
    except _Forbidden as error:
        raise UserError(f"{path}: {error}; do not use this file") from None
    except Exception as error:  # a damaged archive or pickle may raise anything
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{path}: not a file of torch.save ({reason}); it is damaged, restore it") from None


def _read_archive(file: _Slice, start: int) -> Any:
    with zipfile.ZipFile(file) as archive:
        records = {name.partition("/")[2]: info for name, info in archive.NameToInfo.items()}
        if records.get("byteorder") and archive.read(records["byteorder"]) != b"little":
            raise ValueError("it was written on a big-endian machine")
        pickled = archive.read(records["data.pkl"])
    return _Unpickler(pickled, file, records, start).load()


class _Slice(io.RawIOBase):
    """A range of a file, as a file."""

    def __init__(self, file: io.BufferedReader, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer)
        self._file.seek(self._start + self._at)
        count = self._file.readinto(view[: max(0, self._size - self._at)])
        self._at += count
        return count

    def data_offset(self, info: zipfile.ZipInfo) -> int:
        """Where an uncompressed record's bytes begin, counted from the slice's start."""
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{info.filename} is compressed")
        self.seek(info.header_offset + 26)
        name, extra = struct.unpack("<HH", self.read(4))
        begin = info.header_offset + 30 + int(name) + int(extra)
        if begin + info.file_size > self._size:
            raise ValueError(f"{info.filename} is cut short")
        return begin


class _Forbidden(Exception):
    pass


@dataclass(frozen=True)
class _StoredStorage:
    dtype: torch.dtype
    offset: int
    size: int


class _Unpickler(pickle.Unpickler):
    def __init__(self, pickled: bytes, file: _Slice, records: dict[str, zipfile.ZipInfo], start: int) -> None:
        super().__init__(io.BytesIO(pickled))
        self._file, self._records, self._start = file, records, start

    def persistent_load(self, reference: Any) -> _StoredStorage:
        kind, dtype, key, *_ = reference
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise ValueError(f"a reference to {kind}")
        info = self._records[f"data/{key}"]
        return _StoredStorage(dtype, self._start + self._file.data_offset(info), info.file_size)

    def find_class(self, module: str, name: str) -> Any:
        known = _KNOWN.get((module, name))
        if known is not None:
            return known
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.partition(".")[0] in _INERT or (module, name) in _HARMLESS:
            return type(name, (Opaque,), {})
        raise _Forbidden(f"its pickle names {module}.{name}, which no checkpoint holds")


def _rebuild_tensor(
    storage: _StoredStorage, first: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: Any
) -> StoredArray:
    dtype = next((item for item in rest if isinstance(item, torch.dtype)), storage.dtype)
    last = first + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    empty = 0 in size
    if first < 0 or (not empty and (last + 1) * dtype.itemsize > storage.size):
        raise ValueError("a tensor reaches beyond its storage")
    return StoredArray(dtype, tuple(size), tuple(stride), storage.offset + first * dtype.itemsize)


def _bytes_of_text(text: str, encoding: str) -> bytes:
    return text.encode(encoding)


_KNOWN: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda array, *_: array,
    ("torch.storage", "UntypedStorage"): torch.uint8,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): OrderedDict,
    ("argparse", "Namespace"): SimpleNamespace,
    ("types", "SimpleNamespace"): SimpleNamespace,
    ("builtins", "set"): set,
    ("_codecs", "encode"): _bytes_of_text,
    ("_io", "BytesIO"): Opaque,  # Megatron keeps empty ones, as _extra_state
}


# writing


class _Pickler(pickle.Pickler):
    """Writes planned arrays as torch writes tensors."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.arrays: list[PlannedArray] = []

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, PlannedArray):
            return NotImplemented
        self.arrays.append(value)
        storage = _PlannedStorage(len(self.arrays) - 1, value)
        stride = torch.empty(value.shape, device="meta").stride()
        rebuild = torch._utils._rebuild_tensor_v2  # type: ignore[attr-defined]
        return rebuild, (storage, 0, value.shape, stride, False, OrderedDict())

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _PlannedStorage):
            return None
        storage = getattr(torch, _STORAGES[value.array.dtype])
        return "storage", storage, str(value.number), "cpu", _numel(value.array)


@dataclass(frozen=True)
class _PlannedStorage:
    number: int
    array: PlannedArray


def _numel(array: PlannedArray) -> int:
    return torch.Size(array.shape).numel()


def plan_object(content: Any) -> ZipPlan:
    """Lay out the file that ``torch.load`` reads as ``content``, with a tensor for each PlannedArray."""
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(content)
    blobs: list[tuple[int, bytes]] = []
    offsets: dict[int, int] = {}
    directory: list[bytes] = []
    position = 0

    def record(name: str, size: int, data: bytes | None) -> int:
        nonlocal position
        checksum = zlib.crc32(data) if data is not None else 0
        header = _local_header(name, size, checksum, position)
        directory.append(_directory_entry(name, size, checksum, position))
        begin = position + len(header)
        blobs.append((position, header + (data or b"")))
        position = begin + size
        return begin

    record("archive/data.pkl", buffer.tell(), buffer.getvalue())
    record("archive/byteorder", 6, b"little")
    for number, array in enumerate(pickler.arrays):
        size = _numel(array) * array.dtype.itemsize
        offsets[id(array)] = record(f"archive/data/{number}", size, None)
    record("archive/version", 2, b"3\n")
    entries = b"".join(directory)
    blobs.append((position, entries + _end_of_directory(len(directory), len(entries), position)))
    return ZipPlan(blobs[-1][0] + len(blobs[-1][1]), blobs, offsets)


def _local_header(name: str, size: int, checksum: int, position: int) -> bytes:
    extra = struct.pack("<HHQQ", 1, 16, size, size) if size >= _LARGE else b""
    padding = -(position + 30 + len(name) + len(extra) + 4) % _ALIGNMENT
    extra += struct.pack("<HH", 0x4246, padding) + bytes(padding)  # "FB", torch's own padding field
    short = min(size, _LARGE)
    fields = (b"PK\3\4", 45, 0, 0, 0, 0x21, checksum, short, short, len(name), len(extra))
    return struct.pack("<4s5H3L2H", *fields) + name.encode() + extra


def _directory_entry(name: str, size: int, checksum: int, position: int) -> bytes:
    large = [value for value in (size, size, position) if value >= _LARGE]
    extra = struct.pack(f"<HH{len(large)}Q", 1, 8 * len(large), *large) if large else b""
    short = min(size, _LARGE)
    fields = (b"PK\1\2", 45, 45, 0, 0, 0, 0x21, checksum, short, short, len(name), len(extra), 0, 0, 0, 0)
    return struct.pack("<4s6H3L5HLL", *fields, min(position, _LARGE)) + name.encode() + extra


def _end_of_directory(count: int, size: int, position: int) -> bytes:
    end = b""
    if position >= _LARGE or count >= 0xFFFF:
        fields64 = (b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, position)
        end += struct.pack("<4sQ2H2L4Q", *fields64)
        end += struct.pack("<4sLQL", b"PK\6\7", 0, position + size, 1)
    short = min(count, 0xFFFF)
    return end + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, short, short, size, min(position, _LARGE), 0)
