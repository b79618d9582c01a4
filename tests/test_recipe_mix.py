"""The recipe's ``mix``: mistakes are named, and names, groups and widths go together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from btx_megatron.errors import UserError
from btx_megatron.recipe import Mix, Recipe
from btx_megatron.recipe_checks import check_recipe
from btx_megatron.recipe_file import parse_recipe

UPCYCLING: dict[str, Any] = {"method": "sparse_upcycling"}


def recipe_of(mix: dict[str, Any], **values: Any) -> Recipe:
    domains = [{"name": name, "sources": [{"path": "x"}]} for name in ("prose", "code", "math")]
    training = {"train_iters": 10, "lr_warmup_iters": 2}
    return parse_recipe({"data": {"domains": domains}, "training": training, "mix": mix, **values})


@pytest.mark.parametrize(
    ("mix", "values", "message"),
    [
        ({"density": 0.3}, {}, "mix.density 0.3 is for mix.average ties or dare, not mean; leave it out"),
        ({"average": "ties", "density": 0.0}, {}, "mix.density 0.0: must be above 0 and at most 1"),
        ({"average": "dare", "density": 1.5}, {}, "mix.density 1.5: must be above 0 and at most 1"),
        ({"weights": {"prose": 2.0}}, {}, "mix.weights have no effect with mix.average mean"),
        (
            {"average": "base", "weights": {"prose": 2.0}},
            {},
            "mix.weights have no effect with mix.average base",
        ),
        (
            {"average": "weighted", "weights": {"prosa": 2.0}},
            {},
            "mix.weights.prosa: no such model; there are prose, code, math, seed",
        ),
        (
            {"average": "weighted", "weights": {"seed": 2.0}, "include_seed": False},
            {},
            "mix.weights.seed: no such model; there are prose, code, math",
        ),
        ({"average": "ties", "weights": {"code": -1.0}}, {}, "mix.weights.code -1.0: a weight is a number"),
        (
            {"average": "weighted", "weights": dict.fromkeys(("prose", "code", "math", "seed"), 0.0)},
            {},
            "mix.weights: all weights are 0",
        ),
        ({"chunks": 2}, {}, "mix.chunks 2 is for mix.experts split or virtual, not stack; leave it out"),
        ({"copies": 2}, {}, "mix.copies 2 is for mix.experts copies or virtual, not stack; leave it out"),
        ({"experts": "split"}, {}, "mix.experts split needs mix.chunks of at least 2, not 1"),
        ({"experts": "split", "chunks": 0}, {}, "mix.chunks 0: must be at least 1"),
        ({"experts": "copies"}, {}, "mix.experts copies needs mix.copies of at least 2, not 1"),
        ({"experts": "split", "chunks": 5}, {}, "mix.chunks 5 must divide model.ffn_hidden_size 384"),
        (
            {"experts": "blend"},
            {"model": {"ffn_hidden_size": 385}},
            "mix.experts blend cuts model.ffn_hidden_size 385 in as many chunks as models are mixed, 4 (",
        ),
        (
            {"experts": "virtual", "chunks": 4, "copies": 2},
            {},
            "mix.experts virtual with mix.chunks 4: the 2 experts that a token takes are no whole groups; "
            "make moe.moe_router_topk a multiple of mix.chunks",
        ),
        (
            {"virtual_scale": "cube-root"},
            {},
            "mix.virtual_scale cube-root is for mix.experts virtual, not stack",
        ),
        ({"drop_ratio": 1.5}, {}, "mix.drop_ratio 1.5: must lie between 0 and 1"),
        (
            {"router_init": "zero"},
            {},
            "mix.router_init zero: all logits are equal, so every token would take",
        ),
        (
            {"router_init": "ridge", "experts": "blend"},
            {},
            "mix.router_init ridge with mix.experts blend: every",
        ),
        (
            {"router_init": "centroid", "router_std": 0.1},
            {},
            "mix.router_std 0.1 is for mix.router_init normal",
        ),
        ({"router_std": 0.0}, {}, "mix.router_std 0.0: must be above 0"),
        ({"random_seed": -1}, {}, "mix.random_seed -1: must be at least 0"),
        (
            {"random_seed": 1 << 32},
            {},
            "mix.random_seed 4294967296: must be at least 0 and at most 4294967295",
        ),
        (
            {"router_init": "zero", "random_seed": 5},
            {"moe": {"moe_router_topk": 4}},
            "mix.random_seed 5 has no effect: nothing is drawn",
        ),
        ({"average": "ties"}, UPCYCLING, "mix.average has no effect with method sparse_upcycling"),
        ({"weights": {"seed": 2.0}}, UPCYCLING, "mix.weights has no effect with method sparse_upcycling"),
        ({"experts": "blend"}, UPCYCLING, "mix.experts blend is of several models; method sparse_upcycling"),
        (
            {"router_init": "centroid"},
            UPCYCLING,
            "mix.router_init centroid: copies have no text of their own",
        ),
        (
            {"experts": "split", "chunks": 3},
            {"baselines": ["sparse_upcycling_dm"]},
            "sparse_upcycling_dm with mix.experts split with mix.chunks 3: the 2 experts that a token takes",
        ),
        ({"average": "weighted", "weights": {"x": 1.0}}, {"method": "btm"}, "mix.weights.x: no such model"),
    ],
)
def test_each_mistake_is_named(mix: dict[str, Any], values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_recipe(recipe_of(mix, **values), "recipe.yaml")
    text = str(caught.value)
    assert text.startswith("recipe.yaml: ")
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("mix", "values"),
    [
        ({"average": "ties", "density": 0.3, "weights": {"seed": 0.5}}, {}),
        ({"average": "base", "include_seed": False}, {}),
        ({"average": "dare", "random_seed": 7}, {}),
        ({"experts": "split", "chunks": 2}, {"moe": {"moe_router_topk": 4}}),
        ({"experts": "blend", "router_init": "zero"}, {"moe": {"moe_router_topk": 4}}),
        ({"experts": "virtual", "chunks": 2, "copies": 2, "virtual_scale": "cube-root"}, {}),
        ({"router_init": "ridge", "random_seed": 3}, {}),
        ({"router_init": "zero", "drop_ratio": 0.5, "random_seed": 3}, {"moe": {"moe_router_topk": 4}}),
        ({"experts": "copies", "copies": 2, "drop_ratio": 0.5}, UPCYCLING),
        ({"average": "ties", "experts": "blend"}, {"baselines": ["sparse_upcycling_cm"]}),
        ({"average": "ties"}, {"method": "btm"}),
        ({"chunks": 7}, {"method": "dense"}),  # nothing is mixed
    ],
)
def test_what_goes_together_is_taken(mix: dict[str, Any], values: dict[str, Any]) -> None:
    check_recipe(recipe_of(mix, **values), "recipe.yaml")


def test_names_of_the_experts() -> None:
    names = {
        "stack": (1, 1, ["prose", "seed"]),
        "split": (2, 1, ["prose.0", "prose.1", "seed.0", "seed.1"]),
        "blend": (1, 1, ["blend.0", "blend.1"]),
        "copies": (1, 2, ["prose.0", "prose.1", "seed.0", "seed.1"]),
        "virtual": (2, 1, ["prose.0.0", "prose.0.1", "seed.0.0", "seed.0.1"]),
    }
    for kind, (chunks, copies, expected) in names.items():
        mix = Mix(experts=kind, chunks=chunks, copies=copies)  # type: ignore[arg-type]
        assert mix.expert_names(["prose", "seed"]) == expected
    assert recipe_of({}, method="sparse_upcycling").expert_names == ["seed.0", "seed.1", "seed.2", "seed.3"]
    cut = recipe_of({"experts": "split", "chunks": 2, "include_seed": False}, method="sparse_upcycling")
    assert cut.expert_names == ["seed.0.0", "seed.0.1", "seed.1.0", "seed.1.1", "seed.2.0", "seed.2.1"]


@given(
    st.sampled_from(["stack", "split", "copies", "virtual"]),
    st.integers(1, 5),
    st.integers(2, 4),
    st.integers(2, 4),
)
def test_every_expert_is_named_after_its_group(kind: Any, sources: int, chunks: int, copies: int) -> None:
    chunks = chunks if kind in ("split", "virtual") else 1
    copies = copies if kind in ("copies", "virtual") else 1
    mix = Mix(experts=kind, chunks=chunks, copies=copies)
    names = [f"d{number}" for number in range(sources)]
    experts, groups = mix.expert_names(names), mix.expert_groups(sources)
    assert len(set(experts)) == len(experts) == len(groups) == sources * chunks * copies
    assert [names[group] for group in groups] == [name.split(".")[0] for name in experts]
    # what is cut is kept: all experts of a copy together are as wide as the model's feed-forward
    assert mix.expert_width(24) * chunks == 24


@pytest.mark.parametrize(
    ("experts", "ep"), [({"experts": "split", "chunks": 2}, 8), ({"experts": "blend"}, 4)]
)
def test_expert_parallelism_divides_the_experts_not_the_models(experts: dict[str, Any], ep: int) -> None:
    layout = {"expert_model_parallel_size": ep, "data_parallel_size": 8}
    check_recipe(recipe_of(experts, stages={"finetune": {"layout": layout}}), "r")
    layout["expert_model_parallel_size"] = 16
    layout["data_parallel_size"] = 16
    with pytest.raises(UserError, match="expert_model_parallel_size 16 must divide the number of experts"):
        check_recipe(
            recipe_of(
                experts, stages={"finetune": {"layout": layout, "training": {"global_batch_size": 16}}}
            ),
            "r",
        )


def test_expert_tensor_parallelism_cuts_the_experts_width() -> None:
    layout = {"expert_tensor_parallel_size": 4, "data_parallel_size": 4}
    with pytest.raises(UserError, match=r"must divide model.ffn_hidden_size 384 / mix.chunks 64"):
        check_recipe(
            recipe_of({"experts": "split", "chunks": 64}, stages={"finetune": {"layout": layout}}), "r"
        )


def test_an_older_recipe_still_reads(tmp_path: Path) -> None:
    """What a run folder of before holds."""
    recipe = recipe_of({"average": "mean", "include_seed": True, "router_init": "normal", "random_seed": 1})
    assert (recipe.method, recipe.mix.experts) == ("btx", "stack")
