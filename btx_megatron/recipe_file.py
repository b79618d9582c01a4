"""A recipe on disk: YAML and overrides to a typed recipe, and back to plain values.

Two keys are inherited: what stands under the top-level ``training`` and ``layout`` holds for every
stage, and a stage overrides what it needs. Loading never imports torch, so that a wrong recipe is
refused in a fraction of a second.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from btx_megatron import recipe as schema
from btx_megatron.errors import UserError
from btx_megatron.recipe import Recipe
from btx_megatron.recipe_checks import check_recipe, resolve_train_iters


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe, apply ``key.sub=value`` overrides, and check it.

    Raises UserError, naming the key, for a file that is missing or not YAML, an unknown key, a wrong
    type, or values that cannot hold together.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        if not isinstance(raw, dict):
            raise UserError(f"{path}: a recipe is a mapping of keys, this is a {type(raw).__name__}")
        tree: Any = OmegaConf.create(raw)
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: no such recipe file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: broken YAML: {_one_line(error)}") from None
    for override in overrides or []:
        key, equals, _ = override.partition("=")
        if not equals or not re.fullmatch(r"[\w\-.\[\]]+", key):
            raise UserError(f"override '{override}': write it as key.sub=value")
        try:
            tree = OmegaConf.unsafe_merge(tree, OmegaConf.from_dotlist([override]))
        except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"override '{override}': {_one_line(error)}") from None
    recipe = parse_recipe(tree, where=str(path))
    _resolve_paths(recipe, path.resolve().parent)
    check_recipe(recipe, where=str(path))
    resolve_train_iters(recipe)
    return recipe


def parse_recipe(tree: DictConfig | dict[str, Any], where: str = "recipe") -> Recipe:
    """Typed recipe from a tree of plain values; stages inherit ``training`` and ``layout``."""
    typed_schema = OmegaConf.structured(Recipe)
    tree = OmegaConf.create(tree) if isinstance(tree, dict) else tree
    try:
        typed = OmegaConf.merge(typed_schema, tree)  # rejects unknown keys and wrong types as written
        inherited = {key: tree[key] for key in ("training", "layout") if tree.get(key)}
        names = [domain.name for domain in typed.data.domains]
        stages = dict.fromkeys(("seed", "finetune"), inherited)
        stages["dense"] = _without_train_iters(inherited)
        stages["experts"] = dict.fromkeys(names, inherited)
        evaluate = {key: value for key, value in inherited.items() if key == "layout"}
        defaults = OmegaConf.create({"stages": stages, "evaluate": evaluate})
        recipe = OmegaConf.to_object(OmegaConf.unsafe_merge(typed_schema, defaults, tree))  # used up
    except OmegaConfBaseException as error:
        raise UserError(f"{where}: {_explain(error)}") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{where}: {_one_line(error)}") from None
    assert isinstance(recipe, Recipe)
    return recipe


def _without_train_iters(inherited: dict[str, Any]) -> dict[str, Any]:
    """The dense baseline takes as many tokens as the method unless its own key says otherwise."""
    training = {k: v for k, v in (inherited.get("training") or {}).items() if k != "train_iters"}
    return inherited | {"training": training}


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """The whole recipe as plain values, defaults and inherited values filled in."""
    return asdict(recipe)


def _resolve_paths(recipe: Recipe, folder: Path) -> None:
    """Relative paths of inputs start at the recipe, so that a run can start from anywhere."""
    for domain in recipe.data.domains:
        for source in domain.sources:
            if source.path and not re.match(r"[a-z]+:", source.path):
                source.path = str(folder / Path(source.path).expanduser())
    if recipe.tokenizer.tokenizer_model:
        recipe.tokenizer.tokenizer_model = str(folder / Path(recipe.tokenizer.tokenizer_model).expanduser())


def _explain(error: OmegaConfBaseException) -> str:
    key = error.full_key or str(error.key or "?")
    unknown = re.match(r"Key '(.+?)' not in '(\w+)'", str(error))
    if not unknown:
        return f"key '{key}': {_one_line(error)}"
    known = list(getattr(schema, unknown[2]).__dataclass_fields__)
    close = difflib.get_close_matches(unknown[1], known, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(known)}"
    return f"unknown key '{key}'; {hint}"


def _one_line(error: Exception) -> str:
    text = str(error).split("\n    full_key:")[0]
    return " ".join(text.split())
