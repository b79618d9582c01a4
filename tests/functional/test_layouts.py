"""Layouts against one process, resume against the uninterrupted run: the real Megatron code, on gloo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_worker import LAYOUTS, MODEL, ON_4_RANKS, RECOMPUTE, RESHARDS, STEPS, gates_of
from torchrun import torchrun

from tools import golden_losses

pytestmark = pytest.mark.timeout(
    1200
)  # a minute on free cores; ranks that wait for each other suffer on busy ones

NAMES = [f"{kind} {name}" for kind, layouts in LAYOUTS.items() for name in layouts]
BIT_FOR_BIT = (
    "dense DP2+distributed, dropout",
    "dense DP2+overlap",
    "dense TP2+SP, dropout",
    "dense DP2+distributed, bf16",
    "dense PP2, bf16",
    "moe EP2+distributed",
    "moe EP2, bf16",
)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("layouts")
    for world in (1, 2):
        torchrun("layout_worker.py", world, folder)
    return {"folder": folder} | told(folder, 1) | told(folder, 2)


@pytest.fixture(scope="module")
def on_4_ranks(result: dict[str, Any]) -> dict[str, Any]:
    torchrun("layout_worker.py", 4, result["folder"])
    return result | told(result["folder"], 4)


def told(folder: Path, world: int) -> dict[str, Any]:
    return json.loads((folder / f"result-{world}.json").read_text())  # type: ignore[no-any-return]


def assert_agrees(here: dict[str, Any], reference: dict[str, Any]) -> None:
    assert len(here["loss"]) == STEPS
    assert here["loss"] == pytest.approx(reference["loss"], abs=1e-5)
    if reference["balancing"][0] is not None:
        assert 0.9 < reference["balancing"][0] < 2
        assert here["balancing"] == pytest.approx(reference["balancing"], rel=1e-4)
    assert here["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_layout_agrees_with_one_process(result: dict[str, Any], name: str) -> None:
    assert_agrees(result[name], result[f"{name.split()[0]} 1 process"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [f"{kind} {name}" for kind, layouts in ON_4_RANKS.items() for name in layouts]
)
def test_layout_of_4_ranks_agrees_with_one_process(on_4_ranks: dict[str, Any], name: str) -> None:
    assert_agrees(on_4_ranks[name], on_4_ranks[f"{name.split()[0]} 1 process"])


@pytest.mark.parametrize("name", golden_losses.LAYOUTS)
def test_losses_are_those_that_are_kept(result: dict[str, Any], name: str) -> None:
    """If they shall change: python tools/golden_losses.py --update."""
    losses = result[golden_losses.LAYOUTS[name]]["loss"]
    assert golden_losses.compare(name, losses) is None
    off = [*losses[:-1], losses[-1] + 2 * golden_losses.TOLERANCE]
    assert f"step {STEPS}: {off[-1]:.6f}" in (golden_losses.compare(name, off) or "")
    assert f"{STEPS - 1} steps" in (golden_losses.compare(name, losses[1:]) or "")


@pytest.mark.parametrize("kind", RECOMPUTE)
def test_recomputed_activations_are_those_that_were_not_kept(result: dict[str, Any], kind: str) -> None:
    """Bit for bit, with dropout, whose masks must be drawn again."""
    runs = result["recomputed"]
    kept = runs[f"{kind} kept"]
    assert kept["loss"] != result[f"{kind} 1 process"]["loss"][:5]
    for name in RECOMPUTE[kind]:
        assert runs[f"{kind} {name}"] == kept, name


@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_model_learns(result: dict[str, Any], kind: str) -> None:
    losses = result[f"{kind} 1 process"]["loss"]
    assert losses[-1] < losses[0] - 2


@pytest.mark.parametrize("name", BIT_FOR_BIT)
def test_resume_on_the_same_layout_is_bit_for_bit(result: dict[str, Any], name: str) -> None:
    case = result["resumes"][name]
    assert case["resumed"] == case["whole"]


@pytest.mark.parametrize("name", RESHARDS)
def test_resume_on_another_layout(result: dict[str, Any], name: str) -> None:
    whole = result[f"{RESHARDS[name][0]} 1 process"]["loss"][STEPS // 2 :]
    assert result["resumes"][f"reshard {name}"] == pytest.approx(whole, abs=1e-5)


def test_a_run_goes_on_in_another_build(result: dict[str, Any]) -> None:
    """Its weights, optimizer and generators; not what Transformer Engine keeps beside them."""
    assert result["of another build"]["other"] == result["of another build"]["same"]


def test_a_damaged_checkpoint_is_named_with_what_to_do(result: dict[str, Any]) -> None:
    assert "damaged/iter_0000001: cannot be read (CheckpointException, the log has more)" in result["damaged"]
    assert "or delete " in result["damaged"]


@pytest.mark.parametrize("name", ["1", "EP2", "TP2+SP", "PP2"])
def test_held_out_loss_and_routes_count_the_windows_tokens_alone(result: dict[str, Any], name: str) -> None:
    reference, here = result["held out 1"], result[f"held out {name}"]
    assert here["loss"] == pytest.approx(reference["loss"], abs=1e-5)
    tokens = 2 * MODEL.seq_length + 3
    for layer, shares in enumerate(here["share"]):
        assert shares == pytest.approx(reference["share"][layer], abs=1e-9)
        assert sum(shares) == pytest.approx(1)
        for share in shares:  # a whole number of the tokens that count, and top-2 takes each once
            routes = share * tokens * 2
            assert routes == pytest.approx(round(routes), abs=1e-6)


def test_balancing_gradient_does_not_depend_on_sequence_shards(result: dict[str, Any]) -> None:
    """Against the paper's equation in plain torch: N * sum_i mean(g_i) * mean(softmax_i)."""
    sharded = result["balancing"]
    logits = torch.tensor(sharded["logits"], requires_grad=True)
    whole = logits.shape[1] * (gates_of(logits).mean(0) * logits.softmax(-1).mean(0)).sum()
    whole.backward()
    assert logits.grad is not None
    assert sharded["value"] == pytest.approx(whole.item(), rel=1e-6)
    torch.testing.assert_close(torch.tensor(sharded["gradient"]), logits.grad, rtol=1e-4, atol=1e-8)
