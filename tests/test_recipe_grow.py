"""Recipes that grow a mixture: names and stages, what a run says, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from btx_megatron.errors import UserError
from btx_megatron.evaluation.rows import all_rows, rows_of, spent_on
from btx_megatron.manifest import make_manifest, manifest_text
from btx_megatron.methods import training_stages
from btx_megatron.pipeline import stages_of, stages_of_command
from btx_megatron.recipe import Recipe
from btx_megatron.recipe_file import load_recipe, parse_recipe, recipe_to_dict

TRAINING = {"train_iters": 50, "lr_warmup_iters": 5, "global_batch_size": 8}
MODEL = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 2}


def tree(domains: str, **values: Any) -> dict[str, Any]:
    return {"data": data(domains), "training": TRAINING, "model": MODEL, "baselines": [], **values}


def data(domains: str, path: str = "/x", **values: Any) -> dict[str, Any]:
    return {"domains": [{"name": name, "sources": [{"path": path}]} for name in domains], **values}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of the domains a and b, as far as a recipe looks at it."""
    return finished(tmp_path / "old", tree("ab"))


def finished(folder: Path, content: dict[str, Any]) -> Path:
    for stage in ("seed", "finetune"):
        (folder / stage / "checkpoints").mkdir(parents=True)
        manifest = make_manifest(stage, {}, {}, {}, 1, 1.0)
        (folder / stage / "manifest.json").write_text(manifest_text(manifest))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_to_dict(parse_recipe(content))))
    return folder


def load(run: Path, domains: str = "abc", **values: Any) -> Recipe:
    path = run.parent / "new.yaml"
    mix = {"grow_from": "old"} | values.pop("mix", {})
    path.write_text(yaml.safe_dump(tree(domains, mix=mix, **values)))
    return load_recipe(path)


def test_a_run_says_experts_seed_and_tokenizer(run: Path) -> None:
    recipe = load(run)
    assert recipe.mix.grow_from == str(run / "finetune" / "checkpoints")
    assert recipe.stages.seed.pretrained_checkpoint == str(run / "seed" / "checkpoints")
    assert recipe.tokenizer.tokenizer_model == str(run / "data" / "tokenizer" / "tokenizer.model")
    assert recipe.mix.grow_experts == ["a", "b", "seed"]
    assert recipe.expert_names == ["a", "b", "seed", "c"]
    assert recipe.expert_groups == [0, 1, 2, 3]
    assert (recipe.num_experts("grown_from"), recipe.num_experts("mix")) == (3, 4)
    again = parse_recipe(recipe_to_dict(recipe))  # as a worker reads it, the old run gone
    assert again == recipe
    assert again.expert_names == recipe.expert_names


def test_stages_and_rows(run: Path) -> None:
    recipe = load(run, "cbad")
    stages = {stage.name: stage for stage in stages_of(recipe)}
    wanted = [
        "prepare",
        "seed",
        "grown_from",
        "expert:c",
        "expert:d",
        "mix",
        "finetune",
        "evaluate",
        "report",
    ]
    assert list(stages) == wanted
    assert stages["seed"].task == stages["grown_from"].task == "import"
    assert stages["mix"].inputs == ("grown_from", "expert:c", "expert:d")
    assert training_stages(recipe) == ["expert:c", "expert:d", "finetune"]
    assert recipe.expert_names == ["a", "b", "seed", "c", "d"]  # new ones in the recipe's order, behind
    assert all_rows(recipe) == ["seed", "expert:c", "expert:d", "grown_from", "merged", "btx"]
    assert rows_of(recipe)["grown_from"] == "grown_from"
    assert spent_on(recipe, "grown_from") == []
    assert spent_on(recipe, "btx") == ["expert:c", "expert:d", "finetune"]
    assert stages_of_command(recipe, "seed") == ["seed", "grown_from"]
    assert stages_of_command(recipe, "mix") == ["mix"]


def test_what_is_dropped_may_still_be_evaluated(run: Path) -> None:
    """A domain without an expert: how much of it is lost can be told, and no expert is trained for it."""
    recipe = load(run, "abc", mix={"drop": ["b"]})
    assert recipe.expert_names == ["a", "seed", "c"]
    assert recipe.domain_names == ["a", "b", "c"]
    assert recipe.expert_stages == ["expert:c"]
    less = load(
        run, "ab", mix={"drop": ["b", "seed"]}, moe={"moe_router_topk": 1, "moe_router_pre_softmax": True}
    )
    assert less.expert_names == ["a"]
    assert training_stages(less) == ["finetune"]


def test_the_seed_joins_a_mixture_without_one(tmp_path: Path) -> None:
    run = finished(tmp_path / "old", tree("ab", mix={"include_seed": False}))
    recipe = load(run, "abc")
    assert recipe.expert_names == ["a", "b", "c", "seed"]
    mix = next(stage for stage in stages_of(recipe) if stage.name == "mix")
    assert mix.inputs == ("grown_from", "expert:c", "seed")
    assert load(run, "abc", mix={"include_seed": False}).expert_names == ["a", "b", "c"]


def test_a_grown_run_grows_again(run: Path) -> None:
    finished(run.parent / "second", recipe_to_dict(load(run)))
    recipe = load(run, "abcd", mix={"grow_from": "second", "drop": ["a"]})
    assert recipe.expert_names == ["b", "seed", "c", "d"]
    assert recipe.expert_stages == ["expert:d"]


@pytest.mark.parametrize(
    ("domains", "values", "message"),
    [
        ("abc", {"mix": {"grow_from": "elsewhere"}}, "elsewhere: not there; give the run folder of a"),
        ("ab", {}, "the mixture has experts of all domains (a, b, seed), so nothing would change; add a"),
        ("abc", {"mix": {"drop": ["z"]}}, "mix.drop: no expert 'z' in the mixture; there are a, b, seed"),
        ("abc", {"mix": {"drop": ["a", "a"]}}, "mix.drop: 'a' is given 2 times"),
        ("ab", {"mix": {"drop": ["a", "b", "seed"]}}, "mix.drop: no expert would be left"),
        ("abc", {"mix": {"include_seed": False}}, "has the seed as an expert; set mix.drop: [seed]"),
        ("ab", {"mix": {"drop": ["a", "seed"]}}, "moe.moe_router_topk 2 is more than the 1 experts (b)"),
        ("abc", {"moe": {"moe_router_topk": 4}}, "more than the 3 experts of the mixture of mix.grow_from"),
        ("ab", {"mix": {"drop": ["a"], "grow_share": 0.1}}, "grow_share 0.1 has no effect: no expert joins"),
        ("abcd", {"mix": {"grow_share": 0.6}}, "2 experts join (c, d), and their shares are at least"),
        ("abc", {"mix": {"grow_share": -0.1}}, "mix.grow_share -0.1: 1 experts join (c)"),
        ("abc", {"mix": {"average": "ties"}}, "mix.average has no effect with mix.grow_from"),
        ("abc", {"mix": {"experts": "split", "chunks": 2}}, "mix.experts has no effect with mix.grow_from"),
        ("abc", {"mix": {"grow_experts": ["b", "a", "seed"]}}, "are a, b, seed; leave it out"),
        ("abc", {"baselines": ["dense"]}, "with mix.grow_from this one is a part of it; set baselines: []"),
        ("abc", {"method": "btm"}, "mix.grow_from is for method btx, not btm"),
        ("abc", {"model": MODEL | {"hidden_size": 64}}, "hidden_size is 32 in the run of mix.grow_from"),
        ("abc", {"training": TRAINING | {"bf16": True}}, "training.bf16 is False in the run"),
        ("abc", {"data": data("abc", random_seed=7)}, "data.random_seed is 1234 in the run"),
        ("abc", {"data": data("abc", held_out_fraction=0.1)}, "data.held_out_fraction is 0.05 in the run"),
        ("abc", {"data": data("abc", path="/y")}, "data.domains.a: has other sources in the run"),
        ("abc", {"stages": {"seed": {"pretrained_checkpoint": "x"}}}, "has a seed of its own, new experts"),
        (
            "abc",
            {"evaluate": {"layout": {"data_parallel_size": 2, "expert_model_parallel_size": 2}}},
            "evaluate.layout.expert_model_parallel_size 2 must divide the 3 experts of the mixture",
        ),
    ],
)  # fmt: skip
def test_refusals(run: Path, domains: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as refusal:
        load(run, domains, **values)
    assert "\n" not in str(refusal.value)


def test_runs_that_cannot_grow(tmp_path: Path) -> None:
    run = finished(tmp_path / "old", tree("ab"))
    (run / "finetune" / "manifest.json").unlink()
    with pytest.raises(UserError, match="stages seed and finetune are not finished there; finish it with"):
        load(run)
    for name, values, message in (
        ("dense", {"method": "dense"}, "its method dense ends without a mixture"),
        ("btm", {"method": "btm"}, "its method btm ends without a mixture"),
        ("split", {"mix": {"experts": "split", "chunks": 2}}, "its experts are made by mix.experts split"),
    ):
        finished(tmp_path / name, tree("ab", **values))
        with pytest.raises(UserError, match=message):
            load(run, mix={"grow_from": name})


def test_a_checkpoint_must_be_described(run: Path) -> None:
    checkpoint = {"grow_from": "old/finetune/checkpoints"}
    with pytest.raises(UserError, match=r"stages\.seed\.pretrained_checkpoint is missing"):
        load(run, mix=checkpoint)
    seed = {"stages": {"seed": {"pretrained_checkpoint": "old/seed/checkpoints"}}}
    with pytest.raises(UserError, match=r"mix\.grow_experts is missing"):
        load(run, mix=checkpoint, **seed)
    named = checkpoint | {"grow_experts": ["x", "a"]}
    with pytest.raises(UserError, match=r"tokenizer\.tokenizer_model is missing"):
        load(run, mix=named, **seed)
    recipe = load(run, mix=named, tokenizer={"tokenizer_model": "t.model"}, **seed)
    assert recipe.expert_names == ["x", "a", "b", "c", "seed"]
    with pytest.raises(UserError, match=r"mix\.drop is of a mixture that grows; name it with mix\.grow_from"):
        load(run, mix={"grow_from": None, "drop": ["a"]})
