"""Every router and every balancing loss under one process, EP2 and TP2+SP: the same losses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from layout_worker import EXPERTS, MODEL, TRAINING
from router_worker import LAYOUTS, MOES, STEPS
from torchrun import torchrun

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("routers")
    told: dict[str, Any] = {}
    for world in (1, 2):
        torchrun("router_worker.py", world, folder)
        told |= json.loads((folder / f"routers-{world}.json").read_text())
    return told


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", MOES)
def test_losses_are_those_of_one_process(result: dict[str, Any], kind: str, layout: str) -> None:
    if (kind, layout) == ("global", "EP2"):
        pytest.skip("Megatron's u is a running mean over micro-batches, and with DP there are fewer of them")
    reference, here = result[f"{kind} 1 process"], result[f"{kind} {layout}"]
    assert len(here["loss"]) == STEPS
    assert here["loss"] == pytest.approx(reference["loss"], abs=1e-5)
    assert here["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-4)
    assert here["balancing"] == pytest.approx(reference["balancing"], rel=1e-4)


def test_the_kinds_differ(result: dict[str, Any]) -> None:
    ends = {kind: result[f"{kind} 1 process"]["loss"][-1] for kind in MOES}
    assert len({round(loss, 6) for loss in ends.values()}) == len(MOES)


@pytest.mark.parametrize("name", ["recomputed full", "recomputed PP2"])
def test_recomputed_layers_sample_the_same_experts(result: dict[str, Any], name: str) -> None:
    """In a pipeline later micro-batches have begun by then."""
    kept = result["recomputed kept"]
    if name == "recomputed full":
        assert result[name] == kept
    assert result[name]["loss"] == pytest.approx(kept["loss"], abs=1e-5)
    assert result[name]["grad_norm"] == pytest.approx(kept["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("kind", ["sample", "adaptive"])
def test_resume_is_bit_for_bit(result: dict[str, Any], kind: str) -> None:
    case = result["resumes"][kind]
    assert case["resumed"] == case["whole"]


def test_what_has_no_room_is_dropped_and_counted(result: dict[str, Any]) -> None:
    tokens = TRAINING.global_batch_size * MODEL.seq_length
    room = math.ceil(TRAINING.micro_batch_size * MODEL.seq_length / EXPERTS * 0.5)
    micro_batches = TRAINING.global_batch_size // TRAINING.micro_batch_size
    for taken, dropped in zip(result["dropping"]["taken"], result["dropping"]["dropped"], strict=True):
        assert sum(taken) + dropped == tokens
        assert dropped >= tokens // 2
        assert max(taken) <= room * micro_batches
