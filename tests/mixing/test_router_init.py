"""The router's first rows, against plain torch and against what they do to tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from btx_megatron.errors import UserError
from btx_megatron.mixing.experts import expert_count, expert_units
from btx_megatron.mixing.router_init import (
    TEMPERATURE,
    FeatureSums,
    centroid_router,
    normal_router,
    repeat_rows,
    ridge_router,
    zero_router,
)


def domains(count: int, hidden: int, tokens: int, lean: float = 0.5) -> list[Tensor]:
    """Tokens of ``count`` domains behind a norm: noise, a direction that all share, and one of their own."""
    generator = torch.Generator().manual_seed(count * 1000 + hidden)
    shared = torch.randn(hidden, generator=generator)
    features = []
    for _ in range(count):
        own = torch.randn(hidden, generator=generator)
        noise = torch.randn(tokens, hidden, generator=generator)
        states = noise + shared + lean * own
        features.append(states / states.pow(2).mean(1, keepdim=True).sqrt())
    return features


def one_hot(features: list[Tensor]) -> Tensor:
    numbers = [torch.full((len(batch),), expert) for expert, batch in enumerate(features)]
    return torch.nn.functional.one_hot(torch.cat(numbers), len(features)).double()


def test_zero_is_zero() -> None:
    assert torch.equal(zero_router(3, 5), torch.zeros(3, 5))


def test_normal_is_a_function_of_layer_and_seed() -> None:
    rows = normal_router(1, 8, 400, 0.02, 3)
    assert torch.equal(rows, normal_router(1, 8, 400, 0.02, 3))
    assert not torch.equal(rows, normal_router(2, 8, 400, 0.02, 3))
    assert not torch.equal(rows, normal_router(1, 8, 400, 0.02, 4))
    assert rows.std().item() == pytest.approx(0.02, rel=0.06)


def test_centroid_rows_are_the_means_and_logits_the_cosine_over_the_temperature() -> None:
    features = domains(3, 32, 50)
    rows = centroid_router(features)
    means = torch.stack([batch.double().mean(0) for batch in features])
    assert rows.dtype == torch.float32
    cosines = torch.nn.functional.cosine_similarity(rows.double(), means)
    torch.testing.assert_close(cosines, torch.ones(3, dtype=torch.float64))
    # tokens behind a norm are of one length: the logit is exactly cosine / TEMPERATURE
    tokens = features[1].double()
    expected = torch.nn.functional.cosine_similarity(tokens[:, None], means[None], dim=2) / TEMPERATURE
    torch.testing.assert_close(tokens @ rows.double().T, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gain", [1e-3, 30.0])
def test_the_length_of_the_features_does_not_reach_the_logits(gain: float) -> None:
    features = domains(3, 32, 50)
    logits = features[0] @ centroid_router(features).T
    scaled = [gain * batch for batch in features]
    torch.testing.assert_close(scaled[0] @ centroid_router(scaled).T, logits, rtol=1e-4, atol=1e-4)
    ridge = features[0] @ ridge_of(features, 0.01).T
    torch.testing.assert_close(scaled[0] @ ridge_of(scaled, 0.01).T, ridge, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("hidden", [64, 512])
def test_gates_lean_to_the_own_expert_at_any_hidden_size(hidden: int) -> None:
    features = domains(4, hidden, 2 * hidden)
    for expert, tokens in enumerate(features):
        gates = (tokens @ centroid_router(features).T).softmax(1).mean(0)
        assert 0.5 < gates[expert].item() < 0.9  # and not shut
        logits = tokens @ ridge_of(features, 0.1).T
        assert logits.softmax(1).mean(0)[expert].item() > 0.5
        assert logits.mean(0)[expert].item() < 1 / TEMPERATURE


def ridge_of(features: list[Tensor], strength: float) -> Tensor:
    sums = FeatureSums(len(features), features[0].shape[1])
    for expert, batch in enumerate(features):
        sums.add(expert, batch)
    return sums.ridge_router(strength)


@pytest.mark.parametrize("strength", [1e-3, 0.1, 10.0])
def test_ridge_is_least_squares_with_a_penalty(strength: float) -> None:
    features = domains(3, 16, 40)
    x, y = torch.cat(features).double(), one_hot(features)
    penalty = strength * (x.T @ x).diagonal().mean()
    # the same minimum as plain least squares on the data with sqrt(penalty) times the identity below it
    stacked = torch.cat([x, penalty.sqrt() * torch.eye(16, dtype=torch.float64)])
    expected = torch.linalg.lstsq(stacked, torch.cat([y, torch.zeros(16, 3, dtype=torch.float64)])).solution
    got = ridge_router(x.T @ x, x.T @ y, strength)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double() * TEMPERATURE, expected.T, rtol=1e-5, atol=1e-6)


def test_ridge_sees_through_a_direction_that_dwarfs_what_tells_the_domains_apart() -> None:
    features = domains(2, 16, 400, lean=1.0)
    loud = torch.zeros(16)
    loud[3] = 1.0
    generator = torch.Generator().manual_seed(0)
    features = [batch + 50 * torch.randn(len(batch), 1, generator=generator) * loud for batch in features]
    rows = ridge_of(features, 1e-6)
    right = [((batch @ rows.T).argmax(1) == expert).float().mean() for expert, batch in enumerate(features)]
    assert min(right) > 0.9
    assert rows[:, 3].abs().max() < 0.02 * rows.norm(dim=1).max()


def test_ridge_leaves_its_arguments_as_they_are() -> None:
    gram, moments = torch.eye(3, dtype=torch.float64) * 2, torch.ones(3, 2, dtype=torch.float64)
    rows = ridge_router(gram, moments, 0.5)
    assert torch.equal(gram, torch.eye(3, dtype=torch.float64) * 2)
    torch.testing.assert_close(rows, torch.full((2, 3), 1 / 3 / TEMPERATURE))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=25)
def test_a_stream_gives_what_the_whole_gives(cuts: list[int], dtype: torch.dtype) -> None:
    features = [batch.to(dtype) for batch in domains(2, 8, sum(cuts))]
    sums = FeatureSums(2, 8)
    for expert, whole in enumerate(features):
        for batch in whole.split(cuts):
            sums.add(expert, batch)
    x = torch.cat(features).double()
    torch.testing.assert_close(sums.gram, x.T @ x)
    torch.testing.assert_close(sums.moments, x.T @ one_hot(features))
    assert sums.tokens == [sum(cuts)] * 2
    torch.testing.assert_close(sums.centroid_router(), centroid_router(features))


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_centroid_without_a_direction_is_named(value: float) -> None:
    with pytest.raises(UserError, match="no row for expert 1: the mean of its 4 tokens"):
        centroid_router([torch.ones(4, 3), torch.full((4, 3), value)])


def test_an_expert_without_tokens_is_named() -> None:
    sums = FeatureSums(2, 3)
    sums.add(0, torch.ones(4, 3))
    with pytest.raises(UserError, match="expert 1: the mean of its 0 tokens"):
        sums.centroid_router()


@pytest.mark.parametrize("gram", [torch.zeros(3, 3), torch.ones(3, 3), torch.full((3, 3), float("nan"))])
def test_ridge_without_a_solution_says_what_to_do(gram: Tensor) -> None:
    with pytest.raises(UserError, match="no solution"):
        ridge_router(gram, torch.ones(3, 2), 0.0)


@pytest.mark.parametrize(("kind", "chunks", "copies"), [("split", 3, 1), ("virtual", 2, 2), ("copies", 1, 2)])
def test_repeated_rows_lie_where_their_source_s_experts_do(kind: str, chunks: int, copies: int) -> None:
    rows = repeat_rows(torch.arange(4.0).unsqueeze(1).expand(4, 5), chunks * copies)
    assert rows.shape == (expert_count(kind, 4, chunks, copies), 5)  # type: ignore[arg-type]
    for expert, row in enumerate(rows):
        (span,) = expert_units(kind, expert, 4, 12, chunks, copies)  # type: ignore[arg-type]
        assert row.eq(span.source).all()
