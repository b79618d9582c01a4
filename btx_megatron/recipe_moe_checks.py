"""What the recipe's ``moe`` must satisfy: a router that can learn, and no key that would change nothing."""

from __future__ import annotations

from collections.abc import Iterator

from btx_megatron.recipe import Moe, Recipe
from btx_megatron.recipe_numbers import at_least, positive


def moe_problems(recipe: Recipe) -> Iterator[str]:
    """One line for each thing that cannot hold, naming key, numbers and fix."""
    moe, experts = recipe.moe, len(recipe.expert_names)
    yield from at_least("moe", moe, 1, ("moe_router_topk",))
    if moe.moe_router_type == "top_k" and moe.moe_router_topk > experts:
        yield (
            f"moe.moe_router_topk {moe.moe_router_topk} is more than the {experts} experts "
            f"({', '.join(recipe.expert_names)}); lower it"
        )
    if moe.moe_router_type == "top_k" and moe.moe_router_topk == 1 and not moe.moe_router_pre_softmax:
        yield (
            "moe.moe_router_topk 1 with moe.moe_router_pre_softmax false: the softmax over a single "
            "survivor is always 1, so the router gets no gradient; set moe_router_type: switch or "
            "sample_top1, or moe_router_topk >= 2"
        )
    yield from _router_option_problems(recipe)
    yield from at_least("moe", moe, 0, ("moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_router_seed"))
    yield from positive("moe", moe, ("moe_expert_capacity_factor", "moe_router_logit_norm_scale"))
    launch = recipe.launch
    if moe.moe_grouped_gemm and (launch.transformer_impl == "local" or launch.device == "cpu"):
        yield (
            "moe.moe_grouped_gemm true needs Transformer Engine's layers on a GPU, and launch has "
            f"device {launch.device}, transformer_impl {launch.transformer_impl or 'null'}; leave it out: "
            "experts are grouped where the build can"
        )
    yield from positive("mix", recipe.mix, ("router_std",))
    yield from at_least("mix", recipe.mix, 0, ("random_seed",))


_OF_SAMPLING = (
    "moe_router_temperature_decay",
    "moe_router_temperature_min",
    "moe_router_seed",
    "moe_router_inference",
)


def _router_option_problems(recipe: Recipe) -> Iterator[str]:
    """Keys that the router's type does not know would change nothing."""
    moe, default = recipe.moe, Moe()
    kind = moe.moe_router_type
    known = {"top_k": ("moe_router_topk", "moe_router_pre_softmax"), "sample_top1": _OF_SAMPLING}
    for owner, keys in known.items():
        for key in keys:
            if kind != owner and getattr(moe, key) != getattr(default, key):
                yield f"moe.{key} is for moe_router_type {owner}, not for {kind}; leave it out"
    if kind == "soft" and moe.moe_expert_capacity_factor is not None:
        yield "moe.moe_expert_capacity_factor: a soft router gives every token to every expert; leave it out"
    yield from at_least("moe", moe, 0, ("moe_router_temperature_decay",))
    yield from positive("moe", moe, ("moe_router_temperature_min",))
    if moe.moe_router_one_per_group:
        yield from _group_problems(recipe)
    balancing = moe.moe_router_load_balancing_type
    if moe.moe_aux_loss_adaptive and (balancing == "none" or moe.moe_aux_loss_coeff == 0):
        yield "moe.moe_aux_loss_adaptive: there is no balancing loss to weigh; leave it out"


def _group_problems(recipe: Recipe) -> Iterator[str]:
    key, groups = "moe.moe_router_one_per_group", recipe.expert_groups
    if len(set(groups)) == len(groups):
        yield f"{key}: no domain has several experts (mix.experts {recipe.mix.experts}); leave it out"
    topk = recipe.moe.topk(len(groups))
    if topk > len(set(groups)):
        yield f"{key}: a token takes {topk} experts, but there are {len(set(groups))} domains; lower one"
