"""Options of ``btx mix`` and ``btx convert`` that would change nothing are refused before anything is opened.

Whoever writes ``--density 0.3`` means something by it: to mix without it, and say nothing, would give another
model than the one that was asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from btx_megatron.checkpoints.formats import Format, Parallel
from btx_megatron.errors import UserError
from btx_megatron.mixing.grow import is_as_mixed, manifest_of_mix
from btx_megatron.mixing.plan import FROM_TEXT

_FOR_GROWING = {
    "moe", "add_expert", "drop_expert", "lambda", "output", "to", "router_std", "random_seed", "approximate",
    "target_tensor_model_parallel_size", "target_pipeline_model_parallel_size",
    "target_expert_model_parallel_size", "make_vocab_size_divisible_by", "workers", "max_memory", "dry_run",
}  # fmt: skip


def check_mix_options(given: Collection[str], values: Mapping[str, Any]) -> None:
    """Raise UserError for an option of ``btx mix`` that would change nothing.

    ``given``: the parameters that the command line names; ``values``: of all parameters.
    """
    named = set(given)
    if values["recipe"] is not None:
        _refuse(named - {"recipe", "overrides"}, "goes with --expert or --moe, not with a RECIPE")
    elif values["moe"] is not None:
        _refuse(named - _FOR_GROWING, "has no effect with --moe; leave it out")
        _check_growing(named, values)
    else:
        _refuse(named & {"add_expert", "drop_expert", "lambda"}, "needs --moe")
        _check_mixing(named, values)


def _check_mixing(given: set[str], values: Mapping[str, Any]) -> None:
    average, router = values["average"], values["router_init"]
    without = f"has no effect with --average {average}; leave it out, or choose"
    if average not in ("ties", "dare"):
        _refuse(given & {"density"}, f"{without} ties or dare")
    if average not in ("base", "ties", "dare"):
        _refuse(given & {"base"}, f"{without} base, ties or dare")
    if router != "normal":
        _refuse(given & {"router_std"}, f"has no effect with --router-init {router}; leave it out")
    if router != "normal" and average != "dare" and not values["drop_ratio"]:
        _refuse(given & {"random_seed"}, "has no effect: nothing is drawn; leave it out")


def _check_growing(given: set[str], values: Mapping[str, Any]) -> None:
    added = values["add_expert"] or []
    if (len(added) == 1) == (values["drop_expert"] is not None) or len(added) > 1:
        raise UserError("--moe: give one --add-expert NAME=PATH, or one --drop-expert NUMBER")
    of_growth = given & {"lambda", "router_std", "random_seed"}
    if values["drop_expert"] is not None:
        _refuse(of_growth, "has no effect with --drop-expert; leave it out")
    share = values["share"]
    if share is not None and not 0 <= share <= 1:
        raise UserError(f"--lambda {share}: must lie between 0 and 1")
    if of_growth and is_mixed_again(values["moe"]):
        _refuse(
            of_growth,
            f"has no effect: {values['moe']} is as it was mixed, so all its experts are mixed again as they "
            "were, with the new one; leave it out",
        )


def is_mixed_again(moe: Path) -> bool:
    """An untrained mixture grows by being mixed again, where that can be: --lambda is for the others."""
    manifest = manifest_of_mix(moe)
    if manifest is None or manifest.recipe["options"]["router_init"] in FROM_TEXT:
        return False
    sources = manifest.recipe["sources"].values()
    return all(Path(path).exists() for path in sources) and is_as_mixed(moe, manifest)


def check_target_options(to: Format, parallel: Parallel, approximate: bool) -> None:
    """Raise UserError for an option that the target's format does not know. A size of 1 is true of all."""
    cut = {"tensor": parallel.tensor, "pipeline": parallel.pipeline}
    for kind, size in cut.items():
        if size > 1 and to != "megatron-legacy":
            raise UserError(
                f"--target-{kind}-model-parallel-size is for --to megatron-legacy, not for {to}"
                + ("; a torch_dist checkpoint loads at any size" if to == "megatron" else "")
            )
    if to == "hf":
        if parallel.expert > 1:
            raise UserError("--target-expert-model-parallel-size is for a Megatron target, not for hf")
        if parallel.vocabulary is not None:
            raise UserError("--make-vocab-size-divisible-by is for a Megatron target, not for hf")
    elif approximate:
        raise UserError(f"--approximate is for --to hf, not for {to}; leave it out")


def _refuse(options: set[str], why: str) -> None:
    if options:
        raise UserError(f"{option_name(min(options))} {why}")


def option_name(parameter: str) -> str:
    """How a parameter is given on the command line."""
    return f"--{parameter.replace('_', '-')}"
