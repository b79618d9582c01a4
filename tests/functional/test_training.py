"""What one optimizer step does, in absolute terms: scale of the balancing gradient, rates, decay, clipping.

Layouts are held against one process elsewhere; here the one process is held against arithmetic.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_worker import EXPERTS, MODEL
from torch import Tensor
from torchrun import torchrun
from training_worker import (
    BALANCES,
    BETA1,
    BETA2,
    BREAKING,
    CLIP,
    DECAY,
    ITERATIONS,
    LAYOUTS,
    LOWEST,
    PEAK,
    WARMUP,
    Weights,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    """What one process told."""
    torchrun("training_worker.py", 1, folder)
    return torch.load(folder / "training-1.pt", weights_only=False)


@pytest.fixture(scope="module")
def two(one: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What two ranks told, from the weights that the one process saved."""
    torchrun("training_worker.py", 2, folder)
    return torch.load(folder / "training-2.pt", weights_only=False)


def matrices(weights: Weights) -> list[str]:
    return [name for name, weight in weights.items() if weight.dim() == 2]


def norms(weights: Weights) -> list[str]:
    return [name for name, weight in weights.items() if weight.dim() == 1]


def factor(found: Tensor, expected: Tensor) -> float:
    """How often ``expected`` is contained in ``found``."""
    return ((found * expected).sum() / (expected * expected).sum()).item()


# --- the objective: mean loss a token + alpha * (layers' balancing losses, averaged over micro-batches)


@pytest.mark.parametrize("kind", BALANCES)
def test_scale_of_the_balancing_gradient(one: dict[str, Any], kind: str) -> None:
    """At every weight, the routers' first of all, also where it arrives through later layers alone."""
    case = one["balancing"][kind]
    reached = set()
    for name, expected in case["of balancing"].items():
        found = case["with"][name] - case["without"][name]
        # the difference of two gradients keeps their rounding: they are up to 100 times as large
        assert (found - expected).abs().max() < 2e-7, name
        if expected.norm() > 1e-3:
            assert factor(found, expected) == pytest.approx(1, abs=1e-4), name
            reached.add(name)
    assert len(reached) > 10
    assert reached >= {f"decoder.layers.{layer}.mlp.router.weight" for layer in range(MODEL.num_layers)}


@pytest.mark.parametrize("kind", BALANCES)
def test_the_optimizer_takes_the_gradient_of_the_papers_objective(one: dict[str, Any], kind: str) -> None:
    case = one["balancing"][kind]
    for name, of_lm in case["of lm_loss"].items():
        torch.testing.assert_close(case["without"][name], of_lm, rtol=1e-4, atol=2e-7)
        torch.testing.assert_close(
            case["with"][name], of_lm + case["of balancing"][name], rtol=1e-4, atol=2e-7
        )


@pytest.mark.parametrize("kind", BALANCES)
def test_losses_that_are_reported(one: dict[str, Any], kind: str) -> None:
    """The language-model loss a token, and the balancing loss without alpha, a layer."""
    case = one["balancing"][kind]
    for name in ("step with", "step without"):
        assert case[name].lm_loss == pytest.approx(case["lm_loss"], rel=1e-6)
    assert case["step with"].balancing_loss == pytest.approx(
        case["balancing_loss"] / MODEL.num_layers, rel=1e-6
    )
    assert case["step without"].balancing_loss is None


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kind", BALANCES)
def test_scale_of_the_balancing_gradient_under_a_layout(
    one: dict[str, Any], two: dict[str, Any], kind: str, name: str
) -> None:
    seen = set()
    for rank in two["balancing"][kind, name]:
        for layer, found in rank.items():
            expected = one["balancing"][kind]["of balancing"][f"decoder.layers.{layer}.mlp.router.weight"]
            assert factor(found, expected) == pytest.approx(1, abs=1e-4)
            assert (found - expected).abs().max() < 1e-7
            seen.add(layer)
    assert seen == set(range(MODEL.num_layers))


# --- the learning rate


def warm_up(step: int) -> float:
    return PEAK * (step - 1) / WARMUP


def linear(step: int) -> float:
    """After ``step - 1`` steps, of which the first ``WARMUP`` do not count."""
    done = (step - 1 - WARMUP) / (ITERATIONS - WARMUP)
    return PEAK + (LOWEST - PEAK) * done


def cosine(step: int) -> float:
    done = (step - 1 - WARMUP) / (ITERATIONS - WARMUP)
    return LOWEST + (PEAK - LOWEST) * (1 + math.cos(math.pi * done)) / 2


STEPS = range(1, ITERATIONS + 1)
WARM = [warm_up(step) for step in STEPS if step <= WARMUP]
RATES: dict[str, tuple[list[float], float]] = {
    "cosine": (WARM + [cosine(step) for step in STEPS if step > WARMUP], LOWEST),
    "linear": (WARM + [linear(step) for step in STEPS if step > WARMUP], LOWEST),
    "constant": (WARM + [PEAK for step in STEPS if step > WARMUP], PEAK),
    "lowest is a tenth": (WARM + [linear(step) for step in STEPS if step > WARMUP], PEAK / 10),
    "no warm-up": ([PEAK + (LOWEST - PEAK) * (step - 1) / ITERATIONS for step in STEPS], LOWEST),
    "all warm-up": ([PEAK * (step - 1) / (ITERATIONS - 1) for step in STEPS], LOWEST),
}


@pytest.mark.parametrize("name", RATES)
def test_learning_rate_of_every_step(one: dict[str, Any], name: str) -> None:
    """Step k takes what the schedule says after k - 1 steps, as in Megatron: the first step of a warm-up
    takes 0, and the lowest rate is reached when the last step is done."""
    rates, after = RATES[name]
    assert one["schedules"][name]["rates"] == pytest.approx(rates, rel=1e-9)
    assert one["schedules"][name]["next"] == pytest.approx(after, rel=1e-9)


def test_learning_rates_by_hand(one: dict[str, Any]) -> None:
    """12 steps, 4 of them warm-up, from 0.01 to 0.001: steps 1, 2, 5 (the peak), 7, 9 (half way) and 12."""

    def some(name: str) -> list[float]:
        return [one["schedules"][name]["rates"][step - 1] for step in (1, 2, 5, 7, 9, 12)]

    assert some("cosine") == pytest.approx([0, 0.0025, 0.01, 0.00868198, 0.0055, 0.00134254], abs=1e-8)
    assert some("linear") == pytest.approx([0, 0.0025, 0.01, 0.00775, 0.0055, 0.002125], abs=1e-8)
    assert some("constant") == pytest.approx([0, 0.0025, 0.01, 0.01, 0.01, 0.01], abs=1e-8)


# --- weight decay


def test_matrices_decay(one: dict[str, Any]) -> None:
    """Two first steps from the same weights and gradients differ by -lr * decay * w, for all matrices."""
    plain, decayed = one["plain"], one["decayed"]
    rate = plain["learning_rate"]
    assert rate == decayed["learning_rate"] == 0.1
    for name in matrices(plain["before"]):
        before = plain["before"][name]
        assert torch.equal(before, decayed["before"][name])
        assert torch.equal(plain["gradient"][name], decayed["gradient"][name])
        found = decayed["after"][name] - plain["after"][name]
        largest = max(before.abs().max().item(), plain["after"][name].abs().max().item())
        torch.testing.assert_close(found, -rate * DECAY * before, rtol=0, atol=2.4e-7 * largest)
        assert factor(found, -rate * DECAY * before) == pytest.approx(1, abs=1e-5)
    kinds = ("word_embeddings", "linear_qkv", "linear_proj", "router", "experts", "output_layer")
    assert all(any(kind in name for name in matrices(plain["before"])) for kind in kinds)


def test_norms_do_not_decay(one: dict[str, Any]) -> None:
    plain, decayed = one["plain"], one["decayed"]
    assert len(norms(plain["before"])) == 2 * MODEL.num_layers + 1
    for name in norms(plain["before"]):
        assert torch.equal(plain["after"][name], decayed["after"][name])
        assert not torch.equal(plain["after"][name], plain["before"][name])


# --- clipping


def test_first_moments_without_clipping(one: dict[str, Any]) -> None:
    plain = one["plain"]
    for name, gradient in plain["gradient"].items():
        torch.testing.assert_close(plain["exp_avg"][name], (1 - BETA1) * gradient)
        torch.testing.assert_close(plain["exp_avg_sq"][name], (1 - BETA2) * gradient**2)


def test_gradient_norm_is_that_of_the_whole_gradient_before_clipping(one: dict[str, Any]) -> None:
    norm = math.sqrt(sum(g.double().square().sum().item() for g in one["plain"]["gradient"].values()))
    assert norm > 10 * CLIP
    for name in ("plain", "clipped", "clip far away"):
        assert one[name]["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_clipping_scales_what_adamw_takes_to_the_norm(one: dict[str, Any]) -> None:
    plain, clipped = one["plain"], one["clipped"]
    scale = CLIP / plain["grad_norm"]
    for name, moment in plain["exp_avg"].items():
        torch.testing.assert_close(clipped["exp_avg"][name], scale * moment, rtol=1e-4, atol=1e-12)
        second = scale**2 * plain["exp_avg_sq"][name]
        torch.testing.assert_close(clipped["exp_avg_sq"][name], second, rtol=2e-4, atol=1e-15)
    taken = sum((m.double() / (1 - BETA1)).square().sum().item() for m in clipped["exp_avg"].values())
    assert math.sqrt(taken) == pytest.approx(CLIP, rel=1e-4)


def test_a_gradient_below_the_clipping_norm_stays(one: dict[str, Any]) -> None:
    for name, moment in one["plain"]["exp_avg"].items():
        assert torch.equal(one["clip far away"]["exp_avg"][name], moment)


# --- initial weights of two ranks


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


def drawn_twice(first: Weights, second: Weights) -> float:
    """Share of the second rank's random numbers that the first rank drew as well, anywhere: ranks of one
    seed draw one stream, but the first stage is ahead in it by its embedding. Weights of one scale."""
    residual = ("linear_proj", "linear_fc2")  # drawn with another standard deviation
    streams = [
        torch.cat([w[name].flatten() for name in matrices(w) if not any(kind in name for kind in residual)])
        for w in (first, second)
    ]
    assert all(stream.std().item() == pytest.approx(0.1, rel=0.05) for stream in streams)
    return torch.isin(streams[1], streams[0]).float().mean().item()


def test_pipeline_stages_draw_from_seeds_of_their_own(two: dict[str, Any]) -> None:
    first, second = two["drawn"]["PP2"]
    assert drawn_twice(first, second) < 0.05
    assert drawn_twice(first, first) == 1
    shared = [name for name in matrices(first) if name in second]
    assert any("router" in name for name in shared)
    assert any("linear_qkv" in name for name in shared)
    assert len(shared) == 3 + 2 * EXPERTS
    for name in shared:
        assert abs(correlation(first[name], second[name])) < 0.3, name


def test_tied_embeddings_agree_on_the_first_and_the_last_stage(two: dict[str, Any]) -> None:
    first, last = two["drawn"]["PP2, tied"]
    assert torch.equal(first["embedding.word_embeddings.weight"], last["output_layer.weight"])
    assert first["embedding.word_embeddings.weight"].std() > 0.05


def test_shards_of_one_matrix_differ_and_replicas_agree(two: dict[str, Any]) -> None:
    first, second = two["drawn"]["TP2"]
    assert first.keys() == second.keys()
    for name in matrices(first):
        if "router" in name:
            assert torch.equal(first[name], second[name])
        else:
            assert abs(correlation(first[name], second[name])) < 0.15, name
    for name in norms(first):
        assert torch.equal(first[name], second[name])
    assert not torch.equal(*(first[f"decoder.layers.{i}.mlp.router.weight"] for i in range(2)))


def test_data_parallel_ranks_start_alike(two: dict[str, Any]) -> None:
    first, second = two["drawn"]["DP2"]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- a gradient, or a loss, that is not finite


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("overflow", math.inf),
        ("overflow, dense", math.inf),
        ("overflow, no clipping", math.inf),
        ("inf", math.inf),
        ("nan", math.nan),
        ("inf, no clipping", math.inf),
        ("nan, bf16", math.nan),
        ("loss", math.nan),
    ],
)
def test_a_step_that_is_not_finite_moves_nothing(one: dict[str, Any], name: str, norm: float) -> None:
    case = one["failures"][name]
    assert not case["good"]
    assert case["skipped"]
    assert case["unmoved"]
    assert case["told"] > 30
    assert case["grad_norm"] == pytest.approx(norm, nan_ok=True)
    assert math.isfinite(case["loss"]) == (name != "loss")


@pytest.mark.parametrize("what", ["failures", "loss"])
@pytest.mark.parametrize("name", BREAKING)
def test_all_ranks_skip_where_one_breaks(two: dict[str, Any], what: str, name: str) -> None:
    for rank in two[what][name]:
        assert not rank["good"]
        assert rank["skipped"]
        assert rank["unmoved"]


def test_a_skipped_step_leaves_no_trace(one: dict[str, Any]) -> None:
    assert one["beside"]["skipped"] == one["beside"]["whole"]


def test_a_stage_whose_steps_are_all_skipped_ends_and_keeps_its_weights(one: dict[str, Any]) -> None:
    """From step 1 on; three in a row are allowed. What is saved meanwhile are the weights of step 1."""
    stage = one["stage"]
    assert stage["message"].startswith(
        "step 5: the gradient's norm is inf; 4 skipped in a row, more than "
        "training.max_consecutive_skipped_steps 3: lower training.lr"
    )
    assert stage["before"]["latest"] == "iter_0000001"
    assert stage["after"]["latest"] == "iter_0000004"
    assert len(stage["before"]["hashes"]) > 5
    assert stage["after"]["hashes"] == stage["before"]["hashes"]
    told = stage["after"]["steps told"]
    assert [(one["step"], one.get("skipped"), one["grad_norm"]) for one in told] == [
        (step, True, None) for step in (2, 3, 4, 5)
    ]
