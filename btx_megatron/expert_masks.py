"""Which experts of a mixture a text's tokens may take: TiMoE's mask by time, and experts that are opted out.

A masked expert is out of the softmax and never computed, so nothing of it reaches an output: not its
feed-forwards and not its row of the router. The weights that the mix averages, and those that were finetuned
beside it, are another matter: they have seen its text.
"""

from __future__ import annotations

from btx_megatron.recipe import GROWN_FROM, Recipe
from btx_megatron.times import is_after


def masks_experts(recipe: Recipe) -> bool:
    """Whether any token of the recipe's mixtures is kept from any expert."""
    return recipe.moe.moe_router_time_mask or bool(recipe.evaluate.opt_out)


def allowed_experts(recipe: Recipe, domain: str, stage: str, without: str | None = None) -> list[bool] | None:
    """Whether the tokens of a domain may take each expert of a stage's mixture [E]; None: all of them.

    ``without``: the source whose experts are opted out. By time (``moe.moe_router_time_mask``) a domain's
    text is asked at the end of its window, and experts whose windows end later do not answer (TiMoE, arXiv
    2508.08827).
    """
    if without is None and not recipe.moe.moe_router_time_mask:
        return None
    return [
        source != without and _answers(recipe, source, domain) for source in _experts_sources(recipe, stage)
    ]


def _experts_sources(recipe: Recipe, stage: str) -> list[str]:
    """Of each expert of a stage's mixture the model that it comes from."""
    if stage == GROWN_FROM:
        return recipe.mix.grow_experts
    return [recipe.source_names[group] for group in recipe.expert_groups]


def _answers(recipe: Recipe, source: str, domain: str) -> bool:
    if not recipe.moe.moe_router_time_mask:
        return True
    windows = recipe.time_windows
    return not is_after(windows[source].end, windows[domain].end, f"data.domains.{source}")
