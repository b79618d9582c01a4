"""c-BTM: clusters that are domains, equal shares, softmax of distances, files without pickle."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from ensemble_cases import SEEDS, WORDS, texts_of
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer

from btx_megatron.ensembles import clusters as module
from btx_megatron.ensembles.cluster_files import load_clusters, save_clusters
from btx_megatron.ensembles.clusters import Clusters, cluster_weights, deal, fit_clusters
from btx_megatron.ensembles.contexts import Contexts
from btx_megatron.ensembles.mixture import active_experts
from btx_megatron.errors import UserError

TEXTS = [text for name in WORDS for text in texts_of(name, 20)]
DOMAIN = np.repeat(np.arange(3), 20)
CLUSTERS = fit_clusters(TEXTS, 3, random_seed=0)


def test_domains_are_found_without_labels() -> None:
    labels = deal(CLUSTERS, TEXTS, random_seed=0)
    pairs = set(zip(DOMAIN.tolist(), labels.tolist(), strict=True))
    assert len(pairs) == 3  # one cluster a domain
    assert len({label for _, label in pairs}) == 3
    fresh = CLUSTERS.nearest([texts_of(name, 1, seed=5)[0] for name in WORDS])
    assert {(domain, int(label)) for domain, label in enumerate(fresh)} == pairs
    for domain, label in pairs:
        assert set(CLUSTERS.words(5)[label]) <= set(list(WORDS.values())[domain])


def test_points_are_those_of_scikit_learns_pipeline() -> None:
    pipeline = make_pipeline(TfidfVectorizer(), TruncatedSVD(30, random_state=0), Normalizer())
    expected = pipeline.fit_transform(sorted(TEXTS))
    fitted = fit_clusters(sorted(TEXTS), 3, random_seed=0)
    assert fitted.points(sorted(TEXTS)) == pytest.approx(expected, abs=1e-9)


@given(SEEDS, st.integers(1, 60), st.integers(1, 7))
@settings(max_examples=25)
def test_dealt_sizes_are_at_most_one_apart(seed: int, documents: int, clusters: int) -> None:
    chosen = np.random.default_rng(seed).choice(TEXTS, documents).tolist()
    if documents < clusters:
        with pytest.raises(UserError, match=f"{clusters} clusters of {documents} documents"):
            fit_clusters(chosen, clusters, random_seed=seed)
        return
    fitted = fit_clusters(chosen, clusters, random_seed=seed)
    sizes = np.bincount(deal(fitted, chosen, seed), minlength=clusters)
    assert sizes.max() - sizes.min() <= 1


def test_a_sorted_corpus_dealt_in_many_lots_is_not_cut_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DEALT_AT_ONCE", 31)
    texts = [text for name in WORDS for text in texts_of(name, 100, seed=3)]
    labels = deal(CLUSTERS, texts, random_seed=2)
    sizes = np.bincount(labels)
    assert sizes.max() - sizes.min() <= 1
    assert (labels == CLUSTERS.nearest(texts)).mean() > 0.85  # by chance a lot has a few more of one domain


def test_the_seed_decides_and_only_the_seed() -> None:
    again = fit_clusters(TEXTS, 3, random_seed=0)
    assert np.array_equal(again.centres_KC, CLUSTERS.centres_KC)
    assert np.array_equal(deal(again, TEXTS, 7), deal(CLUSTERS, TEXTS, 7))
    assert not np.array_equal(fit_clusters(TEXTS, 3, random_seed=1).centres_KC, CLUSTERS.centres_KC)


def test_a_sample_is_fitted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIT_DOCUMENTS", 30)
    fitted = fit_clusters(TEXTS, 3, random_seed=0)
    labels = deal(fitted, TEXTS, random_seed=0)
    assert len(set(zip(DOMAIN.tolist(), labels.tolist(), strict=True))) == 3


@given(SEEDS, st.sampled_from([0.05, 0.1, 2.0]), st.sampled_from([None, 1, 2, 3]))
@settings(max_examples=30)
def test_weights_are_a_softmax_of_squared_distances(seed: int, temperature: float, top_k: int | None) -> None:
    rng = np.random.default_rng(seed)
    words = [word for of in WORDS.values() for word in of]
    texts = [[" ".join(rng.choice(words, 4)) for _ in range(2)] for _ in range(3)]
    log_w = cluster_weights(CLUSTERS, Contexts(texts, 3, 5), top_k, temperature)
    assert log_w.shape == (3, 3, 5)
    for w, s in np.ndindex(3, 5):
        point = CLUSTERS.points([texts[w][s // 3]])[0]
        raw = [math.exp(-(math.dist(point, centre) ** 2) / temperature) for centre in CLUSTERS.centres_KC]
        best = sorted(range(3), key=lambda k: -raw[k])[:top_k]
        expected = [raw[k] / sum(raw[i] for i in best) if k in best else 0 for k in range(3)]
        assert np.exp(log_w[:, w, s]) == pytest.approx(expected)
    assert active_experts(log_w, np.ones((3, 5))) == (top_k or 3)


def test_a_context_that_says_nothing_still_has_weights() -> None:
    weights = np.exp(cluster_weights(CLUSTERS, Contexts([["?"]], 1, 1)))
    assert weights.sum() == pytest.approx(1)


def test_they_come_back_from_disk_as_they_went(tmp_path: Path) -> None:
    save_clusters(CLUSTERS, tmp_path)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    back = load_clusters(tmp_path)
    assert np.array_equal(back.squared_distances(TEXTS), CLUSTERS.squared_distances(TEXTS))
    save_clusters(back, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first
    assert json.loads(first["clusters.json"])["heaviest_words"] == CLUSTERS.words()


def other_fit(folder: Path) -> None:
    other = fit_clusters(TEXTS[:30], 2, random_seed=0)
    (folder / "other").mkdir()
    save_clusters(other, folder / "other")
    (folder / "other" / "clusters.npz").rename(folder / "clusters.npz")


def pickled(folder: Path) -> None:
    np.savez(folder / "clusters.npz", idf=np.array([{}], dtype=object), directions=0, centres=0)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "clusters.npz").unlink(), r"clusters\.npz: not there"),
        (lambda folder: (folder / "clusters.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "clusters.json").write_text("{}"), "cannot be read"),
        (lambda folder: (folder / "clusters.json").write_text('{"version": 9, "terms": []}'), "version 9"),
        (lambda folder: (folder / "clusters.npz").write_bytes(b"PK\x03\x04 no"), "cannot be read"),
        (lambda folder: (folder / "clusters.npz").write_bytes(b""), "cannot be read"),
        (pickled, "cannot be read.*allow_pickle=False"),
        (other_fit, "of different fits"),
    ],
)
def test_spoilt_files_are_one_line(tmp_path: Path, spoil: object, said: str) -> None:
    save_clusters(CLUSTERS, tmp_path)
    spoil(tmp_path)  # type: ignore[operator]
    with pytest.raises(UserError, match=said) as error:
        load_clusters(tmp_path)
    assert "\n" not in str(error.value)


def test_mistakes() -> None:
    with pytest.raises(UserError, match="temperature 0"):
        cluster_weights(CLUSTERS, Contexts([["x"]], 1, 1), temperature=0)
    with pytest.raises(UserError, match="top_k 4"):
        cluster_weights(CLUSTERS, Contexts([["x"]], 1, 1), top_k=4)
    with pytest.raises(UserError, match="documents to cluster: no words"):
        fit_clusters(["?", "!"], 2, random_seed=0)
    with pytest.raises(UserError, match="0 clusters of 60 documents"):
        fit_clusters(TEXTS, 0, random_seed=0)


def test_distances_do_not_lose_digits() -> None:
    """|x|^2 - 2 x c + |c|^2 would: a point on its centre has the distance 0."""
    on_it = Clusters(CLUSTERS.tfidf, CLUSTERS.directions_CV, CLUSTERS.points(TEXTS[:2]))
    assert on_it.squared_distances(TEXTS[:2]).diagonal().tolist() == [0, 0]
