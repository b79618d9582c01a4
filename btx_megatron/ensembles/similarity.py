"""BTM as the baseline of Branch-Train-MiX (2403.07816): the experts whose texts are most like the context.

Each expert is the mean tf-idf vector of a sample of its training text. A context goes to the ``top_k``
experts by the cosine of its vector with theirs. How the outputs of two are combined the paper does not say;
here their probabilities are mixed with weights in proportion to the cosines, which leaves top-1 as it is.

A context that shares no word with the samples has no direction. It is taken for the mean of the experts'
vectors, so that it goes to the experts that are most like all the others, and top-k stays top-k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from btx_megatron.ensembles.contexts import Contexts
from btx_megatron.ensembles.mixture import Floats, keep_top
from btx_megatron.ensembles.tfidf import MAX_TERMS, TfIdf, fit_tfidf
from btx_megatron.errors import UserError


@dataclass(frozen=True)
class ExpertTexts:
    """The experts as directions: ``means_EV`` [experts, terms], each of length 1."""

    names: tuple[str, ...]
    tfidf: TfIdf
    means_EV: Floats

    def cosines(self, texts: Sequence[str]) -> Floats:
        """Cosine [texts, experts] of each text with each expert, 0 to 1; never all 0 for a text."""
        cosines = np.asarray(self.tfidf.vectors(texts) @ self.means_EV.T)
        middle = self.means_EV.mean(axis=0)
        said_nothing = ~cosines.any(axis=1)
        cosines[said_nothing] = self.means_EV @ (middle / np.linalg.norm(middle))
        return cosines


def fit_expert_texts(samples: Mapping[str, Sequence[str]], max_terms: int = MAX_TERMS) -> ExpertTexts:
    """From expert -> sample of its training text; of equal size, or the idf leans towards the largest.

    Raises UserError for an expert whose sample has no words.
    """
    tfidf = fit_tfidf([text for texts in samples.values() for text in texts], "expert samples", max_terms)
    means = np.zeros((len(samples), len(tfidf.terms)))
    for row, (name, texts) in enumerate(samples.items()):
        mean = np.asarray(tfidf.vectors(texts).mean(axis=0)).ravel() if texts else means[row]
        length = np.linalg.norm(mean)
        if length == 0:
            raise UserError(f"expert {name}: no known word in its {len(texts)} sample texts; give more text")
        means[row] = mean / length
    return ExpertTexts(tuple(samples), tfidf, means)


def similarity_weights(experts: ExpertTexts, contexts: Contexts, top_k: int) -> Floats:
    """Log-weights [E, W, S] for ``mixture.mix``: the ``top_k`` most similar experts, by their cosines.

    A chosen expert of cosine 0 has weight 0. Raises UserError for a ``top_k`` that cannot be.
    """
    with np.errstate(divide="ignore"):
        log_cosines_EN = np.log(experts.cosines(contexts.flat).T)
    return contexts.spread(keep_top(log_cosines_EN, top_k))
