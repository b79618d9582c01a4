"""Every number of a comparison, from what its runs left on disk: compare.json, and the pages made of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from btx_megatron.comparison.rows import Row, rows_of_comparison
from btx_megatron.comparison.statistics import Spread, difference, verdict
from btx_megatron.comparison.variants import Variant
from btx_megatron.durable import write_durably
from btx_megatron.errors import UserError
from btx_megatron.estimate import recipe_parameter_counts
from btx_megatron.evaluation.report import MEAN
from btx_megatron.evaluation.rows import EVALUATION_FILE, MOE_ROWS, ensemble_rows
from btx_megatron.methods import main_stage
from btx_megatron.recipe import Recipe
from btx_megatron.recipe_compare import LEAST_LOAD, TASK, Prediction

COMPARISON_FILE = "compare.json"


def check_predictions(predictions: list[Prediction], variants: list[Variant]) -> None:
    """Raises UserError for a prediction about what the comparison will not have."""
    variants = of_first_seed(variants)
    rows = {row.name: row for row in rows_of_comparison(variants)}
    for number, prediction in enumerate(predictions):
        key = f"compare.predictions[{number}]"
        for name in prediction.rows:
            if name not in rows:
                raise UserError(f"{key}.rows: no row '{name}'; rows: {', '.join(rows)}")
            if prediction.measure == LEAST_LOAD and not _has_load(rows[name]):
                raise UserError(f"{key}.measure {LEAST_LOAD}: '{name}' has no router that is measured")
            if prediction.measure.startswith(TASK) and _is_ensemble(rows[name], variants):
                raise UserError(
                    f"{key}.measure {prediction.measure}: '{name}' is an ensemble, which is not asked"
                )


def _has_load(row: Row) -> bool:
    """Routes are counted of the variants' own mixtures."""
    return row.name == row.variant and row.row in MOE_ROWS


def _is_ensemble(row: Row, variants: list[Variant]) -> bool:
    (variant,) = (variant for variant in variants if variant.name == row.variant)
    return row.row in ensemble_rows(variant.recipe)


def of_first_seed(variants: list[Variant]) -> list[Variant]:
    """The variants once."""
    return [variant for variant in variants if variant.random_seed == variants[0].random_seed]


def write_results(recipe: Recipe, runs: list[Variant], out: Path) -> dict[str, Any]:
    """Write compare.json, the pictures, report.md and report.html; returns what compare.json holds.

    ``runs``: finished ones, all variants of each random seed.
    """
    from btx_megatron.comparison.page import write_pages

    results = gather(recipe, runs)
    out.mkdir(parents=True, exist_ok=True)
    write_durably(out / COMPARISON_FILE, json.dumps(results, indent=1) + "\n")
    write_pages(results, out)
    return results


def gather(recipe: Recipe, runs: list[Variant]) -> dict[str, Any]:
    """Every number, as plain values. Lists over random seeds are in the order of ``random_seeds``."""
    seeds = list(dict.fromkeys(run.random_seed for run in runs))
    variants = of_first_seed(runs)
    measured = {(run.name, run.random_seed): _Run(run) for run in runs}
    rows = {
        row.name: _row(row, [measured[row.variant, seed] for seed in seeds])
        for row in rows_of_comparison(variants)
    }
    return {
        "name": recipe.name,
        "random_seeds": seeds,
        "match": recipe.compare.match,
        "domains": recipe.domain_names,
        "variants": {
            variant.name: _variant(recipe, variant, [measured[variant.name, seed] for seed in seeds])
            for variant in variants
        },
        "rows": rows,
        "differences": _differences(rows, variants[0].name),
        "predictions": [_judged(prediction, rows) for prediction in recipe.compare.predictions],
        **measured[variants[0].name, seeds[0]].made_with(),
    }


class _Run:
    """A finished run of a variant."""

    def __init__(self, variant: Variant) -> None:
        self.recipe, self._folder = variant.recipe, variant.run
        self.summary = self._read("report", "summary.json")
        self.evaluation = self._read("evaluate", EVALUATION_FILE)

    def _read(self, stage: str, file: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(
            (self._folder.published(stage) / file).read_text(encoding="utf-8")
        )
        return content

    def losses(self, row: str) -> dict[str, float]:
        """By domain, and their mean."""
        losses: dict[str, float] = self.summary["held_out_loss"][row]
        return losses

    def least_load(self) -> float | None:
        """Of the least used expert; 1 is even. None where the method makes no mixture."""
        share = (self.evaluation["routing"] or {}).get("share")
        if share is None:
            return None
        layers = [layer for domain in share for layer in domain]
        means = [sum(layer[expert] for layer in layers) / len(layers) for expert in range(len(layers[0]))]
        return min(means) * len(means)

    def loads_by_step(self) -> list[dict[str, Any]]:
        """Of the last stage: steps at which loads were read, and least and largest share of a layer."""
        last = main_stage(self.recipe)
        if last is None or not self.recipe.num_experts(last):
            return []
        lines = (self._folder.published(last) / "losses.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        return [
            {"step": record["step"], "min": record["expert_load"]["min"], "max": record["expert_load"]["max"]}
            for record in records
            if "expert_load" in record
        ]

    def made_with(self) -> dict[str, Any]:
        """Versions, commit and day of the first run's evaluation."""
        manifest = self._folder.manifest("evaluate")
        assert manifest is not None
        return {
            "versions": manifest.versions,
            "code_commit": manifest.code_commit,
            "created": manifest.created,
        }


def _row(row: Row, runs: list[_Run]) -> dict[str, Any]:
    own, first = row.name == row.variant, runs[0]
    losses = [run.losses(row.row) for run in runs]
    loads = [run.least_load() for run in runs] if own and row.row in MOE_ROWS else []
    known = [load for load in loads if load is not None]
    columns = {column: [loss[column] for loss in losses] for column in losses[0]}
    ensemble = row.row in ensemble_rows(first.recipe)  # several models
    counts = asdict(recipe_parameter_counts(first.recipe))
    return {
        "variant": row.variant if own else None,
        "held_out_loss": {column: _told(values) for column, values in columns.items()},
        LEAST_LOAD: _told(known) if known else None,
        "tasks": {
            task: _told([run.summary["tasks"][row.row][task] for run in runs])
            for task in first.summary.get("tasks", {}).get(row.row, {})
        },
        "tokens": first.summary["tokens"][row.row],
        "flops": first.summary["flops"][row.row],
        "active_parameters": None if ensemble else counts["moe_active" if row.row in MOE_ROWS else "dense"],
    }


def _variant(recipe: Recipe, variant: Variant, runs: list[_Run]) -> dict[str, Any]:
    last = main_stage(variant.recipe)
    return {
        "overrides": recipe.compare.variants[variant.name],
        "method": variant.recipe.method,
        "last_stage": last,
        "train_iters": variant.recipe.stage(last).training.train_iters if last else None,
        "stage_seconds": [run.summary["stage_seconds"] for run in runs],
        "routing": [run.evaluation["routing"] for run in runs],
        "load_by_step": [run.loads_by_step() for run in runs],
    }


def _told(values: list[float]) -> dict[str, Any]:
    spread = Spread(tuple(values))
    return {"mean": spread.mean, "deviation": spread.deviation, "values": values}


def _differences(rows: dict[str, Any], first: str) -> dict[str, Any]:
    """Of every variant from the first, in the mean over domains."""
    reference = rows[first]["held_out_loss"][MEAN]["values"]
    told = {}
    for name, row in rows.items():
        if name != first and row["variant"] is not None:
            spread = difference(row["held_out_loss"][MEAN]["values"], reference)
            told[name] = _told(list(spread.values)) | {"half_width": _finite(spread.half_width)}
    return told


def _judged(prediction: Prediction, rows: dict[str, Any]) -> dict[str, Any]:
    first, second = (_values(rows[row], prediction) for row in prediction.rows)
    spread = difference(first, second)
    return {
        **asdict(prediction),
        "difference": _told(list(spread.values)),
        "half_width": _finite(spread.half_width),
        "verdict": verdict(spread, prediction.expect, prediction.within),
    }


def _values(row: dict[str, Any], prediction: Prediction) -> list[float]:
    measure = prediction.measure
    if measure == LEAST_LOAD:
        told = row[LEAST_LOAD]
    elif measure.startswith(TASK):
        told = row["tasks"][measure.removeprefix(TASK)]
    else:
        told = row["held_out_loss"][measure]
    values: list[float] = told["values"]
    return values


def _finite(number: float) -> float | None:
    return None if number == float("inf") else number
