"""The index of a torch_dist checkpoint: ``.metadata``, a pickle, read without running what is in it.

torch reads that file with a plain ``pickle.load``, so a checkpoint from a stranger could run any code.
Here only the handful of classes that the format is made of may be named; anything else stops the load.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

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


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint index holds")
        return super().find_class(module, name)


def read_metadata(folder: Path) -> Metadata:
    """The index of the checkpoint in ``folder``. Raises UserError if it is missing, broken or hostile."""
    path = folder / ".metadata"
    try:
        metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
    except FileNotFoundError:
        raise UserError(f"{folder}: no torch_dist checkpoint there (no .metadata)") from None
    except Exception as error:  # a damaged pickle may raise anything
        raise UserError(f"{path}: not a checkpoint index: {error}; restore the file") from None
    if not isinstance(metadata, Metadata):
        raise UserError(f"{path}: not a checkpoint index but a {type(metadata).__name__}; restore the file")
    return metadata


def overlaps(
    chunk_offset: tuple[int, ...],
    chunk_shape: tuple[int, ...],
    start: tuple[int, ...],
    shape: tuple[int, ...],
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where a stored chunk meets a wanted box: slices into the chunk, and into the box; None if nowhere.

    All four have the rank of the whole tensor; offsets and starts count from its origin.
    """
    in_chunk, in_box = [], []
    for offset, length, begin, extent in zip(chunk_offset, chunk_shape, start, shape, strict=True):
        low, high = max(offset, begin), min(offset + length, begin + extent)
        if low >= high:
            return None
        in_chunk.append(slice(low - offset, high - offset))
        in_box.append(slice(low - begin, high - begin))
    return tuple(in_chunk), tuple(in_box)


def chunks_of(metadata: Metadata, key: str) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], Any]]:
    """Offset, shape and storage place of each stored chunk of a tensor."""
    from torch.distributed.checkpoint.metadata import MetadataIndex

    for chunk in metadata.state_dict_metadata[key].chunks:  # type: ignore[union-attr]
        place = metadata.storage_data.get(MetadataIndex(key, chunk.offsets))  # type: ignore[union-attr]
        if place is None:
            raise UserError(f"the checkpoint's index names no file for {key} at {tuple(chunk.offsets)}")
        yield tuple(chunk.offsets), tuple(chunk.sizes), place


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
