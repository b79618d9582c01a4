"""The balanced assignment against a dense assignment solver, and k-means that is balanced."""

from __future__ import annotations

import numpy as np
import pytest
from ensemble_cases import SEEDS
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from btx_megatron.ensembles.balanced import balanced_assignment, balanced_kmeans, squared_distances


def least_cost(cost_NK: np.ndarray, size_K: np.ndarray) -> float:
    """Each cluster as so many columns as it has places."""
    columns = np.repeat(np.arange(len(size_K)), size_K)
    rows, chosen = linear_sum_assignment(cost_NK[:, columns])
    return float(cost_NK[rows, columns[chosen]].sum())


@given(SEEDS, st.integers(1, 40), st.integers(1, 6), st.sampled_from(["even", "crowded", "ties", "equal"]))
@settings(max_examples=200)
def test_sizes_are_at_most_one_apart_at_the_least_cost(
    seed: int, points: int, clusters: int, kind: str
) -> None:
    rng = np.random.default_rng(seed)
    cost = rng.uniform(size=(points, clusters))
    if kind == "crowded":  # all of them like the first cluster best
        cost[:, 0] -= 2
    elif kind == "ties":
        cost = np.round(cost * 3)
    elif kind == "equal":
        cost[:] = 1.5
    labels = balanced_assignment(cost)
    sizes = np.bincount(labels, minlength=clusters)
    assert sizes.max() - sizes.min() <= 1
    assert cost[np.arange(points), labels].sum() == pytest.approx(least_cost(cost, sizes))


def test_the_larger_clusters_are_those_that_most_points_like() -> None:
    cost = np.array([[1.0, 0, 1]] * 7)
    assert np.bincount(balanced_assignment(cost)).tolist() == [2, 3, 2]


@pytest.mark.parametrize(("scale", "offset"), [(1e-9, 0), (1e9, 0), (1e-9, 1), (1, -1e12)])
def test_costs_of_any_size(scale: float, offset: float) -> None:
    """An offset swallows digits of the differences: the cost is the least one to what is left of them."""
    cost = offset + scale * np.random.default_rng(0).uniform(size=(60, 4)) ** 3
    labels = balanced_assignment(cost)
    extra = cost - cost[:, :1]  # exact: of numbers that near each other
    assert np.bincount(labels).tolist() == [15] * 4
    least = least_cost(extra, np.full(4, 15))
    assert extra[np.arange(60), labels].sum() == pytest.approx(least, abs=60e-12 * abs(offset), rel=1e-9)


def test_kmeans_finds_groups_of_equal_size() -> None:
    rng = np.random.default_rng(0)
    means = np.array([[0, 0], [4, 0], [0, 4]])
    points = np.concatenate([mean + rng.normal(scale=0.5, size=(30, 2)) for mean in means])
    centres = balanced_kmeans(points, 3, random_seed=1)
    order = squared_distances(means.astype(float), centres).argmin(axis=1)
    assert sorted(order) == [0, 1, 2]
    assert centres[order] == pytest.approx(means, abs=0.4)
    assert np.array_equal(centres, balanced_kmeans(points, 3, random_seed=1))


def test_centres_are_the_means_of_their_balanced_members() -> None:
    points = np.random.default_rng(3).normal(size=(50, 3))
    centres = balanced_kmeans(points, 4, random_seed=0)
    labels = balanced_assignment(squared_distances(points, centres))
    assert np.stack([points[labels == k].mean(axis=0) for k in range(4)]) == pytest.approx(centres)


def test_points_that_are_all_one() -> None:
    assert balanced_kmeans(np.ones((5, 2)), 3, random_seed=0) == pytest.approx(np.ones((3, 2)))
