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

from btx_megatron.checkpoints.metadata import chunks_of, overlaps, read_metadata
from btx_megatron.checkpoints.names import has_layer_axis, is_weight, split_layer
from btx_megatron.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
_COMMON = "common_state/shard_0_1"


@dataclass(frozen=True)
class TensorInfo:
    """A weight, under its stacked name."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def find_checkpoint(path: Path) -> Path:
    """The folder with the tensors: ``path`` itself, or the one that its tracker names."""
    if (path / ".metadata").exists():
        return path
    if (path / "checkpoints" / TRACKER).exists():  # a stage of a run
        path = path / "checkpoints"
    tracker = path / TRACKER
    if not tracker.exists():
        raise UserError(f"{path}: no Megatron checkpoint there (neither .metadata nor {TRACKER})")
    name = tracker.read_text().strip()
    if name != RELEASE and not name.isdigit():
        raise UserError(f"{tracker}: holds {name[:40]!r}, not a step or 'release'; correct it")
    folder = path / (RELEASE if name == RELEASE else f"iter_{int(name):07d}")
    if not folder.is_dir():
        raise UserError(f"{tracker}: names {folder.name}, which is not there; correct the tracker")
    return folder


class DistCheckpoint:
    """The weights of one checkpoint. ``path`` is the folder with the tracker, or the tensors' own."""

    def __init__(self, path: Path) -> None:
        self.folder = find_checkpoint(Path(path))
        self._metadata = read_metadata(self.folder)
        self._keys: dict[str, dict[int | None, str]] = {}
        for key, entry in self._metadata.state_dict_metadata.items():
            if is_weight(key) and isinstance(entry, TensorStorageMetadata):
                name, layer = split_layer(key)
                self._keys.setdefault(name, {})[layer] = key
        self.tensors = {name: self._info(name) for name in sorted(self._keys)}

    def _info(self, name: str) -> TensorInfo:
        keys = self._keys[name]
        first = self._metadata.state_dict_metadata[next(iter(keys.values()))]
        assert isinstance(first, TensorStorageMetadata)
        shape = tuple(first.size)
        if None not in keys:
            if sorted(keys) != list(range(len(keys))):  # type: ignore[type-var]
                raise UserError(f"{self.folder}: {name} has layers {sorted(keys)}, not 0 to {len(keys) - 1}")  # type: ignore[type-var]
            shape = (len(keys), *shape)
        return TensorInfo(shape, first.properties.dtype)

    def read(self, name: str, *index: int) -> Tensor:
        """The weight ``name``, or its part at leading indices (layer, expert).

        Raises UserError for a chunk that is missing, truncated or not a tensor.
        """
        keys = self._keys[name]
        if None in keys:
            return self._read_key(keys[None], index)
        if index:
            return self._read_key(keys[index[0]], index[1:])
        return torch.stack([self._read_key(keys[layer], ()) for layer in range(len(keys))])

    def _read_key(self, key: str, index: tuple[int, ...]) -> Tensor:
        entry = self._metadata.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)
        shape = (*(1 for _ in index), *entry.size[len(index) :])
        start = (*index, *(0 for _ in entry.size[len(index) :]))
        out = torch.empty(shape, dtype=entry.properties.dtype)
        filled = 0
        for offset, size, place in chunks_of(self._metadata, key):
            met = overlaps(offset, size, start, shape)
            if met:
                part = self._load(key, place)[met[0]]
                out[met[1]] = part
                filled += part.numel()
        if filled != out.numel():
            raise UserError(f"{self.folder}: {key}: {filled} of {out.numel()} values are stored")
        return out.view(shape[len(index) :])

    def _load(self, key: str, place: Any) -> Tensor:
        path = self.folder / Path(place.relative_path).name  # never outside the checkpoint
        try:
            with path.open("rb") as file:
                file.seek(place.offset)
                block = io.BytesIO(file.read(place.length))
            tensor = torch.load(block, weights_only=True, map_location="cpu")
        except FileNotFoundError:
            raise UserError(f"{path}: missing, and {key} lies in it; restore it") from None
        except Exception as error:
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise UserError(f"{path}: {key} cannot be read ({reason}); the file is damaged") from None
        if not isinstance(tensor, Tensor):
            raise UserError(f"{path}: {key} is no tensor; the file is damaged")
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
        """Append the part of weight ``name`` at leading indices (layer, expert), or all of it."""
        offset = torch.Size((*index, *(0 for _ in info.shape[len(index) :])))
        sizes = torch.Size((*(1 for _ in index), *info.shape[len(index) :]))
        entry = self._tensors.setdefault(
            name, TensorStorageMetadata(TensorProperties(dtype=info.dtype), torch.Size(info.shape), [])
        )
        assert isinstance(entry, TensorStorageMetadata)
        number = len(entry.chunks)
        entry.chunks.append(ChunkStorageMetadata(offset, sizes))
        block = tensor.reshape(sizes).to(info.dtype).contiguous().clone()  # its storage and nothing else
        self._places[MetadataIndex(name, offset, number)] = self._append(block)

    def _append(self, content: Any) -> _StorageInfo:
        start = self._file.tell()
        buffer = io.BytesIO()
        torch.save(content, buffer)
        self._file.write(buffer.getbuffer())
        return _StorageInfo(self._name, start, buffer.tell())

    def finish(self, common: dict[str, Any]) -> None:
        """Write what the ranks share (plain values), then the index, to disk."""
        self._tensors[_COMMON] = BytesStorageMetadata()
        self._places[MetadataIndex(_COMMON)] = self._append([common])
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        metadata = Metadata(
            self._tensors, planner_data={}, storage_data=self._places, storage_meta=StorageMeta()
        )
        _write_durably(self.folder / ".metadata", pickle.dumps(metadata))
        config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        _write_durably(self.folder / "metadata.json", json.dumps(config).encode())


def write_tracker(folder: Path, name: str) -> None:
    """Say which checkpoint of ``folder`` is the latest; last of all."""
    _write_durably(folder / TRACKER, name.encode())


def _write_durably(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
