"""Stages that are equal in two runs, found before they run, so that they are trained once.

A stage's key is everything that its result depends on: the recipe without what the stage does not read, and
the keys of its inputs. Equal keys give equal results; a finished stage is linked into the other run's folder,
whose manifests then say the same fingerprints as if it had been made there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from btx_megatron.pipeline import PipelineStage, stages_of
from btx_megatron.recipe import MATCHED_STAGES, Recipe
from btx_megatron.recipe_file import recipe_to_dict
from btx_megatron.run_folder import RunFolder, result_keys

_OF_THE_RUN = ("name", "method", "upcycling_match", "baselines", "evaluate", "compare", "training", "stages")
"""Of no single stage: which stages there are, and defaults that each stage has taken over. A stage's own part
of ``stages`` is put back."""
_READS_OF_MIXTURE: dict[str, dict[str, tuple[str, ...]]] = {
    "prepare": {},
    "cluster": {},
    "seed": {},
    "expert": {},
    "dense": {},
    "average": {"mix": ("average", "weights", "density", "random_seed", "include_seed", "grow_experts")},
    "mix": {"moe": ("moe_router_type", "moe_router_topk", "moe_router_pre_softmax")},
    "upcycle": {"moe": ("moe_router_type", "moe_router_topk", "moe_router_pre_softmax")},
}
"""Kind of stage -> what it reads of ``moe`` and ``mix``, where that is not all: dense models know neither."""

SHARED_TASKS = ("prepare", "import", "cluster", "train", "mix", "average")
"""Kinds of stages that may be shared: those before the evaluation."""


def stage_keys(recipe: Recipe) -> dict[str, str]:
    """Stage -> key, of the stages that may be shared."""
    tree = recipe_to_dict(recipe)
    keys: dict[str, str] = {}
    for stage in stages_of(recipe):
        if stage.task in SHARED_TASKS:
            inputs = {name: keys[name] for name in stage.inputs}
            content = [stage.name, stage.task, inputs, result_keys(read_by(stage, tree))]
            text = json.dumps(content, sort_keys=True)
            keys[stage.name] = hashlib.sha256(text.encode()).hexdigest()
    return keys


def read_by(stage: PipelineStage, tree: dict[str, Any]) -> dict[str, Any]:
    """The part of a resolved recipe that a stage reads."""
    kind, _, domain = stage.name.partition(":")
    part = {key: value for key, value in tree.items() if key not in _OF_THE_RUN}
    if kind == "prepare":
        part["model"] = {key: tree["model"][key] for key in ("seq_length", "make_vocab_size_divisible_by")}
        del part["clusters"]
    if kind in _READS_OF_MIXTURE:
        del part["moe"]
        if kind not in ("mix", "upcycle"):
            del part["mix"]
        for section, keys in _READS_OF_MIXTURE[kind].items():
            part[section] = {key: tree[section][key] for key in keys}
    else:
        part["evaluate"] = {"opt_out": tree["evaluate"]["opt_out"]}  # masks are built in
    if stage.task in ("train", "import"):
        stages = tree["stages"]
        part["stage"] = stages["experts"][domain] if kind == "expert" else stages.get(kind)
        if kind in MATCHED_STAGES and not stages[kind]["blend"]:
            part["blend"] = stages["finetune"]["blend"]  # data/weights.py, stage_blend
    return part


def link_finished(
    run: RunFolder, keys: Mapping[str, str], others: Iterable[tuple[RunFolder, Mapping[str, str]]]
) -> list[str]:
    """Link what another run has finished and this one lacks; returns the names of the stages."""
    others, linked = list(others), []
    for stage, key in keys.items():
        target = run.published(stage)
        if target.is_symlink() and not target.exists():
            target.unlink()  # the other run was deleted
        if run.manifest(stage) is not None or run.is_locked(stage):
            continue
        for other, other_keys in others:
            if other_keys.get(stage) == key and other.manifest(stage) is not None:
                _link(other.published(stage).resolve(), target)
                linked.append(stage)
                break
    return linked


def _link(source: Path, target: Path) -> None:
    """Relative, so that the whole comparison may be moved."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):  # another comparison in this folder has just done it
        target.symlink_to(os.path.relpath(source, target.parent.resolve()))
