"""The Typer application, and what commands of both kinds share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import btx_megatron

if TYPE_CHECKING:
    from btx_megatron.recipe import Recipe

app = typer.Typer(
    help="Branch-Train-MiX on Megatron-Core: from one seed model to a mixture of experts.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: importing rich would double the time it takes
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, as training.lr=1e-4.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"btx {btx_megatron.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


def load(recipe: Path, overrides: list[str] | None) -> Recipe:
    """The recipe of a file, with overrides."""
    from btx_megatron.recipe_file import load_recipe

    return load_recipe(recipe, overrides)


def run_alone(path: Path, overrides: list[str] | None, command: str, domain: str | None = None) -> None:
    """Run the stages of a command, where they are not finished."""
    from btx_megatron.launch.local import run_stages
    from btx_megatron.pipeline import stages_of_command

    recipe = load(path, overrides)
    run_stages(recipe, stages_of_command(recipe, command, domain))
