"""Every router and every balancing loss under one process, EP2, TP2+SP and CP2: the same losses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_worker import EXPERTS, MODEL, TRAINING
from router_worker import EQUATIONS, LAYOUTS, MASKED, MOES, MORE, STEPS
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


# Megatron's global loss has a running mean over micro-batches, and with DP there are fewer of them
COMPARED = [(kind, layout) for kind in MOES for layout in LAYOUTS if (kind, layout) != ("global", "EP2")]


@pytest.mark.parametrize(("kind", "layout"), COMPARED)
def test_losses_are_those_of_one_process(result: dict[str, Any], kind: str, layout: str) -> None:
    reference, here = result[f"{kind} 1 process"], result[f"{kind} {layout}"]
    assert len(here["loss"]) == STEPS
    assert here["loss"] == pytest.approx(reference["loss"], abs=1e-5)
    assert here["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-4)
    assert here["balancing"] == pytest.approx(reference["balancing"], rel=1e-4)


def test_the_kinds_differ(result: dict[str, Any]) -> None:
    ends = {kind: result[f"{kind} 1 process"]["loss"][-1] for kind in MOES}
    assert len({round(loss, 6) for loss in ends.values()}) == len(MOES)


@pytest.mark.parametrize("kind", ["sample", "masked"])
@pytest.mark.parametrize("how", ["full", "PP2"])
def test_recomputed_layers_take_the_same_experts(result: dict[str, Any], kind: str, how: str) -> None:
    """In a pipeline later micro-batches have begun by then."""
    kept, here = result[f"{kind} recomputed kept"], result[f"{kind} recomputed {how}"]
    if how == "full":
        assert here == kept
    assert here["loss"] == pytest.approx(kept["loss"], abs=1e-5)
    assert here["grad_norm"] == pytest.approx(kept["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("kind", MASKED)
@pytest.mark.parametrize("world", [1, 2])
def test_nothing_of_a_masked_expert_reaches_the_output(result: dict[str, Any], kind: str, world: int) -> None:
    """Its weights and its rows of the router are made NaN."""
    before, silenced, unmasked = result[f"silenced {world}"][kind]
    assert before == silenced
    assert math.isnan(unmasked)


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


def test_what_fills_up_a_batch_takes_no_experts_room(result: dict[str, Any]) -> None:
    """Also where a rank of two has nothing else."""
    alone, *others = result["filled up 1"]
    assert [*others, *result["filled up 2"]] == pytest.approx([alone] * 5, abs=1e-6)


@pytest.mark.parametrize("kind", EQUATIONS)
def test_gates_and_losses_are_the_equations(result: dict[str, Any], kind: str) -> None:
    """Values and gradients, against the definitions in docs/methods.md. Shapes: S, B, E; T = S * B."""
    case, moe = result["equations"][kind], (MOES | MORE)[kind]
    raw = torch.tensor(case["logits"], requires_grad=True)
    logits = raw
    if moe.moe_router_logit_norm_scale is not None:
        centred = raw - raw.mean(-1, keepdim=True)
        logits = moe.moe_router_logit_norm_scale * centred / centred.square().mean(-1, keepdim=True).sqrt()
    flat, k = logits.flatten(0, 1), moe.topk(EXPERTS)
    taken = torch.zeros_like(flat).scatter(1, flat.topk(k).indices, 1.0)
    exponentials = flat.exp() * (1 if moe.moe_router_type == "switch" else taken)
    gates = taken * exponentials / exponentials.sum(1, keepdim=True)
    torch.testing.assert_close(torch.tensor(case["gates"]), gates)
    p_SBE, taken_SBE = logits.softmax(-1), taken.view_as(logits)
    alpha, balancing = moe.moe_aux_loss_coeff, moe.moe_router_load_balancing_type
    if balancing == "btx":
        loss = alpha * EXPERTS * (gates.mean(0) * p_SBE.mean((0, 1))).sum()
    elif balancing == "seq_aux_loss":
        loss = alpha * EXPERTS * (taken_SBE.mean(0) / k * p_SBE.mean(0)).sum(-1).mean()
    else:  # one micro-batch is the whole batch here
        loss = alpha * EXPERTS * (taken.mean(0) / k * p_SBE.mean((0, 1))).sum()
    if moe.moe_z_loss_coeff is not None:
        loss = loss + moe.moe_z_loss_coeff * logits.logsumexp(-1).square().mean()
    weights = torch.tensor(case["weights"])
    ((gates * weights).sum() + len(flat) * loss).backward()  # losses count by the token (Trainer)
    assert raw.grad is not None
    torch.testing.assert_close(torch.tensor(case["grad"]), raw.grad, rtol=1e-4, atol=1e-6)


def test_an_adaptive_weight_follows_its_layer() -> None:
    from btx_megatron.runtime import cpu_backend

    cpu_backend.install()
    from btx_megatron.training.adaptive import next_coefficients

    load = torch.tensor([[10, 10, 10, 10], [40, 0, 0, 0], [13, 9, 9, 9]])
    found = next_coefficients([0.01, 0.01, 0.002], load, most=0.01)
    beyond = 13 / 40 - 1 / 4
    assert found == pytest.approx([0.0099, 0.01, 0.99 * 0.002 + 0.01 * min(0.01, beyond / 5)])
