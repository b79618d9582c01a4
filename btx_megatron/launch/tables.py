"""What ``btx plan`` and ``btx status`` print: plain text in columns, quick to make and easy to grep."""

from __future__ import annotations

from btx_megatron.columns import columns
from btx_megatron.estimate import recipe_parameter_counts, stage_tokens
from btx_megatron.launch.display import clock
from btx_megatron.pipeline import PipelineStage, stages_of
from btx_megatron.recipe import Recipe
from btx_megatron.run_folder import RunFolder
from btx_megatron.runtime.outcome import read_outcome
from btx_megatron.runtime.progress import read_progress
from btx_megatron.runtime.stopwatch import read_duration


def plan_text(recipe: Recipe) -> str:
    """Stages in order with layout, ranks, steps and tokens; then the models' parameters."""
    rows = [["stage", "reads", "layout", "ranks", "steps", "tokens"]]
    rows += [_plan_row(recipe, stage) for stage in stages_of(recipe)]
    counts = recipe_parameter_counts(recipe)
    parameters = [
        ["parameters", ""],
        ["one expert", f"{counts.dense:,}"],
        ["MoE, total", f"{counts.moe_total:,}"],
        ["MoE, active", f"{counts.moe_active:,}"],
    ]
    title = f"{recipe.name}: {len(recipe.expert_names)} experts, top-{recipe.moe.moe_router_topk}"
    title += f"; run folder {recipe.run_folder}"
    return "\n\n".join([title, columns(rows, right=(3, 4, 5)), columns(parameters, right=(1,))])


def _plan_row(recipe: Recipe, stage: PipelineStage) -> list[str]:
    reads = ", ".join(stage.inputs) if len(stage.inputs) <= 4 else "all of these"
    if stage.task == "train":
        settings = recipe.stage(stage.name)
        steps, tokens = f"{settings.training.train_iters:,}", f"{stage_tokens(recipe, stage.name):,}"
        return [stage.name, reads, str(settings.layout), str(stage.ranks), steps, tokens]
    layout = str(recipe.evaluate.layout) if stage.task == "evaluate" else "-"
    return [stage.name, reads or "-", layout, str(stage.ranks), "-", "-"]


def status_text(recipe: Recipe) -> str:
    """Each stage of the recipe's run: done, running, unfinished, failed or missing, and how far."""
    run = RunFolder(recipe.run_folder)
    rows = [["stage", "state", "time", ""]]
    rows += [_status_row(run, stage) for stage in stages_of(recipe)]
    return "\n".join([str(run.path), "", columns(rows, right=(2,))])


def _status_row(run: RunFolder, stage: PipelineStage) -> list[str]:
    manifest, work = run.manifest(stage.name), run.work(stage.name)
    if manifest:
        tokens = f"{manifest.tokens:,} tokens" if manifest.tokens is not None else ""
        return [stage.name, "done", clock(manifest.duration_seconds), tokens]
    if not work.is_dir():
        return [stage.name, "missing", "-", ""]
    outcome, record = read_outcome(work), read_progress(work)
    how_far = f"{record.phase} {record.done}/{record.total} {record.text}".strip() if record else ""
    time = clock(read_duration(work))
    if outcome and outcome.kind in ("failed", "user_error"):
        return [stage.name, "failed", time, outcome.message]
    return [
        stage.name,
        "running" if run.is_locked(stage.name) and not outcome else "unfinished",
        time,
        how_far,
    ]
