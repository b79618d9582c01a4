"""What ``compare`` must satisfy by itself; that its variants can run is checked as they are read."""

from __future__ import annotations

import re
from collections.abc import Iterator

from btx_megatron.recipe import Compare, Recipe
from btx_megatron.recipe_compare import LEAST_LOAD, TASK

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_OF_ALL = re.compile(r"(compare|run_folder)\b")
_RANDOM_SEED = re.compile(r"(.*\.)?training\.seed=|mix\.random_seed=|moe\.moe_router_seed=")


def compare_problems(recipe: Recipe) -> Iterator[str]:
    """Problems of the recipe's ``compare``."""
    compare = recipe.compare
    seeds = compare.random_seeds
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        yield f"compare.random_seeds {seeds}: must be one or more different numbers, at least 0"
    for name, overrides in compare.variants.items():
        if not _NAME.fullmatch(name):
            yield f"compare.variants: '{name}' names a folder: letters, digits, '_', '.' and '-'"
        for override in overrides:
            if _OF_ALL.match(override):
                yield f"compare.variants.{name}: '{override}' is for all variants; set it in the recipe"
            if _RANDOM_SEED.match(override):
                yield f"compare.variants.{name}: '{override}': compare.random_seeds gives it to all"
    tasks = [f"{TASK}{task.name}" for task in recipe.evaluate.tasks]
    yield from _prediction_problems(compare, [*recipe.domain_names, "mean", LEAST_LOAD, *tasks])


def _prediction_problems(compare: Compare, values: list[str]) -> Iterator[str]:
    for number, prediction in enumerate(compare.predictions):
        key = f"compare.predictions[{number}]"
        if len(prediction.rows) != 2 or len(set(prediction.rows)) != 2:
            yield f"{key}.rows {prediction.rows}: must be two different rows"
        if prediction.measure not in values:
            yield f"{key}.measure '{prediction.measure}': must be one of {', '.join(values)}"
        if (prediction.within > 0) != (prediction.expect == "equal"):
            yield f"{key}.within {prediction.within:g}: must be above 0 with expect: equal, else 0"
