"""How long the baselines train: as long as Branch-Train-MiX would, in tokens or in FLOPs.

What btx takes beyond the seed is all its experts and the MoE stage, whichever method the recipe runs: the
recipe describes btx, and with ``method: dense`` the seed is trained on for as many tokens as in a run where
``dense`` is a baseline beside btx. c-BTM has domains of its own: there it is its experts alone. The seed
itself is left out, because every model starts from it.
"""

from __future__ import annotations

import math

from btx_megatron.estimate import stage_tokens, step_tokens
from btx_megatron.estimate_flops import stage_flops, training_flops_per_token
from btx_megatron.methods import training_stages
from btx_megatron.recipe import MATCHED_STAGES, Recipe

COMPUTE_MATCHED = ("sparse_upcycling_cm",)


def reference_stages(recipe: Recipe) -> list[str]:
    """The stages of btx that baselines are matched to."""
    if recipe.cluster_names:
        return recipe.expert_stages
    return [*(f"expert:{domain.name}" for domain in recipe.data.domains if domain.expert), "finetune"]


def matched_train_iters(recipe: Recipe, stage: str) -> int:
    """Steps of a baseline for as many tokens (compute-matched: FLOPs) as all of btx, rounded up.

    The steps of btx must be known. Raises UserError where FLOPs need a tokenizer that cannot be read.
    """
    reference = reference_stages(recipe)
    if stage not in COMPUTE_MATCHED:
        tokens = sum(stage_tokens(recipe, name) for name in reference)
        return -(-tokens // step_tokens(recipe, stage))
    flops = sum(stage_flops(recipe, name) for name in reference)
    return math.ceil(flops / (training_flops_per_token(recipe, stage) * step_tokens(recipe, stage)))


def unresolved_stages(recipe: Recipe) -> list[str]:
    """Baselines among the recipe's stages whose steps are not given."""
    trained = [stage for stage in training_stages(recipe) if stage in MATCHED_STAGES]
    return [stage for stage in trained if recipe.stage(stage).training.train_iters is None]
