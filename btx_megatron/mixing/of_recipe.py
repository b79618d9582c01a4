"""The mixes of a run: a recipe's words as the engine's options."""

from __future__ import annotations

from pathlib import Path

from btx_megatron.data.sample import training_sample
from btx_megatron.data.weights import stage_blend
from btx_megatron.mixing.plan import MixOptions
from btx_megatron.mixing.router_text import RouterTokens
from btx_megatron.recipe import MEASURED_FROM_SEED, ROUTERS_FROM_TEXT, SEED, Recipe

SAMPLE_TOKENS = 1 << 15
"""Of each model's training text, for a router that is made from it."""


def mix_options(recipe: Recipe) -> MixOptions:
    """Of the stage ``mix``."""
    mix, experts = recipe.mix, len(recipe.expert_names)
    topk = recipe.moe.topk(experts)
    return MixOptions(
        average=mix.average,
        weights=mix.weights,
        density=mix.density,
        experts=mix.experts,
        chunks=mix.chunks,
        copies=mix.copies,
        drop_ratio=mix.drop_ratio,
        router_init=mix.router_init,
        router_std=mix.router_std,
        router_topk=topk,
        router_pre_softmax=recipe.moe.moe_router_pre_softmax or topk == 1,
        virtual_scale=mix.virtual_scale,
        random_seed=mix.random_seed,
    )


def upcycling_options(recipe: Recipe) -> MixOptions:
    """Of the stage ``upcycle``: the seed is the only source, and the mixture has the shape of btx's.

    Cut feed-forwards are upcycled as virtual groups (arXiv 2410.07524), whose chunks share a router row and
    are scaled: with rows of their own a token would take parts of different copies, and start with half a
    feed-forward. The router is random, whatever btx's is.
    """
    mix = recipe.mix
    common = mix_options(recipe)
    return MixOptions(
        experts="virtual" if mix.chunks > 1 or mix.experts == "virtual" else "copies",
        chunks=mix.chunks,
        copies=len(recipe.source_names) * mix.copies,
        drop_ratio=mix.drop_ratio,
        router_std=mix.router_std,
        router_topk=common.router_topk,
        router_pre_softmax=common.router_pre_softmax,
        virtual_scale=mix.virtual_scale,
        random_seed=mix.random_seed,
    )


def average_options(recipe: Recipe) -> MixOptions:
    """Of the stage ``average``: merged as btx's shared weights are, but for base, which would be the seed."""
    mix = recipe.mix
    if mix.average == "base":
        return MixOptions()
    return MixOptions(
        average=mix.average, weights=mix.weights, density=mix.density, random_seed=mix.random_seed
    )


def needs_base(options: MixOptions) -> bool:
    """Whether the average is measured from the seed."""
    return options.average in MEASURED_FROM_SEED


def router_tokens(recipe: Recipe, data_folder: Path) -> RouterTokens | None:
    """A sample of what each model was trained on, where the router is made from it; never held-out text."""
    if recipe.mix.router_init not in ROUTERS_FROM_TEXT:
        return None
    stages = {name: SEED if name == SEED else f"expert:{name}" for name in recipe.source_names}
    return RouterTokens(
        {
            name: training_sample(
                data_folder,
                recipe.data.domains,
                stage_blend(recipe, stage),
                SAMPLE_TOKENS,
                recipe.mix.random_seed,
            )
            for name, stage in stages.items()
        }
    )
