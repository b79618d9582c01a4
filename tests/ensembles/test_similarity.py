"""BTM by similarity: cosines against scikit-learn's own, top-k, and no leak from labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from ensemble_cases import SEEDS, WORDS, log_probabilities, texts_of
from hypothesis import given, settings
from hypothesis import strategies as st

from btx_megatron.ensembles.contexts import Contexts, contexts_of
from btx_megatron.ensembles.mixture import active_experts, mix
from btx_megatron.ensembles.similarity import fit_expert_texts, similarity_weights
from btx_megatron.errors import UserError

VOCABULARY = [word for words in WORDS.values() for word in words]
EXPERTS = fit_expert_texts({name: texts_of(name, 20) for name in WORDS})


def decode(tokens: Sequence[int]) -> str:
    return " ".join(VOCABULARY[token] for token in tokens)


def one_context(text: str) -> Contexts:
    return Contexts([[text]], 4, 4)


def plain_tfidf(text: str, corpus: list[str]) -> dict[str, float]:
    """In dictionaries, from the definition."""
    counts = Counter(text.lower().split())
    known = Counter(word for other in corpus for word in set(other.lower().split()))
    vector = {
        w: n * (np.log((1 + len(corpus)) / (1 + known[w])) + 1) for w, n in counts.items() if w in known
    }
    length = np.sqrt(sum(v * v for v in vector.values()))
    return {word: value / length for word, value in vector.items()}


def test_cosines_are_those_of_the_definition() -> None:
    samples = {"a": ["one two two", "three two"], "b": ["four one one", "five six four"], "c": ["seven two"]}
    corpus = [text for texts in samples.values() for text in texts]
    context = "Two one SIX unheard"
    query = plain_tfidf(context, corpus)
    expected = []
    for texts in samples.values():
        vectors = [plain_tfidf(text, corpus) for text in texts]
        mean = {w: sum(v.get(w, 0) for v in vectors) / len(vectors) for v in vectors for w in v}
        length = np.sqrt(sum(v * v for v in mean.values()))
        expected.append(sum(query.get(w, 0) * v for w, v in mean.items()) / length)
    experts = fit_expert_texts(samples)
    assert experts.cosines([context])[0] == pytest.approx(expected)
    first, second, third = sorted(range(3), key=lambda e: -expected[e])
    top2 = np.exp(similarity_weights(experts, one_context(context), 2))[:, 0, 0]
    both = expected[first] + expected[second]
    assert top2[[first, second, third]] == pytest.approx([expected[first] / both, expected[second] / both, 0])


@pytest.mark.parametrize("name", list(WORDS))
def test_a_text_goes_to_the_expert_of_its_domain(name: str) -> None:
    text = texts_of(name, 1, seed=9)[0]
    weights = np.exp(similarity_weights(EXPERTS, one_context(text), 1))
    assert weights[:, 0, 0].tolist() == [float(other == name) for other in WORDS]


@given(SEEDS, st.integers(1, 3))
@settings(max_examples=30)
def test_weights_sum_to_1_over_at_most_top_k_experts(seed: int, top_k: int) -> None:
    rng = np.random.default_rng(seed)
    mask = np.ones((2, 8))
    contexts = contexts_of(rng.integers(0, len(VOCABULARY), (2, 8)), mask, decode, 3)
    log_w = similarity_weights(EXPERTS, contexts, top_k)
    assert np.exp(log_w).sum(axis=0) == pytest.approx(np.ones((2, 8)))
    assert active_experts(log_w, mask) <= top_k
    cosines = EXPERTS.cosines(contexts.flat)
    if top_k == 3:
        shares = cosines / cosines.sum(axis=1, keepdims=True)
        assert np.exp(log_w[:, :, ::3].reshape(3, -1).T) == pytest.approx(shares)


@given(SEEDS, st.integers(0, 11))
@settings(max_examples=30)
def test_no_label_moves_its_own_weights(seed: int, position: int) -> None:
    """Every token from a position's label on is another one; the mixture up to there is the same to a bit."""
    rng = np.random.default_rng(seed)
    stream = rng.integers(0, len(VOCABULARY), 13)
    changed = stream.copy()
    changed[position + 1 :] = (changed[position + 1 :] + 1 + rng.integers(0, 28)) % len(VOCABULARY)
    mask, log_p = np.ones((1, 12)), log_probabilities(seed, windows=1, positions=12)
    mixed = [
        mix(log_p, similarity_weights(EXPERTS, contexts_of(tokens[None, :-1], mask, decode, 4), 2), mask)
        for tokens in (stream, changed)
    ]
    assert np.array_equal(mixed[0][:, : position + 1], mixed[1][:, : position + 1])


def test_a_later_block_does_see_earlier_tokens() -> None:
    """The counterpart of the test above: contexts are renewed."""
    tokens = np.array([[25] * 4 + [0] * 8])  # wiki, then math
    log_w = similarity_weights(EXPERTS, contexts_of(tokens, np.ones((1, 12)), decode, 4), 1)
    assert np.exp(log_w[:, 0, [0, 11]]).T.tolist() == [[0, 0, 1], [1, 0, 0]]


def test_a_context_that_says_nothing_goes_to_the_middle_and_stays_top_k() -> None:
    samples = {"left": ["ape ape bee"], "middle": ["ape bee cow"], "right": ["cow cow bee"]}
    experts = fit_expert_texts(samples)
    weights = np.exp(similarity_weights(experts, one_context("?"), 1))
    assert weights[:, 0, 0].tolist() == [0, 1, 0]


def test_the_order_of_experts_does_not_matter() -> None:
    samples = {name: texts_of(name, 5) for name in WORDS}
    backwards = fit_expert_texts(dict(reversed(samples.items())))
    contexts = one_context("theorem river proof def")
    weights = np.exp(similarity_weights(fit_expert_texts(samples), contexts, 2))
    assert np.exp(similarity_weights(backwards, contexts, 2))[::-1] == pytest.approx(weights)


def test_mistakes() -> None:
    with pytest.raises(UserError, match="expert b: no known word in its 1 sample texts"):
        fit_expert_texts({"a": ["one two"], "b": ["?!"]})
    with pytest.raises(UserError, match="expert samples: no words"):
        fit_expert_texts({"a": ["?"], "b": ["!"]})
    with pytest.raises(UserError, match="single word"):
        fit_expert_texts({"a": ["same"], "b": ["same same"]})
    with pytest.raises(UserError, match="top_k 4"):
        similarity_weights(EXPERTS, one_context("theorem"), 4)
