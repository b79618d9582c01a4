"""A recipe with ``compare`` -> a recipe for each variant and random seed, with a run folder of its own.

A variant is the recipe under its overrides, read and checked like any other, so that whatever a recipe can
say can be compared. What they must have in common is the data: losses over other text or other tokens say
nothing beside each other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from btx_megatron.comparison.sharing import stage_keys
from btx_megatron.errors import UserError
from btx_megatron.estimate import stage_tokens
from btx_megatron.estimate_flops import stage_flops
from btx_megatron.evaluation.rows import main_row, spent_on
from btx_megatron.methods import main_stage
from btx_megatron.recipe import MATCHED_STAGES, Compare, Recipe
from btx_megatron.recipe_checks import check_recipe
from btx_megatron.recipe_file import RECIPE_FILE, load_recipe
from btx_megatron.recipe_mix import draws
from btx_megatron.run_folder import RunFolder


@dataclass(frozen=True)
class Variant:
    """One run of a comparison."""

    name: str
    random_seed: int
    recipe: Recipe

    @cached_property
    def keys(self) -> dict[str, str]:
        """Of the stages that may be shared."""
        return stage_keys(self.recipe)

    @cached_property
    def run(self) -> RunFolder:
        """Where it runs."""
        return RunFolder(self.recipe.run_folder)


def expand(path: Path, overrides: list[str]) -> list[Variant]:
    """All runs of a recipe's comparison: the variants of the first random seed, of the second, ...

    Raises UserError for a recipe without variants, or a variant that cannot run, has other data or tasks than
    the first, or cannot be matched to it.
    """
    base = load_recipe(path, overrides)
    if not base.compare.variants:
        raise UserError(
            f"{path}: compare.variants is empty; name what to compare, as compare.variants.btx=[]"
        )
    return [
        variant for seed in base.compare.random_seeds for variant in _of_seed(path, overrides, base, seed)
    ]


def variants_on_disk(folder: Path) -> list[Variant]:
    """The runs that lie in a comparison's folder, of whichever recipe; what cannot be read is left out."""
    found = []
    for path in sorted(folder.glob(f"seed-*/*/{RECIPE_FILE}")):
        with contextlib.suppress(UserError, ValueError):
            seed = int(path.parent.parent.name.removeprefix("seed-"))
            found.append(Variant(path.parent.name, seed, RunFolder(path.parent).recipe()))
    return found


def _of_seed(path: Path, overrides: list[str], base: Recipe, seed: int) -> Iterator[Variant]:
    first: Variant | None = None
    for name, changes in base.compare.variants.items():
        where = f"compare.variants.{name}"
        try:
            recipe = load_recipe(path, [*overrides, *changes])
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        recipe.name, recipe.compare = name, Compare()
        recipe.run_folder = str(Path(base.run_folder) / f"seed-{seed}" / name)
        _set_random_seed(recipe, seed)
        variant = Variant(name, seed, recipe)
        first = first or variant
        if base.compare.match:
            _check_matchable(recipe, where)
            _match(recipe, first.recipe, base.compare.match, where)
        if variant.keys["prepare"] != first.keys["prepare"]:
            raise UserError(
                f"{where}: its data, tokenizer or model.seq_length differ from those of the first"
            )
        if recipe.evaluate.tasks != first.recipe.evaluate.tasks:
            raise UserError(f"{where}: its evaluate.tasks differ from those of the first")
        yield variant


def _set_random_seed(recipe: Recipe, seed: int) -> None:
    stages = recipe.stages
    for stage in (
        stages.seed,
        *stages.experts.values(),
        stages.finetune,
        stages.dense,
        stages.sparse_upcycling_dm,
        stages.sparse_upcycling_cm,
    ):
        stage.training = replace(stage.training, seed=seed)
    recipe.training = replace(recipe.training, seed=seed)
    if draws(recipe.mix):
        recipe.mix.random_seed = seed
    if recipe.moe.moe_router_type == "sample_top1":
        recipe.moe.moe_router_seed = seed


def _check_matchable(recipe: Recipe, where: str) -> None:
    """Raise UserError where budgets would be matched that are not all known, or not all set."""
    if trained := [name for name in recipe.baselines if name in MATCHED_STAGES]:
        raise UserError(
            f"{where}: compare.match sets the steps of variants alone; leave {trained[0]} out of baselines, "
            "and make a variant of it (method=...)"
        )
    if imported := [stage for stage in recipe.imported_stages if stage in recipe.expert_stages]:
        raise UserError(
            f"{where}: compare.match: what {imported[0]} took before it was imported is not known; "
            "set compare.match: null"
        )


def _match(recipe: Recipe, first: Recipe, match: str, where: str) -> None:
    """Set the steps of the last stage so that all together take what the first variant takes."""
    last = main_stage(recipe)
    if recipe is first or last is None:  # ensembles of experts have no last stage
        return
    cost = {"tokens": stage_tokens, "flops": stage_flops}[match]
    training = recipe.stage(last).training
    assert training.train_iters
    wanted = sum(cost(first, stage) for stage in spent_on(first, main_row(first)))
    before = sum(cost(recipe, stage) for stage in spent_on(recipe, main_row(recipe)) if stage != last)
    steps = round((wanted - before) / cost(recipe, last) * training.train_iters)
    if steps < 1:
        raise UserError(
            f"{where}: compare.match {match}: what comes before {last} takes as much as the first variant "
            f"altogether; train that longer, or set compare.match: null"
        )
    training.train_iters = steps
    check_recipe(recipe, f"{where}: compare.match {match} gives {last} {steps} steps")
