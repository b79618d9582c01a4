"""One hash a tensor, the same however it is cut on disk (see ``checkpoints.stream.tensor_hash``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from btx_megatron.checkpoints.formats import open_checkpoint
from btx_megatron.checkpoints.pieces import dtype_name
from btx_megatron.checkpoints.stream import hash_parts, tensor_hash


def hash_tensors(path: Path) -> dict[str, dict[str, Any]]:
    """Shape, dtype and hash of every weight of a checkpoint of any format. Raises UserError if not finite."""
    source = open_checkpoint(path)
    digests = hash_parts(source)
    return {
        name: {
            "shape": list(info.shape),
            "dtype": dtype_name(info.dtype),
            "xxh3_128": tensor_hash(digests[name].values()),
        }
        for name, info in source.tensors.items()
    }
