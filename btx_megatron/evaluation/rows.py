"""The rows of the result table: the models of a run that are held against each other."""

from __future__ import annotations

from btx_megatron.methods import baseline_stages, main_stage
from btx_megatron.recipe import SEED, Recipe

MOE_ROWS = ("merged", "btx", "sparse_upcycling_dm", "sparse_upcycling_cm")
"""Rows whose model is a mixture of experts."""


def spent_on(recipe: Recipe, row: str) -> list[str]:
    """The training stages that it took to make a row's model, the seed left out, which every row has."""
    experts = recipe.expert_stages
    stages = {SEED: [], "average": experts, "merged": experts, "btx": [*experts, "finetune"]}
    return stages.get(row, [row])


def rows_of(recipe: Recipe) -> dict[str, str]:
    """Rows in the table's order: row -> the stage whose checkpoint it is. The method's own is last."""
    main = main_stage(recipe)
    rows = {SEED: "seed", **{name: name for name in recipe.expert_stages}}
    rows |= {"average": "average"} if recipe.expert_stages else {}
    rows |= {"merged": "mix"} if main == "finetune" else {}
    rows |= {baseline: baseline for baseline in baseline_stages(recipe)}
    return rows | ({main_row(recipe): main} if main else {})


def main_row(recipe: Recipe) -> str:
    """The row of the method itself: that of its last stage; without mixing, the experts' average."""
    main = main_stage(recipe)
    return {"finetune": "btx", None: "average"}.get(main, main or "")
