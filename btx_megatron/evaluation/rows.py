"""The rows of the result table: the models of a run that are held against each other."""

from __future__ import annotations

from btx_megatron.methods import baseline_stages, main_stage
from btx_megatron.recipe import GROWN_FROM, SEED, Recipe

EVALUATION_FILE = "evaluation.json"
"""What the evaluation tells of them, in its folder."""

MOE_ROWS = (GROWN_FROM, "merged", "btx", "sparse_upcycling_dm", "sparse_upcycling_cm")
"""Rows whose model is a mixture of experts."""
PARAMETERS_ROW = "btm:parameters"
BTM_ROWS = ("btm:top-1", "btm:top-2", "btm:uniform", "btm:cached", "btm:updating", PARAMETERS_ROW)
"""Experts chosen by similarity, weighed by a posterior with that prior, and averaged by the cached one."""
CBTM_ROWS = ("cbtm:top-1", "cbtm:top-2", "cbtm:all")
"""Experts weighed by how near the context is to their clusters: so many of the nearest, and all."""
TIMOE_ROWS = ("timoe:uniform", "timoe:posterior")
"""Experts of earlier text, all alike, and weighed by a posterior."""


WITHOUT = "without:"
"""Before the domain that is opted out of the method's mixture."""


def opted_out(row: str) -> str | None:
    """The source whose experts are masked in a row's model."""
    return row.removeprefix(WITHOUT) if row.startswith(WITHOUT) else None


def ensemble_rows(recipe: Recipe) -> list[str]:
    """Rows that have no stage of their own: the experts' probabilities are mixed, or their parameters."""
    btm = BTM_ROWS if "btm" in (recipe.method, *recipe.baselines) and recipe.expert_stages else ()
    own = {"cbtm": CBTM_ROWS, "timoe": TIMOE_ROWS}.get(recipe.method, ())
    return [*btm, *own]


def all_rows(recipe: Recipe) -> list[str]:
    """Every row of the result table, in its order; the method's own is last."""
    own = main_row(recipe)
    rows = [row for row in (*rows_of(recipe), *ensemble_rows(recipe)) if row != own]
    return [*rows, own]


def spent_on(recipe: Recipe, row: str) -> list[str]:
    """The training stages that it took to make a row's model, the seed left out, which every row has."""
    experts = recipe.expert_stages
    if row in ensemble_rows(recipe):
        return experts
    if opted_out(row):
        row = main_row(recipe)
    stages = {SEED: [], GROWN_FROM: [], "average": experts, "merged": experts, "btx": [*experts, "finetune"]}
    return stages.get(row, [row])


def rows_of(recipe: Recipe) -> dict[str, str]:
    """Rows in the table's order: row -> the stage whose checkpoint it is. The method's own is last."""
    main = main_stage(recipe)
    rows = {SEED: "seed", **{name: name for name in recipe.expert_stages}}
    grown = recipe.mix.grow_from is not None
    rows |= {"average": "average"} if recipe.expert_stages and not grown else {}
    rows |= {GROWN_FROM: GROWN_FROM} if grown else {}
    rows |= {"merged": "mix"} if main == "finetune" else {}
    rows |= {baseline: baseline for baseline in baseline_stages(recipe)}
    rows |= {f"{WITHOUT}{name}": main for name in recipe.evaluate.opt_out if main}
    return rows | ({main_row(recipe): main} if main else {})


def main_row(recipe: Recipe) -> str:
    """The row of the method itself: that of its last stage; of ensembles, the one that needs no choice."""
    ends = {
        "finetune": "btx",
        None: {"btm": "btm:updating", "cbtm": "cbtm:all", "timoe": "timoe:posterior"}.get(recipe.method),
    }
    main = main_stage(recipe)
    return ends.get(main) or main or ""
