"""How a stage's samples are shared out over the sources, and how often each source is then read.

Weights are nested as in the paper's tables: of sources within a domain, of domains within the stage's
blend. An effective epoch is a source's drawn tokens over the tokens it has; here it is computed from the
weights, before any dataset is built (a stage's log tells the count of samples really drawn).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import xxhash

from btx_megatron.data.folder import STATISTICS, read_statistics
from btx_megatron.errors import UserError
from btx_megatron.estimate import stage_tokens
from btx_megatron.recipe import MATCHED_STAGES, Domain, Recipe

SourceKey = tuple[str, str]
"""Domain and source."""


def stage_blend(recipe: Recipe, stage: str) -> dict[str, float]:
    """Sampling weight of each domain: the stage's own, or its kind's default (see ``recipe.Stage.blend``)."""
    kind, _, domain = stage.partition(":")
    blend = recipe.stage(stage).blend
    if not blend and kind in MATCHED_STAGES:
        blend = recipe.stages.finetune.blend
    if blend:
        return dict(blend)
    return {domain: 1.0} if kind == "expert" else dict.fromkeys(recipe.domain_names, 1.0)


def order_seed(recipe: Recipe, stage: str) -> int:
    """The random seed of a stage's data order.

    Each stage shuffles its text anew: with one order for all, each would begin with the samples that the
    stages before it began with, and leave the rest unread. Stages that are trained in the place of
    ``finetune`` have its order: what is compared reads the same text in the same order, up to one epoch
    (Megatron shuffles the documents of all whole epochs together).
    """
    kind = stage.partition(":")[0]
    name = "finetune" if kind in MATCHED_STAGES else stage
    return xxhash.xxh32_intdigest(name.encode(), recipe.stage(stage).training.seed)


def source_weights(domains: list[Domain], blend: dict[str, float]) -> dict[SourceKey, float]:
    """Sampling weight of each (domain, source) that is drawn at all; they sum to 1.

    Raises UserError for a domain that does not exist and for weights that leave nothing to draw.
    """
    unknown = set(blend) - {domain.name for domain in domains}
    if unknown:
        raise UserError(f"blend: no domain '{min(unknown)}'; there are {', '.join(d.name for d in domains)}")
    weights: dict[SourceKey, float] = {}
    for domain in domains:
        total = sum(source.weight for source in domain.sources)
        for source in domain.sources:
            share = blend.get(domain.name, 0.0) * source.weight
            if share > 0:
                weights[domain.name, source.name] = share / total
    if not weights:
        raise UserError(f"blend {blend}: every weight is 0; give a domain with text a positive one")
    whole = sum(weights.values())
    return {key: weight / whole for key, weight in weights.items()}


def source_tokens(data_folder: Path) -> dict[SourceKey, int] | None:
    """Training tokens of each source; None where the data is not prepared yet."""
    if not (data_folder / STATISTICS).exists():
        return None
    domains: dict[str, Any] = read_statistics(data_folder)["domains"]
    return {
        (name, source): counts["train"]["tokens"]
        for name, of in domains.items()
        for source, counts in of.items()
    }


def stage_epochs(recipe: Recipe, stage: str, tokens: dict[SourceKey, int]) -> dict[SourceKey, float]:
    """Effective epochs of a stage over each source that it draws from."""
    weights = source_weights(recipe.domains_of(stage), stage_blend(recipe, stage))
    drawn = stage_tokens(recipe, stage)
    return {key: drawn * weight / tokens[key] for key, weight in weights.items() if tokens.get(key)}
