"""``btx verify``: read a checkpoint again, whole, and hold it against what its manifest says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from btx_megatron.checkpoints.megatron_dist import DistCheckpoint
from btx_megatron.checkpoints.metadata import dtype_name
from btx_megatron.checkpoints.names import has_expert_axis
from btx_megatron.checkpoints.tracker import TRACKER, find_checkpoint
from btx_megatron.errors import UserError
from btx_megatron.manifest import read_manifest
from btx_megatron.mixing.hashes import TensorHash, parts_of


def verify(path: Path) -> dict[str, Any]:
    """Check every weight: finite, experts distinct, and (where a manifest lies above) shape and hash.

    Returns how much was checked. Raises UserError that names the first tensor that fails.
    """
    checkpoint = DistCheckpoint(path)
    expected = _manifest_tensors(checkpoint.folder)
    if expected is not None and set(expected) != set(checkpoint.tensors):
        name = min(set(expected) ^ set(checkpoint.tensors))
        where = "in the manifest alone" if name in expected else "not in the manifest"
        raise UserError(f"{checkpoint.folder}: {name} is {where}")
    values = 0
    for name, info in checkpoint.tensors.items():
        digest = _check_values(checkpoint, name)
        found = {"shape": list(info.shape), "dtype": dtype_name(info.dtype), "xxh3_128": digest}
        if expected is not None:
            _compare(checkpoint.folder, name, found, expected[name])
        values += torch.Size(info.shape).numel()
    return {
        "checkpoint": str(checkpoint.folder),
        "tensors": len(checkpoint.tensors),
        "values": values,
        "hashes": "equal to the manifest's" if expected is not None else "no manifest to compare with",
    }


def _check_values(checkpoint: DistCheckpoint, name: str) -> str:
    digest = TensorHash()
    seen: dict[str, tuple[int, ...]] = {}
    for index, part in parts_of(checkpoint, name):
        if not torch.isfinite(part).all():
            raise UserError(f"{checkpoint.folder}: {name} {list(index)} holds NaN or infinite values")
        if has_expert_axis(name):
            _check_distinct(checkpoint.folder, name, index, part, seen)
        digest.update(part)
    return digest.hexdigest()


def _check_distinct(
    folder: Path, name: str, index: tuple[int, ...], part: Tensor, seen: dict[str, tuple[int, ...]]
) -> None:
    one = TensorHash()
    one.update(part)
    other = seen.setdefault(one.hexdigest(), index)
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
    for above in (folder, *folder.parents[:2]):
        if manifest := read_manifest(above):
            return manifest.outputs.get("tensors")
    return None
