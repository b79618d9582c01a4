"""The rows of the result table: the models of a run that are held against each other."""

from __future__ import annotations

from btx_megatron.recipe import SEED, Recipe


def spent_on(recipe: Recipe, row: str) -> list[str]:
    """The training stages that it took to make a row's model, the seed left out, which every row has."""
    experts = [f"expert:{name}" for name in recipe.domain_names]
    stages = {SEED: [], "average": experts, "merged": experts, "btx": [*experts, "finetune"]}
    return stages.get(row, [row])


def rows_of(recipe: Recipe) -> dict[str, str]:
    """Rows in the table's order: row -> the stage whose checkpoint it is."""
    rows = {SEED: "seed"}
    rows |= {f"expert:{name}": f"expert:{name}" for name in recipe.domain_names}
    rows |= {"average": "average", "merged": "mix"}
    rows |= {baseline: baseline for baseline in recipe.baselines}
    return rows | {"btx": "finetune"}
