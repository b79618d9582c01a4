"""Transformer Engine's build beside the local one, as far as that goes without a GPU (see the worker)."""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import Any

import pytest
from torchrun import torchrun

pytestmark = pytest.mark.skipif(
    find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
)


@pytest.fixture(scope="module", params=[1, 2])
def result(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp(f"te{request.param}")
    torchrun("transformer_engine_worker.py", request.param, folder)
    told: dict[str, Any] = json.loads((folder / f"result{request.param}.json").read_text())
    return told


def test_each_build_takes_the_others_weights(result: dict[str, Any]) -> None:
    for case, told in result.items():
        if case != "fp8":
            assert told["different"] == 0, case
            assert told["same_names"], case
            assert told["weights"] > 10, case
            wanted = {"None": None, "grouped": "TEGroupedMLP", "sequential": "SequentialMLP"}
            _, experts, kind = case.split()
            assert told["experts"] == wanted["None" if experts == "None" else kind], case


def test_fp8_reaches_megatron(result: dict[str, Any]) -> None:
    kinds = ("delayed", "tensorwise", "blockwise")
    wanted = {"none": [None, "delayed", False]} | {kind: ["hybrid", kind, True] for kind in kinds}
    assert result["fp8"] == wanted
