"""Held-out loss of ensembles: the experts' own models, whose probabilities of a token are mixed.

    BTM (arXiv 2208.03306; as a baseline 2403.07816)     c-BTM (2303.14177)     TiMoE (2508.08827)

Each expert reads the held-out windows alone; what is kept is the log-probability of every label. How these
are weighed is told in the room ``ensembles``. Texts and priors come from training text, never from what is
held out. One row is no ensemble but a model: the experts' parameters, averaged by the cached prior.

Shapes: E experts in the order of ``Recipe.source_names``, W windows, S positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from btx_megatron.data.held_out import stream_windows
from btx_megatron.data.prepare import tokenizer_path
from btx_megatron.data.sample import PIECE, training_sample
from btx_megatron.data.tokenizer import open_tokenizer
from btx_megatron.data.weights import stage_blend
from btx_megatron.ensembles.cluster_files import load_clusters
from btx_megatron.ensembles.clusters import cluster_weights
from btx_megatron.ensembles.contexts import contexts_of
from btx_megatron.ensembles.mixture import mean_loss, mix
from btx_megatron.ensembles.posterior import cached_prior, posterior_weights
from btx_megatron.ensembles.similarity import fit_expert_texts, similarity_weights
from btx_megatron.ensembles.time_windows import time_weights
from btx_megatron.evaluation.loss import Model, Windows, held_out_loss
from btx_megatron.evaluation.parameter_average import load_average
from btx_megatron.evaluation.rows import CBTM_ROWS, PARAMETERS_ROW, TIMOE_ROWS, ensemble_rows
from btx_megatron.evaluation.token_losses import token_losses
from btx_megatron.job import CHECKPOINTS, Job
from btx_megatron.recipe import SEED, Stage
from btx_megatron.run_folder import stage_folder

Floats = NDArray[np.float64]

_SIMILARITY_TOKENS = 100_000
"""Training tokens of each expert that similarity is learnt from."""
_PRIOR_TOKENS = 20_000
"""Training tokens of each domain that the cached prior is estimated from."""


class Ensembles:
    """Hears the experts one after another; then knows what mixtures of them make of held-out text."""

    def __init__(self, job: Job, stage: Stage, windows: Mapping[str, Windows]) -> None:
        self._job, self._stage, self._sequence = job, stage, job.recipe.model.seq_length
        self._sources = {source: _row(source) for source in job.recipe.source_names}
        self._windows = {"held out": dict(windows)}
        if "btm:cached" in ensemble_rows(job.recipe):
            self._windows["prior"] = {name: self._training_windows(name) for name in windows}
        self._heard: dict[tuple[str, str, str], Floats] = {}

    def hears(self, row: str) -> bool:
        """Whether the row is one of the experts."""
        return row in self._sources.values()

    def hear(self, row: str, model: Model) -> dict[str, float] | None:
        """Let the model of a row read everything, and tell its held-out loss by domain. A collective.

        None, and nothing is read, where it is none of the experts.
        """
        if not self.hears(row):
            return None
        for side, domains in self._windows.items():
            for domain, its in domains.items():
                losses = token_losses(model, its, self._stage, self._sequence)
                self._heard[side, domain, row] = -losses.astype(np.float64)
        held_out = self._windows["held out"]
        return {
            domain: mean_loss(self._heard["held out", domain, row], np.stack([mask for *_, mask in its]))
            for domain, its in held_out.items()
        }

    def losses(self, model: Model) -> dict[str, dict[str, float]]:
        """Row -> domain -> held-out loss in nats a token. A collective.

        ``model``: a dense one in which parameters are averaged; what it holds is lost.
        """
        recipe = self._job.recipe
        rows: dict[str, dict[str, float]] = {row: {} for row in ensemble_rows(recipe)}
        similar = _Similarity(self._job) if "btm:top-1" in rows else None
        clusters = _Clusters(self._job) if recipe.method == "cbtm" else None
        for domain in recipe.domain_names:
            log_p_EWS, tokens_WS, mask_WS = self._of("held out", domain)
            weights: dict[str, Any] = {}
            if similar:
                weights |= similar.weights(tokens_WS, mask_WS)
                weights |= self._posteriors(domain, log_p_EWS, mask_WS)
            if clusters:
                weights |= clusters.weights(tokens_WS, mask_WS)
            if recipe.method == "timoe":
                weights |= self._by_time(domain, log_p_EWS, mask_WS)
            for row, log_w_EWS in weights.items():
                rows[row][domain] = mean_loss(mix(log_p_EWS, log_w_EWS, mask_WS), mask_WS)
            if PARAMETERS_ROW in rows:
                rows[PARAMETERS_ROW][domain] = self._averaged(domain, model)
        return rows

    def _averaged(self, domain: str, model: Model) -> float:
        """Held-out loss of the model whose parameters are the experts', weighed by the domain's prior."""
        prior = self._prior(domain).tolist()
        folders = [self._job.run_folder / stage_folder(row) / CHECKPOINTS for row in self._sources.values()]
        load_average(model, dict(zip(folders, prior, strict=True)))
        return held_out_loss(model, self._windows["held out"][domain], self._stage, self._sequence)

    def _prior(self, domain: str) -> Floats:
        """[E] posterior of the experts on training text of a domain."""
        log_p_EWS, _, mask_WS = self._of("prior", domain)
        return cached_prior(log_p_EWS, mask_WS)

    def _posteriors(self, domain: str, log_p_EWS: Floats, mask_WS: Floats) -> dict[str, Floats]:
        prior = self._prior(domain)
        return {
            "btm:uniform": posterior_weights(log_p_EWS, mask_WS),
            "btm:cached": posterior_weights(log_p_EWS, mask_WS, prior=prior),
            "btm:updating": posterior_weights(log_p_EWS, mask_WS, prior="updating"),
        }

    def _by_time(self, domain: str, log_p_EWS: Floats, mask_WS: Floats) -> dict[str, Floats]:
        """Held-out text of a domain is asked at its end: the experts of later text do not answer."""
        of_domains = self._job.recipe.time_windows
        spans = {source: of_domains[source] for source in self._sources}
        times = [of_domains[domain].end] * len(mask_WS)
        uniform, posterior = TIMOE_ROWS
        return {
            uniform: time_weights(log_p_EWS, mask_WS, spans, times, merge="uniform"),
            posterior: time_weights(log_p_EWS, mask_WS, spans, times, merge="posterior"),
        }

    def _of(self, side: str, domain: str) -> tuple[Floats, NDArray[np.int64], Floats]:
        """Log-probabilities [E, W, S] of all experts; tokens and mask [W, S]."""
        tokens, _, mask = (np.stack(part) for part in zip(*self._windows[side][domain], strict=True))
        heard = [self._heard[side, domain, row] for row in self._sources.values()]
        return np.stack(heard), tokens, mask

    def _training_windows(self, domain: str) -> Windows:
        tokens = _training_tokens(self._job, {domain: 1.0}, _PRIOR_TOKENS)
        return list(stream_windows(tokens, self._sequence))


def _row(source: str) -> str:
    return SEED if source == SEED else f"expert:{source}"


def _training_tokens(job: Job, blend: dict[str, float], count: int) -> NDArray[np.int64]:
    data = job.recipe.data
    return training_sample(job.data_folder, data.domains, blend, count, data.random_seed)


class _Similarity:
    """Which experts' training text a context is like."""

    def __init__(self, job: Job) -> None:
        self._decode = open_tokenizer(tokenizer_path(job.data_folder)).decode
        self._texts = fit_expert_texts({name: self._sample(job, name) for name in job.recipe.source_names})

    def _sample(self, job: Job, source: str) -> list[str]:
        tokens = _training_tokens(job, stage_blend(job.recipe, _row(source)), _SIMILARITY_TOKENS)
        return [
            self._decode(tokens[start : start + PIECE].tolist()) for start in range(0, len(tokens), PIECE)
        ]

    def weights(self, tokens_WS: NDArray[np.int64], mask_WS: Floats) -> dict[str, Floats]:
        """Of top-1 and top-2."""
        contexts = contexts_of(tokens_WS, mask_WS, self._decode)
        return {f"btm:top-{k}": similarity_weights(self._texts, contexts, k) for k in (1, 2)}


class _Clusters:
    """Where a context lies among the clusters that the experts were trained on."""

    def __init__(self, job: Job) -> None:
        self._decode = open_tokenizer(tokenizer_path(job.data_folder)).decode
        self._clusters = load_clusters(job.run_folder / stage_folder("cluster"))
        self._temperature = job.recipe.clusters.temperature

    def weights(self, tokens_WS: NDArray[np.int64], mask_WS: Floats) -> dict[str, Floats]:
        """Of the nearest, the two nearest, and all."""
        contexts = contexts_of(tokens_WS, mask_WS, self._decode)
        kept = zip(CBTM_ROWS, (1, 2, None), strict=True)
        return {row: cluster_weights(self._clusters, contexts, k, self._temperature) for row, k in kept}
