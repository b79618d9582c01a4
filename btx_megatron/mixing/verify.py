"""``btx verify``: read a checkpoint again, whole, and hold it against what its manifest says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from btx_megatron.checkpoints.formats import open_checkpoint
from btx_megatron.checkpoints.names import has_expert_axis
from btx_megatron.checkpoints.pieces import Index, dtype_name
from btx_megatron.checkpoints.stream import hash_parts, tensor_hash
from btx_megatron.checkpoints.tracker import TRACKER, find_checkpoint
from btx_megatron.checkpoints.weights_manifest import manifest_of_weights
from btx_megatron.errors import UserError

_COPIES = re.compile(r"copy|copies|virtual")


def verify(path: Path) -> dict[str, Any]:
    """Check every weight: finite, experts distinct, and (where there is a manifest) shape and hash.

    Experts may be alike where the manifest says that they are copies, or were copied as they were. Returns
    how much was checked. Raises UserError that names the first tensor that fails.
    """
    source = open_checkpoint(path)
    expected = _manifest_tensors(source.folder)
    if expected is not None and set(expected) != set(source.tensors):
        name = min(set(expected) ^ set(source.tensors))
        where = "in the manifest alone" if name in expected else "not in the manifest"
        raise UserError(f"{source.folder}: {name} is {where}")
    digests = hash_parts(source)
    values = 0
    for name, info in source.tensors.items():
        parts = digests[name]
        found = {
            "shape": list(info.shape),
            "dtype": dtype_name(info.dtype),
            "xxh3_128": tensor_hash(parts.values()),
        }
        if expected is not None:
            _compare(source.folder, name, found, expected[name])
        copies = expected is not None and _COPIES.search(expected[name].get("rule", "")) is not None
        if has_expert_axis(name) and not copies:
            _check_distinct(source.folder, name, parts)
        values += torch.Size(info.shape).numel()
    return {
        "checkpoint": str(source.folder),
        "tensors": len(source.tensors),
        "values": values,
        "hashes": "equal to the manifest's" if expected is not None else "no manifest to compare with",
    }


def _check_distinct(folder: Path, name: str, parts: dict[Index, bytes]) -> None:
    seen: dict[bytes, Index] = {}
    for index, digest in parts.items():
        other = seen.setdefault(digest, index)
        if other != index:
            raise UserError(
                f"{folder}: {name}: [layer, expert] {list(index)} and {list(other)} are the same values"
            )


def _compare(folder: Path, name: str, found: dict[str, Any], expected: dict[str, Any]) -> None:
    for key, value in found.items():
        if expected.get(key) != value:
            raise UserError(f"{folder}: {name}: {key} is {value}, the manifest says {expected.get(key)}")


def _manifest_tensors(folder: Path) -> dict[str, Any] | None:
    """The table of tensors in the manifest of the stage that the checkpoint belongs to, if there is one.

    It speaks of the stage's last checkpoint alone, the one that the tracker names.
    """
    tracked = (folder.parent / TRACKER).exists()
    if tracked and find_checkpoint(folder.parent) != folder:
        return None
    manifest = manifest_of_weights(folder)
    return manifest.outputs.get("tensors") if manifest is not None else None
