"""The report of a run: ``summary.json``, two pictures and ``report.md``, from what the stages left on disk.

Nothing is measured here. The losses are those of ``evaluate``, times and tokens those of the stages'
manifests, so a report can be written again at any time, on any machine, without Torch.

A row's tokens and FLOPs are what training that model took, the seed's own left out because every row has
them; a stage that several models share counts once within a row.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btx_megatron.errors import UserError
from btx_megatron.estimate import recipe_parameter_counts
from btx_megatron.estimate_flops import flops_text, training_flops_per_token
from btx_megatron.evaluation.page import render_page
from btx_megatron.evaluation.rows import EVALUATION_FILE, all_rows, spent_on
from btx_megatron.manifest import Manifest
from btx_megatron.methods import stage_names, training_stages
from btx_megatron.recipe import Recipe
from btx_megatron.run_folder import RunFolder

if TYPE_CHECKING:
    from rich.table import Table

MEAN = "mean"


def write_report(recipe: Recipe, run_folder: Path, out: Path) -> dict[str, Any]:
    """Write ``summary.json``, ``losses.png``, ``routing.png`` (of a MoE) and ``report.md`` into ``out``.

    Returns the summary. Raises UserError if a stage that the report tells of is not finished.
    """
    from btx_megatron.evaluation.pictures import draw_losses, draw_routing

    evaluation = read_evaluation(recipe, run_folder)
    manifests = read_manifests(recipe, run_folder)
    summary = summarize(recipe, evaluation, manifests)
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    draw_losses(read_curves(recipe, run_folder), summary["held_out_loss"], out / "losses.png")
    if evaluation["routing"]:
        draw_routing(evaluation["routing"], out / "routing.png")
    page = render_page(recipe, summary, evaluation, manifests)
    (out / "report.md").write_text(page, encoding="utf-8")
    return summary


def read_evaluation(recipe: Recipe, run_folder: Path) -> dict[str, Any]:
    """What ``evaluate`` measured. Raises UserError where it did not run, or measured another set of rows."""
    path = RunFolder(run_folder).published("evaluate") / EVALUATION_FILE
    try:
        evaluation: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not there; run `btx run` or `btx evaluate` first") from None
    except ValueError:
        raise UserError(f"{path}: broken; delete {path.parent} and run `btx evaluate` again") from None
    evaluation.setdefault("tasks", {})  # of version 0.1 before there were tasks
    for row in all_rows(recipe):
        if list(evaluation["held_out_loss"].get(row, {})) != recipe.domain_names:
            raise UserError(f"{path}: no losses of '{row}' on every domain; run `btx evaluate` again")
    return evaluation


def read_manifests(recipe: Recipe, run_folder: Path) -> dict[str, Manifest]:
    """Manifest of every stage before the report, in the pipeline's order.

    Raises UserError for a stage that is not finished.
    """
    manifests: dict[str, Manifest] = {}
    for stage in [*stage_names(recipe), "evaluate"]:
        manifest = RunFolder(run_folder).manifest(stage)
        if manifest is None:
            raise UserError(f"{run_folder}: stage '{stage}' is not finished; run `btx run` first")
        manifests[stage] = manifest
    return manifests


def read_curves(recipe: Recipe, run_folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Training curve of each stage: (tokens that the stage has seen, loss in nats a token) a step."""
    curves = {}
    for stage in training_stages(recipe):
        path = RunFolder(run_folder).published(stage) / "losses.jsonl"
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        told = [(record["tokens"], record["lm_loss"]) for record in records]
        curves[stage] = [(tokens, loss) for tokens, loss in told if loss is not None]  # of skipped steps
    return curves


def summarize(recipe: Recipe, evaluation: dict[str, Any], manifests: dict[str, Manifest]) -> dict[str, Any]:
    """The content of ``summary.json``; ``mean`` is the plain mean over domains."""
    return {
        "held_out_loss": {row: _with_mean(evaluation["held_out_loss"][row]) for row in all_rows(recipe)},
        "tokens": {row: sum(_tokens(row, recipe, manifests).values()) for row in all_rows(recipe)},
        "flops": {row: _flops(row, recipe, manifests) for row in all_rows(recipe)},
        "tasks": {
            row: {task: told["value"] for task, told in its.items()}
            for row, its in evaluation["tasks"].items()
        },
        "stage_seconds": {stage: manifest.duration_seconds for stage, manifest in manifests.items()},
        "parameters": asdict(recipe_parameter_counts(recipe)),
    }


def rows_table(summary: dict[str, Any]) -> Table:
    """Held-out loss of every row, for a terminal; the best of each column stands out."""
    from rich.table import Table

    losses = summary["held_out_loss"]
    columns = list(next(iter(losses.values())))
    best = {column: min(row[column] for row in losses.values()) for column in columns}
    table = Table(
        title="Held-out loss, nats a token",
        caption="bold: the best of a column; tokens and FLOPs: of training beyond the seed",
    )
    table.add_column("model", min_width=max(map(len, losses)))
    for column in [*columns, "tokens", "FLOPs"]:
        table.add_column(column, justify="right")
    for row, values in losses.items():
        cells = [
            f"[bold green]{value:.3f}[/]" if value == best[column] else f"{value:.3f}"
            for column, value in values.items()
        ]
        table.add_row(row, *cells, f"{summary['tokens'][row]:,}", flops_text(summary["flops"][row]))
    return table


def print_report(folder: Path) -> None:
    """Print the table of a report, and where the page is."""
    from rich.console import Console

    Console().print(rows_table(json.loads((folder / "summary.json").read_text(encoding="utf-8"))))
    print(f"report: {folder / 'report.md'}")


def _with_mean(losses: dict[str, float]) -> dict[str, float]:
    return {**losses, MEAN: sum(losses.values()) / len(losses)}


def _tokens(row: str, recipe: Recipe, manifests: dict[str, Manifest]) -> dict[str, int]:
    """By stage; an imported one took none."""
    return {stage: manifests[stage].tokens or 0 for stage in spent_on(recipe, row)}


def _flops(row: str, recipe: Recipe, manifests: dict[str, Manifest]) -> float:
    tokens = _tokens(row, recipe, manifests)
    return sum((count * training_flops_per_token(recipe, stage) for stage, count in tokens.items()), 0.0)
