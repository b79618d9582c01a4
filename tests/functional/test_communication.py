"""The meter sees what torch and Megatron call, changes nothing, and the formulas agree with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from comm_worker import FOUR, NODE, TWO, setup_of_name
from torchrun import torchrun

from btx_megatron.estimate_comm import step_traffic

pytestmark = pytest.mark.timeout(600)  # 45 s on free cores


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("communication")
    for world in (2, 4):
        torchrun("comm_worker.py", world, folder)
    return {world: json.loads((folder / f"comm-{world}.json").read_text()) for world in (2, 4)}


def total(rows: list[dict[str, Any]], what: str) -> float:
    return sum(row[what] for row in rows)


@pytest.mark.parametrize(
    ("world", "name"), [(2, name) for name in TWO] + [(4, name) for name in FOUR], ids=lambda x: str(x)
)
def test_formulas_against_the_count(result: dict[int, dict[str, Any]], world: int, name: str) -> None:
    measured = result[world]["layouts"][name][0]
    computed = step_traffic(setup_of_name(world, name), NODE).rows()
    for row in computed:  # line by line; a line may hold a scalar or two beside
        same = [m for m in measured if all(m[key] == row[key] for key in ("group", "size", "collective"))]
        assert len(same) == 1, row
        assert same[0]["payload"] == pytest.approx(row["payload"], abs=32)
        routed = row["collective"] == "all_to_all"  # even routes are assumed; these are random
        for what in ("wire", "between"):
            assert same[0][what] == pytest.approx(row[what], rel=0.06 if routed else 0, abs=32)
    for what, error in (("payload", 1e-3), ("wire", 0.012), ("between", 0.025)):
        assert total(computed, what) == pytest.approx(total(measured, what), rel=error, abs=100)


@pytest.mark.parametrize(
    ("world", "name"), [(2, "dense TP2+SP"), (4, "moe DP4 EP2+distributed"), (4, "dense TP2 PP2")]
)
def test_every_step_hands_in_the_same(result: dict[int, dict[str, Any]], world: int, name: str) -> None:
    first, second = result[world]["layouts"][name]
    assert total(first, "payload") == pytest.approx(total(second, "payload"), abs=64)


def test_losses_are_the_same_bit_for_bit_with_the_meter_on(result: dict[int, dict[str, Any]]) -> None:
    off, on = result[2]["losses"]
    assert off == on


# calls, bytes handed in and bytes on the wire of two ranks together; a tensor is 24 bytes on each
KNOWN = {
    "all_reduce": [("all_reduce", 2, 48, 48)],
    "all_reduce, async": [("all_reduce", 2, 48, 48)],
    "all_reduce, a name bound at import": [("all_reduce", 2, 48, 48)],
    "all_reduce, coalesced": [("all_reduce", 2, 80, 80)],  # of 24 and 16 bytes, one call
    "all_reduce, functional": [("all_reduce", 2, 48, 48)],
    "all_reduce, inference mode": [("all_reduce", 2, 48, 48)],
    "all_reduce, forward and backward": [("all_reduce", 4, 96, 96)],
    "all_gather, list": [("all_gather", 2, 48, 48)],
    "all_gather, one tensor": [("all_gather", 2, 48, 48)],
    "all_gather, coalesced": [("all_gather", 2, 48, 48)],
    "all_gather, functional, and backward": [("all_gather", 2, 48, 48), ("reduce_scatter", 2, 96, 48)],
    "reduce_scatter, one tensor": [("reduce_scatter", 2, 48, 24)],
    "reduce_scatter, list": [("reduce_scatter", 2, 48, 24)],
    "reduce_scatter, coalesced": [("reduce_scatter", 2, 48, 24)],
    "all_to_all, even": [("all_to_all", 2, 48, 24)],
    "all_to_all, uneven": [("all_to_all", 2, 48, 28)],  # 5 and 2 rows of 4 bytes travel
    "broadcast": [("broadcast", 2, 24, 24)],
    "reduce": [("reduce", 2, 48, 24)],
    "gather": [("gather", 2, 48, 24)],
    "scatter": [("scatter", 2, 48, 24)],
    "send and recv, batched": [("send", 2, 48, 48), ("recv", 2, 0, 0)],
    "barrier": [("barrier", 2, 0, 0)],
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_calls_are_seen_once_and_inside_a_step_alone(
    result: dict[int, dict[str, Any]], name: str
) -> None:
    rows = result[2]["known"][name]
    assert [(r["collective"], r["calls"], r["payload"], r["wire"]) for r in rows] == KNOWN[name]
    assert all(row["between"] == row["wire"] for row in rows)  # each rank was a node of its own


def test_what_torch_calls_from_c_is_seen(result: dict[int, dict[str, Any]]) -> None:
    rows = result[2]["known"]["all_reduce, torch's own DDP"]
    gradient = next(row for row in rows if row["collective"] == "all_reduce")
    assert gradient["payload"] == 2 * 24  # weight 2 x 2 and bias 2


def test_a_stage_writes_its_communication(result: dict[int, dict[str, Any]]) -> None:
    report, log = result[2]["report"], result[2]["log"]
    assert (report["layout"], report["ranks"], report["ranks_per_node"]) == ("DP2 EP2", 2, 2)
    assert (report["steps"], report["tokens_per_step"]) == (2, 8 * 32)
    expected = step_traffic(setup_of_name(2, "moe EP2"), NODE).total()
    assert report["per_step"]["payload"] == pytest.approx(expected.payload, rel=1e-3)
    assert report["per_step"]["between"] == 0
    assert report["wire_bytes_per_token"] == pytest.approx(report["per_step"]["wire"] / 256)
    assert {"group": "ep", "size": 2, "collective": "all_to_all"}.items() <= report["lines"][0].items()
    assert "ep (2)" in log
    assert "a token on the wire" in log
    assert result[2]["nothing"] == []
