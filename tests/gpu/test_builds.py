"""Transformer Engine's build beside the local one on a GPU: the same weights, the same function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_run import EXPERTS, LOCAL, STEPS, TE, Run, tail

KINDS = {"dense": None, "moe": EXPERTS}


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> None:
    """Relative error of the whole."""
    assert ((one - other).norm() / other.norm()).item() < tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_each_build_takes_the_others_checkpoint(kind: str, tmp_path: Path) -> None:
    first = Run(LOCAL, KINDS[kind])
    first.steps(3)
    first.save(tmp_path / "local")
    wanted = first.logits()
    second = Run(TE, KINDS[kind])
    second.load(tmp_path / "local")
    close(second.logits(), wanted, 0.02)
    second.steps(1)  # also of its optimizer's
    second.save(tmp_path / "te")
    wanted = second.logits()
    third = Run(LOCAL, KINDS[kind])
    third.load(tmp_path / "te")
    close(third.logits(), wanted, 0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_both_builds_learn_alike(kind: str) -> None:
    losses = {impl: Run(impl, KINDS[kind]).steps() for impl in (LOCAL, TE)}
    assert tail(losses[TE]) == pytest.approx(tail(losses[LOCAL]), rel=0.02)
    assert tail(losses[TE]) < 0.7 * losses[TE][0]


def test_a_run_of_one_build_goes_on_in_the_other(tmp_path: Path) -> None:
    whole = Run(TE, EXPERTS).steps()
    half = Run(LOCAL, EXPERTS)
    half.steps(STEPS // 2)
    half.save(tmp_path)
    rest = Run(TE, EXPERTS)
    rest.resume(tmp_path)
    assert tail(rest.steps(STEPS // 2)) == pytest.approx(tail(whole), rel=0.02)


def test_the_local_build_computes_on_the_gpu_what_it_does_on_a_cpu() -> None:
    from cpu_losses import cpu_losses

    fp32: dict[str, Any] = {"training": {"bf16": False}}
    torch.backends.cuda.matmul.allow_tf32 = False
    for experts, tolerance in ((None, 2e-4), (EXPERTS, 2e-3)):  # the router's product may be TF32
        expected = cpu_losses(experts)
        assert Run(LOCAL, experts, **fp32).steps(5) == pytest.approx(expected, abs=tolerance)


def test_modules_are_transformer_engines() -> None:
    layer = Run(TE, EXPERTS).trainer.model[0].module.module.decoder.layers[0]  # type: ignore[union-attr]
    names = {type(module).__name__ for module in layer.modules()}  # type: ignore[union-attr]
    assert {"TELayerNormColumnParallelLinear", "TEDotProductAttention", "TEGroupedMLP", "RMSNorm"} <= names


def test_grouped_products_are_the_sequential_ones() -> None:
    """TransformerEngine #2409: they were not."""
    logits, losses = {}, {}
    for choice in (True, False):
        run = Run(TE, EXPERTS, moe={"moe_grouped_gemm": choice})
        logits[choice], losses[choice] = run.logits(), run.steps()
    close(logits[True], logits[False], 0.01)
    assert losses[True][0] == pytest.approx(losses[False][0], rel=1e-3)
    assert tail(losses[True]) == pytest.approx(tail(losses[False]), rel=0.02)


@pytest.mark.parametrize(
    "moe",
    [
        {"moe_router_topk": 2},
        {"moe_router_type": "switch"},
        {"moe_router_type": "soft"},
        {"moe_router_type": "sample_top1"},
        {"moe_router_topk": 2, "moe_token_dispatcher_type": "allgather"},
    ],
    ids=lambda moe: "-".join(map(str, moe.values())),
)
@pytest.mark.parametrize("fp8", [None, "hybrid"])
def test_routers_on_the_grouped_path(moe: dict[str, Any], fp8: str | None) -> None:
    losses = {}
    for choice in (True, False):
        run = Run(TE, EXPERTS, {"fp8": fp8} if choice else {}, moe | {"moe_grouped_gemm": choice})
        losses[choice] = run.steps()
        layers = run.trainer.model[0].module.module.decoder.layers  # type: ignore[union-attr]
        if moe.get("moe_router_type") != "switch":
            assert all(not layer.mlp.router.take_drops().item() for layer in layers)  # type: ignore[union-attr]
    assert tail(losses[True]) == pytest.approx(tail(losses[False]), rel=0.03)
