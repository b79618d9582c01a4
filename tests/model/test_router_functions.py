"""What routers are made of, against their equations: noise, Sample Top-1, capacity, normalisation, groups."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from btx_megatron.model.noise import gumbel_noise


@pytest.fixture(scope="module")
def routers() -> Any:
    from btx_megatron.runtime import cpu_backend

    cpu_backend.install()
    from btx_megatron.model import routers

    return routers


def noise(step: int = 3, layer: int = 2, first: int = 0, positions: int = 50, seed: int = 7) -> torch.Tensor:
    samples = torch.tensor([4, 11, 2**31])
    return gumbel_noise(seed, step, layer, samples, torch.arange(first, first + positions), 4)


def test_noise_belongs_to_the_place_and_not_to_the_shard() -> None:
    whole = noise()
    assert whole.shape == (50, 3, 4)
    assert torch.equal(whole[20:], noise(first=20, positions=30))
    samples = torch.tensor([11])
    assert torch.equal(whole[:, 1:2], gumbel_noise(7, 3, 2, samples, torch.arange(50), 4))
    assert torch.equal(
        whole[..., :3], gumbel_noise(7, 3, 2, torch.tensor([4, 11, 2**31]), torch.arange(50), 3)
    )


@pytest.mark.parametrize("other", [{"step": 4}, {"layer": 3}, {"seed": 8}, {"first": 1}])
def test_noise_of_another_place_is_unrelated(other: dict[str, int]) -> None:
    here, there = noise(positions=2000).flatten(), noise(positions=2000, **other).flatten()
    assert abs(torch.corrcoef(torch.stack([here, there]))[0, 1]) < 0.02


def test_noise_is_gumbels() -> None:
    """Mean 0.5772, variance pi^2 / 6; the distribution function exp(-exp(-x)) at a few places."""
    drawn = gumbel_noise(1, 0, 0, torch.arange(64), torch.arange(512), 8).flatten().double()
    assert drawn.isfinite().all()
    assert drawn.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert drawn.var().item() == pytest.approx(math.pi**2 / 6, abs=0.02)
    for x in (-1.0, 0.0, 1.0, 3.0):
        assert (drawn <= x).double().mean().item() == pytest.approx(math.exp(-math.exp(-x)), abs=0.003)


def test_experts_are_sampled_by_their_probabilities(routers: Any) -> None:
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0])
    drawn = gumbel_noise(5, 9, 1, torch.arange(100), torch.arange(400), 4).view(-1, 4)
    _, routes = routers.sampled_top1(logits + drawn, 0.7)
    torch.testing.assert_close(routes.float().mean(0), logits.softmax(0), atol=0.006, rtol=0)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_sample_top1_is_the_equation(routers: Any, temperature: float) -> None:
    logits = torch.randn(30, 4, generator=torch.Generator().manual_seed(1))
    drawn = noise().reshape(-1, 4)[:30]
    ours, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    gates, routes = routers.sampled_top1(ours + drawn, temperature)
    total = torch.zeros(())
    for token in range(30):
        y = [math.exp((logits[token, e] + drawn[token, e]) / temperature) for e in range(4)]
        best = y.index(max(y))
        assert routes[token].nonzero().flatten().tolist() == [best]
        assert gates[token, best].item() == pytest.approx(y[best] / sum(y), rel=1e-5)
        assert gates[token].count_nonzero() == 1
        soft = ((plain[token] + drawn[token]) / temperature).exp()
        total = total + (token + 1) * soft[best] / soft.sum()
    total.backward()
    (gates * torch.arange(1, 31)[:, None]).sum().backward()
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad, plain.grad)
    assert ours.grad.abs().max() > 0


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=40), st.integers(0, 40))
def test_earlier_tokens_are_served_first(routers: Any, routes: list[list[bool]], capacity: int) -> None:
    kept = routers.first_come(torch.tensor(routes), capacity)
    for expert in range(3):
        wanted = [token for token, row in enumerate(routes) if row[expert]]
        assert kept[:, expert].nonzero().flatten().tolist() == wanted[:capacity]


def test_normalised_logits(routers: Any) -> None:
    logits = torch.randn(5, 2, 6, generator=torch.Generator().manual_seed(0)) * 7 + 3
    ours, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    made = routers.normalized_logits(ours, 0.8)
    mean = plain.mean(-1, keepdim=True)
    expected = 0.8 * (plain - mean) / ((plain - mean) ** 2).mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(made, expected)
    weights = torch.arange(60.0).view(5, 2, 6).sin()
    (made * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad)


def test_masked_experts_do_not_shift_normalised_logits(routers: Any) -> None:
    logits = torch.randn(5, 2, 6, generator=torch.Generator().manual_seed(0)) * 7 + 3
    allowed_BE = torch.tensor([[True] * 4 + [False] * 2, [False] * 2 + [True] * 4])
    made = routers.normalized_logits(logits, 0.8, allowed_BE)
    torch.testing.assert_close(made[:, 0, :4], routers.normalized_logits(logits[:, :1, :4], 0.8)[:, 0])
    torch.testing.assert_close(made[:, 1, 2:], routers.normalized_logits(logits[:, 1:, 2:], 0.8)[:, 0])


def test_equal_logits_stay_equal_and_finite(routers: Any) -> None:
    logits = torch.full((2, 1, 4), 3.0, requires_grad=True)
    made = routers.normalized_logits(logits, 1.0)
    made.sum().backward()
    assert torch.equal(made, torch.zeros(2, 1, 4))
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_one_of_each_group(routers: Any) -> None:
    logits = torch.randn(40, 2, 6, generator=torch.Generator().manual_seed(3))
    groups = [0, 0, 1, 1, 2, 2]
    made = routers.best_of_each_group(logits, torch.tensor(groups))
    for token, masked in zip(logits.view(-1, 6).tolist(), made.view(-1, 6).tolist(), strict=True):
        pairs = ((0, 1), (2, 3), (4, 5))
        best = {max(pair, key=token.__getitem__) for pair in pairs}
        for expert in range(6):
            assert (masked[expert] == token[expert]) if expert in best else masked[expert] < -1e37
    top = made.topk(3, dim=-1).indices // 2
    assert (top.sort(-1).values == torch.arange(3)).all()
    assert made.softmax(-1).isfinite().all()
