"""Commands that take a recipe or a run folder: the pipeline, and each of its stages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from btx_megatron.cli.app import Overrides, RecipePath, app, load, run_alone
from btx_megatron.errors import UserError

if TYPE_CHECKING:
    from btx_megatron.recipe import Recipe

RunOrRecipe = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or the recipe that made it.")]


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    only: Annotated[
        str | None, typer.Option(metavar="STAGE", help="This stage alone, as expert:math; RECIPE or RUN.")
    ] = None,
) -> None:
    """Run the whole pipeline: what is not finished yet, from where it stopped."""
    from btx_megatron.launch.local import run_pipeline, run_stages

    loaded = _run_recipe(recipe) if recipe.is_dir() and not overrides else load(recipe, overrides)
    if only is not None:
        run_stages(loaded, [only])
        return
    run_pipeline(loaded)
    _print_report(Path(loaded.run_folder))


@app.command()
def submit(
    recipe: RecipePath,
    overrides: Overrides = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="STAGE", help="This stage alone, as expert:math; repeatable.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write the scripts, send nothing.")] = False,
    update_code: Annotated[
        bool, typer.Option("--update-code", help="Freeze this code anew, in a run that was submitted before.")
    ] = False,
) -> None:
    """Send the pipeline to Slurm as a graph of jobs: what is neither finished nor queued."""
    from btx_megatron.launch.submit import submit as submit_run

    for line in submit_run(load(recipe, overrides), only or [], dry_run, update_code):
        print(line)


@app.command()
def cancel(
    run: RunOrRecipe,
    now: Annotated[bool, typer.Option("--now", help="Without time to save.")] = False,
) -> None:
    """End a run's jobs on Slurm; those that train save first."""
    from btx_megatron.launch.submit import cancel as cancel_run

    for line in cancel_run(_run_recipe(run), now):
        print(line)


@app.command()
def compare(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Train, measure and compare the recipe's variants over several random seeds (compare)."""
    from btx_megatron.comparison.run import run_comparison

    run_comparison(recipe, overrides or [])


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpu_type: Annotated[
        str | None, typer.Option(help="A100, H100, H200, B200, ...; H100 if not given.")
    ] = None,
    mfu: Annotated[
        float | None, typer.Option(help="Share of its peak that training reaches; 0.4 if not given.")
    ] = None,
    fit: Annotated[
        float | None,
        typer.Option(metavar="GB", help="Memory to fit; else the GPU's, unless launch.device is cpu."),
    ] = None,
    simulate: Annotated[
        bool,
        typer.Option("--simulate", help="Instead: what failing nodes cost, against one synchronous run."),
    ] = False,
    gpus: Annotated[
        list[int] | None, typer.Option(metavar="N", help="With --simulate: GPUs in all; repeatable.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(metavar="K", help="With --simulate: how often; 20 if not given.")
    ] = None,
    assume: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="With --simulate, as gpu_mtbf_hours=30000; repeatable."),
    ] = None,
) -> None:
    """Show stages, layouts, tokens, memory, traffic and GPU-hours; nothing is run."""
    if simulate:
        if gpu_type is not None or mfu is not None or fit is not None:
            raise UserError(
                "--gpu-type, --mfu and --fit are not for --simulate; give it --assume mfu=0.3 or "
                "--assume peak_tflops=989"
            )
        from btx_megatron.simulate.table import simulation_text

        print(simulation_text(load(recipe, overrides), gpus or [], seeds, assume or []))
        return
    if gpus or assume or seeds is not None:
        raise UserError("--gpus, --seeds and --assume belong to --simulate; give it, too")
    from btx_megatron.launch.tables import plan_text

    print(plan_text(load(recipe, overrides), gpu_type, mfu, fit))


@app.command()
def status(run: RunOrRecipe) -> None:
    """Show which stages are done, running, unfinished or missing."""
    from btx_megatron.launch.tables import status_text

    print(status_text(_run_recipe(run)))


@app.command()
def report(run: RunOrRecipe) -> None:
    """Write the report of a finished run again."""
    from btx_megatron.launch.local import run_stages

    recipe = _run_recipe(run)
    run_stages(recipe, ["report"], again=True)
    _print_report(Path(recipe.run_folder))


@app.command()
def prepare(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Make the tokenizer and the token files."""
    run_alone(recipe, overrides, "prepare")


@app.command()
def seed(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Train the seed model."""
    run_alone(recipe, overrides, "seed")


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    domain: Annotated[str | None, typer.Option(metavar="NAME", help="Its expert alone.")] = None,
) -> None:
    """Train the experts, each apart; or the one of --domain."""
    run_alone(recipe, overrides, "train", domain)


@app.command()
def finetune(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Train the mixture of experts."""
    run_alone(recipe, overrides, "finetune")


@app.command()
def dense(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Train the baseline: the seed continued, without branching."""
    run_alone(recipe, overrides, "dense")


@app.command()
def upcycle(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Train sparse upcycling, the method or the baseline: copies of the seed as experts."""
    run_alone(recipe, overrides, "upcycle")


@app.command()
def evaluate(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Measure the held-out loss of every model."""
    run_alone(recipe, overrides, "evaluate")


@app.command()
def export(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Write the method's model in another format (export.to)."""
    run_alone(recipe, overrides, "export")


def _run_recipe(run_or_recipe: Path) -> Recipe:
    """The recipe of a run folder, or of a recipe's file."""
    from btx_megatron.run_folder import RunFolder

    if not run_or_recipe.exists():
        raise UserError(f"{run_or_recipe}: no such run folder or recipe")
    return RunFolder(run_or_recipe).recipe() if run_or_recipe.is_dir() else load(run_or_recipe, None)


def _print_report(run_folder: Path) -> None:
    from btx_megatron.evaluation.report import print_report

    print_report(run_folder / "report")
