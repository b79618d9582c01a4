"""Megatron's torch_dist checkpoints, as an index of pieces: without Megatron and without ranks.

    CKPT/latest_checkpointed_iteration.txt      "100" or "release", written last
    CKPT/iter_0000100/  or  CKPT/release/       .metadata, metadata.json, *.distcp

A tensor is stored as chunks, each a torch-saved block at an offset of a file; ``.metadata`` says which chunk
is which part of which tensor. Layers lie stacked, or one key each; both are read, stacked is written.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from btx_megatron.checkpoints.metadata import Chunk, StoredTensor, read_index
from btx_megatron.checkpoints.names import DENSE_TO_MOE, LAYERS, ROUTER, is_weight, split_layer
from btx_megatron.checkpoints.pieces import (
    Files,
    Index,
    Piece,
    TensorInfo,
    dtype_name,
    indices_of,
    part_info,
    read_part,
)
from btx_megatron.checkpoints.torch_zip import PlannedArray, StoredArray, ZipPlan, plan_object, read_object
from btx_megatron.checkpoints.tracker import find_checkpoint
from btx_megatron.durable import sync, write_durably
from btx_megatron.errors import UserError

_COMMON = "common_state/shard_0_1"
_NORM = LAYERS + "mlp.linear_fc1.layer_norm_weight"


class DistCheckpoint:
    """The weights of one checkpoint. ``path`` is the folder with the tracker, or the tensors' own."""

    def __init__(self, path: Path) -> None:
        self.folder = find_checkpoint(Path(path))
        self.files = Files(self.folder)
        index = read_index(self.folder)
        self._objects = index.objects
        self._keys: dict[str, dict[int | None, StoredTensor]] = {}
        for key, stored in index.tensors.items():
            if is_weight(key):
                name, layer = split_layer(key)
                self._keys.setdefault(name, {})[layer] = stored
        # Megatron's local layers save a mixture's norm under the dense name
        if ROUTER in self._keys and _NORM in self._keys and DENSE_TO_MOE[_NORM] not in self._keys:
            self._keys[DENSE_TO_MOE[_NORM]] = self._keys.pop(_NORM)
        self.tensors = {name: self._info(name) for name in sorted(self._keys)}
        self._blocks: dict[tuple[str, int], StoredArray] = {}

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

    def pieces(self, name: str, index: Index) -> list[Piece]:
        """Where the part of ``name`` at leading indices (layer, expert) lies.

        Raises UserError for a chunk that is missing, damaged, or not what the index says.
        """
        keys = self._keys[name]
        stored, rest = (keys[None], index) if None in keys else (keys[index[0]], index[1:])
        return [piece for chunk in stored.chunks for piece in self._pieces_in(name, stored, chunk, rest)]

    def _pieces_in(self, name: str, stored: StoredTensor, chunk: Chunk, index: Index) -> Iterable[Piece]:
        ranges = zip(index, chunk.offset, chunk.shape, strict=False)
        if any(not first <= at < first + length for at, first, length in ranges):
            return
        block = self._block(name, stored, chunk)
        leading = zip(index, chunk.offset, block.stride, strict=False)
        skipped = sum((at - first) * step for at, first, step in leading)
        shape, offset = chunk.shape[len(index) :], chunk.offset[len(index) :]
        stride = block.stride[len(index) :]
        if len(shape) not in (1, 2):
            raise UserError(
                f"{self.folder}: {name} is no matrix and no vector: no weight of a Llama or Mixtral"
            )
        rows, cols = shape if len(shape) == 2 else (*shape, 1)
        row, col = offset if len(offset) == 2 else (*offset, 0)
        step = stride[0] if rows > 1 else cols
        if cols > 1 and stride[-1] != 1:
            raise UserError(f"{self.folder / chunk.file}: {name} is not stored row by row; save it again")
        begin = block.offset + skipped * stored.dtype.itemsize
        yield Piece(chunk.file, begin, rows, cols, row, col, None if step == cols else step)

    def _block(self, name: str, stored: StoredTensor, chunk: Chunk) -> StoredArray:
        """The torch-saved block of a chunk, found once."""
        key = (chunk.file, chunk.start)
        if key not in self._blocks:
            path = self.folder / chunk.file
            if not path.exists():
                raise UserError(f"{path}: missing, and {name} lies in it; restore it")
            block = read_object(path, chunk.start, chunk.length)
            if not isinstance(block, StoredArray) or (block.shape, block.dtype) != (
                chunk.shape,
                stored.dtype,
            ):
                raise UserError(f"{path}: {name} has another shape or dtype than the index says; restore it")
            self._blocks[key] = block
        return self._blocks[key]

    def read(self, name: str, *index: int) -> Tensor:
        """The weight ``name``, or what lies at leading indices (layer, expert)."""
        shape = self.tensors[name].shape[len(index) :]
        wanted = [whole for whole in indices_of(name, self.tensors[name]) if whole[: len(index)] == index]
        return torch.stack([read_part(self, name, whole) for whole in wanted]).reshape(shape)

    @cached_property
    def common(self) -> dict[str, Any]:
        """Plain values beside the tensors: ``recipe`` (ours), ``args`` (Megatron-LM's), ``iteration``, ..."""
        if (self.folder / "common.pt").exists():  # the older form
            return dict(read_object(self.folder / "common.pt"))
        if _COMMON not in self._objects:
            return {}
        place = self._objects[_COMMON]
        values = read_object(self.folder / place.file, place.start, place.length)
        return dict(values[0] if isinstance(values, list) else values)


class DistLayout:
    """A torch_dist checkpoint to be, laid out and preallocated in ``folder``, which must be new or empty.

    One chunk a part. ``rank_of(name, index)`` says which file a part goes to, ``__RANK_0.distcp``.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, TensorInfo],
        rank_of: Callable[[str, Index], int] = lambda name, index: 0,
    ) -> None:
        self.folder, self.tensors = folder, dict(tensors)
        folder.mkdir(parents=True, exist_ok=True)
        self.files = Files(folder, os.O_RDWR | os.O_CREAT)
        self._plans: dict[tuple[torch.dtype, tuple[int, ...]], tuple[ZipPlan, int]] = {}
        self._places: dict[tuple[str, Index], tuple[str, int, int]] = {}
        self._ends: dict[str, int] = {"__0_0.distcp": 0}
        headers: list[tuple[str, int, bytes]] = []
        for name, info in self.tensors.items():
            for index in indices_of(name, info):
                plan, _ = self._plan(name, index)
                file = f"__{rank_of(name, index)}_0.distcp"
                start = self._ends.get(file, 0)
                self._places[name, index] = (file, start, plan.length)
                self._ends[file] = start + plan.length
                headers += [(file, start + at, blob) for at, blob in plan.blobs]
        for file, length in self._ends.items():
            self.files.preallocate(file, length)
        for file, at, blob in headers:
            self.files.write(file, at, blob)

    def _plan(self, name: str, index: Index) -> tuple[ZipPlan, int]:
        """The torch-saved block of a part, and where in it its values begin."""
        info = self.tensors[name]
        key = (info.dtype, (*(1 for _ in index), *info.shape[len(index) :]))
        if key not in self._plans:
            array = PlannedArray(*key)
            plan = plan_object(array)
            self._plans[key] = (plan, plan.offsets[id(array)])
        return self._plans[key]

    def pieces(self, name: str, index: Index) -> list[Piece]:
        """Where to write the part of ``name`` at leading indices (layer, expert)."""
        file, start, _ = self._places[name, index]
        info = part_info(self.tensors[name], index)
        rows, cols = info.shape if len(info.shape) == 2 else (*info.shape, 1)
        return [Piece(file, start + self._plan(name, index)[1], rows, cols)]

    def finish(self, common: dict[str, Any]) -> None:
        """Write the plain values that lie beside the tensors, bring all to disk, and the index last."""
        buffer = io.BytesIO()
        torch.save([common], buffer)
        file, start = "__0_0.distcp", self._ends["__0_0.distcp"]
        self.files.write(file, start, buffer.getvalue())
        self.files.sync()
        self.files.close()
        index = self._index((file, start, buffer.tell()))
        write_durably(self.folder / ".metadata", index)
        config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        write_durably(self.folder / "metadata.json", json.dumps(config))
        sync(self.folder)

    def _index(self, common: tuple[str, int, int]) -> bytes:
        from torch.distributed.checkpoint import metadata as dcp
        from torch.distributed.checkpoint.filesystem import _StorageInfo

        entries: dict[str, Any] = {_COMMON: dcp.BytesStorageMetadata()}
        places: dict[Any, Any] = {dcp.MetadataIndex(_COMMON): _StorageInfo(*common)}
        for name, info in self.tensors.items():
            chunks = []
            for number, index in enumerate(indices_of(name, info)):
                rest = info.shape[len(index) :]
                offset = torch.Size((*index, *(0 for _ in rest)))
                chunks.append(dcp.ChunkStorageMetadata(offset, torch.Size((*(1 for _ in index), *rest))))
                places[dcp.MetadataIndex(name, offset, number)] = _StorageInfo(*self._places[name, index])
            properties = dcp.TensorProperties(dtype=info.dtype)
            entries[name] = dcp.TensorStorageMetadata(properties, torch.Size(info.shape), chunks)
        content = dcp.Metadata(entries, planner_data={}, storage_data=places, storage_meta=dcp.StorageMeta())
        return pickle.dumps(content)
