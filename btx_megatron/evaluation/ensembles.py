"""Held-out loss of ensembles: the experts' own models, whose probabilities of a token are mixed.

    BTM (arXiv 2208.03306; as a baseline 2403.07816)     TiMoE (2508.08827)

Each expert reads the held-out windows alone; what is kept is the log-probability of every label. How these
are weighed is told in the room ``ensembles``. Texts and priors come from training text, never from what is
held out. Nothing here needs a rank: rank 0 does it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from btx_megatron.data.sample import PIECE, training_sample
from btx_megatron.data.tokenizer import open_tokenizer, tokenizer_path
from btx_megatron.ensembles.contexts import contexts_of
from btx_megatron.ensembles.mixture import mean_loss, mix
from btx_megatron.ensembles.posterior import cached_prior, posterior_weights
from btx_megatron.ensembles.similarity import fit_expert_texts, similarity_weights
from btx_megatron.ensembles.time_windows import TimeWindow, time_weights
from btx_megatron.job import Job
from btx_megatron.recipe import SEED, Recipe

Floats = NDArray[np.float64]
Window = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]

BTM_ROWS = ("btm:top-1", "btm:top-2", "btm:uniform", "btm:cached", "btm:updating")
"""By similarity, and by a posterior with that prior."""
TIMOE_ROWS = ("timoe:uniform", "timoe:posterior")
_SAMPLE = 100_000
"""Training tokens of each expert that similarity is learnt from."""


@dataclass(frozen=True)
class Heard:
    """What the experts make of one domain."""

    windows: Sequence[Window]
    log_p_EWS: Floats
    """Of held-out labels."""
    training_log_p_EWS: Floats
    """Of a sample of the domain's training text, for a prior that is estimated once."""
    training_mask_WS: NDArray[np.float32]


def ensemble_rows(recipe: Recipe) -> tuple[str, ...]:
    """The rows that the method or a baseline adds to the result table."""
    btm = BTM_ROWS if recipe.method == "btm" or "btm" in recipe.baselines else ()
    return (*btm, *(TIMOE_ROWS if recipe.method == "timoe" else ()))


def ensemble_losses(job: Job, heard: Mapping[str, Heard]) -> dict[str, dict[str, float]]:
    """Row -> domain -> held-out loss in nats a token."""
    recipe = job.recipe
    rows: dict[str, dict[str, float]] = {row: {} for row in ensemble_rows(recipe)}
    similar = _Similarity(job) if "btm:top-1" in rows else None
    for domain, its in heard.items():
        tokens, _, mask = (np.stack(part) for part in zip(*its.windows, strict=True))
        weights: dict[str, Floats] = {}
        if similar:
            weights |= similar.weights(tokens, mask)
            prior = cached_prior(its.training_log_p_EWS, its.training_mask_WS)
            weights["btm:uniform"] = posterior_weights(its.log_p_EWS, mask)
            weights["btm:updating"] = posterior_weights(its.log_p_EWS, mask, prior="updating")
            weights["btm:cached"] = posterior_weights(its.log_p_EWS, mask, prior=prior)
        if recipe.method == "timoe":
            windows = recipe.time_windows
            times = [windows[domain].end] * len(tokens)
            for row in TIMOE_ROWS:
                merge = row.partition(":")[2]
                weights[row] = time_weights(its.log_p_EWS, mask, windows, times, merge=merge)  # type: ignore[arg-type]
        for row, log_w in weights.items():
            rows[row][domain] = mean_loss(mix(its.log_p_EWS, log_w, mask), mask)
    return rows


class _Similarity:
    """Which experts' training text a context is like."""

    def __init__(self, job: Job) -> None:
        recipe = job.recipe
        self._decode = open_tokenizer(tokenizer_path(job.data_folder)).decode
        self._texts = fit_expert_texts({name: self._sample(job, name) for name in recipe.source_names})

    def _sample(self, job: Job, source: str) -> list[str]:
        recipe = job.recipe
        names = recipe.domain_names if source == SEED else [source]
        tokens = training_sample(
            job.data_folder, recipe.data.domains, dict.fromkeys(names, 1.0), _SAMPLE, recipe.data.random_seed
        )
        return [self._decode(tokens[start : start + PIECE].tolist()) for start in range(0, len(tokens), PIECE)]

    def weights(self, tokens_WS: NDArray[np.int64], mask_WS: NDArray[np.float32]) -> dict[str, Floats]:
        contexts = contexts_of(tokens_WS, mask_WS, self._decode)
        return {f"btm:top-{k}": similarity_weights(self._texts, contexts, k) for k in (1, 2)}
