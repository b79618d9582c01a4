"""One hash a tensor, of its values in row-major order: the same however the tensor is cut on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from btx_megatron.checkpoints.megatron_dist import DistCheckpoint
from btx_megatron.checkpoints.metadata import dtype_name
from btx_megatron.checkpoints.names import has_expert_axis, has_layer_axis


class TensorHash:
    """XXH3 (128 bits) over parts that are fed in row-major order."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()

    def update(self, part: Tensor) -> None:
        """Feed the next part."""
        self._hash.update(part.contiguous().reshape(-1).view(torch.uint8).numpy())

    def hexdigest(self) -> str:
        """The hash so far."""
        return self._hash.hexdigest()


def parts_of(checkpoint: DistCheckpoint, name: str) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """A weight in row-major parts: layer by layer and, in a MoE, expert by expert."""
    shape = checkpoint.tensors[name].shape
    if has_expert_axis(name):
        for layer in range(shape[0]):
            for expert in range(shape[1]):
                yield (layer, expert), checkpoint.read(name, layer, expert)
    elif has_layer_axis(name):
        for layer in range(shape[0]):
            yield (layer,), checkpoint.read(name, layer)
    else:
        yield (), checkpoint.read(name)


def hash_tensors(path: Path) -> dict[str, dict[str, Any]]:
    """Shape, dtype and hash of every weight of a checkpoint."""
    checkpoint = DistCheckpoint(path)
    table = {}
    for name, info in checkpoint.tensors.items():
        digest = TensorHash()
        for _, part in parts_of(checkpoint, name):
            digest.update(part)
        shape, dtype = list(info.shape), dtype_name(info.dtype)
        table[name] = {"shape": shape, "dtype": dtype, "xxh3_128": digest.hexdigest()}
    return table
