"""Experts' parameters averaged inside the evaluation: against torch, against the mix, under every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from average_worker import LAYOUTS, WEIGHTS
from torchrun import torchrun

from btx_megatron.checkpoints.formats import open_checkpoint
from btx_megatron.checkpoints.pieces import indices_of, read_part

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("average")
    for world in LAYOUTS:
        torchrun("average_worker.py", world, path)
    return path


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    return {
        name: told
        for world in LAYOUTS
        for name, told in json.loads((folder / f"average-{world}.json").read_text()).items()
    }


def test_the_mixs_average_is_torchs(folder: Path) -> None:
    """What the average in the model is held against."""
    sources = {name: open_checkpoint(folder / name) for name, weight in WEIGHTS.items() if weight}
    mixed = open_checkpoint(folder / "mixed")
    for name, info in mixed.tensors.items():
        for index in indices_of(name, info):
            terms = [
                WEIGHTS[key] * read_part(source, name, index).double() for key, source in sources.items()
            ]
            torch.testing.assert_close(
                read_part(mixed, name, index).double(), torch.stack(terms).sum(0), rtol=1e-6, atol=1e-7
            )


@pytest.mark.parametrize("name", [name for layouts in LAYOUTS.values() for name in layouts])
def test_the_average_in_the_model(result: dict[str, Any], name: str) -> None:
    here = result[name]
    assert here["away"] < 1e-6
    assert here["loss"] == pytest.approx(result["1"]["loss"], abs=1e-5)
    assert here["mean"] == pytest.approx(here["loss"], abs=1e-6)  # so a row is the mean of its token losses
