"""Megatron's own legacy checkpoints: the same weights as its torch_dist ones; and it loads what we write."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from legacy_worker import CASES
from torchrun import torchrun

from btx_megatron.checkpoints.megatron_dist import DistCheckpoint
from btx_megatron.checkpoints.megatron_legacy import LegacyCheckpoint
from btx_megatron.checkpoints.names import has_expert_axis, has_layer_axis
from btx_megatron.checkpoints.pieces import TensorInfo, check_cover, read_rows


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("legacy")
    torchrun("legacy_worker.py", 2, folder)  # loads our files into Megatron's models, too
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_megatrons_legacy_files_hold_what_torch_dist_holds(saved: Path, case: str) -> None:
    legacy = LegacyCheckpoint(saved / case / "legacy" / "iter_0000005")
    dist = DistCheckpoint(saved / case / "dist")
    assert legacy.tensors.keys() == dist.tensors.keys()
    for name, info in legacy.tensors.items():
        wanted = dist.read(name)
        assert (info.shape, info.dtype) == (tuple(wanted.shape), wanted.dtype)
        axes = has_layer_axis(name) + has_expert_axis(name)
        part = TensorInfo(info.shape[axes:], info.dtype)
        for index in itertools.product(*map(range, info.shape[:axes])):
            pieces = legacy.pieces(name, index)
            check_cover(pieces, part.shape, name)
            assert torch.equal(read_rows(legacy.files, pieces, part, 0, part.shape[0]), wanted[index]), name
