"""The rows of the result table: the models of a run that are held against each other."""

from __future__ import annotations

from btx_megatron.recipe import SEED, Recipe


def rows_of(recipe: Recipe) -> dict[str, str]:
    """Rows in the table's order: row -> the stage whose checkpoint it is."""
    rows = {SEED: "seed"}
    rows |= {f"expert:{name}": f"expert:{name}" for name in recipe.domain_names}
    rows |= {"average": "average", "merged": "mix"}
    rows |= {baseline: baseline for baseline in recipe.baselines}
    return rows | {"btx": "finetune"}
