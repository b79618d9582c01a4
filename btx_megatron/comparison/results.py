"""Every number of a comparison, from what its runs left on disk: a file of each random seed, and what all of
them say, compare.json and the pages made of it.

A random seed's file is enough to tell of it: its runs may lie on another machine, or be gone.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from itertools import chain, count
from pathlib import Path
from typing import Any

from btx_megatron.comparison.rows import Row, rows_of_comparison
from btx_megatron.comparison.statistics import Spread, difference, verdict
from btx_megatron.comparison.variants import Variant
from btx_megatron.durable import write_durably
from btx_megatron.errors import UserError
from btx_megatron.estimate import recipe_parameter_counts
from btx_megatron.evaluation.page import machine_text
from btx_megatron.evaluation.report import MEAN
from btx_megatron.evaluation.rows import EVALUATION_FILE, MOE_ROWS, ensemble_rows, opted_out, rows_of
from btx_megatron.methods import main_stage
from btx_megatron.recipe import Recipe
from btx_megatron.recipe_compare import LEAST_LOAD, TASK, Prediction
from btx_megatron.recipe_file import recipe_to_dict
from btx_megatron.run_folder import result_keys

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


def write_results(recipe: Recipe, of_seeds: list[dict[str, Any]], out: Path) -> dict[str, Any]:
    """Write compare.json, the pictures, report.md and report.html; returns what compare.json holds.

    ``of_seeds``: what ``gather`` tells of each random seed.
    """
    from btx_megatron.comparison.page import write_pages

    results = join(recipe, of_seeds)
    out.mkdir(parents=True, exist_ok=True)
    write_durably(out / COMPARISON_FILE, json.dumps(results, indent=1) + "\n")
    write_pages(results, out)
    return results


def keep(of_seed: dict[str, Any], out: Path) -> None:
    """Write what ``gather`` tells of a random seed into the folder of the results.

    A file of other recipes that lies there, and may be all that is left of them, is moved aside.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = seed_file(out, of_seed["random_seed"])
    if path.exists() and _read(path).get("recipes") != of_seed["recipes"]:
        path.rename(_unused(path))
    write_durably(path, json.dumps(of_seed) + "\n")


def _unused(path: Path) -> Path:
    """``seed-1.json`` -> ``seed-1.json.before``, or the first of ``.before-2``, ... that is not there."""
    before = path.with_suffix(".json.before")
    others = (before.with_name(f"{before.name}-{number}") for number in count(2))
    return next(name for name in chain([before], others) if not name.exists())


def kept(variants: list[Variant], out: Path) -> dict[str, Any] | None:
    """What was kept of a random seed; None where nothing was, or of other recipes or in another order: names
    of rows depend on it."""
    told = _read(seed_file(out, variants[0].random_seed))
    fits = list(told.get("recipes", {}).items()) == list(_recipes(variants).items()) and told.get("text")
    return told if fits else None


def _read(path: Path) -> dict[str, Any]:
    """Empty where there is no such file, or it is not what ``keep`` writes."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return told if isinstance(told, dict) and isinstance(told.get("recipes"), dict) else {}


def seed_file(out: Path, random_seed: int) -> Path:
    """Where a random seed's results are kept."""
    return out / f"seed-{random_seed}.json"


def _recipes(variants: list[Variant]) -> dict[str, str]:
    """Variant -> hash of all that its results depend on."""
    return {variant.name: _hash(result_keys(recipe_to_dict(variant.recipe))) for variant in variants}


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def gather(variants: list[Variant]) -> dict[str, Any]:
    """Every number of one random seed, as plain values. ``variants``: all of it, finished."""
    runs = {variant.name: _Run(variant) for variant in variants}
    return {
        "random_seed": variants[0].random_seed,
        "recipes": _recipes(variants),
        "text": runs[variants[0].name].text(),
        "variants": {name: _variant(run) for name, run in runs.items()},
        "rows": {row.name: _row(row, runs[row.variant]) for row in rows_of_comparison(variants)},
        "made_with": runs[variants[0].name].made_with(),
    }


def join(recipe: Recipe, of_seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """What compare.json holds. Lists over random seeds are in their order here.

    Raises UserError for random seeds of different text, which say nothing beside each other.
    """
    first = of_seeds[0]
    for told in of_seeds:
        if told["text"] != first["text"]:
            raise UserError(
                f"random seeds {first['random_seed']} and {told['random_seed']} were measured on different "
                "text, tokens or tasks (from other versions of packages?); keep one of them"
            )
    rows = {name: _joined_row([told["rows"][name] for told in of_seeds]) for name in first["rows"]}
    return {
        "name": recipe.name,
        "random_seeds": [told["random_seed"] for told in of_seeds],
        "match": recipe.compare.match,
        "domains": recipe.domain_names,
        "variants": {
            name: {"overrides": overrides, **_joined_variant([told["variants"][name] for told in of_seeds])}
            for name, overrides in recipe.compare.variants.items()
        },
        "rows": rows,
        "differences": _differences(rows, next(iter(recipe.compare.variants))),
        "predictions": [_judged(prediction, rows) for prediction in recipe.compare.predictions],
        "made_with": [told["made_with"] for told in of_seeds],
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

    def text(self) -> str:
        """Hash of the text and the tasks that the run's models were measured on."""
        return _hash({key: self.evaluation[key] for key in ("held_out_sha256", "task_files")})

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
        """Versions, commit and day of the run's evaluation, and the machine that this is gathered on."""
        manifest = self._folder.manifest("evaluate")
        assert manifest is not None
        return {
            "versions": manifest.versions,
            "code_commit": manifest.code_commit,
            "created": manifest.created,
            "machine": machine_text(),
        }


def _row(row: Row, run: _Run) -> dict[str, Any]:
    own = row.name == row.variant
    ensemble = row.row in ensemble_rows(run.recipe)  # several models
    is_mixture = row.row in MOE_ROWS or opted_out(row.row)
    made_by = rows_of(run.recipe).get(row.row)  # a mixture that was grown had fewer experts
    experts = run.recipe.num_experts(made_by) if made_by else None
    counts = asdict(recipe_parameter_counts(run.recipe, experts))
    return {
        "variant": row.variant if own else None,
        "held_out_loss": run.losses(row.row),
        LEAST_LOAD: run.least_load() if own and row.row in MOE_ROWS else None,
        "tasks": run.summary.get("tasks", {}).get(row.row, {}),
        "tokens": run.summary["tokens"][row.row],
        "flops": run.summary["flops"][row.row],
        "active_parameters": None if ensemble else counts["moe_active" if is_mixture else "dense"],
    }


def _joined_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one model under every random seed; what it takes is the same under all."""
    loads = [row[LEAST_LOAD] for row in rows if row[LEAST_LOAD] is not None]
    return rows[0] | {
        "held_out_loss": _told_each([row["held_out_loss"] for row in rows]),
        "tasks": _told_each([row["tasks"] for row in rows]),
        LEAST_LOAD: _told(loads) if loads else None,
    }


def _told_each(values: list[dict[str, float]]) -> dict[str, Any]:
    return {key: _told([its[key] for its in values]) for key in values[0]}


def _variant(run: _Run) -> dict[str, Any]:
    last = main_stage(run.recipe)
    return {
        "method": run.recipe.method,
        "last_stage": last,
        "train_iters": run.recipe.stage(last).training.train_iters if last else None,
        "stage_seconds": run.summary["stage_seconds"],
        "routing": run.evaluation["routing"],
        "load_by_step": run.loads_by_step(),
    }


_OF_A_SEED = ("stage_seconds", "routing", "load_by_step")
"""Of a variant: a list over random seeds. The others are the same under all."""


def _joined_variant(told: list[dict[str, Any]]) -> dict[str, Any]:
    return told[0] | {key: [its[key] for its in told] for key in _OF_A_SEED}


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
