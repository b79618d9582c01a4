"""What is told of a step is so: FLOPs as torch's counter has them, all experts' routes under every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from telling_worker import CASES, LOADS, VOCABULARY
from torchrun import torchrun

from btx_megatron.estimate_flops import forward_flops


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("telling")


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    """What one process told."""
    torchrun("telling_worker.py", 1, folder)
    return json.loads((folder / "telling-1.json").read_text())


@pytest.fixture(scope="module")
def two(one: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What two ranks told, from the weights that the one process saved."""
    torchrun("telling_worker.py", 2, folder)
    return json.loads((folder / "telling-2.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_flops_are_those_that_torch_counts(one: dict[str, Any], name: str) -> None:
    """With attention in plain matrix products the counter sees the whole square of scores."""
    model, experts, topk, freeze = CASES[name]
    forward = forward_flops(model, VOCABULARY, experts, topk, causal=False)
    found = one[name]["flops"] / one[name]["tokens"]
    assert found == pytest.approx(forward.training(freeze), rel=0.01)


def test_of_fused_attention_on_a_cpu_torch_counts_nothing(one: dict[str, Any]) -> None:
    """So the counter cannot be used as it is on what we train with."""
    model, experts, topk, _ = CASES["GQA"]
    forward = forward_flops(model, VOCABULARY, experts, topk, causal=False)
    counted = one["GQA, fused attention"]
    rest = forward.training() - 3 * forward.attention
    assert counted["flops"] / counted["tokens"] == pytest.approx(rest, rel=0.01)


def test_routes_are_those_that_the_routers_returned(one: dict[str, Any]) -> None:
    told = one["routes"]
    assert told["routes"] == told["seen"]
    # two steps of 8 windows of 32 tokens, two routes each; the second reading begins anew
    assert all(sum(layer) == 2 * 8 * 32 * 2 for reading in told["routes"] for layer in reading)
    assert told["dense"] == []


@pytest.mark.parametrize("layout", LOADS)
def test_routes_are_the_same_under_every_layout(
    one: dict[str, Any], two: dict[str, Any], layout: str
) -> None:
    for found, expected in zip(two[layout]["routes"], one["routes"]["routes"], strict=True):
        for layer, reference in zip(found, expected, strict=True):
            assert sum(layer) == sum(reference)
            # a token between two experts may fall to the other one by a rounding
            assert layer == pytest.approx(reference, abs=2)


def test_memory_is_that_of_the_largest_rank(two: dict[str, Any]) -> None:
    for told in two.values():
        assert told["memory"] >= 0.9 * told["own memory"] > 100e6
