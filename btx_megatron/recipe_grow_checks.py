"""What a recipe must satisfy that grows a mixture, or takes experts from it; rules as in recipe_checks."""

from __future__ import annotations

from collections.abc import Iterator

from btx_megatron.recipe import SEED, Mix, Recipe

_OF_A_NEW_MIX = (
    "average", "weights", "density", "experts", "chunks", "copies", "drop_ratio", "virtual_scale",
    "router_init",
)  # fmt: skip
_OF_GROWTH = ("grow_experts", "grow_share", "drop")


def grow_problems(recipe: Recipe) -> Iterator[str]:
    """Everything in ``mix`` that cannot hold, or would change nothing, with or without ``grow_from``."""
    mix, default = recipe.mix, Mix()
    if mix.grow_from is None:
        for key in _OF_GROWTH:
            if getattr(mix, key) != getattr(default, key):
                yield f"mix.{key} is of a mixture that grows; name it with mix.grow_from, or leave this out"
        return
    if recipe.method != "btx":
        yield f"mix.grow_from is for method btx, not {recipe.method}; leave it out"
    if recipe.baselines:
        yield (
            f"baselines [{', '.join(recipe.baselines)}]: each is matched to a whole run of btx, and with "
            "mix.grow_from this one is a part of it; set baselines: []"
        )
    for key in _OF_A_NEW_MIX:
        if getattr(mix, key) != getattr(default, key):
            yield f"mix.{key} has no effect with mix.grow_from, the mixture is there; leave it out"
    if recipe.stages.seed.pretrained_checkpoint is None:
        yield (
            "stages.seed.pretrained_checkpoint is missing; mix.grow_from is a checkpoint, name the seed that "
            "its experts are branches of"
        )
    yield from _name_problems(recipe)
    yield from _share_problems(recipe)
    yield from _old_mixture_problems(recipe)


def _name_problems(recipe: Recipe) -> Iterator[str]:
    mix = recipe.mix
    if not mix.grow_experts:
        yield (
            "mix.grow_experts is missing; mix.grow_from is a checkpoint, name its experts in the order of "
            "its router's rows"
        )
    for key, names in (("grow_experts", mix.grow_experts), ("drop", mix.drop)):
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield f"mix.{key}: '{name}' is given {names.count(name)} times; names must differ"
    for name in mix.drop:
        if name not in mix.grow_experts:
            yield f"mix.drop: no expert '{name}' in the mixture; there are {', '.join(mix.grow_experts)}"
    if not recipe.expert_names:
        yield "mix.drop: no expert would be left; leave one out"
    if not mix.include_seed and SEED in mix.kept_experts:
        yield f"mix.include_seed false: the mixture has the seed as an expert; set mix.drop: [{SEED}]"
    if not recipe.joining_names and not mix.drop:
        yield (
            f"mix.grow_from: the mixture has experts of all domains ({', '.join(mix.grow_experts)}), so "
            "nothing would change; add a domain to data.domains, or name experts in mix.drop"
        )


def _share_problems(recipe: Recipe) -> Iterator[str]:
    share, joining = recipe.mix.grow_share, recipe.joining_names
    if share is None:
        return
    if not joining:
        yield f"mix.grow_share {share:g} has no effect: no expert joins; leave it out"
    elif not 0 <= share * len(joining) <= 1:
        yield (
            f"mix.grow_share {share:g}: {len(joining)} experts join ({', '.join(joining)}), and their shares "
            f"are at least 0 and at most 1 together; give at most {1 / len(joining):.3g}"
        )


def _old_mixture_problems(recipe: Recipe) -> Iterator[str]:
    """It is evaluated as it was, beside what becomes of it."""
    experts, ep = len(recipe.mix.grow_experts), recipe.evaluate.layout.expert_model_parallel_size
    if recipe.moe.topk(experts) > experts:
        yield (
            f"moe.moe_router_topk {recipe.moe.moe_router_topk} is more than the {experts} experts of the "
            "mixture of mix.grow_from, which is evaluated, too; lower it"
        )
    if experts % ep:
        yield (
            f"evaluate.layout.expert_model_parallel_size {ep} must divide the {experts} experts of the "
            "mixture of mix.grow_from, which is evaluated, too"
        )
