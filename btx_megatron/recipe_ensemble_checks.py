"""What ensembles of experts ask of a recipe: experts, and for TiMoE times that keep later text out."""

from __future__ import annotations

from collections.abc import Iterator

from btx_megatron.recipe import Clusters, Recipe
from btx_megatron.recipe_numbers import at_least, positive
from btx_megatron.times import is_after


def ensemble_problems(recipe: Recipe) -> Iterator[str]:
    """One line for each thing that cannot hold, naming key and fix."""
    if "btm" in recipe.baselines and (not recipe.expert_stages or recipe.method in ("btm", "cbtm")):
        yield (
            f"baselines: 'btm' beside method {recipe.method}: it has no experts of domains, or is it; "
            "leave it out"
        )
    if recipe.method == "cbtm":
        yield from _cluster_problems(recipe)
    elif recipe.clusters != Clusters():
        yield f"clusters: they are for method cbtm, not for {recipe.method}; leave them out"
    if recipe.method == "timoe":
        yield from _time_problems(recipe)
    if recipe.method == "timoe" or recipe.moe.moe_router_time_mask:
        return
    for domain in recipe.data.domains:
        if domain.start is not None or domain.end is not None:
            yield (
                f"data.domains.{domain.name}: start and end are for method timoe and "
                "moe.moe_router_time_mask; leave them out"
            )


def _cluster_problems(recipe: Recipe) -> Iterator[str]:
    yield from at_least("clusters", recipe.clusters, 2, ("number",))
    yield from at_least("clusters", recipe.clusters, 1, ("dimensions",))
    yield from at_least("clusters", recipe.clusters, 0, ("random_seed",))
    yield from positive("clusters", recipe.clusters, ("temperature",))
    if recipe.mix.include_seed:
        yield "mix.include_seed: the seed is of no cluster; set it to false for method cbtm"
    for name in recipe.domain_names:
        if name in recipe.cluster_names:
            yield f"data.domains: '{name}' is the name of a cluster, too; call the domain something else"


def _time_problems(recipe: Recipe) -> Iterator[str]:
    """Every expert begins as the seed, so the seed may know of no time after the first expert's."""
    if recipe.mix.include_seed:
        yield "mix.include_seed: the seed has no time window; set it to false for method timoe"
    ends = [(name, window.end) for name, window in recipe.time_windows.items()]
    apart = [(name, end) for name, end in ends if name in recipe.source_names]
    if not apart:
        return  # said elsewhere
    first, end = apart[0]
    for name, other in apart:
        first, end = (name, other) if is_after(end, other, f"data.domains.{name}") else (first, end)
    for name, other in ends:
        if is_after(end, other, f"data.domains.{name}"):
            yield (
                f"data.domains.{name}: ends before '{first}', the first that has an expert: nobody could "
                "answer its queries; give it an expert, or leave it out"
            )
    for expert, own in apart:
        for name in recipe.stages.experts[expert].blend:
            if is_after(dict(ends).get(name, own), own, f"data.domains.{name}"):
                yield (
                    f"stages.experts.{expert}.blend: '{name}' ends after '{expert}', whose queries must not "
                    "know it; leave it out"
                )
    blend = recipe.stages.seed.blend or dict.fromkeys(recipe.domain_names, 1.0)
    for name, other in ends:
        if blend.get(name) and is_after(other, end, f"data.domains.{name}"):
            yield (
                f"stages.seed.blend: '{name}' ends after '{first}', whose queries must not know it, and all "
                f"experts begin as the seed; train the seed on '{first}' alone, or import one"
            )
