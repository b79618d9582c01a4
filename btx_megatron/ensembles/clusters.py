"""c-BTM: domains found in the text itself, experts weighted by how near the context is (2303.14177).

A text is its tf-idf vector, projected on the ``dimensions`` main directions (truncated SVD) and scaled to
length 1, as in c-BTM's published code; without the projection all distances between texts are nearly equal,
and a softmax over them says nothing. Balanced k-means on a sample of the documents finds the centres.

- Training: ``deal`` gives every document a cluster, equally many to each, so that experts get equal data. It
  is equal in documents, not in tokens.
- Inference: p(D=j | context) is proportional to exp(-distance^2 / T), T = 0.1, and only the top-k stay. No
  balance is asked for here: what is read cannot be shared out.

Deterministic for a ``random_seed`` on one machine; on another the last bits of the SVD may differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.decomposition import TruncatedSVD

from btx_megatron.ensembles.balanced import Labels, balanced_assignment, balanced_kmeans, squared_distances
from btx_megatron.ensembles.contexts import Contexts
from btx_megatron.ensembles.mixture import Floats, keep_top
from btx_megatron.ensembles.tfidf import MAX_TERMS, TfIdf, fit_tfidf
from btx_megatron.errors import UserError

TEMPERATURE = 0.1
DIMENSIONS = 100
FIT_DOCUMENTS = 16_384
_DEALT_AT_ONCE = 4096


@dataclass(frozen=True)
class Clusters:
    """``directions_CV`` [dimensions, terms] and ``centres_KC`` [clusters, dimensions]."""

    tfidf: TfIdf
    directions_CV: Floats
    centres_KC: Floats

    def points(self, texts: Sequence[str]) -> Floats:
        """Points [texts, C] of length 1; the origin for a text without a known word."""
        projected = np.asarray(self.tfidf.vectors(texts) @ self.directions_CV.T)
        length = np.linalg.norm(projected, axis=1, keepdims=True)
        return np.divide(projected, length, out=np.zeros_like(projected), where=length > 0)

    def squared_distances(self, texts: Sequence[str]) -> Floats:
        """Squared distance [texts, K] to each centre."""
        return squared_distances(self.points(texts), self.centres_KC)

    def nearest(self, texts: Sequence[str]) -> Labels:
        """The nearest cluster of each text: what a single document is, whatever else there is."""
        return self.squared_distances(texts).argmin(axis=1)

    def words(self, count: int = 10) -> list[list[str]]:
        """Each cluster's ``count`` heaviest words: what a domain without a label is about."""
        weight_KV = self.centres_KC @ self.directions_CV
        return [[self.tfidf.terms[i] for i in np.argsort(-row, kind="stable")[:count]] for row in weight_KV]


def fit_clusters(
    texts: Sequence[str],
    clusters: int,
    random_seed: int,
    dimensions: int = DIMENSIONS,
    max_terms: int = MAX_TERMS,
) -> Clusters:
    """Find ``clusters`` domains in the documents, from ``FIT_DOCUMENTS`` of them drawn with the seed at most.

    Raises UserError for fewer documents than clusters, and for documents without words.
    """
    if not 1 <= clusters <= len(texts):
        raise UserError(
            f"{clusters} clusters of {len(texts)} documents; give at least one, and a document for each"
        )
    order = np.random.default_rng(random_seed).permutation(len(texts))[: max(FIT_DOCUMENTS, clusters)]
    sample = [texts[i] for i in sorted(order)]
    tfidf = fit_tfidf(sample, "documents to cluster", max_terms)
    svd = TruncatedSVD(min(dimensions, len(tfidf.terms), len(sample)), random_state=random_seed)
    with np.errstate(invalid="ignore"):  # texts that are all one have no variance to explain
        svd.fit(tfidf.vectors(sample))
    unplaced = Clusters(tfidf, np.asarray(svd.components_), np.zeros((clusters, len(svd.components_))))
    centres = balanced_kmeans(unplaced.points(sample), clusters, random_seed)
    return Clusters(tfidf, unplaced.directions_CV, centres)


def deal(clusters: Clusters, texts: Sequence[str], random_seed: int) -> Labels:
    """Cluster of each training document [texts]; sizes are at most one apart.

    Dealt some thousands at a time, each lot balanced, in an order shuffled with the seed: a corpus that holds
    one domain after the other would otherwise have each of them cut up.
    """
    count = len(clusters.centres_KC)
    lot = (
        max(1, _DEALT_AT_ONCE // count) * count
    )  # whole lots are equal to a document, so only the last one is not
    order = np.random.default_rng(random_seed).permutation(len(texts))
    labels = np.empty(len(texts), dtype=np.int64)
    for start in range(0, len(texts), lot):
        chosen = order[start : start + lot]
        labels[chosen] = balanced_assignment(clusters.squared_distances([texts[i] for i in chosen]))
    return labels


def cluster_weights(
    clusters: Clusters, contexts: Contexts, top_k: int | None = None, temperature: float = TEMPERATURE
) -> Floats:
    """Log-weights [E, W, S] for ``mixture.mix``: softmax(-distance^2 / T), the ``top_k`` largest.

    Raises UserError for a temperature that is not above 0 and a ``top_k`` that cannot be.
    """
    if not temperature > 0:
        raise UserError(
            f"temperature {temperature}: weights are exp(-distance^2 / T); give a T above 0, as 0.1"
        )
    squared_EN = clusters.squared_distances(contexts.flat).T
    return contexts.spread(keep_top(-squared_EN / temperature, top_k))
