"""The rows of a comparison's table, and which of them are one model.

Rows are the variants' own models, by the variant's name, and the other models that their runs measured (seed,
experts, averages, baselines, ensembles): by their own name where they are of the first variant that has them,
as VARIANT/ROW where another variant's is another model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from btx_megatron.comparison.variants import Variant
from btx_megatron.evaluation.rows import (
    EVALUATION_FILE,
    MOE_ROWS,
    WITHOUT,
    all_rows,
    ensemble_rows,
    main_row,
    rows_of,
    spent_on,
)
from btx_megatron.evaluation.tasks import documents_hash

_FOR_TRAINING = (
    "moe_router_load_balancing_type",
    "moe_aux_loss_coeff",
    "moe_aux_loss_adaptive",
    "moe_z_loss_coeff",
)
"""Of ``moe``: without effect on what a model computes."""


@dataclass(frozen=True)
class Row:
    """One model of the table."""

    name: str
    variant: str
    """In whose runs it is."""
    row: str
    """Its name there."""


def rows_of_comparison(variants: list[Variant]) -> list[Row]:
    """The variants' own models first, then the others, each once. ``variants``: of one random seed."""
    own = [Row(variant.name, variant.name, main_row(variant.recipe)) for variant in variants]
    seen = {_identity(variant, main_row(variant.recipe)) for variant in variants}
    names, others = {row.name for row in own}, []
    for variant in variants:
        for row in all_rows(variant.recipe):
            identity = _identity(variant, row)
            if identity in seen:
                continue
            seen.add(identity)
            name = f"{variant.name}/{row}" if row in names else row
            names.add(name)
            others.append(Row(name, variant.name, row))
    return [*own, *others]


def measured_before(variant: Variant, others: Iterable[Variant]) -> dict[str, Any]:
    """Row -> what was measured, of the rows whose model a finished run of another variant measured alike.

    Ensembles and the variant's own row are measured in any case: of these the evaluation tells more.
    """
    own = main_row(variant.recipe)
    files = {task.name: documents_hash(task) for task in variant.recipe.evaluate.tasks}
    wanted = {_identity(variant, row): row for row in rows_of(variant.recipe) if row != own}
    found: dict[str, Any] = {}
    for other in others:
        alike = other.recipe.evaluate == variant.recipe.evaluate
        if wanted and alike and other.run.manifest("evaluate"):
            told = (other.run.published("evaluate") / EVALUATION_FILE).read_text(encoding="utf-8")
            evaluation = json.loads(told)
            if evaluation["task_files"] != files:
                continue
            for row in rows_of(other.recipe):
                known = wanted.pop(_identity(other, row), None)
                if known:
                    found[known] = {
                        "held_out_loss": evaluation["held_out_loss"][row],
                        "tasks": evaluation["tasks"].get(row),
                    }
    return found


def _identity(variant: Variant, row: str) -> tuple[str, ...]:
    """What tells a row's model from another's: its name in the run, and the keys of what it is made from."""
    recipe, keys = variant.recipe, variant.keys
    stages = [rows_of(recipe)[row]] if row in rows_of(recipe) else spent_on(recipe, row)
    own = row if row not in rows_of(recipe) or row.startswith(WITHOUT) else ""
    router, sources = "", ""  # the same weights may be routed otherwise
    if row in MOE_ROWS:
        router = json.dumps({k: v for k, v in asdict(recipe.moe).items() if k not in _FOR_TRAINING})
    if row in ensemble_rows(recipe):  # of the experts, and of the seed where it joins them
        sources = json.dumps(recipe.source_names)
    return (own, router, sources, *(keys[stage] for stage in stages))
