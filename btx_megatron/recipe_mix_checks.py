"""What the recipe's ``mix`` must satisfy: its options fit together, and each has an effect.

Whoever writes ``density: 0.3`` means something by it: to mix without it, and say nothing, would give another
model than the one that was asked for. Rules are written as in recipe_checks: the first problem is raised,
and each rule relies on those before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from btx_megatron.methods import main_stage, upcycling_stages
from btx_megatron.recipe import Mix, Recipe
from btx_megatron.recipe_grow_checks import grow_problems
from btx_megatron.recipe_mix import draws
from btx_megatron.recipe_numbers import at_least, divisors, positive

_MAX_SEED = (1 << 32) - 1


def mix_problems(recipe: Recipe) -> Iterator[str]:
    """Everything in ``mix`` that cannot hold, or would change nothing, with the recipe's method."""
    yield from grow_problems(recipe)
    upcycled = upcycling_stages(recipe)
    mixed = main_stage(recipe) == "finetune"
    if mixed or recipe.method in ("btm", "timoe"):
        yield from _average_problems(recipe)
    if mixed or upcycled:
        yield from _layout_problems(recipe)
        yield from _router_problems(recipe)
        yield from _drawn_problems(recipe.mix)
    if recipe.method == "sparse_upcycling":
        yield from _upcycling_problems(recipe.mix)
    if upcycled:
        yield from _copies_problems(recipe, upcycled[0])


def _average_problems(recipe: Recipe) -> Iterator[str]:
    mix, default = recipe.mix, Mix()
    if mix.average not in ("ties", "dare") and mix.density != default.density:
        yield f"mix.density {mix.density:g} is for mix.average ties or dare, not {mix.average}; leave it out"
    if not 0 < mix.density <= 1:
        yield f"mix.density {mix.density}: must be above 0 and at most 1"
    if mix.average in ("mean", "base") and mix.weights:
        yield f"mix.weights have no effect with mix.average {mix.average}; set it to weighted"
    for name, weight in mix.weights.items():
        if name not in recipe.source_names:
            yield f"mix.weights.{name}: no such model; there are {', '.join(recipe.source_names)}"
        if not (math.isfinite(weight) and weight >= 0):
            yield f"mix.weights.{name} {weight}: a weight is a number that is not negative"
    if not any(mix.weights.get(name, 1.0) for name in recipe.source_names):
        yield "mix.weights: all weights are 0; at least one must be positive"


def _layout_problems(recipe: Recipe) -> Iterator[str]:
    """Which options each kind of experts has, and that the feed-forward can be cut."""
    mix, kind, width = recipe.mix, recipe.mix.experts, recipe.model.ffn_hidden_size
    yield from at_least("mix", mix, 1, ("chunks", "copies"))
    for key, kinds in (("chunks", ("split", "virtual")), ("copies", ("copies", "virtual"))):
        if kind not in kinds and getattr(mix, key) != 1:
            known = " or ".join(kinds)
            yield f"mix.{key} {getattr(mix, key)} is for mix.experts {known}, not {kind}; leave it out"
    if kind == "split" and mix.chunks < 2:
        yield f"mix.experts split needs mix.chunks of at least 2, not {mix.chunks}"
    if kind == "copies" and mix.copies < 2:
        yield f"mix.experts copies needs mix.copies of at least 2, not {mix.copies}"
    if width % mix.chunks:
        known = divisors(width)
        yield f"mix.chunks {mix.chunks} must divide model.ffn_hidden_size {width}; possible: {known}"
    sources = len(recipe.source_names)
    if kind == "blend" and width % sources:
        yield (
            f"mix.experts blend cuts model.ffn_hidden_size {width} in as many chunks as models are mixed, "
            f"{sources} ({', '.join(recipe.source_names)}), which does not divide it; change the width"
        )
    if kind == "virtual":
        yield from _group_problems(recipe, "mix.experts virtual")
    elif mix.virtual_scale != Mix().virtual_scale:
        yield f"mix.virtual_scale {mix.virtual_scale} is for mix.experts virtual, not {kind}; leave it out"
    if not 0 <= mix.drop_ratio <= 1:
        yield f"mix.drop_ratio {mix.drop_ratio}: must lie between 0 and 1"


def _group_problems(recipe: Recipe, what: str) -> Iterator[str]:
    """A token takes whole groups of chunks, or the copy that they were is not there for it."""
    experts = len(recipe.expert_names)
    topk = recipe.moe.topk(experts)
    if topk % recipe.mix.chunks:
        yield (
            f"{what} with mix.chunks {recipe.mix.chunks}: the {topk} experts that a token takes are no whole "
            "groups; make moe.moe_router_topk a multiple of mix.chunks"
        )


def _router_problems(recipe: Recipe) -> Iterator[str]:
    mix, experts = recipe.mix, len(recipe.expert_names)
    topk = recipe.moe.topk(experts)
    if mix.router_init == "zero" and topk < experts:
        yield (
            f"mix.router_init zero: all logits are equal, so every token would take the same {topk} of the "
            f"{experts} experts; use normal, or a router that takes all"
        )
    if mix.router_init in ("centroid", "ridge") and mix.experts == "blend":
        yield (
            f"mix.router_init {mix.router_init} with mix.experts blend: every expert is a part of all "
            "models, so no text is its own; use normal"
        )
    yield from positive("mix", mix, ("router_std",))
    if mix.router_init != "normal" and mix.router_std != Mix().router_std:
        yield (
            f"mix.router_std {mix.router_std:g} is for mix.router_init normal, not {mix.router_init}; "
            "leave it out"
        )


def _drawn_problems(mix: Mix) -> Iterator[str]:
    if not 0 <= mix.random_seed <= _MAX_SEED:
        yield f"mix.random_seed {mix.random_seed}: must be at least 0 and at most {_MAX_SEED}"
    if not draws(mix) and mix.random_seed != Mix().random_seed:
        yield f"mix.random_seed {mix.random_seed} has no effect: nothing is drawn; leave it out"


def _upcycling_problems(mix: Mix) -> Iterator[str]:
    """Options that speak of several models, where there is the seed alone."""
    default = Mix()
    for key in ("average", "weights", "density"):
        if getattr(mix, key) != getattr(default, key):
            yield f"mix.{key} has no effect with method sparse_upcycling: the seed is copied; leave it out"
    if mix.experts == "blend":
        yield "mix.experts blend is of several models; method sparse_upcycling has the seed alone: use stack"
    if mix.router_init != "normal":
        yield f"mix.router_init {mix.router_init}: copies have no text of their own; use normal"


def _copies_problems(recipe: Recipe, stage: str) -> Iterator[str]:
    """``mix.experts split`` is upcycled as virtual groups: copies of a part alone could not be the seed."""
    if recipe.mix.experts == "split":
        yield from _group_problems(recipe, f"{stage} with mix.experts split")
    if len(recipe.source_names) * recipe.mix.copies < 2:
        yield f"{stage}: one copy of the seed is a dense model; set mix.include_seed: true or mix.copies: 2"
