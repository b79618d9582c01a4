"""The paper's figure as code: which stages a run has, and which finished stages each one reads.

    prepare -> seed -> experts, each apart -> mix     -> finetune -+
                 |                         -> average -------------+-> evaluate -> report
                 +-> dense (baseline) -----------------------------+

Stages meet on disk only, so that each may run anywhere, and a stage that is finished is never repeated.
How stages are run is launch/'s; here is what depends on what, and what is left to do.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from btx_megatron.errors import UserError
from btx_megatron.job import Task
from btx_megatron.recipe import SEED, Recipe
from btx_megatron.run_folder import RunFolder


@dataclass(frozen=True)
class PipelineStage:
    """One box of the figure."""

    name: str
    """``seed``, ``expert:DOMAIN``, ..."""
    task: Task
    """What kind of work it is."""
    inputs: tuple[str, ...]
    """Names of the stages whose finished folders it reads."""
    ranks: int = 1
    """Processes that it runs on."""


def stages_of(recipe: Recipe) -> list[PipelineStage]:
    """All stages of a recipe, each after those that it reads."""
    experts = [f"expert:{name}" for name in recipe.domain_names]
    merged = tuple(experts) + ((SEED,) if recipe.mix.include_seed else ())
    stages = [
        PipelineStage("prepare", "prepare", ()),
        _train(recipe, "seed", "prepare"),
        *(_train(recipe, expert, "prepare", "seed") for expert in experts),
        PipelineStage("mix", "mix", merged),
        PipelineStage("average", "average", merged),
        _train(recipe, "finetune", "prepare", "mix"),
        *(_train(recipe, baseline, "prepare", "seed") for baseline in recipe.baselines),
    ]
    rows = tuple(stage.name for stage in stages)
    evaluate = PipelineStage("evaluate", "evaluate", rows, recipe.evaluate.layout.world_size)
    return [*stages, evaluate, PipelineStage("report", "report", (*rows, "evaluate"))]


def _train(recipe: Recipe, name: str, *inputs: str) -> PipelineStage:
    if name in recipe.imported_stages:
        return PipelineStage(name, "import", ("prepare",))
    return PipelineStage(name, "train", inputs, recipe.stage(name).layout.world_size)


def stages_to_run(
    stages: list[PipelineStage], run: RunFolder, targets: Collection[str]
) -> list[PipelineStage]:
    """The unfinished stages that ``targets`` need, themselves included, in order.

    Raises UserError if a finished stage was made from something else than what lies in the run now, or
    from what is missing and would be made anew.
    """
    needed: set[str] = set()
    for stage in reversed(stages):
        if (stage.name in targets or stage.name in needed) and run.manifest(stage.name) is None:
            needed |= {stage.name, *stage.inputs}
    unfinished = [stage for stage in stages if stage.name in needed and run.manifest(stage.name) is None]
    for stage in stages:
        _check_inputs(stage, run, {other.name for other in unfinished})
    return unfinished


def _check_inputs(stage: PipelineStage, run: RunFolder, unfinished: Collection[str]) -> None:
    manifest = run.manifest(stage.name)
    if manifest is None:
        return
    folder = run.published(stage.name)
    for name, fingerprint in manifest.inputs.items():
        now = run.manifest(name)
        if now is None and name in unfinished:
            raise UserError(
                f"{folder} is finished, but {run.published(name)}, which it was made from, is missing "
                f"and would be made anew; put it back, or delete {folder} too"
            )
        if now is not None and now.fingerprint != fingerprint:
            raise UserError(
                f"{folder} was made from another {name} than lies in {run.published(name)} now; "
                f"delete {folder} to make it again"
            )


def input_fingerprints(stage: PipelineStage, run: RunFolder) -> dict[str, str]:
    """What a stage would be made from now. Raises UserError if an input is not finished."""
    fingerprints = {}
    for name in stage.inputs:
        manifest = run.manifest(name)
        if manifest is None:
            raise UserError(
                f"stage {stage.name} needs the stage {name}, which is not finished in {run.path}; "
                f"make it first with `btx {command_of(name)}`, or all with `btx run`"
            )
        fingerprints[name] = manifest.fingerprint
    return fingerprints


def command_of(stage: str) -> str:
    """The arguments of ``btx`` that run one stage alone."""
    kind, _, domain = stage.partition(":")
    if kind == "expert":
        return f"train RECIPE --domain {domain}"
    if kind == "average":
        return "mix RECIPE"
    return "report RUN" if kind == "report" else f"{kind} RECIPE"
