"""The runs of a comparison, one after the other; what two of them share is trained once."""

from __future__ import annotations

import json
from pathlib import Path

from btx_megatron.comparison.page import print_results
from btx_megatron.comparison.results import (
    COMPARISON_FILE,
    check_predictions,
    gather,
    keep,
    kept,
    seed_file,
    write_results,
)
from btx_megatron.comparison.rows import measured_before
from btx_megatron.comparison.sharing import link_finished
from btx_megatron.comparison.variants import Variant, expand, variants_on_disk
from btx_megatron.errors import StageFailed
from btx_megatron.launch.local import run_pipeline
from btx_megatron.launch.machine import Machine
from btx_megatron.recipe_file import load_recipe

RESULTS = "compare"
"""The folder of the results, beside the random seeds'; in it one for each recipe that compares here."""


def run_comparison(path: Path, overrides: list[str], machine: Machine | None = None) -> Path:
    """Train and measure all variants that are not finished; returns the folder of the results.

    The results are written anew as each random seed ends, and kept: where they are and not all of its runs
    have a folder, nothing is run again. A variant that fails stops no other. Raises what run_pipeline raises.
    """
    recipe = load_recipe(path, overrides)
    variants = expand(path, overrides)
    check_predictions(recipe.compare.predictions, variants)
    folder = Path(recipe.run_folder)
    out, of_seeds, failed = folder / RESULTS / recipe.name, [], []
    planned = {variant.run.path for variant in variants}
    others = [variant for variant in variants_on_disk(folder) if variant.run.path not in planned]
    for seed in recipe.compare.random_seeds:
        of_seed = [variant for variant in variants if variant.random_seed == seed]
        file = seed_file(out, seed)
        told = None if all(variant.run.path.exists() for variant in of_seed) else kept(of_seed, out)
        if told:
            print(f"== random seed {seed}: taken from {file}", flush=True)
        else:
            if file.exists() and not any(variant.run.path.exists() for variant in of_seed):
                print(f"== random seed {seed}: {file} is of other recipes, and not taken", flush=True)
            mistakes = _run_all(of_seed, [*variants, *others], machine)
            failed += mistakes
            if mistakes:
                continue
            told = gather(of_seed)
            keep(told, out)
        of_seeds.append(told)
        write_results(recipe, of_seeds, out)
    if failed:
        raise StageFailed("\n".join(failed))
    print_results(json.loads((out / COMPARISON_FILE).read_text(encoding="utf-8")))
    print(f"comparison: {out / 'report.md'}")
    return out


def _run_all(of_seed: list[Variant], known: list[Variant], machine: Machine | None) -> list[str]:
    """Run the variants of one random seed; returns what failed."""
    failed = []
    for number, variant in enumerate(of_seed, 1):
        named = f"random seed {variant.random_seed}, {variant.name}"
        print(f"== {named} ({number} of {len(of_seed)})", flush=True)
        try:
            _run(variant, known, machine)
        except StageFailed as error:
            failed.append(f"{named}: {error}")
    return failed


def _run(variant: Variant, known: list[Variant], machine: Machine | None) -> None:
    variant.run.claim(variant.recipe)
    others = [other for other in known if other is not variant]
    linked = link_finished(variant.run, variant.keys, [(other.run, other.keys) for other in others])
    if linked:
        print(f"taken from another variant: {', '.join(linked)}", flush=True)
    run_pipeline(variant.recipe, machine, measured_before(variant, others))
