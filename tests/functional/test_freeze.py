"""Frozen parts: their weights stay bit for bit, AdamW knows nothing of them, the rest learns and resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from freeze_worker import CASES
from layout_worker import EXPERTS, MODEL, VOCABULARY
from torchrun import torchrun

from btx_megatron.estimate import parameter_counts

pytestmark = pytest.mark.timeout(1200)

COUNTS = parameter_counts(MODEL, VOCABULARY, EXPERTS, topk=2)
FEED_FORWARDS = MODEL.num_layers * 3 * MODEL.hidden_size * MODEL.ffn_hidden_size
ROUTERS = MODEL.num_layers * MODEL.hidden_size * EXPERTS
NUMBERS = {
    "moe": {"experts": EXPERTS * FEED_FORWARDS, "router": ROUTERS, "shared": COUNTS.dense - FEED_FORWARDS},
    "dense": {"experts": FEED_FORWARDS, "shared": COUNTS.dense - FEED_FORWARDS},
}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("frozen")
    torchrun("freeze_worker.py", 2, folder)
    return json.loads((folder / "frozen.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CASES)
def test_frozen_weights_stay_and_the_others_move(result: dict[str, Any], name: str) -> None:
    kind, layout, frozen = CASES[name]
    case = result[name]
    assert case["stayed"] == sorted(frozen)
    assert case["moved"] == sorted(NUMBERS[kind].keys() - set(frozen))
    copies = 1 if layout.use_distributed_optimizer else layout.data_parallel_size
    trained = sum(count for part, count in NUMBERS[kind].items() if part not in frozen)
    assert case["remembered"] == copies * trained


@pytest.mark.parametrize("name", CASES)
def test_a_run_with_frozen_parts_resumes_bit_for_bit(result: dict[str, Any], name: str) -> None:
    assert result[name]["resumed"] == result[name]["whole"]


def test_recomputed_layers_behind_a_frozen_embedding_learn(result: dict[str, Any]) -> None:
    kept, recomputed = result["moe, shared"], result["moe, shared, recomputed"]
    assert recomputed["losses"] == kept["losses"]
    assert recomputed["whole"] == kept["whole"]
