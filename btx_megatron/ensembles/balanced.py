"""k-means whose clusters have equally many members: at most one apart.

scikit-learn starts it (k-means++); the balanced assignment it does not have. That is a transport problem,
solved exactly: every point goes to its cheapest cluster under prices that even the sizes out, roughly; then
one point after the other is moved from a cluster that has too many to one that has too few, along the
cheapest chain of moves. Under prices the start is optimal for the sizes it has, and cheapest chains keep it
so (successive shortest paths). Time goes with what the prices leave to be moved, memory with points x
clusters; a dense assignment solver would need points x points.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import kmeans_plusplus

from btx_megatron.ensembles.mixture import Floats

Labels = NDArray[np.int64]

RESTARTS = 4
_MAX_ROUNDS = 50
_PRICE_STEPS = 100


def balanced_kmeans(points_NC: Floats, clusters: int, random_seed: int) -> Floats:
    """Centres [clusters, C] of N >= clusters points: of ``RESTARTS`` runs the one with the closest points."""
    best, centres = np.inf, np.empty(0)
    for start in range(RESTARTS):
        seed = np.random.default_rng((random_seed, start)).integers(2**31)
        found = _lloyd(points_NC, kmeans_plusplus(points_NC, clusters, random_state=int(seed))[0])
        squared = squared_distances(points_NC, found)
        cost = squared[np.arange(len(points_NC)), balanced_assignment(squared)].sum()
        if cost < best:
            best, centres = cost, found
    return centres


def _lloyd(points_NC: Floats, centres_KC: Floats) -> Floats:
    labels: Labels | None = None
    for _ in range(_MAX_ROUNDS):
        before, labels = labels, balanced_assignment(squared_distances(points_NC, centres_KC))
        if before is not None and np.array_equal(before, labels):
            break
        centres_KC = np.stack([points_NC[labels == k].mean(axis=0) for k in range(len(centres_KC))])
    return centres_KC


def squared_distances(points_NC: Floats, centres_KC: Floats) -> Floats:
    """Squared Euclidean distance [N, K]."""
    return np.stack([((points_NC - centre) ** 2).sum(axis=1) for centre in centres_KC], axis=1)


def balanced_assignment(cost_NK: Floats) -> Labels:
    """Cluster of each point [N], sizes at most one apart, at the least total cost for these sizes.

    Where N is no multiple of K, the clusters that most points would like best are one larger.
    """
    points, clusters = cost_NK.shape
    wanted = np.bincount(cost_NK.argmin(axis=1), minlength=clusters)
    size_K = np.full(clusters, points // clusters)
    size_K[np.argsort(-wanted, kind="stable")[: points % clusters]] += 1
    labels = (cost_NK + _prices(cost_NK, size_K)).argmin(axis=1)
    move_KK, who_KK = np.full((clusters, clusters), np.inf), np.zeros((clusters, clusters), dtype=np.int64)
    changed = list(range(clusters))
    rounding = 1e-12 * float(np.abs(cost_NK).max(initial=0.0))
    while True:
        for cluster in changed:
            _find_cheapest_moves(cost_NK, labels, cluster, move_KK, who_KK)
        surplus_K = np.bincount(labels, minlength=clusters) - size_K
        if not surplus_K.any():
            return labels
        changed = _cheapest_chain(move_KK, surplus_K, rounding)
        for source, target in pairwise(changed):
            labels[who_KK[source, target]] = target


def _prices(cost_NK: Floats, size_K: Labels) -> Floats:
    """Prices of the clusters under which the cheapest choices have about these sizes (subgradient steps)."""
    prices = np.zeros(len(size_K))
    scale = float(np.ptp(cost_NK)) if cost_NK.size else 0.0
    for step in range(_PRICE_STEPS):
        sizes = np.bincount((cost_NK + prices).argmin(axis=1), minlength=len(size_K))
        prices += scale / (step + 1) * (sizes - size_K) / len(cost_NK)
    return prices


def _find_cheapest_moves(
    cost_NK: Floats, labels: Labels, cluster: int, move_KK: Floats, who_KK: Labels
) -> None:
    """Fill a cluster's row: what its cheapest move to each other cluster costs, and whose move that is."""
    members = np.flatnonzero(labels == cluster)
    move_KK[cluster] = np.inf
    if len(members):
        extra = cost_NK[members] - cost_NK[members, cluster, None]
        first = extra.argmin(axis=0)
        who_KK[cluster] = members[first]
        move_KK[cluster] = extra[first, np.arange(len(move_KK))]
    move_KK[cluster, cluster] = np.inf


def _cheapest_chain(move_KK: Floats, surplus_K: Labels, rounding: float) -> list[int]:
    """Clusters from one with too many to one with too few, by the cheapest moves (Bellman and Ford).

    A gain up to ``rounding`` is none: a circle of moves that cost nothing would else look worth a walk.
    """
    distance = np.where(surplus_K > 0, 0.0, np.inf)
    before = np.full(len(surplus_K), -1)
    for _ in range(len(surplus_K)):
        through = distance[:, None] + move_KK
        best = through.argmin(axis=0)
        cheaper = through.min(axis=0) < distance - rounding
        if not cheaper.any():
            break
        before[cheaper] = best[cheaper]
        distance = np.where(cheaper, through.min(axis=0), distance)
    chain = [int(np.where(surplus_K < 0, distance, np.inf).argmin())]
    while before[chain[0]] >= 0:
        chain.insert(0, int(before[chain[0]]))
        assert len(chain) <= len(surplus_K), "the cheapest chain runs in a circle"
    return chain
