"""BTM's posterior against Bayes in plain probabilities, token after token."""

from __future__ import annotations

import math

import numpy as np
import pytest
from ensemble_cases import SEEDS, log_probabilities, random_mask
from hypothesis import given
from hypothesis import strategies as st

from btx_megatron.ensembles.mixture import active_experts, mix
from btx_megatron.ensembles.posterior import Prior, cached_prior, parameter_weights, posterior_weights
from btx_megatron.errors import UserError


def bayes(p_ES: np.ndarray, counted_S: np.ndarray, prior: list[float]) -> list[list[float]]:
    """[S][E]: the belief before each token, moved by one token at a time."""
    belief, before = list(prior), []
    for s, counted in enumerate(counted_S):
        before.append(belief)
        if counted:
            joint = [b * p for b, p in zip(belief, p_ES[:, s], strict=True)]
            belief = [j / sum(joint) for j in joint]
    return before


@given(SEEDS, st.booleans())
def test_the_posterior_is_bayes_token_by_token(seed: int, cached: bool) -> None:
    log_p, mask = log_probabilities(seed, windows=3), random_mask(seed, windows=3)
    prior = [0.2, 0.5, 0.3] if cached else [1 / 3] * 3
    weights = np.exp(posterior_weights(log_p, mask, prior if cached else "uniform"))
    for w in range(3):
        assert pytest.approx(np.array(bayes(np.exp(log_p[:, w]), mask[w], prior))) == weights[:, w].T


@given(SEEDS, st.sampled_from([0.3, 0.1, 1.0]))
def test_the_updating_prior_is_a_moving_average_of_what_windows_said(seed: int, decay: float) -> None:
    log_p, mask = log_probabilities(seed, windows=4), random_mask(seed, windows=4)
    mask[2] = 0  # a window that says nothing moves nothing
    weights = np.exp(posterior_weights(log_p, mask, "updating", decay=decay))
    prior = [1 / 3] * 3
    for w in range(4):
        said = np.array(bayes(np.exp(log_p[:, w]), mask[w], prior))
        assert pytest.approx(said) == weights[:, w].T
        if mask[w].any():
            prior = [
                (1 - decay) * a + decay * b for a, b in zip(prior, said[mask[w] > 0].mean(0), strict=True)
            ]


@given(SEEDS, st.sampled_from(["uniform", "updating"]))
def test_the_mixture_of_a_window_is_the_mixture_of_whole_texts(seed: int, prior: Prior) -> None:
    """The chain rule: token mixtures under the posterior multiply to sum_j p(D=j) p(x | D=j)."""
    log_p, mask = log_probabilities(seed), random_mask(seed)
    log_w = posterior_weights(log_p, mask, prior)
    whole = np.exp(log_w[:, :, 0] + (log_p * mask).sum(axis=2)).sum(axis=0)  # of position 0: the prior
    assert mix(log_p, log_w, mask).sum(axis=1) == pytest.approx(np.log(whole))


@given(SEEDS, st.sampled_from(["uniform", "updating"]), st.sampled_from([None, 1, 2]))
def test_weights_sum_to_1_and_the_order_of_experts_does_not_matter(
    seed: int, prior: Prior, top_k: int | None
) -> None:
    log_p, mask = log_probabilities(seed), random_mask(seed)
    weights = np.exp(posterior_weights(log_p, mask, prior, top_k))
    assert weights.sum(axis=0) == pytest.approx(np.ones(mask.shape))
    order = [2, 0, 1]
    if top_k is None:  # before the first token all are equal, and top-k takes the first ones
        assert np.exp(posterior_weights(log_p[order], mask, prior)) == pytest.approx(weights[order])


@given(SEEDS, st.sampled_from(["uniform", "updating"]))
def test_equal_experts_are_one_expert(seed: int, prior: Prior) -> None:
    one, mask = log_probabilities(seed, experts=1), random_mask(seed)
    log_p = np.repeat(one, 4, axis=0)
    mixed = mix(log_p, posterior_weights(log_p, mask, prior), mask)
    assert mixed == pytest.approx(np.where(mask > 0, one[0], 0), abs=1e-14)


@given(SEEDS, st.sampled_from(["uniform", "updating"]))
def test_top_k_of_all_is_dense(seed: int, prior: Prior) -> None:
    log_p, mask = log_probabilities(seed), random_mask(seed)
    dense = posterior_weights(log_p, mask, prior)
    assert posterior_weights(log_p, mask, prior, top_k=3) == pytest.approx(dense)
    assert active_experts(posterior_weights(log_p, mask, prior, top_k=2), mask) == 2


@given(SEEDS, st.integers(0, 4), st.sampled_from(["uniform", "updating"]))
def test_no_label_moves_its_own_weights_or_earlier_ones(seed: int, position: int, prior: Prior) -> None:
    log_p, mask = log_probabilities(seed), random_mask(seed)
    changed = log_p.copy()
    changed[:, 1, position:] = log_probabilities(seed + 1)[:, 1, position:]
    before, after = (posterior_weights(p, mask, prior) for p in (log_p, changed))
    assert np.array_equal(before[:, 0], after[:, 0])
    assert np.array_equal(before[:, 1, : position + 1], after[:, 1, : position + 1])


def test_long_texts_neither_overflow_nor_lose_an_expert_for_good() -> None:
    """4,000 tokens for one expert, then 4,000 for the other: e^-4000 is no fp64 number, its log is."""
    log_p = np.full((2, 2, 4000), -1.0)
    log_p[1, 0], log_p[0, 1] = -2.0, -2.0
    mask = np.ones((2, 4000))
    weights = np.exp(posterior_weights(log_p, mask, "updating"))
    assert weights[:, 0, -1] == pytest.approx([1, 0])
    assert weights[:, 1, 0] == pytest.approx([0.65, 0.35], abs=1e-3)  # 0.7 * 1/2 + 0.3 * 1, nearly
    assert weights[:, 1, -1] == pytest.approx([0, 1])


def test_what_is_not_counted_may_be_garbage() -> None:
    log_p, mask = log_probabilities(3), random_mask(3)
    spoilt = np.where(mask > 0, log_p, math.nan)
    assert np.array_equal(posterior_weights(spoilt, mask), posterior_weights(log_p, mask))
    with pytest.raises(ValueError, match="expert 0"):
        posterior_weights(spoilt, np.ones_like(mask))


@given(SEEDS)
def test_the_cached_prior_is_the_mean_posterior(seed: int) -> None:
    log_p, mask = log_probabilities(seed), random_mask(seed)
    beliefs = [
        belief
        for w in range(2)
        for belief, counted in zip(bayes(np.exp(log_p[:, w]), mask[w], [1 / 3] * 3), mask[w], strict=True)
        if counted
    ]
    prior = cached_prior(log_p, mask)
    assert prior == pytest.approx(np.mean(beliefs, axis=0))
    assert prior.sum() == pytest.approx(1)
    named = parameter_weights(["math", "code", "wiki"], log_p, mask)
    assert named == dict(zip(["math", "code", "wiki"], prior.tolist(), strict=True))
    swapped = cached_prior(log_p[:, ::-1], mask[::-1])
    assert swapped == pytest.approx(prior)


def test_a_prior_of_0_leaves_an_expert_out() -> None:
    log_p, mask = log_probabilities(5), random_mask(5)
    weights = np.exp(posterior_weights(log_p, mask, [0.5, 0, 0.5]))
    assert (weights[1] == 0).all()
    assert weights[[0, 2]] == pytest.approx(np.exp(posterior_weights(log_p[[0, 2]], mask)))


@pytest.mark.parametrize("prior", [[0.5, 0.5], [0.6, 0.6, -0.2], [0.3, 0.3, 0.3], [math.nan, 0.5, 0.5]])
def test_a_prior_that_is_none_is_loud(prior: list[float]) -> None:
    with pytest.raises(ValueError, match="3 probabilities"):
        posterior_weights(log_probabilities(0), random_mask(0), prior)


def test_mistakes() -> None:
    with pytest.raises(UserError, match="top_k 9"):
        posterior_weights(log_probabilities(0), random_mask(0), top_k=9)
    with pytest.raises(ValueError, match="decay"):
        posterior_weights(log_probabilities(0), random_mask(0), "updating", decay=0)
