"""The index of a torch_dist checkpoint: ``.metadata``, a pickle, read without running what is in it.

torch reads that file with a plain ``pickle.load``, so a checkpoint from a stranger could run any code.
Here only the handful of classes that the format is made of may be named; anything else stops the load.
What is read becomes plain values, each one checked, so that a damaged index is found here and not later,
as an odd error in the middle of a tensor.
"""

from __future__ import annotations

import io
import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from btx_megatron.checkpoints.torch_zip import PATHS
from btx_megatron.errors import UserError

_DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
_INTEGERS = ("int64", "int32", "int16", "int8", "uint8", "bool")
_ALLOWED = {
    *(("torch", name) for name in (*_DTYPES, *_INTEGERS)),
    *(("torch", name) for name in ("Size", "strided", "contiguous_format", "preserve_format")),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "TensorProperties",
            "ChunkStorageMetadata",
            "BytesStorageMetadata",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}

Box = tuple[int, ...]


@dataclass(frozen=True)
class Chunk:
    """A stored part of a tensor and where its bytes lie."""

    offset: Box
    """Its first element, counted from the tensor's origin."""
    shape: Box
    file: str
    """Name of a file in the checkpoint's folder."""
    start: int
    """First byte in that file."""
    length: int
    """Bytes."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the checkpoint, under the key that it has there."""

    shape: Box
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]
    """Together they hold as many values as the tensor has."""


@dataclass(frozen=True)
class StoredObject:
    """A torch-saved object that is no tensor."""

    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Index:
    """What ``.metadata`` says."""

    tensors: dict[str, StoredTensor]
    objects: dict[str, StoredObject]


def _path(*parts: str) -> str:
    """torch keeps the folder that a checkpoint was saved to; of no use where it lies now."""
    return "/".join(parts)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in PATHS:
            return _path
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint index holds")
        return super().find_class(module, name)


def read_index(folder: Path) -> Index:
    """The index of the checkpoint in ``folder``.

    Raises UserError if it is missing, broken or hostile, or leaves values of a tensor out.
    """
    path = folder / ".metadata"
    try:
        metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
        if not isinstance(metadata, Metadata):
            raise TypeError(f"it is a {type(metadata).__name__}")
        entries = {str(key): entry for key, entry in metadata.state_dict_metadata.items()}
        tensors = {
            key: _stored_tensor(metadata, key, entry)
            for key, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        return Index(tensors, {key: _stored_object(metadata, key) for key in set(entries) - set(tensors)})
    except FileNotFoundError:
        raise UserError(f"{folder}: no torch_dist checkpoint there (no .metadata)") from None
    except Exception as error:  # a damaged pickle may raise anything
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"{path}: not a checkpoint index: {reason}; restore the file") from None


def _stored_object(metadata: Metadata, key: str) -> StoredObject:
    place = metadata.storage_data.get(MetadataIndex(key))
    if place is None:
        raise ValueError(f"no file is named for {key}")
    start, length = _box((place.offset, place.length))
    return StoredObject(Path(place.relative_path).name, start, length)


def _stored_tensor(metadata: Metadata, key: str, entry: TensorStorageMetadata) -> StoredTensor:
    shape, dtype = _box(entry.size), entry.properties.dtype
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{key} has no dtype")
    chunks = tuple(_chunk(metadata, key, shape, chunk) for chunk in entry.chunks)
    stored = sum(math.prod(chunk.shape) for chunk in chunks)
    if stored != math.prod(shape):
        raise ValueError(f"{key}: {stored} of {math.prod(shape)} values are stored")
    return StoredTensor(shape, dtype, chunks)


def _chunk(metadata: Metadata, key: str, whole: Box, chunk: ChunkStorageMetadata) -> Chunk:
    offset, shape = _box(chunk.offsets), _box(chunk.sizes)
    ends = (first + length for first, length in zip(offset, shape, strict=True))
    if any(end > length for end, length in zip(ends, whole, strict=True)):
        raise ValueError(f"{key}: the chunk at {list(offset)} sticks out of {list(whole)}")
    place = metadata.storage_data.get(MetadataIndex(key, chunk.offsets))
    if place is None:
        raise ValueError(f"no file is named for {key} at {list(offset)}")
    name = Path(place.relative_path).name  # never outside the checkpoint
    start, length = _box((place.offset, place.length))
    return Chunk(offset, shape, name, start, length)


def _box(numbers: Any) -> Box:
    box = tuple(numbers)
    if not all(isinstance(number, int) and number >= 0 for number in box):
        raise ValueError(f"{box} are not sizes")
    return box
