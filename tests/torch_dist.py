"""A torch_dist folder by torch's own writer, for tests to read."""

from __future__ import annotations

from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor


def save_torch_dist(folder: Path, state: dict[str, Tensor]) -> Path:
    """``state`` as a checkpoint, without a process group."""
    dcp.save(dict(state), storage_writer=dcp.FileSystemWriter(folder, sync_files=False), no_dist=True)
    return folder
