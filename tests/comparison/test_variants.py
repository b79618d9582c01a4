"""A recipe's comparison as runs: overrides, random seeds, equal budgets, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from recipes import RECIPE, VARIANTS, write_recipe

from btx_megatron.comparison.results import check_predictions
from btx_megatron.comparison.rows import rows_of_comparison
from btx_megatron.comparison.variants import Variant, expand
from btx_megatron.errors import UserError
from btx_megatron.estimate import stage_tokens, step_tokens
from btx_megatron.estimate_flops import stage_flops, training_flops_per_token
from btx_megatron.evaluation.rows import main_row, spent_on
from btx_megatron.methods import main_stage
from btx_megatron.recipe_compare import Prediction


def by_name(variants: list[Variant]) -> dict[str, Variant]:
    return {variant.name: variant for variant in variants}


def test_every_variant_with_every_random_seed(tmp_path: Path) -> None:
    variants = expand(write_recipe(tmp_path, random_seeds=[3, 4]), ["training.lr=0.01"])
    assert [(v.random_seed, v.name) for v in variants] == [
        (seed, name) for seed in (3, 4) for name in VARIANTS
    ]
    folders = {str(Path(v.recipe.run_folder).relative_to(tmp_path)) for v in variants}
    assert folders == {f"runs/seed-{seed}/{name}" for seed in (3, 4) for name in VARIANTS}
    for variant in variants:
        stages = variant.recipe.stages
        trained = [stages.seed, *stages.experts.values(), stages.finetune, stages.dense]
        assert {stage.training.seed for stage in trained} == {variant.random_seed}
        assert {stage.training.lr for stage in trained} == {0.01}
        assert variant.recipe.mix.random_seed == variant.random_seed
        assert not variant.recipe.compare.variants
    assert by_name(variants)["split"].recipe.mix.chunks == 2
    assert by_name(variants)["btx"].recipe.mix.chunks == 1


@pytest.mark.parametrize("match", ["tokens", "flops"])
def test_budgets_are_equal_to_half_a_step(tmp_path: Path, match: str) -> None:
    variants = by_name(expand(write_recipe(tmp_path, match=match), []))

    def budget(variant: Variant) -> float:
        cost = stage_tokens if match == "tokens" else stage_flops
        return sum(
            cost(variant.recipe, stage) for stage in spent_on(variant.recipe, main_row(variant.recipe))
        )

    wanted = budget(variants["btx"])
    for name in ("unbalanced", "split", "soft", "upcycled", "dense"):
        recipe = variants[name].recipe
        last = str(main_stage(recipe))
        step = step_tokens(recipe, last) * (training_flops_per_token(recipe, last) if match == "flops" else 1)
        assert abs(budget(variants[name]) - wanted) <= step / 2, name
    soft, top2 = (variants[name].recipe.stages.finetune.training.train_iters for name in ("soft", "btx"))
    assert soft is not None
    assert top2 == 12
    assert soft < 12 if match == "flops" else soft == 12  # three experts a token
    assert variants["btm"].recipe.stages.finetune.training.train_iters == 12  # has no last stage


def test_noise_of_the_router_has_the_random_seed_too(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, variants={"sampled": ["moe.moe_router_type=sample_top1"]}, random_seeds=[9])
    assert expand(path, [])[0].recipe.moe.moe_router_seed == 9


IMPORTED = (
    "stages.seed.pretrained_checkpoint=",
    "stages.experts.json.pretrained_checkpoint=",
    "tokenizer.tokenizer_model=",
)


@pytest.mark.parametrize(
    ("compare", "message"),
    [
        ({"variants": {}}, "compare.variants is empty; name what to compare"),
        ({"random_seeds": []}, r"compare.random_seeds \[\]: must be one or more different numbers"),
        ({"random_seeds": [1, 1]}, r"compare.random_seeds \[1, 1\]: must be"),
        ({"random_seeds": [-1]}, r"compare.random_seeds \[-1\]: must be"),
        ({"variants": {"a/b": []}}, "compare.variants: 'a/b' names a folder"),
        ({"variants": {"..": []}}, "names a folder"),
        ({"variants": {"a": ["run_folder=x"]}}, "compare.variants.a: 'run_folder=x' is for all variants"),
        ({"variants": {"a": ["compare.match=flops"]}}, "'compare.match=flops' is for all variants"),
        ({"variants": {"a": ["stages.seed.training.seed=1"]}}, "compare.random_seeds gives it to all"),
        ({"variants": {"a": ["mix.random_seed=1"]}}, "compare.random_seeds gives it to all"),
        ({"variants": {"a": ["moe.topk=1"]}}, "compare.variants.a: .*unknown key 'moe.topk'"),
        ({"variants": {"a": ["nothing"]}}, "compare.variants.a: override 'nothing': write it as"),
        (
            {"variants": {"a": [], "b": ["evaluate.tasks=[{name: a, path: a.jsonl}]"]}},
            "compare.variants.b: its evaluate.tasks differ from those of the first",
        ),
        (
            {"variants": {"a": [], "b": ["data.random_seed=5"]}},
            "compare.variants.b: its data, tokenizer or model.seq_length differ from those of the first",
        ),
        ({"variants": {"a": [], "b": ["tokenizer.vocab_size=600"]}}, "compare.variants.b: its data"),
        (
            {"variants": {"a": [], "b": ["training.train_iters=100"]}, "match": "tokens"},
            "compare.variants.b: compare.match tokens: what comes before finetune takes as much",
        ),
        ({"match": "time"}, "compare.match"),
        (
            {"variants": {"a": [], "b": ["baselines=[dense]"]}, "match": "tokens"},
            "compare.variants.b: compare.match sets the steps of variants alone; leave dense out of",
        ),
        (
            {
                "variants": {"a": [f"{its}/somewhere" for its in IMPORTED]},
                "match": "flops",
            },
            "compare.variants.a: compare.match: what expert:json took before it was imported is not known",
        ),
        (
            {
                "variants": {
                    "a": [],
                    "b": [
                        "stages.finetune.training.lr_warmup_iters=40",
                        "stages.finetune.training.train_iters=80",
                    ],
                },
                "match": "tokens",
            },
            "compare.match tokens gives finetune 12 steps: .*lr_warmup_iters 40",
        ),
        ({"variants": {"a": "method=dense"}}, r"key 'compare.variants.a': is 'method=dense', must be a list"),
        ({"predictions": [{"rows": ["btx"]}]}, r"compare.predictions\[0\].rows \['btx'\]: must be two"),
        ({"predictions": [{"rows": ["btx", "btx"]}]}, "must be two different rows"),
        (
            {"predictions": [{"rows": ["btx", "soft"], "measure": "art"}]},
            r"\[0\].measure 'art': must be one of",
        ),
        ({"predictions": [{"rows": ["btx", "soft"], "within": 1}]}, r"\[0\].within 1: must be above 0 with"),
        ({"predictions": [{"rows": ["btx", "soft"], "expect": "equal"}]}, r"\[0\].within 0: must be above 0"),
    ],
)
def test_refusals(tmp_path: Path, compare: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        expand(write_recipe(tmp_path, **compare), [])


def test_a_recipe_without_a_comparison_is_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    with pytest.raises(UserError, match=r"compare.variants is empty"):
        expand(path, [])


def test_rows_are_each_model_once(tmp_path: Path) -> None:
    variants = expand(write_recipe(tmp_path), [])
    rows = [row.name for row in rows_of_comparison(variants)]
    assert rows[: len(VARIANTS)] == list(VARIANTS)
    assert len(set(rows)) == len(rows)
    others = rows[len(VARIANTS) :]
    # balancing changes nothing of a mixture that was not trained yet; another router does, and other experts
    assert others == [
        "seed",
        "expert:json",
        "expert:mail",
        "average",
        "merged",
        "split/merged",
        "soft/merged",
        "btm:top-1",
        "btm:top-2",
        "btm:uniform",
        "btm:cached",
        "btm:parameters",
    ]


def test_an_ensemble_without_the_seed_is_another_row(tmp_path: Path) -> None:
    variants = {"btm": ["method=btm"], "noseed": ["method=btm", "mix.include_seed=false"]}
    rows = [row.name for row in rows_of_comparison(expand(write_recipe(tmp_path, variants=variants), []))]
    for row in ("btm:top-1", "btm:top-2", "btm:uniform", "btm:cached", "btm:parameters"):
        assert {row, f"noseed/{row}"} <= set(rows)


def test_predictions_are_about_rows_that_there_will_be(tmp_path: Path) -> None:
    variants = expand(write_recipe(tmp_path), [])
    check_predictions(
        [Prediction("", ["btx", "btm:top-2"]), Prediction("", ["expert:json", "seed"])], variants
    )
    with pytest.raises(
        UserError, match=r"compare.predictions\[1\].rows: no row 'bxt'; rows: btx, unbalanced"
    ):
        check_predictions([Prediction("", ["btx", "dense"]), Prediction("", ["bxt", "dense"])], variants)
