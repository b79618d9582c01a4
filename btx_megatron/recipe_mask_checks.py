"""What masked experts ask of a recipe: experts that are somebody's, and one left for every text."""

from __future__ import annotations

from collections.abc import Iterator

from btx_megatron.expert_masks import allowed_experts
from btx_megatron.methods import main_stage, stage_names
from btx_megatron.recipe import MOE_STAGES, Recipe

_TIME_MASK = "moe.moe_router_time_mask"


def mask_problems(recipe: Recipe) -> Iterator[str]:
    """One line for each thing that cannot hold, naming key and fix."""
    masks = recipe.moe.moe_router_time_mask
    if masks or recipe.evaluate.opt_out:
        problems = [*_owner_problems(recipe), *(_time_problems(recipe) if masks else [])]
        yield from problems or _opt_out_problems(recipe)


def _owner_problems(recipe: Recipe) -> Iterator[str]:
    key = _TIME_MASK if recipe.moe.moe_router_time_mask else "evaluate.opt_out"
    if main_stage(recipe) not in MOE_STAGES:
        yield f"{key}: method {recipe.method} ends with no mixture of experts; leave it out"
    elif not recipe.expert_groups:
        yield f"{key}: with mix.experts blend every expert is of all domains; choose another, or leave it out"


def _time_problems(recipe: Recipe) -> Iterator[str]:
    if any(stage.startswith("sparse_upcycling") for stage in stage_names(recipe)):
        yield f"{_TIME_MASK}: the experts of sparse upcycling are of no time; leave one of the two out"
        return
    if recipe.mix.include_seed:
        yield f"mix.include_seed: the seed has no time window; set it to false with {_TIME_MASK}"
        return
    windows = recipe.time_windows  # refuses what is missing, or no time
    for name in dict.fromkeys([*recipe.source_names, *recipe.mix.grow_experts]):
        if name not in windows:
            yield f"{_TIME_MASK}: the expert '{name}' is of no domain in data.domains, and so of no time"
            return
    topk = recipe.moe.topk(len(recipe.expert_names))
    balancing = recipe.moe.moe_router_load_balancing_type
    counts = balancing not in ("btx", "none") and recipe.moe.moe_router_type != "sample_top1"
    for domain in windows if recipe.expert_groups else ():
        allowed = _experts_left(recipe, domain)
        if not allowed:
            yield f"{_TIME_MASK}: text of '{domain}' may take no expert; keep its expert, or leave it out"
        elif counts and allowed < topk:
            yield (
                f"moe.moe_router_load_balancing_type {balancing}: it counts on {topk} experts a token, and "
                f"text of '{domain}' may take {allowed}; choose btx or none"
            )


def _experts_left(recipe: Recipe, domain: str, without: str | None = None) -> int:
    """Experts of the method's mixture that a domain's text may take."""
    return sum(allowed_experts(recipe, domain, str(main_stage(recipe)), without) or [])


def _opt_out_problems(recipe: Recipe) -> Iterator[str]:
    sources = recipe.source_names
    for name in recipe.evaluate.opt_out:
        if name not in sources:
            yield f"evaluate.opt_out: '{name}' has no experts in the mixture; it has {', '.join(sources)}"
        elif recipe.evaluate.opt_out.count(name) > 1:
            yield f"evaluate.opt_out: '{name}' is given twice; once is enough"
        elif alone := [domain for domain in recipe.domain_names if not _experts_left(recipe, domain, name)]:
            yield f"evaluate.opt_out: without '{name}' text of '{alone[0]}' has no expert left; leave it out"
