"""A mixture that grows: what its run's recipe says of it, and what a recipe must satisfy to go on from it.

A recipe has to know all experts by name and order before anything runs, and after the old run is gone. So a
run folder in ``mix.grow_from`` is only a short way to say four things, which are written into the recipe when
it is read: the mixture's checkpoint, its experts, its seed (new experts are branches of the same model) and
its tokenizer. Who has a checkpoint and no run says them by hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from btx_megatron.errors import UserError
from btx_megatron.manifest import CHECKPOINTS, read_manifest
from btx_megatron.methods import main_stage
from btx_megatron.recipe import SEED, Domain, Model, Recipe, Source

_MAY_DIFFER = ("seq_length", "attention_dropout", "hidden_dropout", "init_method_std")
"""Of the model: what changes no weight's shape or meaning."""


def take_run(recipe: Recipe, run: Path, old: Recipe, where: str) -> None:
    """Write what the finished run ``run``, made by the recipe ``old``, says into the recipe that grows it.

    Raises UserError where the run ends without a mixture, is not finished, or had another model, or where the
    recipe says something else of experts or seed. Another tokenizer is seen when checkpoints are opened.
    """
    for problem in _problems(recipe, run, old):
        raise UserError(f"{where}: {problem}")
    recipe.mix.grow_from = str(run / str(main_stage(old)) / CHECKPOINTS)
    recipe.mix.grow_experts = old.expert_names
    recipe.stages.seed.pretrained_checkpoint = str(_seed_of(run))
    if recipe.tokenizer.tokenizer_model is None:
        recipe.tokenizer = replace(old.tokenizer, tokenizer_model=str(_tokenizer_of(run)))


def _problems(recipe: Recipe, run: Path, old: Recipe) -> Iterator[str]:
    key, main = f"mix.grow_from {run}", main_stage(old)
    if main is None or old.num_experts(main) is None:
        yield f"{key}: its method {old.method} ends without a mixture; name a run of method btx"
    if read_manifest(run / str(main)) is None or not _seed_of(run).exists():
        yield f"{key}: its stages seed and {main} are not finished there; finish it with `btx run`"
    if old.mix.experts != "stack":
        yield (
            f"{key}: its experts are made by mix.experts {old.mix.experts}, of whole models one a domain are "
            "added (stack)"
        )
    for name, there, here in _differences(recipe, old):
        yield f"{name} is {there} in the run of mix.grow_from and {here} here; set {name}: {there}"
    there = {domain.name: _texts(domain) for domain in old.data.domains}
    for domain in recipe.data.domains:
        if _texts(domain) != there.get(domain.name, _texts(domain)):
            yield (
                f"data.domains.{domain.name}: has other sources in the run of mix.grow_from, which may have "
                "been trained on what is held out here; give it the same, or new text a domain of its own"
            )
    if recipe.mix.grow_experts not in ([], old.expert_names):
        yield f"mix.grow_experts: the experts of {run} are {', '.join(old.expert_names)}; leave it out"
    seed = recipe.stages.seed.pretrained_checkpoint
    if seed is not None and Path(seed).resolve() != _seed_of(run).resolve():
        yield (
            f"stages.seed.pretrained_checkpoint {seed}: the mixture of {run} has a seed of its own, new "
            "experts must be branches of it; leave it out"
        )


def _differences(recipe: Recipe, old: Recipe) -> Iterator[tuple[str, Any, Any]]:
    for field in fields(Model):
        there, here = getattr(old.model, field.name), getattr(recipe.model, field.name)
        if there != here and field.name not in _MAY_DIFFER:
            yield f"model.{field.name}", there, here
    if old.training.bf16 != recipe.training.bf16:
        yield "training.bf16", old.training.bf16, recipe.training.bf16
    for key in ("random_seed", "held_out_fraction"):  # else it was trained on what is held out here
        there, here = getattr(old.data, key), getattr(recipe.data, key)
        if there != here:
            yield f"data.{key}", there, here


def _texts(domain: Domain) -> list[Source]:
    """A domain's sources; how often each is drawn from has no part in what is held out."""
    return [replace(source, weight=1.0) for source in domain.sources]


def _seed_of(run: Path) -> Path:
    return run / SEED / CHECKPOINTS


def _tokenizer_of(run: Path) -> Path:
    folder = run / "data" / "tokenizer"
    json = folder / "tokenizer.json"
    return json if json.exists() else folder / "tokenizer.model"
