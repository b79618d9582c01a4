"""Which experts a text may take: by time, and without those that are opted out."""

from __future__ import annotations

from typing import Any

import pytest

from btx_megatron.errors import UserError
from btx_megatron.evaluation.rows import all_rows, rows_of, spent_on
from btx_megatron.expert_masks import allowed_experts, masks_experts
from btx_megatron.recipe import Recipe
from btx_megatron.recipe_checks import check_recipe
from btx_megatron.recipe_file import parse_recipe

NAMES = ("a", "b", "c")


def recipe_of(times: bool = True, **values: Any) -> Recipe:
    domains: list[dict[str, Any]] = [{"name": name, "sources": [{"path": "x"}]} for name in NAMES]
    for domain, (start, end) in zip(domains, ((2000, 2004), (2010, 2014), (2005, 2009)), strict=True):
        domain |= {"start": start, "end": end} if times else {}
    training = {"train_iters": 10, "lr_warmup_iters": 0, "global_batch_size": 4}
    tree = {"data": {"domains": domains}, "training": training, "mix": {"include_seed": False}}
    return parse_recipe(tree | values)


MASK = {"moe_router_time_mask": True}


def test_without_a_mask_all_may_be_taken() -> None:
    recipe = recipe_of(times=False)
    check_recipe(recipe, "here")
    assert not masks_experts(recipe)
    assert allowed_experts(recipe, "a", "finetune") is None


def test_later_experts_do_not_answer() -> None:
    recipe = recipe_of(moe=MASK)
    check_recipe(recipe, "here")
    assert masks_experts(recipe)
    assert [allowed_experts(recipe, name, "finetune") for name in NAMES] == [
        [True, False, False],
        [True, True, True],
        [True, False, True],
    ]


def test_all_parts_of_a_domain_share_its_time() -> None:
    recipe = recipe_of(moe=MASK, mix={"include_seed": False, "experts": "split", "chunks": 2})
    assert allowed_experts(recipe, "c", "finetune") == [True, True, False, False, True, True]


GROWN = {"grow_from": "old", "grow_experts": ["a", "b"], "include_seed": False}
IMPORTED = {"seed": {"pretrained_checkpoint": "seed"}}


def test_a_mixture_that_grows() -> None:
    """The old one has experts of its own, and may be asked of the new domain's text, too."""
    recipe = recipe_of(
        moe=MASK, mix=GROWN, stages=IMPORTED, baselines=[], tokenizer={"tokenizer_model": "model"}
    )
    check_recipe(recipe, "here")
    assert recipe.expert_names == ["a", "b", "c"]
    assert [allowed_experts(recipe, name, "grown_from") for name in NAMES] == [
        [True, False],
        [True, True],
        [True, False],
    ]
    assert allowed_experts(recipe, "c", "finetune") == [True, False, True]


def test_opted_out() -> None:
    recipe = recipe_of(times=False, evaluate={"opt_out": ["b", "seed"]}, mix={"include_seed": True})
    check_recipe(recipe, "here")
    assert allowed_experts(recipe, "a", "finetune") is None
    assert allowed_experts(recipe, "a", "finetune", "b") == [True, False, True, True]
    assert allowed_experts(recipe, "a", "finetune", "seed") == [True, True, True, False]
    rows = rows_of(recipe)
    assert rows["without:b"] == rows["without:seed"] == rows["btx"] == "finetune"
    assert all_rows(recipe)[-1] == "btx"
    assert spent_on(recipe, "without:b") == spent_on(recipe, "btx")


def test_both_at_once() -> None:
    recipe = recipe_of(moe=MASK, evaluate={"opt_out": ["c"]})
    check_recipe(recipe, "here")
    assert allowed_experts(recipe, "b", "finetune", "c") == [True, True, False]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"moe": MASK, "times": False}, "data.domains.a: the start and the end of its text are missing"),
        ({"moe": MASK, "mix": {"include_seed": True}}, "mix.include_seed: the seed has no time window"),
        ({"moe": MASK, "mix": {"include_seed": False, "experts": "blend"}}, "with mix.experts blend"),
        ({"moe": MASK, "baselines": ["sparse_upcycling_dm"]}, "experts of sparse upcycling are of no time"),
        (
            {"moe": MASK, "baselines": [], "mix": GROWN | {"grow_experts": ["x", "a"]}, "stages": IMPORTED},
            "the expert 'x' is of no domain in data.domains",
        ),
        (
            {"moe": MASK, "baselines": [], "mix": GROWN | {"drop": ["a"]}, "stages": IMPORTED},
            "text of 'a' may take no expert",
        ),
        ({"moe": MASK, "method": "btm"}, "method btm ends with no mixture"),
        (
            {"moe": MASK | {"moe_router_load_balancing_type": "aux_loss"}},
            "'a' may take 1; choose btx or none",
        ),
        ({"moe": MASK, "evaluate": {"opt_out": ["a"]}}, "without 'a' text of 'a' has no expert left"),
        (
            {"times": False, "evaluate": {"opt_out": ["x"]}},
            "'x' has no experts in the mixture; it has a, b, c",
        ),
        ({"times": False, "evaluate": {"opt_out": ["a", "a"]}}, "'a' is given twice"),
        (
            {"times": False, "method": "dense", "evaluate": {"opt_out": ["a"]}},
            "evaluate.opt_out: method dense",
        ),
        ({}, "start and end are for method timoe and moe.moe_router_time_mask"),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        check_recipe(recipe_of(**values), "here")
    assert message in str(error.value)
