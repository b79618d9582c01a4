"""The formulas for memory against what runs keep: each part, a step's peak, and checkpoints on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from memory_worker import CASES, PRECISIONS, SAVED, setup_of_case
from torchrun import torchrun

from btx_megatron.estimate_memory import checkpoint_bytes, fullest_rank, rank_memory

pytestmark = pytest.mark.timeout(600)  # half a minute on free cores

RUNS = [
    (world, name, bf16)
    for world, cases in CASES.items()
    for name in cases
    for bf16 in PRECISIONS.get(name.split()[0], (False,))
]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("memory")
    for world in CASES:
        torchrun("memory_worker.py", world, folder)
    return {world: json.loads((folder / f"memory-{world}.json").read_text()) for world in CASES}


@pytest.mark.parametrize(("world", "name", "bf16"), RUNS)
def test_formulas_against_the_count(
    result: dict[int, dict[str, Any]], world: int, name: str, bf16: bool
) -> None:
    setup = setup_of_case(name, CASES[world][name], bf16)
    experts_elsewhere = setup.layout.expert_model_parallel_size > 1  # even routes are assumed there
    for rank, measured in enumerate(result[world][f"{name}, {'bf16' if bf16 else 'fp32'}"]):
        place = rank if setup.layout.pipeline_model_parallel_size > 1 else 0
        computed = rank_memory(setup, place)
        for part in ("weights", "gradients", "optimizer"):
            assert getattr(computed, part) == pytest.approx(measured[part], rel=0.01), part
        error = 0.1 if experts_elsewhere else 0.03
        assert computed.activations == pytest.approx(measured["activations"], rel=error)
        together = setup.layout.tensor_model_parallel_size * setup.layout.context_parallel_size
        if together == 1 and not experts_elsewhere:
            # gloo's copies are beside; a GPU's collectives have buffers of another size
            step = computed.activations + computed.working
            assert step == pytest.approx(measured["step"], rel=0.1)
        assert fullest_rank(setup).total >= computed.total


@pytest.mark.parametrize(("world", "name"), [(world, name) for world in SAVED for name in SAVED[world]])
@pytest.mark.parametrize("bf16", [False, True])
def test_checkpoints_on_disk(result: dict[int, dict[str, Any]], world: int, name: str, bf16: bool) -> None:
    measured = result[world]["checkpoints"][f"{name}, {'bf16' if bf16 else 'fp32'}"]
    _, computed = checkpoint_bytes(setup_of_case(name, CASES[world][name], bf16))
    assert computed == pytest.approx(measured, abs=800_000)  # of 9 to 40 million; the rest is metadata
