"""FP8 on a GPU: it learns what bf16 learns, and a run that was interrupted goes on as if it had not been."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_run import EXPERTS, STEPS, TE, Run, tail

from btx_megatron.recipe import Layout

KINDS = {"dense": None, "moe": EXPERTS}
FP8: dict[str, dict[str, Any]] = {
    "delayed": {"fp8": "hybrid", "fp8_recipe": "delayed", "fp8_amax_history_len": 16},
    "tensorwise": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    "tensorwise-e4m3": {"fp8": "e4m3", "fp8_recipe": "tensorwise"},
    "tensorwise-ends": {
        "fp8": "hybrid",
        "fp8_recipe": "tensorwise",
        "num_layers_at_start_in_bf16": 1,
        "num_layers_at_end_in_bf16": 1,
    },
    "blockwise": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
}


@pytest.fixture(scope="module")
def bf16() -> dict[str, list[float]]:
    return {kind: Run(TE, experts).steps() for kind, experts in KINDS.items()}


@pytest.mark.parametrize("recipe", FP8)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_bf16s(kind: str, recipe: str, bf16: dict[str, list[float]]) -> None:
    run = Run(TE, KINDS[kind], FP8[recipe])
    losses = run.steps()
    assert tail(losses) == pytest.approx(tail(bf16[kind]), rel=0.02)
    different = max(abs(a - b) for a, b in zip(losses, bf16[kind], strict=True))
    if recipe != "tensorwise-ends":  # which leaves no layer of two in FP8
        assert different > 0, "it computed in bf16"


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_exact(kind: str, recipe: str, tmp_path: Path) -> None:
    """Megatron-LM #1350: FP8 checkpoints of a MoE could not be resumed."""
    whole = Run(TE, KINDS[kind], FP8[recipe])
    whole.steps(STEPS // 2)
    whole.save(tmp_path)
    expected = whole.steps(STEPS // 2)
    again = Run(TE, KINDS[kind], FP8[recipe])
    again.resume(tmp_path)
    assert again.steps(STEPS // 2) == expected


def test_weights_leave_fp8(tmp_path: Path) -> None:
    """From an FP8 stage to one without, and to another FP8 recipe."""
    first = Run(TE, EXPERTS, FP8["delayed"])
    before = first.steps(5)[-1]
    first.save(tmp_path)
    for other in ({}, FP8["tensorwise"]):
        run = Run(TE, EXPERTS, other)
        run.load(tmp_path)
        assert run.steps(1)[0] < before + 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_in_fp8(kind: str, tmp_path: Path) -> None:
    """Their fp32 masters are the checkpoint's values, not the rounded ones; and they learn."""
    layout = Layout(use_distributed_optimizer=True)
    first = Run(TE, KINDS[kind], layout=layout)
    first.steps(2)
    first.save(tmp_path)
    wanted = [weight.detach().float().flatten() for weight in first.trainer.model[0].parameters()]
    rest = first.steps(STEPS - 2)
    run = Run(TE, KINDS[kind], FP8["tensorwise"] | {"fp8_param_gather": True}, layout=layout)
    run.load(tmp_path)
    for mine, its in zip(masters(run), sorted(wanted, key=_by_content), strict=True):
        assert torch.equal(mine, its)
    run.state.iteration = 2
    losses = run.steps(STEPS - 2)
    assert losses[0] == pytest.approx(rest[0], rel=0.02)
    assert tail(losses) == pytest.approx(tail(rest), rel=0.03)


def masters(run: Run) -> list[torch.Tensor]:
    """fp32 weights of the distributed optimizer, on one rank all of them."""
    found = []
    for optimizer in run.trainer.optimizer.chained_optimizers:
        for group in optimizer.optimizer.param_groups:
            found += [parameter.detach().flatten() for parameter in group["params"]]
    return sorted(found, key=_by_content)


def _by_content(weight: torch.Tensor) -> tuple[int, float, float]:
    """The optimizer keeps no names; where two are equal, as norms may be, their order is nothing."""
    return weight.numel(), weight.double().sum().item(), weight[0].item()


def test_routers_stay_in_fp32() -> None:
    heard: list[torch.dtype] = []
    run = Run(TE, EXPERTS, FP8["delayed"])
    router = run.trainer.model[0].module.module.decoder.layers[0].mlp.router  # type: ignore[union-attr]
    original = router.routing  # type: ignore[union-attr]

    def listen(logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        heard.append(logits.dtype)
        return original(logits, *args, **kwargs)  # type: ignore[operator]

    router.routing = listen  # type: ignore[union-attr]
    run.steps(1)
    assert set(heard) == {torch.float32}
