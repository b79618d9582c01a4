"""What ``btx plan`` and ``btx status`` print: plain text in columns, quick to make and easy to grep."""

from __future__ import annotations

from btx_megatron.columns import columns
from btx_megatron.data.weights import source_tokens, stage_epochs
from btx_megatron.errors import UserError
from btx_megatron.estimate import recipe_parameter_counts, stage_tokens
from btx_megatron.estimate_flops import flops_text, stage_flops
from btx_megatron.evaluation.rows import all_rows, spent_on
from btx_megatron.gpus import gpu_named
from btx_megatron.launch.display import clock, how_far
from btx_megatron.launch.sizes import MFU, check_sizes, sizes_text
from btx_megatron.methods import has_moe
from btx_megatron.pipeline import PipelineStage, stages_of
from btx_megatron.recipe import Recipe
from btx_megatron.run_folder import RunFolder
from btx_megatron.runtime.outcome import read_outcome
from btx_megatron.runtime.progress import read_progress
from btx_megatron.runtime.stopwatch import read_duration


def plan_text(
    recipe: Recipe, gpu: str | None = None, mfu: float | None = None, fit: float | None = None
) -> str:
    """Stages in order with layout, ranks, steps and tokens; the models' parameters; memory, checkpoints,
    network and GPU-hours; epochs, once the data is prepared.

    ``gpu``, ``mfu``: None for H100 and MFU. ``fit``: GB a GPU that each stage must fit; None: the memory of
    ``gpu``, unless the recipe is for the CPU. Raises UserError where one does not, and where ``gpu`` or
    ``mfu`` make no sense.
    """
    kind, mfu = gpu_named(gpu or "H100"), MFU if mfu is None else mfu
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu {mfu:g}: a share, above 0 and at most 1")
    if fit is not None or recipe.launch.device != "cpu":
        check_sizes(recipe, kind.memory if fit is None else fit * 1e9)
    if recipe.imported_stages:
        from btx_megatron.mixing.pretrained import check_pretrained

        check_pretrained(recipe)
    rows = [["stage", "reads", "layout", "ranks", "steps", "tokens", "FLOPs"]]
    rows += [_plan_row(recipe, stage) for stage in stages_of(recipe)]
    counts = recipe_parameter_counts(recipe)
    parameters = [
        ["parameters", ""],
        ["one expert" if recipe.expert_stages else "dense", f"{counts.dense:,}"],
    ]
    if has_moe(recipe):
        parameters += [["MoE, total", f"{counts.moe_total:,}"], ["MoE, active", f"{counts.moe_active:,}"]]
    title = f"{recipe.name}: {_models_text(recipe)}; run folder {recipe.run_folder}"
    tables = [columns(rows, right=(3, 4, 5, 6)), compute_text(recipe), columns(parameters, right=(1,))]
    return "\n\n".join([title, *tables, sizes_text(recipe, kind, mfu), *epochs_text(recipe)])


def _models_text(recipe: Recipe) -> str:
    """``4 experts, top-2``; with another method than btx, its name first."""
    method = [] if recipe.method == "btx" else [recipe.method]
    names, model = recipe.expert_names, recipe.model
    if not has_moe(recipe):
        return ", ".join(
            [*method, f"{len(recipe.expert_stages)} experts"] if recipe.expert_stages else method
        )
    width = recipe.expert_ffn_hidden_size
    cut = f" of width {width}" if width != model.ffn_hidden_size else ""
    return ", ".join([*method, f"{len(names)} experts{cut}", recipe.moe.router_text(len(names))])


def compute_text(recipe: Recipe) -> str:
    """What training each model takes beyond the seed, so that their compute can be compared."""
    rows = [["to train, beyond the seed", "tokens", "FLOPs"]]
    for row in all_rows(recipe):
        stages = spent_on(recipe, row)
        tokens = sum(stage_tokens(recipe, stage) for stage in stages)
        rows.append([row, f"{tokens:,}", flops_text(sum(stage_flops(recipe, stage) for stage in stages))])
    note = "FLOPs: matrix products of the model, forward and backward; causal half of attention; no recompute"
    return f"{columns(rows, right=(1, 2))}\n{note}"


def epochs_text(recipe: Recipe) -> list[str]:
    """How often each training stage reads each source; nothing before the data is prepared."""
    run = RunFolder(recipe.run_folder)
    tokens = source_tokens(run.published("prepare"))
    if tokens is None:
        return []
    tokens |= source_tokens(run.published("cluster")) or {}
    stages = [stage.name for stage in stages_of(recipe) if stage.task == "train"]
    epochs = {stage: stage_epochs(recipe, stage, tokens) for stage in stages}
    rows = [["epochs over each source", "tokens", *stages]]
    for key, count in tokens.items():
        cells = [f"{epochs[stage][key]:.2f}" if key in epochs[stage] else "-" for stage in stages]
        rows.append(["/".join(key), f"{count:,}", *cells])
    return [columns(rows, right=range(1, len(rows[0])))]


def _plan_row(recipe: Recipe, stage: PipelineStage) -> list[str]:
    reads = ", ".join(stage.inputs) if len(stage.inputs) <= 4 else "all of these"
    if stage.task == "train":
        settings = recipe.stage(stage.name)
        steps, tokens = f"{settings.training.train_iters:,}", f"{stage_tokens(recipe, stage.name):,}"
        flops = flops_text(stage_flops(recipe, stage.name))
        return [stage.name, reads, str(settings.layout), str(stage.ranks), steps, tokens, flops]
    layout = str(recipe.evaluate.layout) if stage.task == "evaluate" else "-"
    return [stage.name, reads or "-", layout, str(stage.ranks), "-", "-", "-"]


def status_text(recipe: Recipe) -> str:
    """Each stage of the recipe's run: done, running, unfinished, failed or missing, and how far.

    Where it was sent to Slurm, also each stage's job, and how that stands if Slurm answers.
    """
    run = RunFolder(recipe.run_folder)
    jobs, unknown = _job_cells(run)
    rows = [["stage", "state", "time", *(["job"] if jobs else []), ""]]
    for stage in stages_of(recipe):
        *cells, how_far = _status_row(run, stage)
        rows.append([*cells, *([jobs.get(stage.name, "")] if jobs else []), how_far])
    text = "\n".join([str(run.path), "", columns(rows, right=(2,))])
    return "\n\n".join([text, *unknown, *epochs_text(recipe)])


def _job_cells(run: RunFolder) -> tuple[dict[str, str], list[str]]:
    """Stage -> ``7 RUNNING on n[1-2]`` or ``8 PENDING (Dependency)``; empty where Slurm was sent nothing. And
    why the numbers alone are told."""
    from btx_megatron.launch.queue import job_states
    from btx_megatron.launch.submit import read_jobs

    jobs = read_jobs(run)
    try:
        states, unknown = job_states([job.id for job in jobs.values()]), []
    except UserError as error:
        states, unknown = {}, [f"how the jobs stand is not known: {error}"]
    return {stage: f"{job.id} {states.get(job.id, '')}".rstrip() for stage, job in jobs.items()}, unknown


def _status_row(run: RunFolder, stage: PipelineStage) -> list[str]:
    manifest, work = run.manifest(stage.name), run.work(stage.name)
    if manifest:
        tokens = f"{manifest.tokens:,} tokens" if manifest.tokens is not None else ""
        return [stage.name, "done", clock(manifest.duration_seconds), tokens]
    if not work.is_dir():
        return [stage.name, "missing", "-", ""]
    outcome, record = read_outcome(work), read_progress(work)
    time = clock(read_duration(work))
    if outcome and outcome.kind in ("failed", "user_error"):
        return [stage.name, "failed", time, outcome.message]
    if run.is_locked(stage.name) and not outcome:
        return [stage.name, "running", time, how_far(record) if record else ""]
    reached = f"{record.phase} {record.done}/{record.total}, {record.text}".strip(", ") if record else ""
    return [stage.name, "unfinished", time, reached]
