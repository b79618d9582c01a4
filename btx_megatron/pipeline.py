"""The paper's figure as code: which stages a run has, and which finished stages each one reads.

    prepare -> seed -> experts, each apart -> mix     -> finetune ----+   (grown: mix reads grown_from, too)
                 |                         -> average ----------------+-> evaluate -> report
                 +-> dense (baseline) --------------------------------+
                 +-> upcycle -> sparse_upcycling_dm, _cm (baselines) -+

With another ``method`` a part of this: dense and sparse upcycling are the lines of those baselines alone;
BTM, c-BTM and TiMoE leave out mix and finetune. c-BTM's experts read what the stage ``cluster`` makes of
prepare's text. methods says which stages there are.

Stages meet on disk only, so that each may run anywhere, and a stage that is finished is never repeated.
How stages are run is launch/'s; here is what depends on what, and what is left to do.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from btx_megatron import methods
from btx_megatron.errors import UserError
from btx_megatron.job import Task, branches_from
from btx_megatron.recipe import (
    GROWN_FROM,
    MATCHED_STAGES,
    MEASURED_FROM_SEED,
    ROUTERS_FROM_TEXT,
    SEED,
    Recipe,
)
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
    names = methods.stage_names(recipe)
    stages = [PipelineStage("prepare", "prepare", ()), *(_stage(recipe, name) for name in names[1:])]
    evaluate = PipelineStage("evaluate", "evaluate", tuple(names), recipe.evaluate.layout.world_size)
    main = methods.main_stage(recipe)
    export = [PipelineStage("export", "export", (main,))] if recipe.export.to and main else []
    return [*stages, evaluate, PipelineStage("report", "report", (*names, "evaluate")), *export]


def stages_of_command(recipe: Recipe, command: str, domain: str | None = None) -> list[str]:
    """The stages that ``btx COMMAND RECIPE`` runs. Raises UserError where the recipe has none such.

    ``domain``: of ``btx train``, the one expert that is meant.
    """
    names = [name.removeprefix("expert:") for name in recipe.expert_stages]
    if domain is not None and names and domain not in names:
        raise UserError(f"--domain {domain}: no expert of that name; the recipe has {', '.join(names)}")
    stages = stages_of(recipe)
    chosen = {
        "train": [f"expert:{domain}"] if domain is not None else recipe.expert_stages,
        "mix": [stage.name for stage in stages if stage.task in ("mix", "average")],
        "upcycle": methods.upcycling_stages(recipe),
        SEED: [SEED, GROWN_FROM] if recipe.mix.grow_from else [SEED],
    }.get(command, [command])
    known = [stage.name for stage in stages]
    if command in MATCHED_STAGES and command not in known:
        raise UserError(f"baselines does not name '{command}'; add it to train that baseline")
    if command == "export" and "export" not in known and methods.main_stage(recipe):
        raise UserError("export.to is null; say export.to=hf")
    if not chosen or not set(chosen) <= set(known):
        has = ", ".join(known)
        raise UserError(f"method {recipe.method} has nothing to do for `btx {command}`; its stages are {has}")
    return chosen


def _stage(recipe: Recipe, name: str) -> PipelineStage:
    if name in ("mix", "average"):
        return PipelineStage(name, "mix" if name == "mix" else "average", _mixed_from(recipe, name))
    if name == "cluster":
        return PipelineStage(name, "cluster", ("prepare",))
    if name == "upcycle":
        return PipelineStage(name, "mix", (SEED,))
    if name in recipe.imported_stages:
        return PipelineStage(name, "import", ("prepare",))
    source = branches_from(name)
    text = "cluster" if recipe.domains_of(name) is not recipe.data.domains else "prepare"
    inputs = (text,) if source is None else (text, source)
    return PipelineStage(name, "train", inputs, recipe.stage(name).layout.world_size)


def _mixed_from(recipe: Recipe, name: str) -> tuple[str, ...]:
    """The models, the seed where the average is measured from it, and the data that a router is made from."""
    mix = recipe.mix
    if mix.grow_from:
        return (GROWN_FROM, *recipe.expert_stages, *((SEED,) if SEED in recipe.joining_names else ()))
    base = mix.average in MEASURED_FROM_SEED and not (name == "average" and mix.average == "base")
    seed = (SEED,) if mix.include_seed or base else ()
    text = ("prepare",) if name == "mix" and mix.router_init in ROUTERS_FROM_TEXT else ()
    return (*text, *recipe.expert_stages, *seed)


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
    if kind == GROWN_FROM:
        return "seed RECIPE"
    if kind == "cluster":
        return "run RECIPE --only cluster"
    if kind in ("average", "upcycle"):
        return "mix RECIPE"
    if kind.startswith("sparse_upcycling"):
        return "upcycle RECIPE"
    return "report RUN" if kind == "report" else f"{kind} RECIPE"
