"""Mixtures against sums of plain probabilities."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from ensemble_cases import SEEDS, log_probabilities, random_mask
from hypothesis import given
from hypothesis import strategies as st

from btx_megatron.ensembles.mixture import (
    active_experts,
    keep_top,
    mean_loss,
    mean_weights,
    mix,
    normalised,
)
from btx_megatron.errors import UserError

THIRDS = np.full((3, 1, 1), -math.log(3))


@given(SEEDS)
def test_a_mixture_is_the_weighted_sum_of_probabilities(seed: int) -> None:
    log_p, mask = log_probabilities(seed), random_mask(seed)
    log_w = normalised(np.random.default_rng(seed).normal(size=log_p.shape))
    mixed = mix(log_p, log_w, mask)
    for w, s in np.ndindex(mask.shape):
        plain = sum(math.exp(log_w[e, w, s]) * math.exp(log_p[e, w, s]) for e in range(3))
        assert mixed[w, s] == pytest.approx(math.log(plain) if mask[w, s] else 0.0, rel=1e-12)


def test_probabilities_far_below_fp64_mix() -> None:
    log_p = np.array([-5000.0, -5001.0]).reshape(2, 1, 1)
    assert mix(log_p, np.full((2, 1, 1), -math.log(2)), [[1]])[0, 0] == pytest.approx(
        -5000 + math.log((1 + math.exp(-1)) / 2), rel=1e-15
    )


def test_fp32_input_is_mixed_in_fp64() -> None:
    log_p = log_probabilities(1).astype(np.float32)
    mixed = mix(log_p, THIRDS, np.ones((2, 5), dtype=np.float32))
    assert mixed.dtype == np.float64
    assert np.array_equal(mixed, mix(log_p.astype(np.float64), THIRDS, np.ones((2, 5))))


@given(SEEDS, st.sampled_from([math.nan, math.inf, -math.inf, 1e300]))
def test_what_has_no_weight_or_is_not_counted_has_no_influence(seed: int, garbage: float) -> None:
    log_p, mask = log_probabilities(seed), random_mask(seed)
    log_w = keep_top(np.random.default_rng(seed).normal(size=log_p.shape), 2)
    spoilt = np.where((log_w == -np.inf) | (mask == 0), garbage, log_p)
    assert np.array_equal(mix(spoilt, log_w, mask), mix(log_p, log_w, mask))


def test_a_broken_number_that_counts_is_loud() -> None:
    log_p = log_probabilities(0)
    log_p[1, 0, 3] = math.nan
    with pytest.raises(ValueError, match=r"expert 1.*window 0, position 3"):
        mix(log_p, THIRDS, np.ones((2, 5)))


@pytest.mark.parametrize("log_w", [np.zeros((3, 1, 1)), np.full((3, 1, 1), math.nan)])
def test_weights_that_do_not_sum_to_1_are_loud(log_w: np.ndarray) -> None:
    with pytest.raises(ValueError, match="do not sum to 1"):
        mix(log_probabilities(0), log_w, np.ones((2, 5)))


def test_shapes_that_do_not_fit_are_loud() -> None:
    with pytest.raises(ValueError, match="experts, windows, positions"):
        mix(log_probabilities(0), THIRDS, np.ones((5, 2)))


@given(SEEDS, st.integers(1, 5))
def test_top_k_keeps_the_largest_in_their_proportions(seed: int, top_k: int) -> None:
    weights = np.random.default_rng(seed).dirichlet(np.ones(5), size=4).T  # [5, 4]
    kept = np.exp(keep_top(np.log(weights), top_k))
    for n in range(4):
        best = sorted(range(5), key=lambda e: -weights[e, n])[:top_k]
        whole = sum(weights[e, n] for e in best)
        assert kept[:, n] == pytest.approx([weights[e, n] / whole if e in best else 0 for e in range(5)])


def test_of_equal_weights_the_first_stay() -> None:
    assert np.exp(keep_top(np.zeros((4, 1)), 2))[:, 0] == pytest.approx([0.5, 0.5, 0, 0])


@pytest.mark.parametrize("top_k", [0, 4, -1])
def test_a_top_k_that_cannot_be(top_k: int) -> None:
    with pytest.raises(UserError, match=f"top_k {top_k}: of 3 experts"):
        keep_top(np.zeros((3, 1)), top_k)


def test_the_room_needs_neither_torch_nor_megatron() -> None:
    rooms = "clusters, cluster_files, similarity, posterior, time_windows"
    found = "{'torch', 'megatron'} & set(sys.modules)"
    program = f"import sys; from btx_megatron.ensembles import {rooms}; sys.exit(bool({found}))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_all_weights_0_are_loud() -> None:
    with pytest.raises(ValueError, match="all 0"):
        normalised(np.full((2, 3), -np.inf))


def test_counts_and_shares_are_those_of_the_counted_positions() -> None:
    log_w = np.log(np.array([[[0.25, 0.5, 1]], [[0.75, 0.5, 1e-300]]]))
    log_w[1, 0, 2] = -np.inf
    assert active_experts(log_w, [[1, 1, 1]]) == pytest.approx(5 / 3)
    assert active_experts(log_w, [[0, 0, 1]]) == 1
    assert mean_weights(log_w, [[1, 1, 0]]) == pytest.approx([0.375, 0.625])
    assert mean_loss([[-1.0, -3.0, -50.0]], [[1, 1, 0]]) == 2
    with pytest.raises(ValueError, match="no position"):
        mean_loss([[-1.0]], [[0]])
