"""Methods and baselines: their stages, what these read, and how long they train."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from btx_megatron.data.weights import stage_blend
from btx_megatron.errors import UserError
from btx_megatron.estimate import parameter_counts, recipe_parameter_counts, stage_tokens
from btx_megatron.estimate_flops import forward_flops, stage_flops, training_flops_per_token
from btx_megatron.evaluation.rows import MOE_ROWS, all_rows, ensemble_rows, main_row, rows_of, spent_on
from btx_megatron.job import branches_from
from btx_megatron.launch.tables import plan_text
from btx_megatron.matching import matched_train_iters, reference_stages
from btx_megatron.methods import has_moe, training_stages
from btx_megatron.pipeline import command_of, stages_of, stages_of_command
from btx_megatron.recipe import MATCHED_STAGES, MOE_STAGES, Recipe
from btx_megatron.recipe_checks import check_recipe, resolve_train_iters
from btx_megatron.recipe_file import load_recipe, parse_recipe, recipe_to_dict

METHODS = ("btx", "sparse_upcycling", "dense", "btm", "cbtm", "timoe")
EXPERTS = ["expert:a", "expert:b"]
UPCYCLED = ["sparse_upcycling_dm", "sparse_upcycling_cm"]


def recipe_of(resolved: bool = True, **values: Any) -> Recipe:
    domains: list[dict[str, Any]] = [{"name": name, "sources": [{"path": "x"}]} for name in ("a", "b")]
    if values.get("method") == "timoe":
        for year, domain in enumerate(domains, 2020):
            domain |= {"start": str(year), "end": str(year)}
        values |= {"mix": {"include_seed": False}, "stages": {"seed": {"blend": {"a": 1}}}}
    if values.get("method") == "cbtm":
        values |= {"mix": {"include_seed": False}, "clusters": {"number": 3}}
    training = {"train_iters": 10, "lr_warmup_iters": 0, "global_batch_size": 4}
    tree = {"data": {"domains": domains}, "tokenizer": {"vocab_size": 300}, "training": training, **values}
    recipe = parse_recipe(tree)
    check_recipe(recipe, "recipe.yaml")
    if resolved:
        resolve_train_iters(recipe)
    return recipe


@pytest.mark.parametrize(
    ("values", "stages"),
    [
        ({"method": "btx"}, [*EXPERTS, "mix", "average", "finetune"]),
        ({"method": "dense"}, ["dense"]),
        ({"method": "sparse_upcycling"}, ["upcycle", "sparse_upcycling_dm"]),
        ({"method": "sparse_upcycling", "upcycling_match": "compute"}, ["upcycle", "sparse_upcycling_cm"]),
        ({"method": "btm"}, [*EXPERTS, "average"]),
        ({"method": "timoe"}, [*EXPERTS, "average"]),
        ({"method": "cbtm"}, [*(f"expert:cluster{number}" for number in range(3)), "average"]),
        (
            {"baselines": ["dense", *UPCYCLED]},
            [*EXPERTS, "mix", "average", "finetune", "upcycle", "dense", *UPCYCLED],
        ),
        ({"method": "dense", "baselines": ["dense"]}, ["dense"]),
        (
            {"method": "sparse_upcycling", "baselines": ["dense", *UPCYCLED]},
            ["upcycle", "sparse_upcycling_dm", "dense", "sparse_upcycling_cm"],
        ),
    ],
)
def test_the_graph_of_each_method(values: dict[str, Any], stages: list[str]) -> None:
    recipe = recipe_of(**{"baselines": [], **values})
    graph = stages_of(recipe)
    found = ["cluster"] if recipe.cluster_names else []
    assert [stage.name for stage in graph] == ["prepare", *found, "seed", *stages, "evaluate", "report"]
    seen: set[str] = set()
    for stage in graph:
        assert set(stage.inputs) <= seen
        assert stage.task == "import" or (stage.task == "train") == (stage.name in training_stages(recipe))
        source = branches_from(stage.name) if stage.task == "train" else None
        assert source is None or source in stage.inputs
        assert command_of(stage.name)
        seen.add(stage.name)
    assert set(graph[-1].inputs) == seen - {"report"}
    assert has_moe(recipe) == bool(set(stages) & set(MOE_STAGES))


def test_what_the_mix_reads() -> None:
    def inputs(stage: str = "mix", **mix: Any) -> tuple[str, ...]:
        return next(found.inputs for found in stages_of(recipe_of(mix=mix)) if found.name == stage)

    assert inputs() == inputs("average") == (*EXPERTS, "seed")
    assert inputs(include_seed=False) == tuple(EXPERTS)
    for average in ("base", "ties", "dare"):
        assert inputs(include_seed=False, average=average) == (*EXPERTS, "seed")
    assert inputs("average", include_seed=False, average="ties") == (*EXPERTS, "seed")
    assert inputs("average", include_seed=False, average="base") == tuple(EXPERTS)  # the mean
    assert inputs(router_init="centroid") == ("prepare", *EXPERTS, "seed")
    assert inputs("average", router_init="centroid") == (*EXPERTS, "seed")


@pytest.mark.parametrize("method", METHODS)
def test_rows_are_stages_and_the_methods_own_is_last(method: str) -> None:
    recipe = recipe_of(method=method, baselines=["dense", *UPCYCLED])
    rows = rows_of(recipe)
    shown = all_rows(recipe)
    names = [stage.name for stage in stages_of(recipe)]
    assert set(rows.values()) <= set(names)
    assert shown[-1] == main_row(recipe)
    assert set(shown) == {*rows, *ensemble_rows(recipe)}
    assert bool(ensemble_rows(recipe)) == (method in ("btm", "cbtm", "timoe"))
    for row in ensemble_rows(recipe):
        assert spent_on(recipe, row) == recipe.expert_stages
    for row, stage in rows.items():
        assert (recipe.num_experts(stage) is not None) == (row in MOE_ROWS)
        assert set(spent_on(recipe, row)) <= set(training_stages(recipe)) - {"seed"}
    assert plan_text(recipe)


def test_experts_of_clusters_read_their_clusters() -> None:
    recipe = recipe_of(method="cbtm", stages={"experts": {"cluster1": {"training": {"train_iters": 7}}}})
    inputs = {stage.name: stage.inputs for stage in stages_of(recipe)}
    assert inputs["cluster"] == inputs["seed"] == ("prepare",)
    assert inputs["expert:cluster1"] == ("cluster", "seed")
    assert inputs["dense"] == ("prepare", "seed")
    assert stage_blend(recipe, "expert:cluster1") == {"cluster1": 1.0}
    assert stages_of_command(recipe, "train", "cluster2") == ["expert:cluster2"]
    assert stage_tokens(recipe, "dense") == (10 + 7 + 10) * 4 * 256  # as many as the experts
    with pytest.raises(
        UserError, match="--domain a: no expert of that name; the recipe has cluster0, cluster1"
    ):
        stages_of_command(recipe, "train", "a")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"clusters": {"number": 1}}, "clusters.number 1: must be at least 2"),
        ({"clusters": {"temperature": 0}}, "clusters.temperature 0.0: must be above 0"),
        ({"mix": {}}, "mix.include_seed: the seed is of no cluster"),
        ({"baselines": ["btm"]}, "baselines: 'btm' beside method cbtm"),
        ({"method": "btm"}, "clusters: they are for method cbtm, not for btm"),
        ({"stages": {"experts": {"cluster9": {}}}}, "stages.experts.cluster9: no expert of that name"),
    ],
)
def test_clusters_that_cannot_be(values: dict[str, Any], message: str) -> None:
    tree = {"method": "cbtm", "mix": {"include_seed": False}, "clusters": {"number": 3}} | values
    domains = [{"name": name, "sources": [{"path": "x"}]} for name in ("a", "b")]
    training = {"train_iters": 10, "lr_warmup_iters": 0}
    with pytest.raises(UserError) as error:
        check_recipe(parse_recipe({"data": {"domains": domains}, "training": training} | tree), "here")
    assert message in str(error.value)


def test_a_method_is_its_baseline_alone() -> None:
    """Same stage, same steps, same shape."""
    beside = recipe_of(baselines=["dense", *UPCYCLED])
    alone = {
        "dense": recipe_of(method="dense"),
        "sparse_upcycling_dm": recipe_of(method="sparse_upcycling"),
        "sparse_upcycling_cm": recipe_of(method="sparse_upcycling", upcycling_match="compute"),
    }
    for stage, recipe in alone.items():
        assert main_row(recipe) == stage
        assert stage_tokens(recipe, stage) == stage_tokens(beside, stage)
        assert stage_flops(recipe, stage) == stage_flops(beside, stage)
        assert recipe.num_experts(stage) == beside.num_experts(stage)


@settings(max_examples=25)
@given(
    iters=st.lists(st.integers(1, 1000), min_size=3, max_size=3),
    batch=st.sampled_from([1, 4, 24]),
    chunks=st.sampled_from([1, 2]),
)
def test_baselines_take_as_much_as_btx_and_less_than_a_step_more(
    iters: list[int], batch: int, chunks: int
) -> None:
    training = [{"training": {"train_iters": count}} for count in iters]
    own = {"training": {"global_batch_size": batch}}
    stages = {"experts": dict(zip("ab", training, strict=False)), "finetune": training[2]}
    mix = {"experts": "split", "chunks": chunks} if chunks > 1 else {}
    stages |= dict.fromkeys(MATCHED_STAGES, own)
    recipe = recipe_of(stages=stages, baselines=["dense", *UPCYCLED], mix=mix)
    tokens = sum(iters) * 4 * 256
    for stage in ("dense", "sparse_upcycling_dm"):
        assert tokens <= stage_tokens(recipe, stage) < tokens + batch * 256
    flops = sum(stage_flops(recipe, stage) for stage in reference_stages(recipe))
    step = training_flops_per_token(recipe, "sparse_upcycling_cm") * batch * 256
    assert flops * (1 - 1e-12) <= stage_flops(recipe, "sparse_upcycling_cm") < flops + step * (1 + 1e-9)
    assert stage_tokens(recipe, "sparse_upcycling_cm") <= stage_tokens(recipe, "sparse_upcycling_dm")


def test_a_compute_matched_baseline_takes_fewer_tokens_of_a_larger_model() -> None:
    """Experts are dense while btx's are trained: 20 of 30 parts of the tokens cost what one expert costs."""
    recipe = recipe_of(baselines=["sparse_upcycling_cm"])
    dense = forward_flops(recipe.model, 384).training()
    moe = forward_flops(recipe.model, 384, 3, 2).training()
    steps = (20 * dense + 10 * moe) / moe
    assert recipe.stages.sparse_upcycling_cm.training.train_iters == -int(-steps // 1)
    assert 10 < steps < 30


def test_split_experts_are_counted_by_their_width() -> None:
    """Top-4 of 8 halves costs as much as top-2 of 4 wholes, but for the router."""
    whole = recipe_of(moe={"moe_router_topk": 2})
    split = recipe_of(moe={"moe_router_topk": 4}, mix={"experts": "split", "chunks": 2})
    router = split.model.num_layers * split.model.hidden_size * 3
    assert recipe_parameter_counts(split).moe_total == recipe_parameter_counts(whole).moe_total + router
    assert recipe_parameter_counts(split).moe_active == recipe_parameter_counts(whole).moe_active + router
    assert recipe_parameter_counts(split).dense == recipe_parameter_counts(whole).dense
    assert (
        training_flops_per_token(split, "finetune")
        == training_flops_per_token(whole, "finetune") + 6 * router
    )
    counts = parameter_counts(split.model, 300, 6, 4, 192)
    assert counts == recipe_parameter_counts(split)


def test_an_imported_expert_costs_nothing_in_any_method() -> None:
    stages = {"experts": {"a": {"pretrained_checkpoint": "elsewhere"}}}
    tokenizer = {"tokenizer_model": "x", "vocab_size": 300}
    for method in ("btx", "dense"):
        recipe = recipe_of(False, stages=stages, method=method, tokenizer=tokenizer)
        assert matched_train_iters(recipe, "dense") == 20
        assert recipe.imported_stages == (["expert:a"] if method == "btx" else [])


def test_the_resolved_recipe_is_read_back_as_itself(tmp_path: Path) -> None:
    """`btx run RUN/recipe.yaml` repeats a run: nothing is matched twice."""
    recipe = recipe_of(method="sparse_upcycling", baselines=["dense", "sparse_upcycling_cm"])
    for domain in recipe.data.domains:
        domain.sources[0].path = "stdlib:"
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_to_dict(recipe)))
    assert recipe_to_dict(load_recipe(path)) == recipe_to_dict(recipe)


def test_baselines_draw_from_the_moe_stages_blend() -> None:
    recipe = recipe_of(
        stages={"finetune": {"blend": {"a": 3.0}}, "sparse_upcycling_cm": {"blend": {"b": 1.0}}},
        baselines=["dense", *UPCYCLED],
    )
    assert stage_blend(recipe, "dense") == stage_blend(recipe, "sparse_upcycling_dm") == {"a": 3.0}
    assert stage_blend(recipe, "sparse_upcycling_cm") == {"b": 1.0}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"upcycling_match": "compute"}, "upcycling_match is for method sparse_upcycling"),
        (
            {"method": "dense", "stages": {"experts": {"b": {"training": {"train_iters": None}}}}},
            "stages.experts.b.training.train_iters is missing; dense trains as long as btx would: give "
            "it, or stages.dense.training.train_iters",
        ),
        (
            {"method": "sparse_upcycling", "stages": {"finetune": {"training": {"train_iters": 0}}}},
            "stages.finetune.training.train_iters 0: must be at least 1",
        ),
        (
            {"method": "dense", "stages": {"dense": {"training": {"freeze": ["experts"]}}}},
            "stages.dense.training.freeze: this stage trains a dense model",
        ),
        (
            {
                "method": "sparse_upcycling",
                "stages": {"sparse_upcycling_dm": {"layout": {"expert_model_parallel_size": 2}}},
            },
            "stages.sparse_upcycling_dm.layout.expert_model_parallel_size 2 must divide the number of "
            "experts 3",
        ),
        (
            {"stages": {"sparse_upcycling_cm": {"pretrained_checkpoint": "x"}}},
            "stages.sparse_upcycling_cm.pretrained_checkpoint: only stages.seed and "
            "stages.experts are imported",
        ),
    ],
)
def test_each_mistake_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe_of(**values)
    assert str(caught.value).startswith(f"recipe.yaml: {message}")


def test_given_steps_need_no_reference() -> None:
    stages = {"dense": {"training": {"train_iters": 7}}, "finetune": {"training": {"train_iters": None}}}
    recipe = recipe_of(method="dense", stages=stages)
    assert recipe.stages.dense.training.train_iters == 7


def test_an_upcycled_stage_may_freeze_what_a_moe_has() -> None:
    freeze = {"sparse_upcycling_dm": {"training": {"freeze": ["router"]}}}
    assert recipe_of(method="sparse_upcycling", stages=freeze).num_experts("sparse_upcycling_dm") == 3


def test_commands_and_their_stages() -> None:
    both = recipe_of(baselines=UPCYCLED)
    assert stages_of_command(both, "mix") == ["mix", "average", "upcycle"]
    assert stages_of_command(both, "upcycle") == UPCYCLED
    assert stages_of_command(both, "train") == EXPERTS
    assert stages_of_command(both, "train", "b") == ["expert:b"]
    assert stages_of_command(recipe_of(method="btm"), "mix") == ["average"]
    assert stages_of_command(recipe_of(method="sparse_upcycling"), "mix") == ["upcycle"]
    assert {command_of(stage) for stage in ("mix", "average", "upcycle")} == {"mix RECIPE"}
    assert command_of("sparse_upcycling_cm") == "upcycle RECIPE"
    for method, command in [("dense", "mix"), ("dense", "train"), ("sparse_upcycling", "finetune")]:
        with pytest.raises(UserError, match=f"method {method} has nothing to do for `btx {command}`"):
            stages_of_command(recipe_of(method=method), command)
    with pytest.raises(UserError, match="method btx has nothing to do for `btx upcycle`"):
        stages_of_command(recipe_of(), "upcycle")
    with pytest.raises(UserError, match="nothing to do for `btx train`"):
        stages_of_command(recipe_of(method="dense"), "train", "a")


def test_expert_names_do_not_change_with_the_baselines() -> None:
    for left, right in pairwise([recipe_of(baselines=names) for names in ([], ["dense"], UPCYCLED)]):
        assert left.expert_names == right.expert_names == ["a", "b", "seed"]


def test_text_that_has_no_expert() -> None:
    """It is trained on by the seed, the MoE and the baselines, and evaluated on."""
    domains: list[dict[str, Any]] = [{"name": name, "sources": [{"path": "x"}]} for name in ("a", "b", "c")]
    domains[2]["expert"] = False
    recipe = recipe_of(data={"domains": domains}, baselines=["dense", "sparse_upcycling_dm"])
    assert recipe.expert_stages == EXPERTS
    assert recipe.expert_names == ["a", "b", "seed"]
    assert recipe.domain_names == ["a", "b", "c"]
    for stage in ("seed", "finetune", "dense", "sparse_upcycling_dm"):
        assert stage_blend(recipe, stage) == {"a": 1.0, "b": 1.0, "c": 1.0}
    assert stage_tokens(recipe, "dense") == 3 * 10 * 4 * 256
    for mistake, message in [
        ({"stages": {"experts": {"c": {}}}}, "stages.experts.c: no expert of that name; there are a, b"),
        ({"data": {"domains": [domains[2]]}}, "data.domains: none has an expert"),
    ]:
        with pytest.raises(UserError, match=message):
            recipe_of(**{"data": {"domains": domains}, **mistake})


def timoe(domains: dict[str, tuple[int, bool]], blends: dict[str, dict[str, float]]) -> None:
    """Check a recipe: domain -> year, and whether it has an expert; stage -> blend."""
    named = [
        {"name": name, "start": year, "end": year + 1, "expert": expert, "sources": [{"path": name}]}
        for name, (year, expert) in domains.items()
    ]
    experts = {name: {"blend": blend} for name, blend in blends.items() if name != "seed"}
    stages = {"seed": {"blend": blends["seed"]}, "experts": experts}
    training = {"train_iters": 10, "lr_warmup_iters": 0, "global_batch_size": 4}
    tree = {
        "method": "timoe",
        "data": {"domains": named},
        "training": training,
        "stages": stages,
        "baselines": [],
    }
    check_recipe(parse_recipe(tree | {"mix": {"include_seed": False}}), "recipe.yaml")


@pytest.mark.parametrize(
    ("domains", "blends", "message"),
    [
        (
            {"a": (1900, True), "b": (1950, True)},
            {"seed": {"a": 1, "b": 1}},
            "stages.seed.blend: 'b' ends after 'a', whose queries must not know it",
        ),
        (
            {"a": (1900, False), "b": (1950, True)},
            {"seed": {"a": 1}},
            "data.domains.a: ends before 'b', the first that has an expert: nobody could answer its queries",
        ),
        (
            {"a": (1900, True), "b": (1950, True)},
            {"seed": {"a": 1}, "a": {"a": 1, "b": 1}},
            "stages.experts.a.blend: 'b' ends after 'a', whose queries must not know it; leave it out",
        ),
    ],
)
def test_no_later_text_has_a_part_in_an_answer(
    domains: dict[str, tuple[int, bool]], blends: dict[str, dict[str, float]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        timoe(domains, blends)


def test_earlier_text_may_have_a_part_in_an_answer() -> None:
    timoe(
        {"a": (1900, True), "b": (1950, True), "c": (1990, False)}, {"seed": {"a": 1}, "b": {"a": 1, "b": 1}}
    )
