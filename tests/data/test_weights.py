"""Effective epochs, and where a user sees them."""

from dataclasses import replace
from pathlib import Path

import pytest
from corpora import random_words, write_files

from btx_megatron.data.prepare import prepare
from btx_megatron.data.weights import order_seed, source_tokens, stage_blend, stage_epochs
from btx_megatron.launch.tables import plan_text, status_text
from btx_megatron.recipe import Recipe, Stage
from btx_megatron.recipe_file import parse_recipe


def recipe_of(folder: Path) -> Recipe:
    """Domain a: sources x (weight 1) and y (weight 3); domain b: x. A step is 4 x 16 tokens."""
    for name in ("a/x", "a/y", "b/x"):
        write_files(folder / name, {f"{i}.txt": f"{name} {random_words(i, 50)}" for i in range(10)})

    def source(domain: str, name: str, weight: float) -> dict[str, object]:
        return {"name": name, "path": str(folder / domain / name), "weight": weight}

    return parse_recipe(
        {
            "run_folder": str(folder / "run"),
            "data": {
                "num_workers": 1,
                "domains": [
                    {"name": "a", "sources": [source("a", "x", 1), source("a", "y", 3)]},
                    {"name": "b", "sources": [source("b", "x", 5)]},
                ],
            },
            "tokenizer": {"vocab_size": 300},
            "model": {"seq_length": 16},
            "training": {"train_iters": 10, "global_batch_size": 4},
            "stages": {
                "finetune": {"blend": {"a": 1, "b": 3}},
                "dense": {"training": {"train_iters": 20}},
                "experts": {"b": {"blend": {"b": 9, "a": 1}}},
            },
        }
    )


def test_a_stages_blend_is_its_own_or_its_kinds(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    assert stage_blend(recipe, "seed") == {"a": 1.0, "b": 1.0}
    assert stage_blend(recipe, "expert:a") == {"a": 1.0}
    assert stage_blend(recipe, "expert:b") == {"b": 9, "a": 1}
    assert stage_blend(recipe, "finetune") == stage_blend(recipe, "dense") == {"a": 1, "b": 3}


def test_each_stage_has_an_order_of_its_own(tmp_path: Path) -> None:
    """But those that are compared read the same text in the same order."""
    recipe = recipe_of(tmp_path)
    stages = ["seed", "expert:a", "expert:b", "finetune"]
    seeds = {stage: order_seed(recipe, stage) for stage in stages}
    assert len(set(seeds.values())) == len(stages)
    assert all(0 <= seed < 1 << 32 for seed in seeds.values())  # numpy takes no other
    for matched in ("dense", "sparse_upcycling_dm", "sparse_upcycling_cm"):
        assert order_seed(recipe, matched) == seeds["finetune"]
    other = replace(recipe, stages=replace(recipe.stages, seed=with_seed(recipe.stages.seed, 7)))
    assert order_seed(other, "seed") != seeds["seed"]
    assert order_seed(other, "finetune") == seeds["finetune"]


def with_seed(stage: Stage, seed: int) -> Stage:
    return replace(stage, training=replace(stage.training, seed=seed))


def test_epochs_follow_from_weights_tokens_and_steps(tmp_path: Path) -> None:
    tokens = {("a", "x"): 100, ("a", "y"): 200, ("b", "x"): 400}
    recipe = recipe_of(tmp_path)
    drawn = 10 * 4 * 16
    assert stage_epochs(recipe, "seed", tokens) == pytest.approx(
        {("a", "x"): drawn / 8 / 100, ("a", "y"): drawn * 3 / 8 / 200, ("b", "x"): drawn / 2 / 400}
    )
    assert stage_epochs(recipe, "expert:a", tokens) == pytest.approx(
        {("a", "x"): drawn / 4 / 100, ("a", "y"): drawn * 3 / 4 / 200}
    )
    assert stage_epochs(recipe, "dense", tokens)["b", "x"] == pytest.approx(2 * drawn * 3 / 4 / 400)


def test_plan_and_status_show_them_once_the_data_is_prepared(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    assert "epochs" not in plan_text(recipe) + status_text(recipe)
    (tmp_path / "run" / "data").mkdir(parents=True)
    prepare(recipe, tmp_path / "run" / "data", lambda *step: None)
    tokens = source_tokens(tmp_path / "run" / "data")
    assert tokens is not None
    for text in (plan_text(recipe), status_text(recipe)):
        lines = [line.split() for line in text.splitlines()]
        header = next(i for i, line in enumerate(lines) if line[:1] == ["epochs"])
        assert lines[header][-5:] == ["seed", "expert:a", "expert:b", "finetune", "dense"]
        rows = {line[0]: line[1:] for line in lines[header + 1 : header + 4]}
        assert rows["a/y"][0] == f"{tokens['a', 'y']:,}"
        assert rows["b/x"][2] == "-"
        assert float(rows["a/y"][2]) == pytest.approx(640 * 0.75 / tokens["a", "y"], abs=0.005)
