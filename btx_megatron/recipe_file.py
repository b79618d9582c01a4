"""A recipe on disk: YAML and overrides to a typed recipe, and back to plain values.

Two keys are inherited: what stands under the top-level ``training`` and ``layout`` holds for every
stage, and a stage overrides what it needs. Loading never imports torch, so that a wrong recipe is
refused in a fraction of a second.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from btx_megatron.errors import UserError
from btx_megatron.recipe import MATCHED_STAGES, Recipe, cluster_names
from btx_megatron.recipe_checks import check_recipe, resolve_train_iters
from btx_megatron.recipe_grow import take_run
from btx_megatron.recipe_yaml import literal, read_yaml

RECIPE_FILE = "recipe.yaml"
"""The resolved recipe in a run folder."""


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe, apply ``key.sub=value`` overrides, and check it.

    Raises UserError, naming the key, for a file that is missing or not YAML, an unknown key or one that
    is given twice, a wrong type, or values that cannot hold together.
    """
    path = Path(path)
    tree = _read_tree(path)
    for override in overrides or []:
        _apply(tree, override)
    recipe = parse_recipe(tree, where=str(path))
    _resolve_paths(recipe, path.resolve().parent)
    if recipe.mix.grow_from is not None:
        _look_at_grown(recipe, Path(recipe.mix.grow_from), where=str(path))
    check_recipe(recipe, where=str(path))
    resolve_train_iters(recipe)
    return recipe


def _read_tree(path: Path) -> DictConfig:
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe file") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; a recipe is a YAML file that can be read") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: broken YAML: {_one_line(error)}") from None
    if not isinstance(tree, dict | None):
        raise UserError(f"{path}: a recipe is a mapping of keys, this is {_shown(tree)}")
    try:
        return OmegaConf.create(tree or {})
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {_one_line(error)}") from None


def _apply(tree: DictConfig, override: str) -> None:
    """Set one ``key.sub[0].name=value``; a mapping is merged into the one that is there."""
    key, equals, value = override.partition("=")
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w:-]+|\[\d+\])*", key):
        raise UserError(f"override '{override}': write it as key.sub=value")
    try:
        read = read_yaml(value) if value else ""
        OmegaConf.update(tree, key, read, merge=True, force_add=True)
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError, LookupError) as error:
        raise UserError(f"override '{override}': {_one_line(error)}") from None


def parse_recipe(tree: DictConfig | dict[str, Any], where: str = "recipe") -> Recipe:
    """Typed recipe from a tree of plain values; stages inherit ``training`` and ``layout``."""
    typed_schema = OmegaConf.structured(Recipe)
    tree = OmegaConf.create(literal(tree)) if isinstance(tree, dict) else tree
    plain: Any = OmegaConf.to_container(tree)
    for problem in _shape_problems(Recipe, plain, ""):
        raise UserError(f"{where}: {problem}")
    try:
        typed = OmegaConf.merge(typed_schema, tree)  # rejects unknown keys and wrong types as written
        inherited = {key: plain[key] for key in ("training", "layout") if plain.get(key)}
        names = [domain.name for domain in typed.data.domains if domain.expert]
        names += cluster_names(typed.method, typed.clusters.number)
        stages = dict.fromkeys(("seed", "finetune"), inherited)
        stages |= dict.fromkeys(MATCHED_STAGES, _without_train_iters(inherited))
        stages["experts"] = dict.fromkeys(names, inherited)
        evaluate = _without_context_parallelism(inherited)
        defaults = OmegaConf.create({"stages": stages, "evaluate": evaluate})
        recipe = OmegaConf.to_object(OmegaConf.unsafe_merge(typed_schema, defaults, tree))  # used up
    except OmegaConfBaseException as error:
        key = error.full_key or str(error.key or "?")
        raise UserError(f"{where}: key '{key}': {_one_line(error)}") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{where}: {_one_line(error)}") from None
    assert isinstance(recipe, Recipe)
    return recipe


def _without_context_parallelism(inherited: dict[str, Any]) -> dict[str, Any]:
    """The evaluation's layout: it reads whole sequences."""
    if "layout" not in inherited:
        return {}
    return {"layout": {k: v for k, v in inherited["layout"].items() if k != "context_parallel_size"}}


def _without_train_iters(inherited: dict[str, Any]) -> dict[str, Any]:
    """A baseline trains as long as btx unless its own key says otherwise."""
    training = {k: v for k, v in (inherited.get("training") or {}).items() if k != "train_iters"}
    return inherited | {"training": training}


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """The whole recipe as plain values, defaults and inherited values filled in."""
    return asdict(recipe)


def _resolve_paths(recipe: Recipe, folder: Path) -> None:
    """Relative paths of inputs start at the recipe, so that a run can start from anywhere."""
    if recipe.run_folder.startswith("~"):
        recipe.run_folder = _at(folder, recipe.run_folder)
    for domain in recipe.data.domains:
        for source in domain.sources:
            if source.path and not re.match(r"[a-z]+:", source.path):
                source.path = _at(folder, source.path)
    for stage in (recipe.stages.seed, *recipe.stages.experts.values()):
        if stage.pretrained_checkpoint:
            stage.pretrained_checkpoint = _at(folder, stage.pretrained_checkpoint)
    for task in recipe.evaluate.tasks:
        if task.path:
            task.path = _at(folder, task.path)
        if task.fewshot_path:
            task.fewshot_path = _at(folder, task.fewshot_path)
    if recipe.mix.grow_from:
        recipe.mix.grow_from = _at(folder, recipe.mix.grow_from)
    if recipe.tokenizer.tokenizer_model:
        recipe.tokenizer.tokenizer_model = _at(folder, recipe.tokenizer.tokenizer_model)


def _at(folder: Path, path: str) -> str:
    try:
        return str(folder / Path(path).expanduser())
    except RuntimeError:
        raise UserError(f"{path}: nobody's home is known by this name; give the whole path") from None


def _look_at_grown(recipe: Recipe, grown: Path, where: str) -> None:
    """Take what a run says of the mixture to grow. Raises UserError where it cannot be grown."""
    if not grown.exists():
        raise UserError(
            f"{where}: mix.grow_from {grown}: not there; give the run folder of a finished btx run, or a "
            "checkpoint of a MoE"
        )
    made_by = grown / RECIPE_FILE
    if made_by.exists():
        take_run(recipe, grown, parse_recipe(_read_tree(made_by), where=str(made_by)), where)


def _shape_problems(kind: Any, value: Any, key: str) -> Iterator[str]:
    """Unknown keys, and mappings, lists and plain values in each other's places; ``kind`` is the type."""
    lists = [part for part in get_args(kind) if get_origin(part) is list]
    if lists and get_origin(kind) is not dict and value is not None:  # or null
        kind = lists[0]
    if is_dataclass(kind) or get_origin(kind) is dict:
        if not isinstance(value, dict):
            yield f"key '{key}': is {_shown(value)}, must be a mapping, as key: value"
            return
        kinds = get_type_hints(kind) if is_dataclass(kind) else dict.fromkeys(value, get_args(kind)[1])
        for name, item in value.items():
            at = f"{key}.{name}" if key else str(name)
            if name in kinds:
                yield from _shape_problems(kinds[name], item, at)
            else:
                yield f"unknown key '{at}'; {_hint(str(name), list(kinds))}"
    elif get_origin(kind) is list:
        if not isinstance(value, list):
            yield f"key '{key}': is {_shown(value)}, must be a list"
            return
        for index, item in enumerate(value):
            yield from _shape_problems(get_args(kind)[0], item, f"{key}[{index}]")
    elif isinstance(value, dict | list):
        yield f"key '{key}': is {_shown(value)}, must be a single value"


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    return "empty" if value is None else repr(value)


def _hint(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(known)}"


def _one_line(error: Exception) -> str:
    text = str(error).split("\n    full_key:")[0]
    return " ".join(text.split())
