"""Megatron's torch_dist checkpoints: read and written tensor by tensor, without Megatron and without ranks.

    CKPT/latest_checkpointed_iteration.txt      "100" or "release", written last
    CKPT/iter_0000100/  or  CKPT/release/       .metadata, metadata.json, *.distcp

A tensor is stored as chunks, each a torch-saved block at an offset of a file. ``read`` puts together the
part that is asked for (a layer, an expert) from whatever chunks it lies in, so one never holds more than
that part. The writer appends chunk by chunk and writes the index last.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from btx_megatron.checkpoints.metadata import Box, Chunk, StoredTensor, dtype_name, overlaps, read_index
from btx_megatron.checkpoints.names import has_layer_axis, is_weight, split_layer
from btx_megatron.checkpoints.tracker import find_checkpoint
from btx_megatron.durable import write_durably
from btx_megatron.errors import UserError

_COMMON = "common_state/shard_0_1"


@dataclass(frozen=True)
class TensorInfo:
    """A weight, under its stacked name."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class DistCheckpoint:
    """The weights of one checkpoint. ``path`` is the folder with the tracker, or the tensors' own."""

    def __init__(self, path: Path) -> None:
        self.folder = find_checkpoint(Path(path))
        self._keys: dict[str, dict[int | None, StoredTensor]] = {}
        for key, stored in read_index(self.folder).items():
            if is_weight(key):
                name, layer = split_layer(key)
                self._keys.setdefault(name, {})[layer] = stored
        self.tensors = {name: self._info(name) for name in sorted(self._keys)}

    def _info(self, name: str) -> TensorInfo:
        keys = self._keys[name]
        first = next(iter(keys.values()))
        if set(keys) == {None}:
            return TensorInfo(first.shape, first.dtype)
        if set(keys) != set(range(len(keys))):
            layers = ", ".join("all of them" if layer is None else str(layer) for layer in keys)
            raise UserError(f"{self.folder}: {name} is stored for layers {layers}: neither stacked nor each")
        for layer, stored in keys.items():
            if (stored.shape, stored.dtype) != (first.shape, first.dtype):
                raise UserError(
                    f"{self.folder}: {name} is {list(first.shape)} {dtype_name(first.dtype)} in one layer and"
                    f" {list(stored.shape)} {dtype_name(stored.dtype)} in layer {layer}"
                )
        return TensorInfo((len(keys), *first.shape), first.dtype)

    def read(self, name: str, *index: int) -> Tensor:
        """The weight ``name``, or its part at leading indices (layer, expert).

        Raises UserError for a chunk that is missing, truncated, or not what the index says.
        """
        keys = self._keys[name]
        if None in keys:
            return self._read_part(name, keys[None], index)
        if index:
            return self._read_part(name, keys[index[0]], index[1:])
        return torch.stack([self._read_part(name, keys[layer], ()) for layer in range(len(keys))])

    def _read_part(self, name: str, stored: StoredTensor, index: Box) -> Tensor:
        rest = stored.shape[len(index) :]
        shape, start = (*(1 for _ in index), *rest), (*index, *(0 for _ in rest))
        out = torch.empty(shape, dtype=stored.dtype)
        filled = 0
        for chunk in stored.chunks:
            met = overlaps(chunk.offset, chunk.shape, start, shape)
            if met:
                part = self._load(name, stored.dtype, chunk)[met[0]]
                out[met[1]] = part
                filled += part.numel()
        if filled != out.numel():
            raise UserError(f"{self.folder}: {name}: {filled} of {out.numel()} values are stored")
        return out.view(rest)

    def _load(self, name: str, dtype: torch.dtype, chunk: Chunk) -> Tensor:
        path = self.folder / chunk.file
        try:
            with path.open("rb") as file:
                file.seek(chunk.start)
                block = io.BytesIO(file.read(chunk.length))
            tensor = torch.load(block, weights_only=True, map_location="cpu")
            if (tuple(tensor.shape), tensor.dtype) != (chunk.shape, dtype):
                raise ValueError("another shape or dtype than the index says")
        except FileNotFoundError:
            raise UserError(f"{path}: missing, and {name} lies in it; restore it") from None
        except Exception as error:  # what is left of a damaged block may raise anything
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise UserError(f"{path}: {name} cannot be read ({reason}); the file is damaged") from None
        assert isinstance(tensor, Tensor)
        return tensor

    @property
    def num_layers(self) -> int:
        """Transformer layers."""
        return next(info.shape[0] for name, info in self.tensors.items() if has_layer_axis(name))


class DistWriter:
    """Writes a torch_dist checkpoint chunk by chunk; ``finish`` makes it readable.

    ``folder`` is the one with the tensors and must be new or empty.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._name = "__0_0.distcp"
        self._file = (folder / self._name).open("wb")
        self._tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}

    def add(self, name: str, info: TensorInfo, tensor: Tensor, *index: int) -> None:
        """Append the part of weight ``name`` at leading indices (layer, expert), or all of it.

        Raises ValueError if ``tensor`` is not that part: nothing is reshaped or converted on the way.
        """
        rest = info.shape[len(index) :]
        if (tuple(tensor.shape), tensor.dtype) != (rest, info.dtype):
            raise ValueError(f"{name} {list(index)}: {tensor.shape} {tensor.dtype}, not {rest} {info.dtype}")
        offset = torch.Size((*index, *(0 for _ in rest)))
        sizes = torch.Size((*(1 for _ in index), *rest))
        entry = self._tensors.setdefault(
            name, TensorStorageMetadata(TensorProperties(dtype=info.dtype), torch.Size(info.shape), [])
        )
        assert isinstance(entry, TensorStorageMetadata)
        number = len(entry.chunks)
        entry.chunks.append(ChunkStorageMetadata(offset, sizes))
        block = tensor.detach().reshape(sizes).contiguous().clone()  # its storage and nothing else
        self._places[MetadataIndex(name, offset, number)] = self._append(block)

    def _append(self, content: Any) -> _StorageInfo:
        start = self._file.tell()
        buffer = io.BytesIO()
        torch.save(content, buffer)
        self._file.write(buffer.getbuffer())
        return _StorageInfo(self._name, start, buffer.tell())

    def finish(self, common: dict[str, Any]) -> None:
        """Write what the ranks share (plain values), then the index, to disk.

        Raises ValueError for a weight of which parts were not added.
        """
        for name, entry in self._tensors.items():
            assert isinstance(entry, TensorStorageMetadata)
            if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
                raise ValueError(f"{name}: {len(entry.chunks)} parts do not make {list(entry.size)}")
        self._tensors[_COMMON] = BytesStorageMetadata()
        self._places[MetadataIndex(_COMMON)] = self._append([common])
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        metadata = Metadata(
            self._tensors, planner_data={}, storage_data=self._places, storage_meta=StorageMeta()
        )
        write_durably(self.folder / ".metadata", pickle.dumps(metadata))
        config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        write_durably(self.folder / "metadata.json", json.dumps(config).encode())
