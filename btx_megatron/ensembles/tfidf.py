"""Tf-idf of texts: scikit-learn's vectorizer, as plain data that can be saved without pickle.

A text's vector counts its words (two characters or more, lower case), each times how rare it is among the
texts fitted on, ln((1 + n) / (1 + n_word)) + 1, and has length 1. A text without a known word is the zero
vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfVectorizer

from btx_megatron.ensembles.mixture import Floats
from btx_megatron.errors import UserError

MAX_TERMS = 50_000


@dataclass(frozen=True)
class TfIdf:
    """Words, and the weight of each: ``idf_V`` [terms]."""

    terms: tuple[str, ...]
    idf_V: Floats

    @cached_property
    def _vectorizer(self) -> TfidfVectorizer:
        vectorizer = TfidfVectorizer(vocabulary=list(self.terms))
        vectorizer.idf_ = self.idf_V
        return vectorizer

    def vectors(self, texts: Sequence[str]) -> csr_matrix:
        """Unit vectors [texts, terms], sparse; zero for a text without a known word."""
        return self._vectorizer.transform(texts)


def fit_tfidf(texts: Sequence[str], what: str, max_terms: int = MAX_TERMS) -> TfIdf:
    """The ``max_terms`` most frequent words of the texts; under two: UserError, which names ``what``."""
    vectorizer = TfidfVectorizer(max_features=max_terms)
    try:
        vectorizer.fit(texts)
    except ValueError as error:
        if "empty vocabulary" not in str(error):  # scikit-learn's word for no words at all
            raise
        raise UserError(f"{what}: no words in {len(texts)} texts; give texts with words") from None
    terms = tuple(vectorizer.get_feature_names_out().tolist())
    if len(terms) < 2:
        raise UserError(f"{what}: a single word in {len(texts)} texts tells nothing apart; give more text")
    return TfIdf(terms, np.asarray(vectorizer.idf_))
